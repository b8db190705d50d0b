"""Convert tables, folders of captions and official annotation files into JSON lists.

A source is a table (CSV, TSV, JSON lines, a JSON list) with a path and a caption in each row, a
folder of images with .txt or .json files, or official files of COCO's captions, Karpathy's splits,
VQA v2, NLVR2 or SNLI-VE, which are recognized by their form. Unusable rows and files are left out
and listed in skipped.txt.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import Parser, at_least
from engine.launch import run_script
from utils import InputError, read_regular

if TYPE_CHECKING:
    from dataset.official import CaptionedFile

SHOWN = 5  # problems that are printed
SKIPPED = "skipped.txt"

parser = Parser(
    __doc__.splitlines()[0], "captions.csv --image_root photos --output data/mine --test 100"
)
parser.add_argument(
    "sources", nargs="+", metavar="SOURCE", help="table, folder or official files of one kind"
)
parser.add_argument(
    "--image_root", default="", metavar="DIR", help="folder that the image paths start from"
)
parser.add_argument(
    "--output",
    required=True,
    type=Path,
    metavar="DIR",
    help="folder of the lists: train.json, val.json and test.json, each if it has entries",
)
parser.add_argument("--overwrite", action="store_true", help="replace existing lists")
parser.add_argument(
    "--test", type=at_least(0), default=0, metavar="N", help="images to hold out in test.json"
)
parser.add_argument(
    "--path", metavar="NAME", help="column of the image paths (default: recognized by its name)"
)
parser.add_argument(
    "--text", metavar="NAME", help="column of the captions (default: recognized by its name)"
)
parser.add_argument(
    "--encoding", metavar="NAME", help="encoding of a table, such as cp1252 (default: UTF-8)"
)
parser.add_argument("--seed", type=int, default=0, help="random seed of --test")


def read_sources(args: argparse.Namespace) -> tuple[dict[str, list], list[str]]:
    """Read the sources of a command line.

    Returns:
        The entries of each split, and the problems of entries that are left out.

    Raises:
        InputError: A source cannot be read, or the sources do not belong together.
    """
    from dataset.official import recognize

    contents: dict[str, bytes | None] = {}  # None for a folder
    for source in args.sources:
        try:
            contents[source] = None if os.path.isdir(source) else read_regular(source)
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    files = {source: data for source, data in contents.items() if data}
    forms = {source: form for source, data in files.items() if (form := recognize(data))}
    if (args.path or args.text or args.encoding) and len(forms) == len(files):
        raise InputError(
            f"--path, --text and --encoding apply to tables, and {args.sources[0]} is none: leave"
            " them out"
        )
    if len(forms) == len(contents):
        return _read_official(files, forms, args.image_root)
    if forms:
        raise InputError(
            f"{next(iter(forms))}: is an official file: convert it apart from tables and folders"
        )
    return _read_captions(contents, args)


def _read_official(
    contents: dict[str, bytes], forms: dict[str, Any], image_root: str
) -> tuple[dict[str, list], list[str]]:
    """Read official files."""
    from dataset.official import ImageFinder, convert

    find = ImageFinder(image_root)
    lists, problems = convert(contents, forms, find)
    for source, form in forms.items():
        print(f"{source}: {form.title}")
    if find.missing:
        print(
            f"note: {len(find.missing):,} of {len(find.paths):,} images are not in --image_root"
            f" {image_root or os.curdir}, such as {find.missing[0]}"
        )
    return lists, problems


def _read_captions(
    contents: dict[str, bytes | None], args: argparse.Namespace
) -> tuple[dict[str, list], list[str]]:
    """Read tables and folders, which may have captions of the same images."""
    from dataset.official import CaptionedFile
    from dataset.tables import read_folder, read_table

    captions, problems, summaries = {}, [], []
    for source, data in contents.items():
        if data is None:
            texts, skipped, summary = read_folder(source, args.image_root)
        else:
            texts, skipped, summary = read_table(
                source,
                data,
                args.image_root,
                encoding=args.encoding,
                path_column=args.path,
                text_column=args.text,
            )
        summaries.append(f"{source}: {summary}")
        problems += skipped
        for image, of_image in texts.items():
            captions.setdefault(image, {}).update(dict.fromkeys(of_image))
    if not captions:
        raise InputError(
            f"{problems[0]} (none of {len(problems):,} can be used)"
            if problems
            else f"{', '.join(args.sources)}: no rows"
        )
    print(*summaries, sep="\n")
    images = [CaptionedFile(image, list(texts)) for image, texts in captions.items()]
    return {"train": images}, problems


def hold_out(lists: dict[str, list], count: int, seed: int) -> dict[str, list]:
    """Move `count` images, drawn at random, from the training list to the test list.

    Raises InputError if the sources have no captions or their own split, or too few images.
    """
    from dataset.official import CaptionedFile

    images = lists.get("train", [])
    if "test" in lists or not (images and isinstance(images[0], CaptionedFile)):
        raise InputError(
            "--test holds out images of captions to train on; the sources have their own split:"
            " leave it out"
        )
    if count >= len(images):
        raise InputError(
            f"--test {count}: there are {len(images)} images, and some must remain to train on"
        )
    drawn = set(random.Random(seed).sample(range(len(images)), count))
    parts = [], []
    for i, image in enumerate(images):
        parts[i in drawn].append(image)
    return {**lists, "train": parts[0], "test": parts[1]}


def entries_of(image: "CaptionedFile", split: str) -> list[dict[str, Any]]:
    """Return the entries of an image.

    An image with an id has an entry for each caption in training, other images have one entry.
    """
    if split == "train" and image.image_id is not None:
        return [
            {"image": image.image, "caption": text, "image_id": image.image_id}
            for text in image.captions
        ]
    return [{"image": image.image, "caption": image.captions}]


def main() -> None:
    """Convert the sources of the command line and print the number of entries."""
    args = parser.parse_args()
    from dataset.official import CaptionedFile
    from engine.output_dir import check_output, make_output_dir, write_files

    lists, problems = read_sources(args)
    if args.test:
        lists = hold_out(lists, args.test, args.seed)
    files, counts = {}, {}
    for split, items in lists.items():
        name, entries, counts[split] = f"{split}.json", items, f"{len(items):,} entries"
        if isinstance(items[0], CaptionedFile):
            entries = [entry for image in items for entry in entries_of(image, split)]
            captions = sum(len(image.captions) for image in items)
            counts[split] = f"{len(items):,} images, {captions:,} captions"
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        files[name] = "[" + ",\n ".join(lines) + "]\n"
    if problems:
        files[SKIPPED] = "".join(f"{problem}\n" for problem in problems)
    make_output_dir(args.output, lock=False, flag="--output")
    for name in files:
        check_output(args.output / name, overwrite=args.overwrite)
    write_files(
        {
            args.output / name: text.encode("utf-8", "backslashreplace")
            for name, text in files.items()
        }
    )
    for split, count in counts.items():
        print(f"{args.output / split}.json: {count}")
    others = {"train.json", "val.json", "test.json", SKIPPED} - files.keys()
    stale = sorted(str(args.output / name) for name in others if (args.output / name).exists())
    if args.overwrite and stale:
        print(f"note: kept from an earlier conversion: {', '.join(stale)}")
    if problems:
        print(f"left out, {len(problems):,} ({args.output / SKIPPED} lists all):")
        print(*(f"  {problem}" for problem in problems[:SHOWN]), sep="\n")


if __name__ == "__main__":
    run_script(main)
