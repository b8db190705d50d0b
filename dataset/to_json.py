"""Tables and folders of captions, and official annotation files -> the JSON lists that training and
testing read.

    python -m dataset.to_json captions.csv --image_root photos --output data/mine --test 100 python
    -m dataset.to_json dataset_coco.json --image_root coco --output data/coco python -m
    dataset.to_json v2_OpenEnded_mscoco_train2014_questions.json
    v2_mscoco_train2014_annotations.json ...

A source is a table (CSV, TSV, JSON lines, a JSON list) with a path and a caption in each row, a
folder of images with .txt or .json files, or an official file of COCO's captions, Karpathy's
splits, VQA v2, NLVR2 or SNLI-VE, which is recognized by its form. Unusable rows and files are left
out and listed in skipped.txt.
"""

from pathlib import Path

from configs.flags import Flags, at_least
from engine.launch import begin_script, run_script

flags = Flags(
    __doc__.splitlines()[0], "captions.csv --image_root photos --output data/mine --test 100"
)
flags.add_argument(
    "sources", nargs="+", metavar="SOURCE", help="table, folder or official files of one kind"
)
flags.add_argument(
    "--image_root", default="", metavar="DIR", help="folder that the paths start from"
)
flags.add_argument(
    "--output",
    "--output_dir",
    required=True,
    type=Path,
    metavar="DIR",
    help="folder of the lists: train.json, val.json and test.json, each if it has entries",
)
flags.add_argument(
    "--overwrite", action="store_true", help="replace the lists of an earlier conversion"
)
flags.add_argument(
    "--test", type=at_least(0), default=0, metavar="N", help="images to hold out in test.json"
)
flags.add_argument(
    "--path", metavar="NAME", help="column of the image paths; recognized by its name if not given"
)
flags.add_argument(
    "--text", metavar="NAME", help="column of the captions; recognized by its name if not given"
)
flags.add_argument(
    "--encoding", metavar="NAME", help="encoding of a table, such as cp1252 (default: UTF-8)"
)
flags.add_argument("--seed", type=int, default=0, help="another one holds out other images")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
import random

from dataset.official import CaptionedFile, ImageFinder, convert, recognize
from dataset.tables import read_folder, read_table
from engine.output_dir import make_output_dir
from utils import InputError, atomic_write, read_regular

SHOWN = 5  # problems that are printed
SKIPPED = "skipped.txt"


def read_sources(args) -> tuple[dict[str, list], list[str]]:
    """Read the sources of a command line.

    Returns the entries of each split and the problems. Raises InputError.
    """
    contents = {}  # None for a folder
    for source in args.sources:
        try:
            contents[source] = None if os.path.isdir(source) else read_regular(source)
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({error.strerror})") from None
    forms = {source: data and recognize(data) for source, data in contents.items()}
    if (args.path or args.text or args.encoding) and not any(
        data and not forms[source] for source, data in contents.items()
    ):
        raise InputError(
            f"--path, --text and --encoding are of tables, and {args.sources[0]} is none: leave them out"
        )
    if all(forms.values()):
        find = ImageFinder(args.image_root)
        lists, problems = convert(contents, forms, find)
        for source, form in forms.items():
            print(f"{source}: {form.title}")
        if find.missing:
            print(
                f"note: {len(find.missing):,} of {len(find.found):,} images are not in --image_root "
                f"{args.image_root or os.curdir}, such as {next(iter(find.missing))}"
            )
        return lists, problems
    if any(forms.values()):
        raise InputError(
            f"{next(filter(forms.get, forms))}: is an official file: convert it apart from tables and folders"
        )
    captions, problems, told = {}, [], []
    for source, data in contents.items():
        if data is None:
            read, skipped, found = read_folder(source, args.image_root)
        else:
            read, skipped, found = read_table(
                source,
                data,
                args.image_root,
                encoding=args.encoding,
                path_column=args.path,
                text_column=args.text,
            )
        told.append(f"{source}: {found}")
        problems += skipped
        for image, texts in read.items():
            captions.setdefault(image, {}).update(dict.fromkeys(texts))
    if not captions:
        raise InputError(
            f"{problems[0]} (none of {len(problems):,} can be used)"
            if problems
            else f"{', '.join(args.sources)}: no rows"
        )
    print(*told, sep="\n")
    return {
        "train": [CaptionedFile(image, list(texts)) for image, texts in captions.items()]
    }, problems


def hold_out(lists: dict[str, list], count: int, seed: int) -> dict[str, list]:
    """Move `count` images, drawn at random, from the images to train on to those to test on.

    Raises InputError.
    """
    images = lists.get("train", [])
    if "test" in lists or not (images and isinstance(images[0], CaptionedFile)):
        raise InputError(
            "--test holds out images of captions to train on; the sources have their own split: leave it out"
        )
    if count >= len(images):
        raise InputError(
            f"--test {count}: there are {len(images)} images, and some must remain to train on"
        )
    held = set(random.Random(seed).sample(range(len(images)), count))
    parts = [], []
    for i, image in enumerate(images):
        parts[i in held].append(image)
    return {**lists, "train": parts[0], "test": parts[1]}


def entries_of(image: CaptionedFile, split: str) -> list[dict]:
    """Return an image's entries: one for each caption to train on if it has an id, else one with
    all captions.
    """
    if split == "train" and image.image_id is not None:
        return [
            {"image": image.image, "caption": text, "image_id": image.image_id}
            for text in image.captions
        ]
    return [{"image": image.image, "caption": image.captions}]


def write(output: Path, files: dict[str, list[str]], overwrite: bool) -> None:
    """Write lines to files of a folder, and remove nothing.

    Raises InputError before the first if one exists.
    """
    existing = [str(output / name) for name in files if (output / name).exists()]
    if existing and not overwrite:
        raise InputError(
            f"{', '.join(existing)}: exists already; name another --output, or add --overwrite"
        )
    make_output_dir(output, lock=False, flag="--output")
    for name, lines in files.items():
        try:
            with atomic_write(output / name) as file:
                file.writelines(f"{line}\n".encode("utf-8", "backslashreplace") for line in lines)
        except OSError as error:
            raise InputError(
                f"{output / name}: cannot be written ({error.strerror}): make room, or name another "
                "--output"
            ) from None


def main():
    """Convert the sources of the command line and print the number of entries."""
    args = flags.parse_args()
    lists, problems = read_sources(args)
    if args.test:
        lists = hold_out(lists, args.test, args.seed)
    files, counts = {}, {}
    for split, items in lists.items():
        name, entries, counts[split] = f"{split}.json", items, f"{len(items):,} entries"
        if isinstance(items[0], CaptionedFile):
            entries = [entry for image in items for entry in entries_of(image, split)]
            counts[split] = (
                f"{len(items):,} images, {sum(len(image.captions) for image in items):,} captions"
            )
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        files[name] = ["[" + ",\n ".join(lines) + "]"]
    if problems:
        files[SKIPPED] = problems
    write(args.output, files, args.overwrite)
    for split, count in counts.items():
        print(f"{args.output / split}.json: {count}")
    left = [
        str(args.output / name)
        for name in ("train.json", "val.json", "test.json", SKIPPED)
        if name not in files
    ]
    if args.overwrite and (left := list(filter(os.path.exists, left))):
        print(f"note: {', '.join(left)} of an earlier conversion stays as it is")
    if problems:
        print(
            f"left out, {len(problems):,} ({args.output / SKIPPED} lists all):",
            *problems[:SHOWN],
            sep="\n  ",
        )


if __name__ == "__main__":
    run_script(main)
