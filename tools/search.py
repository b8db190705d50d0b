"""Search folders of images by a text or an example, and list near-copies.

The command `index` adds the images of folders to an index, and embeds changed images again. The
commands `query` and `duplicates` read the index. Results go to standard output, and notes go to
standard error.
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from configs.cli import Parser, at_least
from engine.launch import interruptible, run_script
from utils import InputError, percent, printable

parser = Parser(__doc__, "index photos --checkpoint weights/flickr30k.pth --output output/photos")
index = parser.add_command(
    "index",
    "Embed the images of folders and add them to an index.",
    "photos --checkpoint weights/flickr30k.pth --output output/photos",
)
index.add_argument(
    "folders", nargs="+", metavar="FOLDER", help="folder of images; subfolders are included"
)
index.add_argument(
    "--prune", action="store_true", help="remove images from the index if they are in no FOLDER"
)
index.add_argument(
    "--checkpoint",
    required=True,
    metavar="SOURCE",
    help="checkpoint of pre-training, retrieval or grounding: weight file, folder of a run, or hub"
    " repository USER/NAME[@REVISION]",
)
index.add_argument("--output", required=True, metavar="INDEX", help="folder of the index")
index.add_argument(
    "--config", metavar="FILE", help="YAML file of the training, for a checkpoint without one"
)
index.add_set()
query = parser.add_command(
    "query",
    "Print the images that fit a text or an example best, with scores.",
    'output/photos "two dogs in the snow" --html dogs.html',
)
query.add_argument("index", metavar="INDEX", help="folder of the index")
query.add_argument("text", nargs="?", metavar="TEXT", help="description of the images")
query.add_argument(
    "--image",
    metavar="FILE",
    help="example image. With TEXT, search for images that are similar to both",
)
query.add_argument("--queries", metavar="FILE", help="file that has a TEXT in each line")
query.add_argument("-k", type=at_least(1), default=20, help="number of images to print")
query.add_argument(
    "--rerank",
    type=at_least(0),
    metavar="N",
    help="number of most similar images to re-rank by ITM (default: the key k_test, but 0 if ITC"
    " ranked better in the checkpoint's validation)",
)
query.add_argument(
    "--threshold",
    type=float,
    help="print only images whose probability is at least this. It is the probability by ITM, or by"
    " ITC if no image is re-ranked",
)
query.add_argument(
    "--checkpoint", metavar="SOURCE", help="new path of the checkpoint, if it has moved"
)
copies = parser.add_command(
    "duplicates",
    "List groups of images that look nearly alike.",
    "output/photos --html copies.html",
)
copies.add_argument("index", metavar="INDEX", help="folder of the index")
copies.add_argument(
    "--threshold",
    type=float,
    default=0.75,
    help="smallest share of equal bits in the hashes of near-copies, above 0.5 and at most 1",
)
for command in (index, query, copies):
    command.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")
for command, line in ((query, "an object for each image"), (copies, "a list for each group")):
    command.add_argument("--json", action="store_true", help=f"print JSON lines, {line}")
    command.add_argument("--html", metavar="PAGE", help="also write an HTML page with thumbnails")


def show(path: str) -> str:
    """Return a printable path, relative if it is below the working directory."""
    return printable(path.removeprefix(os.path.join(os.getcwd(), "")))


def note(text: str) -> None:
    """Print a note to standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ending_in_silence() -> Iterator[None]:
    """End the block without a message if a reader such as head has closed the output."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # otherwise Python reports the error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_index(args: argparse.Namespace) -> None:
    """Create or update an index, and print the number of images."""
    from inference import load_model
    from inference.index import count_suffixes, find_images, open_index, update_index

    images, problems, others = find_images(args.folders)
    before = open_index(args.output)
    model = load_model(args.checkpoint, args.device, config=args.config, overrides=args.set)
    with interruptible(
        f"{args.output} keeps the images embedded so far; repeat the command to continue"
    ):
        changes = update_index(args.output, before, model, images, prune=args.prune)
    if others:
        note(f"left out files without an image suffix: {count_suffixes(others)}")
    for path, problem in sorted([*problems, *changes.unusable]):
        note(f"left out {show(path)}: {problem}")
    print(
        f"{args.output}: {changes.kept + changes.embedded} images, {changes.kept} unchanged,"
        f" {changes.embedded} embedded, {changes.removed} removed; exif: {model.config.exif}"
    )


def open_for_reading(folder: str) -> Any:
    """Read an index and note if it is incomplete. Raises InputError."""
    from inference.index import read_index

    found = read_index(folder)
    if found.left:
        note(f"note: {folder} is incomplete, {found.left} images are not indexed yet")
    return found


def read_queries(args: argparse.Namespace) -> list[str | None]:
    """Return the texts to search for, [None] for an example alone. Raises InputError."""
    from utils import read_regular

    if not args.queries:
        return [args.text]
    if args.text is not None or args.html:
        raise InputError("--queries takes neither TEXT nor --html; leave them out")
    try:
        lines = read_regular(args.queries).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--queries {args.queries}: cannot be read ({error}); name a text file"
        ) from None
    return [line for line in lines if line.strip()]


def answer_queries(args: argparse.Namespace) -> None:
    """Print the images that fit best, and write the page."""
    from engine.output_dir import check_output
    from inference.index import describe_scores, load_model_of, search
    from inference.inputs import UnknownWords
    from visualize.page import Picture, write_page

    texts = read_queries(args)
    if args.html:
        check_output(args.html, "--html")
    index = open_for_reading(args.index)
    model = load_model_of(index, args.index, args.device, args.checkpoint)
    note(f"{args.index}: {len(index.rows)} images, exif: {model.config.exif}")
    options = {"k": args.k, "rerank": args.rerank, "threshold": args.threshold}
    for number, text in enumerate(texts):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UnknownWords)
            hits = search(index, model, text, args.image, **options)
        for warning in caught:
            note(f"note: {warning.message}")
        about = describe_scores(model, hits, len(index.rows))
        if args.html:
            pictures = [Picture(hit.path, caption(hit)) for hit in hits]
            rows = {f"{len(hits)} images": pictures}
            write_page(args.html, text or show(args.image), about, rows, args.image)
            note(f"wrote {args.html}")
        if not (number or args.json):
            note("\n".join([*about, "     ITM       ITC  image"]))
        print_hits(args, text, hits)


def scores(hit: Any) -> tuple[str, str]:
    """Return the probabilities of a hit by ITM and by ITC; a dash if it was not re-ranked."""
    return "-" if hit.match is None else percent(hit.match), percent(hit.itc)


def caption(hit: Any) -> str:
    """Return the caption of a hit on the page."""
    match, itc = scores(hit)
    return f"ITC {itc}" if hit.match is None else f"ITM {match}, ITC {itc}"


def print_hits(args: argparse.Namespace, text: str | None, hits: list) -> None:
    """Print the hits of a query."""
    if text and args.queries and not args.json:
        print(f"{printable(text)}:")
    for rank, hit in enumerate(hits, 1):
        if args.json:
            about = {"query": text, "image": args.image, "rank": rank}
            print(json.dumps({**about, **hit._asdict()}))
        else:
            print("{:>8}{:>10}  {}".format(*scores(hit), show(hit.path)))
    if text and args.queries and not args.json:
        print()


def list_copies(args: argparse.Namespace) -> None:
    """Print groups of near-copies, each image with its likeness to an earlier one."""
    from engine.output_dir import check_output
    from engine.precision import find_device
    from inference.index import near_copies
    from visualize.page import Picture, write_page

    if not 0.5 < args.threshold <= 1:
        raise InputError(
            f"--threshold {args.threshold} is out of range; it must be above 0.5 and at most 1"
        )
    if args.html:
        check_output(args.html, "--html")
    index = open_for_reading(args.index)
    groups = near_copies(index, args.threshold, find_device(args.device))
    about = "equal: share of hash bits in which an image equals an earlier image of its group"
    found = f"{len(groups)} groups of {sum(map(len, groups))} images"
    if args.html:
        rows = {
            f"Group {number}": [Picture(copy.path, f"equal {copy.likeness:.1%}") for copy in group]
            for number, group in enumerate(groups, 1)
        }
        write_page(args.html, "Near-copies", [found, about], rows)
        note(f"wrote {args.html}")
    if not args.json:
        note(f"{about}\n   equal  image")
    for group in groups:
        if args.json:
            print(json.dumps([copy._asdict() for copy in group]))
        else:
            print(*(f"{copy.likeness:8.1%}  {show(copy.path)}\n" for copy in group), sep="")
    note(found)


def main() -> None:
    """Run the command on the command line."""
    commands = {"index": make_index, "query": answer_queries, "duplicates": list_copies}
    with ending_in_silence():
        args = parser.parse_args()
        commands[args.command](args)


if __name__ == "__main__":
    run_script(main)
