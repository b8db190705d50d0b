"""Convert tables, folders of captions and official annotation files into JSON lists.

There are three kinds of sources:

- a table (CSV, TSV, JSON lines, a JSON list, Parquet) with an image and a caption in each row
- a folder of images with captions in .txt or .json files
- official files of COCO's captions, Karpathy's splits, VQA v2, NLVR2 or SNLI-VE, which are
  recognized by their content

Unusable rows are left out and listed in skipped.txt. --check also decodes every image.
"""

import argparse
import functools
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.cli import Parser, at_least
from engine.launch import run_script
from utils import InputError, cores, read_regular

if TYPE_CHECKING:
    from dataset.official import CaptionedFile

SHOWN = 5  # problems that are printed
SKIPPED = "skipped.txt"

parser = Parser(
    __doc__.splitlines()[0], "captions.csv --image_root photos --output data/mine --test 100"
)
parser.add_argument(
    "sources",
    nargs="+",
    metavar="SOURCE",
    help="table (CSV, TSV, JSON, Parquet), folder of images, or official annotation files of one"
    " kind, such as VQA v2",
)
parser.add_argument(
    "--image_root", default="", metavar="DIR", help="folder that the image paths start from"
)
parser.add_argument(
    "--output",
    required=True,
    type=Path,
    metavar="DIR",
    help="folder for train.json, val.json and test.json",
)
parser.add_argument("--overwrite", action="store_true", help="replace existing lists")
for split in ("test", "val"):
    parser.add_argument(
        f"--{split}",
        type=at_least(0),
        default=0,
        metavar="N",
        help=f"number of images to hold out in {split}.json, with all their captions",
    )
parser.add_argument(
    "--check", action="store_true", help="decode every image, and leave out unusable images"
)
parser.add_argument(
    "--workers",
    type=at_least(1),
    metavar="N",
    default=cores(),
    help="number of processes that decode images for --check",
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
parser.add_argument("--seed", type=int, default=0, help="random seed of --test and --val")


class Sources(NamedTuple):
    """Content of the sources.

    Attributes:
        lists: Entries of each split, CaptionedFile or a dict.
        files: Path of each image under --image_root by its path in the entries.
        problems: Problems of entries that are left out.
        summaries: Lines to print about the sources.
    """

    lists: dict[str, list]
    files: dict[str, str]
    problems: list[str]
    summaries: list[str]


def read_sources(args: argparse.Namespace) -> Sources:
    """Read the sources of a command line.

    Raises InputError if one cannot be read, or if they do not belong together.
    """
    from dataset.official import recognize
    from dataset.parquet import is_parquet

    contents: dict[str, bytes | None] = {}  # None for folders and Parquet files
    for source in args.sources:
        try:
            whole = not (os.path.isdir(source) or is_parquet(source))
            contents[source] = read_regular(source) if whole else None
        except OSError as error:
            raise InputError(
                f"{source}: cannot be read ({error.strerror}); check the path"
            ) from None
    forms = {
        source: form for source, data in contents.items() if data and (form := recognize(data))
    }
    tables = [source for source in contents if source not in forms and not os.path.isdir(source)]
    if ((args.path or args.text) and not tables) or (
        args.encoding and all(map(is_parquet, tables))
    ):
        raise InputError(
            f"{args.sources[0]}: --path and --text apply to tables, and --encoding to CSV, TSV and"
            " JSON tables; leave these flags out"
        )
    if len(forms) == len(contents):
        return _read_official(contents, forms, args.image_root)
    if forms:
        raise InputError(
            f"{next(iter(forms))} is an official file; convert it in another call, without tables"
            " and folders"
        )
    return _read_captions(contents, args)


def _read_official(contents: dict[str, Any], forms: dict[str, Any], image_root: str) -> Sources:
    """Read official files."""
    from dataset.official import ImageFinder, convert

    find = ImageFinder(image_root)
    lists, problems = convert(contents, forms, find)
    summaries = [f"{source}: {form.title}" for source, form in forms.items()]
    if find.missing:
        summaries.append(
            f"note: {len(find.missing):,} of {len(find.paths):,} images are not in --image_root"
            f" {image_root or os.curdir}, such as {find.missing[0]}"
        )
    return Sources(lists, find.files, problems, summaries)


def _read_captions(contents: dict[str, bytes | None], args: argparse.Namespace) -> Sources:
    """Read tables and folders. Images in Parquet files become files in `--output`/images."""
    from dataset.official import CaptionedFile
    from dataset.parquet import is_parquet, read_parquet
    from dataset.tables import Captions, read_folder, read_table

    captions = Captions(args.image_root)
    columns = {"image_column": args.path, "text_column": args.text}
    for source, data in contents.items():
        if data is not None:
            read_table(source, data, captions, encoding=args.encoding, **columns)
        elif is_parquet(source):
            read_parquet(source, captions, args.output / "images", **columns)
        else:
            read_folder(source, captions)
    lists = {
        split: [CaptionedFile(image, list(texts)) for image, texts in images.items()]
        for split, images in captions.lists.items()
    }
    files = {image: image for images in captions.lists.values() for image in images}
    return Sources(lists, files, captions.problems, captions.summaries)


def leave_out_broken(sources: Sources, image_root: str, workers: int) -> Sources:
    """Decode all images, and leave out the entries of images that cannot be used."""
    from tqdm import tqdm

    from dataset.official import CaptionedFile
    from dataset.pool import in_processes
    from dataset.report import begin, decode

    def usable(item: Any) -> bool:
        if isinstance(item, CaptionedFile):
            return item.image not in broken
        return broken.isdisjoint(item.get("images") or [item["image"]])

    files = {image: os.path.join(image_root, file) for image, file in sources.files.items()}
    bar = tqdm(
        files.values(), desc="decoding", unit="img", leave=False, disable=None, dynamic_ncols=True
    )
    broken, problems = set(), []
    with in_processes(workers, begin) as run:
        results = run(functools.partial(decode, exif="stored"), bar)
        for (image, file), seen in zip(files.items(), results, strict=True):
            if seen.problem:
                broken.add(image)
                problems.append(f"image {file}: {seen.problem}")
    lists = {split: list(filter(usable, items)) for split, items in sources.lists.items()}
    summary = f"images: {len(files):,} decoded, {len(broken):,} of them broken"
    return Sources(
        {split: items for split, items in lists.items() if items},
        files,
        sources.problems + problems,
        [*sources.summaries, summary],
    )


def hold_out(lists: dict[str, list], counts: dict[str, int], seed: int) -> dict[str, list]:
    """Move images, drawn at random, from the training list to other lists.

    Args:
        lists: Entries of each split.
        counts: Number of images by split, test first: its images do not depend on the others.
        seed: Random seed.

    Raises:
        InputError: The sources have no captions, their own split, or too few images.
    """
    from dataset.official import CaptionedFile

    images = lists.get("train", [])
    flags = " ".join(f"--{split} {count}" for split, count in counts.items())
    if counts.keys() & lists.keys() or not (images and isinstance(images[0], CaptionedFile)):
        raise InputError(
            f"{flags}: the sources have their own split, or no captions to train on; leave out"
            " these flags"
        )
    if sum(counts.values()) >= len(images):
        raise InputError(
            f"{flags}: the sources have only {len(images)} images; leave some for training"
        )
    rest, rng, parts = list(range(len(images))), random.Random(seed), {}
    for split, count in counts.items():
        drawn = set(rng.sample(rest, count))
        parts[split] = [images[i] for i in sorted(drawn)]
        rest = [i for i in rest if i not in drawn]
    return {**lists, "train": [images[i] for i in rest], **parts}


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


def format_lists(lists: dict[str, list]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of the file of each split, and a description of its content."""
    from dataset.official import CaptionedFile

    files, counts = {}, {}
    for split, items in lists.items():
        entries, counts[split] = items, f"{len(items):,} entries"
        if isinstance(items[0], CaptionedFile):
            entries = [entry for image in items for entry in entries_of(image, split)]
            captions = sum(len(image.captions) for image in items)
            counts[split] = f"{len(items):,} images, {captions:,} captions"
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        files[split] = "[" + ",\n ".join(lines) + "]\n"
    return files, counts


def main() -> None:
    """Convert the sources of the command line and print the number of entries."""
    args = parser.parse_args()
    from engine.output_dir import check_output, make_output_dir, write_files

    sources = read_sources(args)
    if args.check:
        sources = leave_out_broken(sources, args.image_root, args.workers)
    lists, problems = sources.lists, sources.problems
    if not lists:
        first = f"{problems[0]} (first of {len(problems):,} problems)" if problems else "no rows"
        raise InputError(f"{', '.join(args.sources)}: nothing can be used: {first}")
    print(*sources.summaries, sep="\n")
    if held_out := {split: n for split in ("test", "val") if (n := getattr(args, split))}:
        lists = hold_out(lists, held_out, args.seed)
    texts, counts = format_lists(lists)
    files = {f"{split}.json": text for split, text in texts.items()}
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
        print(f"note: kept {', '.join(stale)} from an earlier conversion")
    if problems:
        print(f"left out: {len(problems):,} items ({args.output / SKIPPED} lists all)")
        print(*(f"  {problem}" for problem in problems[:SHOWN]), sep="\n")


if __name__ == "__main__":
    run_script(main)
