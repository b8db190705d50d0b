"""Search folders of images by a text or an example, and list near-copies.

`index` adds the images of folders to an index, and embeds changed images again. `query` and
`duplicates` read the index. Results go to standard output, progress and notes to standard error.
"""

from pathlib import Path

from configs.flags import Flags, at_least
from utils import begin_script, run_script

DEVICE = {"help": "cuda, cuda:1, ... or cpu (default: cuda if there is a GPU)"}
flags = Flags(__doc__, "index photos --checkpoint flickr30k.pth --to output/photos")
index = flags.add_command(
    "index",
    "Embed the images of folders and add them to an index.",
    "photos --checkpoint flickr30k.pth --to output/photos",
)
index.add_argument(
    "folders", nargs="+", metavar="FOLDER", help="folder of images, searched at any depth"
)
index.add_argument(
    "--prune", action="store_true", help="remove indexed images that are not in a FOLDER"
)
index.add_argument(
    "--checkpoint",
    required=True,
    metavar="FILE",
    help="checkpoint of pre-training, retrieval or grounding: a "
    "file, the folder of a run, or a hub repository USER/NAME[@REVISION]",
)
index.add_argument("--to", required=True, metavar="INDEX", help="folder of the index")
index.add_argument(
    "--config",
    metavar="FILE",
    help="for a checkpoint without one: the YAML file it was trained with",
)
index.add_set()
index.add_argument("--device", **DEVICE)
query = flags.add_command(
    "query",
    "Print the images that fit a text or an example best, with scores.",
    'output/photos "two dogs in the snow" --html dogs.html',
)
query.add_argument("index", metavar="INDEX", help="folder of the index")
query.add_argument("text", nargs="?", metavar="TEXT", help="what the images show")
query.add_argument(
    "--image", metavar="FILE", help="an example; with a text, images that are similar to both"
)
query.add_argument("-k", type=at_least(1), default=20, help="images to print")
query.add_argument(
    "--rerank",
    type=at_least(0),
    metavar="N",
    help="rank the N most similar images by their match with the "
    "text (ITM), 0 for none; the others follow by similarity (default: the checkpoint's k_test)",
)
query.add_argument("--html", metavar="PAGE", help="also write a page of thumbnails")
query.add_argument(
    "--checkpoint", metavar="FILE", help="new path of the index's checkpoint, if it has moved"
)
query.add_argument("--device", **DEVICE)
copies = flags.add_command(
    "duplicates", "List groups of images that look nearly alike.", "output/photos --threshold 0.99"
)
copies.add_argument("index", metavar="INDEX", help="folder of the index")
copies.add_argument(
    "--threshold", type=float, default=0.98, help="smallest similarity of near-copies, at most 1"
)
copies.add_argument("--device", **DEVICE)
if __name__ == "__main__":
    begin_script(flags)

import os
import sys
import time
import warnings

from dataset.images import FORMATS, SUFFIXES
from engine.processes import find_device
from engine.saving import writing
from inference import load_model
from inference.index import (
    UNUSABLE,
    count_others,
    find_images,
    load_model_of,
    near_copies,
    open_index,
    read_index,
    search,
    update_index,
)
from inference.inputs import UnknownWords
from utils import InputError, interruptible, printable
from visualize.page import check_page, write_page

SHOWN = 5  # unusable images that are printed


def show(path):
    """Return a printable path, relative if it is below the working directory."""
    return printable(path.removeprefix(os.path.join(os.getcwd(), "")))


def note(text):
    """Print a note to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_results(lines):
    """Print lines to standard output, which a reader such as head may close early."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # otherwise Python reports the error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_index(args):
    """Create or update an index, and print the number of images."""
    images, problems, others = find_images(args.folders)
    before = open_index(args.to)
    model = load_model(args.checkpoint, args.device, config=args.config, overrides=args.set)
    start = time.monotonic()
    with interruptible(f"{args.to} has what was embedded so far; the same command goes on"):
        changes = update_index(args.to, before, model, images, problems, args.prune)
    rate = changes.embedded / (time.monotonic() - start)
    print_results(
        [
            f"{args.to}: {changes.total} images, {changes.kept} as before, {changes.embedded} embedded"
            + f" ({rate:.1f} per second)" * bool(changes.embedded)
            + f", {changes.removed} removed"
        ]
    )
    if others:
        note(
            f"  left out: other files: {count_others(others)}; images have the suffixes of {', '.join(FORMATS)}"
        )
    for path, problem in changes.unusable[:SHOWN]:
        note(f"  left out: {show(path)}: {problem}")
    if len(changes.unusable) > SHOWN:
        note(f"  left out: {len(changes.unusable)} in all, {Path(args.to, UNUSABLE)} has the list")


def open_for_reading(folder):
    """Return the Index in a folder; print a note if it is incomplete. Raises InputError."""
    found = read_index(folder)
    if found.left:
        note(f"note: {folder} is incomplete, {found.left} images are not indexed yet")
    return found


def answer_query(args):
    """Print the images that fit best, and write the page."""
    if Path(args.text or "").suffix.lower() in SUFFIXES and os.path.isfile(args.text):
        raise InputError(
            f"TEXT {args.text} is an image file: --image {args.text} searches for images like it"
        )
    if args.html:
        check_page(args.html)
    found_in = open_for_reading(args.index)
    model = load_model_of(found_in, args.index, args.device, args.checkpoint)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UnknownWords)
        found = search(found_in, model, args.text, args.image, args.k, args.rerank)
    for warning in caught:
        note(f"note: {warning.message}")
    print_results(f"{score:8.3f}  {show(path)}" for path, score in found)
    if args.html:
        ranked_by = (
            "similarity (ITC)"
            if args.text is None or args.rerank == 0
            else "matching (ITM), then by similarity (ITC)"
        )
        with writing(Path(args.html)):
            write_page(args.html, found, len(found_in.paths), ranked_by, args.text, args.image)
        note(f"wrote {args.html}")


def list_copies(args):
    """Print groups of near-copies, each image with its similarity to the one before it that is most
    similar.
    """
    if not 0 < args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold}: must be above 0 and at most 1")
    groups = near_copies(open_for_reading(args.index), args.threshold, find_device(args.device))
    for group in groups:
        print_results([*(f"{similarity:8.3f}  {show(path)}" for path, similarity in group), ""])
    note(f"{len(groups)} groups of {sum(map(len, groups))} images")


def main():
    args = flags.parse_args()
    {"index": make_index, "query": answer_query, "duplicates": list_copies}[args.command](args)


if __name__ == "__main__":
    run_script(main)
