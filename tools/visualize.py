"""Draw the curves and results of a run, or explain a model's decision on an image.

--run draws curves.png from the TensorBoard files, and retrieval.png or attributes.png from the
results. --run with --caption draws query.png: a caption of the test set and its five best images.

--checkpoint draws heat maps of the model's decision on an image and a text (Figures 4 to 6 of the
paper). --checkpoint with --pseudo_targets draws the words and texts that the momentum model
proposes (Figure 2 of the paper).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from configs.cli import Parser, at_least
from engine.launch import run_script
from utils import InputError, permitted

parser = Parser(
    __doc__, '--checkpoint weights/refcoco.pth --image photo.jpg --text "a man with a hat"'
)
parser.add_argument("--run", metavar="DIR", help="folder of a run to draw")
parser.add_argument(
    "--queries",
    type=at_least(1),
    default=5,
    help="number of queries in retrieval.png and of boxes in attributes.png",
)
parser.add_argument(
    "--caption", metavar="TEXT", help="caption to draw in query.png, from the test set of --run"
)
parser.add_argument(
    "--checkpoint",
    metavar="SOURCE",
    help="model of any task: weight file, folder of a run, or hub repository USER/NAME[@REVISION]",
)
parser.add_argument(
    "--image",
    nargs="+",
    metavar="FILE",
    help="image to explain; NLVR2 and text assignment need two",
)
parser.add_argument(
    "--text", "--question", help='text, caption or question; for relevance "QUERY [SEP] WORDS"'
)
parser.add_argument(
    "--answer",
    help="answer to explain (default: the best answer of answer_list; without answer_list, a"
    " generated answer)",
)
parser.add_argument(
    "--gradcam_mode",
    choices=["itm", "itc"],
    default="itm",
    help="attention that the heat maps show. itm: cross-attention, with a map for each word; itc:"
    " self-attention of the image encoder, without maps of words",
)
parser.add_argument(
    "--block_num",
    type=int,
    help="number of the layer, from 0. itm: of a multimodal layer of BERT, 6 to 11 in the released"
    " models (default: the third, or the last but one of at most three). itc: of a layer of the ViT"
    " (default: the last)",
)
parser.add_argument(
    "--pseudo_targets", action="store_true", help="draw the proposals of the momentum model"
)
parser.add_argument(
    "--texts",
    metavar="FILE",
    help="file of texts that --pseudo_targets compares with the image: a text in each line, or a"
    " JSON list with captions (default: the key test_file)",
)
parser.add_argument(
    "--output",
    type=Path,
    metavar="PATH",
    help="file to write (default: heatmap.png or pseudo_targets.png). With --run, it is the folder"
    " to write to (default: the folder of the run)",
)
parser.add_argument(
    "--config", metavar="FILE", help="YAML file of the training, for a checkpoint without one"
)
parser.add_set()
parser.add_argument(
    "--allow_missing",
    action="store_true",
    help="keep initial weights for tensors that --checkpoint lacks",
)
parser.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")


@permitted()
def draw_run(folder: Path, output: Path, queries: int) -> None:
    """Draw curves.png, retrieval.png and attributes.png of a run, each if the run has its data."""
    from visualize.curves import read_curves
    from visualize.draw import TITLES, draw_attributes, draw_curves, draw_retrieval

    tensorboard = folder / "tensorboard"
    results = {"retrieval": draw_retrieval, "attributes": draw_attributes}
    results = {folder / f"result/{name}.json": draw for name, draw in results.items()}
    results = {path: draw for path, draw in results.items() if path.exists()}
    if not (tensorboard.is_dir() or results):
        raise InputError(
            f"--run {folder}: the folder has neither tensorboard/ nor a result to draw; name the"
            " folder of a run"
        )
    if tensorboard.is_dir():
        curves = read_curves(tensorboard)
        if not TITLES.keys() & curves.keys():
            raise InputError(f"{tensorboard}: no curves yet; train first")
        draw_curves(curves, output / "curves.png")
        print(f"wrote {output / 'curves.png'}")
    for path, draw in results.items():
        draw_result(path, output / f"{path.stem}.png", draw, queries)


def draw_caption(folder: Path, output: Path, caption: str) -> None:
    """Draw query.png of a run: a caption of its test set with the best images."""
    from visualize.draw import draw_query

    def draw(rankings: Any, picture: Path, _: int) -> None:
        queries = {query["caption"]: query for query in rankings["text_to_image"]}
        if caption not in queries:
            raise InputError(
                f"--caption: the test set of {folder} has no such caption; name one of its"
                f' captions, such as "{next(iter(queries))}"'
            )
        draw_query(rankings, queries[caption], picture)

    draw_result(folder / "result/retrieval.json", output / "query.png", draw, 1)


def draw_result(result: Path, picture: Path, draw: Any, queries: int) -> None:
    """Draw a result of an evaluation. Raises InputError if the file is not one."""
    import json

    from dataset.images import ImageError
    from utils import read_regular

    try:
        draw(json.loads(read_regular(result)), picture, queries)
    except ImageError as error:
        raise InputError(f"{result}: image {error}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{result}: not the result of an evaluation ({what}); evaluate again"
        ) from None
    print(f"wrote {picture}")


def read_texts(path: str | Path, max_words: int) -> list[str]:
    """Return distinct cleaned-up texts: captions of a JSON list, else lines. Raises InputError."""
    from dataset.caption import Captioned
    from dataset.entries import read_entries
    from dataset.text import pre_caption
    from utils import read_regular

    if Path(path).suffix == ".json":
        texts = [text for entry in read_entries(path, Captioned) for text in entry.texts]
    else:
        try:
            texts = read_regular(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--texts {path}: cannot be read as text ({error}); name a text file"
            ) from None
    return [text for text in dict.fromkeys(pre_caption(text, max_words) for text in texts) if text]


def draw_pseudo_targets(args: argparse.Namespace, model: Any) -> None:
    """Draw the momentum model's words and texts for an image and its caption."""
    import torch

    from dataset.text import MAX_WORDS, pre_caption
    from dataset.transforms import normalize
    from inference.inputs import read_image
    from visualize import draw
    from visualize.explain import text_targets, unknown_words

    picture = read_image(args.image[0], exif=model.config.exif)
    max_words = model.config.max_words or MAX_WORDS
    words = model.fill_in(picture, args.text)
    files = [path for path in model.config.test_file or [] if os.path.isfile(path)]
    files = [args.texts] if args.texts else files
    texts = [text for path in files for text in read_texts(path, max_words)]
    texts, caption, best = list(dict.fromkeys(texts)), pre_caption(args.text, max_words), []
    if texts:
        image = normalize(model.transform(picture)[None].to(model.device))
        with torch.no_grad():
            _, image_feat = model.model.encode_image(image, momentum=True)
        best = text_targets(model.model, image_feat, texts, caption, model.tokenizer)
    elif args.texts:
        raise InputError(f"--texts {args.texts}: the file has no text; name another file")
    else:
        print(
            "note: test_file is missing, so no texts are ranked; add --texts FILE to choose texts",
            file=sys.stderr,
        )
    title = [f"caption: {caption}", *unknown_words(word for word, _ in words)]
    title.append("words that the momentum model expects in place of each word:")
    texts_title = (
        f"the most similar of {len(texts)} texts, with softmax over all of these texts (ITC):"
    )
    image = picture.permute(1, 2, 0).numpy()
    draw.draw_pseudo_targets(image, words, best, title, texts_title, args.output)


def draw_heat_map(args: argparse.Namespace, model: Any) -> None:
    """Draw the heat maps of a model's decision on one or two images."""
    from dataset.vqa import reachable_answers

    answers = [args.answer] if args.answer else None
    if model.can("answer"):
        answers = answers or reachable_answers(model.config)
        if not answers:
            print(
                "note: answer_list is missing, so the model generates the answer; add --answer TEXT"
                " to choose one",
                file=sys.stderr,
            )
    elif answers:
        raise InputError(
            f"--answer: task {model.task} has no answers, only VQA has them; leave it out"
        )
    images = args.image if len(args.image) == 2 else args.image[0]
    options = {"mode": args.gradcam_mode, "block_num": args.block_num}
    model.heat_map(images, args.text, answers, **options).draw(args.output)


def draw_model(args: argparse.Namespace) -> None:
    """Draw heat maps or pseudo-targets of a checkpoint. Raises InputError."""
    from engine.output_dir import check_output

    name = "pseudo_targets.png" if args.pseudo_targets else "heatmap.png"
    args.output = args.output or Path(name)
    if args.output.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise InputError(
            f"--output {args.output}: not a picture; end the name in .png, .jpg, .pdf or .svg"
        )
    check_output(args.output)
    if not args.image or args.text is None:
        raise InputError("--image or --text is missing; name an image and a text")
    from configs.tasks import find_task
    from inference import load_model

    model = load_model(
        args.checkpoint, args.device, None, args.config, args.set, allow_missing=args.allow_missing
    )
    print(model.report, file=sys.stderr)
    count = 2 if "pairs" in find_task(model.task).traits else 1
    if len(args.image) != count:
        raise InputError(
            f"--image: task {model.task} takes {count} {'images' if count > 1 else 'image'}, not"
            f" {len(args.image)}"
        )
    if args.pseudo_targets:
        draw_pseudo_targets(args, model)
    else:
        draw_heat_map(args, model)
    print(f"wrote {args.output}")


def main() -> None:
    """Draw a run, or explain a model, as the command line says."""
    args = parser.parse_args()
    if bool(args.run) == bool(args.checkpoint):
        raise InputError("pass either --run to draw a run, or --checkpoint to explain a model")
    folder = Path(args.run) if args.run else None
    if folder and args.caption is not None:
        draw_caption(folder, args.output or folder, args.caption)
    elif folder:
        draw_run(folder, args.output or folder, args.queries)
    else:
        draw_model(args)


if __name__ == "__main__":
    run_script(main)
