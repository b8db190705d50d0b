"""Pictures of a run (--output_dir): curves.png from its TensorBoard files, retrieval.png and attributes.png from its results.

Pictures of what a model sees (--checkpoint): heat maps of its decision on an image and a text (Figures 4 to 6 of the paper),
and with --pseudo_targets the words and texts that the momentum model proposes (Figure 2).
"""

from configs.flags import Flags
from utils import begin_script, run_script

flags = Flags(__doc__, '--checkpoint refcoco.pth --image photo.jpg --text "a man with a hat"')
flags.add_argument("--output_dir", help="the folder of a run, whose curves and rankings to draw")
flags.add_argument("--queries", type=int, default=5, help="queries of each direction in retrieval.png, or boxes in attributes.png")
flags.add_argument("--checkpoint", help="the weights to explain, of any task")
flags.add_argument("--image", nargs="+", help="an image file, two for NLVR2 and text assignment")
flags.add_argument("--text", help="the text to explain, or the caption of --pseudo_targets")
flags.add_argument("--question", help="for VQA, in place of --text")
flags.add_argument("--answer", help="explain this answer; else the best of the answer list, else a generated one")
flags.add_argument("--gradcam_mode", choices=["itm", "itc"], default="itm",
                   help="itm: cross-attention, a map for each word; itc: the image encoder's self-attention")  # fmt: skip
flags.add_argument("--block_num", type=int, help="the layer, counted from 0: by default the third with cross-attention "
                   "(8 of 12) but never the last, for itc the last of the image encoder")  # fmt: skip
flags.add_argument("--pseudo_targets", action="store_true", help="the momentum model's words and texts for an image")
flags.add_argument("--texts", help="texts to choose from: one a line, or a JSON list with captions; test_file by default")
flags.add_argument("--to", help="the picture to write: heatmap.png or pseudo_targets.png by default")
flags.add_argument("--config", help="for a checkpoint without one: the YAML file it was trained with")
flags.add_set()
flags.add_argument("--allow_missing", action="store_true", help="weights missing in --checkpoint stay random")
flags.add_argument("--device", help="cuda, cuda:1, ... or cpu; by default cuda where there is a GPU")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
from pathlib import Path

import torch

from configs.schema import require
from dataset.annotations import check_entry, read_json_list
from dataset.caption import Captioned
from dataset.images import load_image
from dataset.text import MAX_QUESTION_WORDS, MAX_WORDS, pre_caption, pre_question
from dataset.transforms import normalize, test_transform
from dataset.vqa import load_answer_list
from engine.configuration import choose_config
from engine.curves import read_curves
from engine.processes import init_process_group
from models import build_model, task_of
from models.checkpoint import load_checkpoint, named_tensors, read_checkpoint
from models.tokenizer import tokenizer_of
from utils import InputError
from visualize.draw import TITLES, draw_attributes, draw_curves, draw_heat_maps, draw_pseudo_targets, draw_retrieval
from visualize.explain import (
    UNKNOWN, explain_answer, explain_class, explain_similarity, split_words, text_targets, word_targets,
)  # fmt: skip


def picture_run(folder, queries):
    """Draw curves.png, retrieval.png and attributes.png of a run, as far as it has what they show."""
    tensorboard, draws = folder / "tensorboard", {"retrieval": draw_retrieval, "attributes": draw_attributes}
    results = {folder / f"result/{name}.json": draw for name, draw in draws.items()}
    if not (tensorboard.is_dir() or any(result.exists() for result in results)):
        raise InputError(f"--output_dir {folder}: no run there, it has neither tensorboard nor result/{{{','.join(draws)}}}.json")
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
                draw(json.loads(result.read_text()), picture, queries)
            except OSError as error:
                raise InputError(f"{result}: image {error}") from None
            print(f"wrote {picture}")


def check_flags(args, task, state):
    """Raise InputError where the flags do not fit the task of the checkpoint, before anything slow."""
    count = 2 if task in ("nlvr", "nlvr_pretrain") else 1
    wanted, other = ("question", "text") if task == "vqa" else ("text", "question")
    momentum = any(name.startswith("text_encoder_m.") for name in state)
    for wrong, flag, reason in (
        (len(args.image) != count, "--image", f"takes {count} image{'s' * (count - 1)}; {len(args.image)} given"),
        (args.pseudo_targets and task != "pretrain", "--pseudo_targets",
         "has no momentum model of words; pass one of pre-training"),
        (args.pseudo_targets and not momentum, "--pseudo_targets",
         "has no momentum model (text_encoder_m.*); pass one with it"),
        (getattr(args, other) is not None, f"--{other}", f"takes no {other}; pass --{wanted} instead"),
        (getattr(args, wanted) is None, f"--{wanted} is missing", f"takes a {wanted}"),
        (args.answer and task != "vqa", "--answer", "has no answers; only VQA has"),
        (args.gradcam_mode == "itc" and task not in ("pretrain", "retrieval"), "--gradcam_mode itc",
         "has no contrastive similarity; only pre-training and retrieval have"),
    ):  # fmt: skip
        if wrong:
            raise InputError(f"{flag}: checkpoint {args.checkpoint} is of task {task}, which {reason}")


def load_model(args):
    """Return the task, the model in eval mode on --device, and the tokenizer of --checkpoint."""
    device = init_process_group(args.device)
    file = read_checkpoint(args.checkpoint)
    state = named_tensors(file, args.checkpoint)
    task = task_of(state)
    check_flags(args, task, state)
    del file, state  # load_checkpoint reads the file again
    config, _, text = choose_config(task, args, args.checkpoint)
    print(f"configuration: {text}")
    require(config, "bert_config", "image_res")
    tokenizer = tokenizer_of(config)
    model = build_model(task, config, tokenizer)
    print(load_checkpoint(model, args.checkpoint, args.allow_missing, complete=True))
    return task, model.to(device).eval(), tokenizer


def read_texts(path):
    """Read the texts of a file, cleaned up, each once: captions of a JSON list, else the lines."""
    if Path(path).suffix == ".json":
        texts = [text for number, entry in read_json_list(path) for text in check_entry(entry, Captioned, path, number).texts]
    else:
        try:
            texts = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--texts {path}: cannot be read as text, one per line: {error}") from None
    return [text for text in dict.fromkeys(pre_caption(text, MAX_WORDS) for text in texts) if text]


def candidate_texts(args, config):
    """Return the texts to compare an image with: of --texts, else of test_file where it exists, else none."""
    files = [args.texts] if args.texts else [path for path in config["test_file"] or [] if Path(path).is_file()]
    if not files:
        print("note: no texts to compare with, as --texts is not given and the checkpoint's test_file is out of reach")
    texts = list(dict.fromkeys(text for path in files for text in read_texts(path)))
    if args.texts and not texts:
        raise InputError(f"--texts {args.texts}: no text in it")
    return texts


def candidate_answers(args, config):
    """Return the answers to choose from: --answer, else those of answer_list where it exists, else none."""
    if args.answer:
        return [args.answer]
    path = config["answer_list"]
    if path and Path(path).is_file():
        return load_answer_list(path)
    print("note: the answer is generated, as --answer is not given and the checkpoint's answer_list is out of reach")
    return []


def read_phrase(args, model, tokenizer):
    """Return --text or --question as the model reads it, and lines on the words that the vocabulary lacks, if any.

    Raises InputError where clean-up leaves nothing of it.
    """
    text = pre_caption(args.text, MAX_WORDS) if args.text is not None else pre_question(args.question, MAX_QUESTION_WORDS)
    phrase = split_words(text, model, tokenizer)
    if not phrase.words:
        given = f"--text {args.text!r}" if args.text is not None else f"--question {args.question!r}"
        raise InputError(f"{given}: nothing is left of it after clean-up, give a text with words")
    lacking = ", ".join(word.removesuffix(UNKNOWN) for word in phrase.words if word.endswith(UNKNOWN))
    return phrase, [f"not in the vocabulary, all the same to the model: {lacking}"] if lacking else []


def picture_heat_maps(args, images, image, task, model, tokenizer):
    """Draw the heat maps of a decision. images: uint8 [H, W, 3] each; image [I, 3, R, R]: as the model takes them."""
    phrase, unknown = read_phrase(args, model, tokenizer)
    if args.gradcam_mode == "itc":
        maps = explain_similarity(model, image, phrase, args.block_num)
    elif task == "vqa":
        maps = explain_answer(model, image, phrase, candidate_answers(args, model.config), tokenizer, args.block_num)
    else:
        maps = explain_class(task, model, image, phrase, args.block_num)
    panels = [(f"whole {'question' if task == 'vqa' else 'text'}", maps.whole.cpu().numpy())]
    panels += zip(phrase.words, maps.by_word.cpu().numpy().swapaxes(0, 1))
    draw_heat_maps(images, panels, [phrase.text.strip(), maps.verdict, *unknown], args.to)


def picture_pseudo_targets(args, images, image, model, tokenizer):
    """Draw the momentum model's words and texts for an image and its caption. Arguments as in picture_heat_maps."""
    phrase, unknown = read_phrase(args, model, tokenizer)
    texts = candidate_texts(args, model.config)
    with torch.no_grad():
        image_embeds, image_feat = model.encode_image(image, momentum=True)
    words = list(zip(phrase.words, word_targets(model, image_embeds, phrase, tokenizer)))
    best = text_targets(model, image_feat, texts, phrase.text, tokenizer) if texts else []
    title = [f"caption: {phrase.text}", *unknown, "what the momentum model expects in place of each word:"]
    draw_pseudo_targets(images[0], words, best, title, f"the most similar of {len(texts)} texts:", args.to)


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
    task, model, tokenizer = load_model(args)
    resize = test_transform(model.config["image_res"])
    image = normalize(torch.stack([resize(picture) for picture in images])).to(next(model.parameters()).device)
    images = [picture.permute(1, 2, 0).numpy() for picture in images]
    if args.pseudo_targets:
        picture_pseudo_targets(args, images, image, model, tokenizer)
    else:
        picture_heat_maps(args, images, image, task, model, tokenizer)
    print(f"wrote {args.to}")


def main():
    args = flags.parse_args()
    if bool(args.output_dir) == bool(args.checkpoint):
        raise InputError("name either --output_dir, a run to draw, or --checkpoint, a model to explain")
    if args.output_dir:
        picture_run(Path(args.output_dir), args.queries)
    else:
        picture_model(args)


if __name__ == "__main__":
    run_script(main)
