"""A table of image paths and captions (CSV, TSV or JSON lines) -> the JSON lists that training and testing read.

    python -m dataset.to_json captions.csv --image_root photos --output data/mine --test 100

Rows that name the same image become one entry with all their captions. Rows that cannot be used are left out and named.
"""

from pathlib import Path

from configs.flags import Flags, at_least
from utils import begin_script, run_script

flags = Flags(__doc__.splitlines()[0], "captions.csv --image_root photos --output data/mine --test 100")
flags.add_argument("table", metavar="captions.csv", help="CSV, TSV or JSON lines with a path and a caption in each row")
flags.add_argument("--image_root", default="", metavar="DIR", help="folder that the paths start from")
flags.add_argument("--output", "--output_dir", required=True, type=Path, metavar="DIR", help="folder of the lists")
flags.add_argument("--test", type=at_least(0), default=0, metavar="N", help="images to hold out in test.json")
flags.add_argument("--path", metavar="NAME", help="column of the image paths; recognized by its name if not given")
flags.add_argument("--text", metavar="NAME", help="column of the captions; recognized by its name if not given")
flags.add_argument("--encoding", metavar="NAME", help="of the table, such as cp1252; UTF-8 if not given")
flags.add_argument("--seed", type=int, default=0, help="another one holds out other images")
if __name__ == "__main__":
    begin_script(flags)

import codecs
import csv
import io
import json
import os
import random
import re

from dataset.annotations import read_json_list
from dataset.text import MAX_WORDS, is_blank, pre_caption, without_halves
from utils import InputError, atomic_write, make_output_dir

# names that columns have in the wild, the likeliest first; upper case, blanks and hyphens do not matter
PATHS = ("path", "image", "file", "filename", "file_name", "filepath", "file_path", "image_path", "image_name", "image_file",
         "img", "img_path", "photo", "picture")
TEXTS = ("caption", "captions", "text", "description", "sentence", "alt_text", "alt", "comment", "title")
DELIMITERS = ",\t;|"
SHOWN = 5  # rows that are printed of those left out


def read_rows(path, encoding=None):
    """Yield (place, row) for the rows of a table, by default in UTF-8, or in UTF-16 if it begins with its mark.

    row: {column: value}, or the ValueError that says why there is none. Raises InputError if the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode(encoding or ("utf-16" if utf16 else "utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except LookupError as error:
        raise InputError(f"--encoding: {error}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} line {line}: not {error.encoding} text; save the file as UTF-8, or name its encoding, such "
                         "as --encoding cp1252") from None
    if text.lstrip().startswith("["):
        return ((f"entry {number} (counting from 0)", entry) for number, entry in read_json_list(path))
    lines = io.StringIO(text, newline="")
    return _read_json_lines(lines) if text.lstrip().startswith("{") else _read_csv(lines, path)


def _read_json_lines(lines):
    for line, text in enumerate(lines, 1):
        if text.strip():
            try:
                yield f"line {line}", json.loads(text)
            except (ValueError, RecursionError) as error:
                yield f"line {line}", ValueError(f"not valid JSON ({error})")


def _read_csv(lines, path):
    head = lines.readline()
    lines.seek(0)
    delimiter = max(DELIMITERS, key=head.count)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    names, line = None, 1  # a row may go over several lines: of its first one
    try:
        for cells in reader:
            if names is None:
                names = [cell.strip() for cell in cells]
            elif any(cells) and len(cells) == len(names):
                yield f"line {line}", dict(zip(names, cells))
            elif any(cells):  # spreadsheets end in rows of empty cells
                yield f"line {line}", ValueError(f"{len(cells)} columns, but line 1 has {len(names)}; a text that holds "
                                                 f"{delimiter!r} must stand in double quotes")
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path} line {line}: {error}; close the double quote there, or double each one that belongs to a "
                         "text") from None


def _column(row, wanted, known, flag, path):
    """The column that the flag names, else the first known one. Raises InputError if the row has none."""
    names = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in row} | {name: name for name in row}
    for name in [wanted] if wanted else known:
        if name in names:
            return names[name]
    raise InputError(f"{path}: none of the columns {', '.join(map(repr, row))} is called {wanted or ', '.join(known)}; name "
                     f"the right one with {flag} (line 1 of a CSV or TSV file names the columns)")


def read_pairs(path, image_root, encoding=None, path_column=None, text_column=None):
    """Read a table -> ({image path: [captions]}, the names of both columns, problems of the rows that cannot be used).

    Raises InputError if the file cannot be read or no row of it can be used.
    """
    captions, problems, columns = {}, [], None
    for place, row in read_rows(path, encoding):
        if isinstance(row, dict) and columns is None:
            columns = _column(row, path_column, PATHS, "--path", path), _column(row, text_column, TEXTS, "--text", path)
        try:
            image, texts = _pair(row, columns, image_root)
        except ValueError as error:
            problems.append(f"{path} {place}: {error}")
        else:
            captions.setdefault(image, {}).update(dict.fromkeys(texts))  # each text once
    if not captions:
        raise InputError(f"{problems[0]} (none of the {len(problems):,} rows can be used)" if problems else f"{path}: no rows")
    return {image: list(texts) for image, texts in captions.items()}, columns, problems


def _pair(row, columns, image_root):
    """Image path and captions of a row. Raises ValueError if it cannot be used."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not an object")
    image, texts = map(row.get, columns)
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"{columns[0]!r} is empty or not text")
    image = image.strip()
    spellings = image, image.replace("\\", "/")  # Windows writes folders with backslashes
    found = next((name for name in spellings if os.path.isfile(os.path.join(image_root, name))), None)
    if found is None:
        raise ValueError(f"image {os.path.join(image_root, image)} does not exist; paths start from --image_root")
    texts = texts if isinstance(texts, list) else [texts]
    if not texts or not all(isinstance(text, str) and not is_blank(pre_caption(text, MAX_WORDS)) for text in texts):
        raise ValueError(f"{columns[1]!r} is empty or not text")
    return os.path.normpath(found), [" ".join(without_halves(text).split()) for text in texts]


def hold_out(captions, count, seed):
    """Divide {image: captions} into entries to train on and `count` entries to test on, drawn at random. Raises InputError."""
    if count >= len(captions):
        raise InputError(f"--test {count}: there are {len(captions)} images, and some must remain to train on")
    held = set(random.Random(seed).sample(list(captions), count))
    parts = [], []
    for image, texts in captions.items():
        parts[image in held].append({"image": image, "caption": texts})
    return parts


def _write(path, lines):
    """Write the lines to a file; no lines, no file. Raises InputError."""
    try:
        if lines:
            with atomic_write(path) as file:
                file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace"))
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}): make room, or name another --output") from None


def main():
    """Convert a table from the command line and print what came of it."""
    args = flags.parse_args()
    captions, columns, problems = read_pairs(args.table, args.image_root, args.encoding, args.path, args.text)
    parts = hold_out(captions, args.test, args.seed)
    make_output_dir(args.output, writes=False, flag="--output")
    print("{}: images from column {!r}, captions from column {!r}".format(args.table, *columns))
    for name, entries in zip(("train.json", "test.json"), parts):
        lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        _write(args.output / name, lines and ["[" + ",\n ".join(lines) + "]"])
        if entries:
            count = sum(len(captions[entry["image"]]) for entry in entries)
            print(f"{args.output / name}: {len(entries):,} images, {count:,} captions")
    _write(args.output / "skipped.txt", problems)
    if problems:
        print(f"left out, {len(problems):,} rows ({args.output / 'skipped.txt'} lists all):", *problems[:SHOWN], sep="\n  ")


if __name__ == "__main__":
    run_script(main)
