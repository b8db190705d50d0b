"""Pictures of a run (--output_dir): curves.png of its TensorBoard files, retrieval.png and
attributes.png of its results.

Pictures of what a model sees (--checkpoint): heat maps of its decision on an image and a text
(Figures 4 to 6 of the paper), and with --pseudo_targets the words and texts that the momentum model
proposes (Figure 2).
"""

from configs.flags import Flags, at_least
from utils import begin_script, run_script

flags = Flags(__doc__, '--checkpoint refcoco.pth --image photo.jpg --text "a man with a hat"')
flags.add_argument("--output_dir", help="the folder of a run, whose curves and rankings to draw")
flags.add_argument(
    "--queries",
    type=at_least(1),
    default=5,
    help="queries of each direction in retrieval.png, boxes in attributes.png",
)
flags.add_argument("--checkpoint", help="the weights to explain, of any task")
flags.add_argument("--image", nargs="+", help="an image file, two for NLVR2 and text assignment")
flags.add_argument(
    "--text",
    help="the text to explain, of relevance QUERY [SEP] WORDS, or the caption of --pseudo_targets",
)
flags.add_argument("--question", help="for VQA, in place of --text")
flags.add_argument(
    "--answer", help="explain this answer; else the best of the answer list, else a generated one"
)
flags.add_argument(
    "--gradcam_mode",
    choices=["itm", "itc"],
    default="itm",
    help="itm: cross-attention, a map for each word; itc: the image encoder's self-attention",
)
flags.add_argument(
    "--block_num",
    type=int,
    help="the layer, counted from 0: by default the third with cross-attention "
    "(8 of 12) but never the last, for itc the last of the image encoder",
)
flags.add_argument(
    "--pseudo_targets",
    action="store_true",
    help="the momentum model's words and texts for an image",
)
flags.add_argument(
    "--texts",
    help="texts to choose from: one a line, or a JSON list with captions; test_file by default",
)
flags.add_argument(
    "--to", help="the picture to write: heatmap.png or pseudo_targets.png by default"
)
flags.add_argument(
    "--config", help="for a checkpoint without one: the YAML file it was trained with"
)
flags.add_set()
flags.add_argument(
    "--allow_missing", action="store_true", help="weights missing in --checkpoint stay random"
)
flags.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if there is a GPU)")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
from pathlib import Path

import torch

from dataset.caption import Captioned
from dataset.entries import read_entries
from dataset.images import ImageError, load_image
from dataset.text import MAX_WORDS, is_blank, pre_caption
from dataset.transforms import normalize
from dataset.vqa import reachable_answers
from engine.configuration import choose_config
from engine.curves import read_curves
from engine.processes import init_process_group
from inference import Inference
from models import ALIGNED, task_of
from models.weights import named_tensors, read_checkpoint
from utils import InputError, read_regular
from visualize.draw import TITLES, draw_attributes, draw_curves, draw_pseudo_targets, draw_retrieval
from visualize.explain import text_targets, unknown_words


def picture_run(folder, queries):
    """Draw curves.png, retrieval.png and attributes.png of a run, each if the run has its data."""
    tensorboard, draws = (
        folder / "tensorboard",
        {"retrieval": draw_retrieval, "attributes": draw_attributes},
    )
    results = {folder / f"result/{name}.json": draw for name, draw in draws.items()}
    if not (tensorboard.is_dir() or any(result.exists() for result in results)):
        raise InputError(
            f"--output_dir {folder}: no run there, it lacks tensorboard and {' or '.join(map(str, results))}"
        )
    if tensorboard.is_dir():
        curves = read_curves(tensorboard)
        if not TITLES.keys() & curves.keys():
            raise InputError(f"{tensorboard}: no curves there yet, train first")
        draw_curves(curves, folder / "curves.png")
        print(f"wrote {folder / 'curves.png'}")
    for result, draw in results.items():
        if result.exists():
            picture = folder / f"{result.stem}.png"
            try:
                draw(json.loads(read_regular(result)), picture, queries)
            except InputError:
                raise
            except ImageError as error:
                raise InputError(f"{result}: image {error}") from None
            except (OSError, ValueError, LookupError, TypeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise InputError(
                    f"{result}: not what an evaluation writes ({what}): evaluate again"
                ) from None
            print(f"wrote {picture}")


def check_flags(args, task, state):
    """Raise InputError where the flags do not fit the task of the checkpoint, before anything slow."""
    count = 2 if task in ("nlvr", "nlvr_pretrain") else 1
    wanted, other = ("question", "text") if task == "vqa" else ("text", "question")
    momentum = any(name.startswith("text_encoder_m.") for name in state)
    for wrong, flag, reason in (
        (
            len(args.image) != count,
            "--image",
            f"takes {count} image{'s' * (count - 1)}; {len(args.image)} given",
        ),
        (
            args.pseudo_targets and task != "pretrain",
            "--pseudo_targets",
            "has no momentum model of words; pass one of pre-training",
        ),
        (
            args.pseudo_targets and not momentum,
            "--pseudo_targets",
            "has no momentum model (text_encoder_m.*); pass one with it",
        ),
        (
            getattr(args, other) is not None,
            f"--{other}",
            f"takes no {other}; pass --{wanted} instead",
        ),
        (getattr(args, wanted) is None, f"--{wanted} is missing", f"takes a {wanted}"),
        (args.answer and task != "vqa", "--answer", "has no answers; only VQA has"),
        (
            args.gradcam_mode == "itc" and task not in ALIGNED,
            "--gradcam_mode itc",
            "has no contrastive similarity; only pre-training and retrieval have",
        ),
    ):
        if wrong:
            raise InputError(
                f"{flag}: checkpoint {args.checkpoint} is of task {task}, which {reason}"
            )
    given = getattr(args, wanted)
    if is_blank(pre_caption(given, MAX_WORDS)):
        raise InputError(
            f"--{wanted} {given!r}: nothing is left of it after clean-up, give a text with words"
        )


def load(args):
    """Return the Inference model of --checkpoint on --device.

    Raises InputError for flags that do not fit its task.
    """
    device = init_process_group(args.device)
    file = read_checkpoint(args.checkpoint)
    state = named_tensors(file, args.checkpoint)
    task = task_of(state)
    check_flags(args, task, state)
    del file, state  # load_checkpoint reads the file again
    config, _, text = choose_config(task, args, args.checkpoint)
    print(f"configuration: {text}")
    model = Inference(task, config, args.checkpoint, device, allow_missing=args.allow_missing)
    print(model.report)
    return model


def read_texts(path, max_words):
    """Read the texts of a file, cleaned up, each once: captions of a JSON list, else the lines."""
    if Path(path).suffix == ".json":
        texts = [text for entry in read_entries(path, Captioned) for text in entry.texts]
    else:
        try:
            texts = read_regular(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--texts {path}: cannot be read as text, one per line: {error}"
            ) from None
    return [text for text in dict.fromkeys(pre_caption(text, max_words) for text in texts) if text]


def candidate_texts(args, config):
    """Return the texts to compare an image with: from --texts, else from test_file if it exists,
    else none.
    """
    files = (
        [args.texts]
        if args.texts
        else [path for path in config["test_file"] or [] if Path(path).is_file()]
    )
    if not files:
        print(
            "note: no texts to compare with, as --texts is not given and the checkpoint's test_file is out of reach"
        )
    texts = list(
        dict.fromkeys(
            text for path in files for text in read_texts(path, config["max_words"] or MAX_WORDS)
        )
    )
    if args.texts and not texts:
        raise InputError(f"--texts {args.texts}: no text in it")
    return texts


def candidate_answers(args, config):
    """Return the answers to choose from: --answer, else answer_list if it exists, else none."""
    if args.answer:
        return [args.answer]
    answers = reachable_answers(config)
    if not answers:
        print(
            "note: the answer is generated, as --answer is not given and the checkpoint's answer_list is out of reach"
        )
    return answers


def picture_pseudo_targets(args, picture, model):
    """Draw the momentum model's words and texts for an image, uint8 [3, H, W], and its caption."""
    words, texts = model.fill_in(picture, args.text), candidate_texts(args, model.config)
    caption, best = pre_caption(args.text, model.config["max_words"] or MAX_WORDS), []
    if texts:
        with torch.no_grad():
            _, image_feat = model.model.encode_image(
                normalize(model.transform(picture)[None].to(model.device)), momentum=True
            )
        best = text_targets(model.model, image_feat, texts, caption, model.tokenizer)
    title = [f"caption: {caption}", *unknown_words(word for word, _ in words)]
    title.append("what the momentum model expects in place of each word:")
    image = picture.permute(1, 2, 0).numpy()
    draw_pseudo_targets(
        image, words, best, title, f"the most similar of {len(texts)} texts:", args.to
    )


def picture_model(args):
    """Draw what a checkpoint makes of an image and a text."""
    args.to = Path(args.to or ("pseudo_targets.png" if args.pseudo_targets else "heatmap.png"))
    if args.to.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise InputError(f"--to {args.to}: the name of a picture ends in .png, .jpg, .pdf or .svg")
    if args.to.is_dir() or not os.access(args.to.parent, os.W_OK):
        raise InputError(f"--to {args.to}: cannot write there, name a file in a folder that exists")
    if not args.image:
        raise InputError("--image is missing: name the image to explain")
    try:
        images = [load_image(path) for path in args.image]
    except OSError as error:
        raise InputError(f"--image: {error}") from None
    model = load(args)
    if args.pseudo_targets:
        picture_pseudo_targets(args, images[0], model)
    else:
        answers = candidate_answers(args, model.config) if model.task == "vqa" else None
        images, text = (
            images if len(images) == 2 else images[0],
            args.question if model.task == "vqa" else args.text,
        )
        model.heat_map(
            images, text, answers, mode=args.gradcam_mode, block_num=args.block_num
        ).draw(args.to)
    print(f"wrote {args.to}")


def main():
    args = flags.parse_args()
    if bool(args.output_dir) == bool(args.checkpoint):
        raise InputError(
            "name either --output_dir, a run to draw, or --checkpoint, a model to explain"
        )
    if args.output_dir:
        picture_run(Path(args.output_dir), args.queries)
    else:
        picture_model(args)


if __name__ == "__main__":
    run_script(main)
