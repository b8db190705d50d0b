"""Readers of captions in tables (CSV, TSV, JSON lines, JSON lists) and in folders of images."""

import codecs
import csv
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dataset.entries import read_json_list
from dataset.images import FORMATS, SUFFIXES, absolute
from dataset.shards import CAPTION_SUFFIXES, image_and_captions
from dataset.text import MAX_WORDS, is_blank, pre_caption, without_halves
from utils import InputError, read_regular

# usual names of columns, the likeliest first; upper case, blanks and hyphens do not matter
PATHS = (
    "path",
    "image",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "image_name",
    "image_file",
    "img",
    "img_path",
    "photo",
    "picture",
)
TEXTS = (
    "caption",
    "captions",
    "text",
    "description",
    "sentence",
    "alt_text",
    "alt",
    "comment",
    "title",
)
DELIMITERS = ",\t;|"


class Captions:
    """Captions of images, collected from tables and folders.

    Args:
        image_root: Folder that the image paths start from.

    Attributes:
        lists: Captions by split and image path. Each caption of an image is kept once.
        problems: Problems of unusable rows.
        summaries: Description of each source.
    """

    def __init__(self, image_root: str) -> None:
        self.image_root = image_root
        self.lists: dict[str, dict[str, dict[str, None]]] = {}
        self.problems: list[str] = []
        self.summaries: list[str] = []
        self._spellings: dict[str, str] = {}

    def add(self, image: str, texts: list[str], split: str = "train") -> None:
        """Add captions of an image. The first spelling of its path names the image."""
        image = self._spellings.setdefault(absolute(self.image_root, image), image)
        self.lists.setdefault(split, {}).setdefault(image, {}).update(dict.fromkeys(texts))


def decode(path: str, data: bytes, encoding: str | None = None) -> str:
    """Decode a table, by default from UTF-8, or from UTF-16 if it has a byte order mark.

    Raises InputError.
    """
    try:
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return data.decode(encoding or ("utf-16" if utf16 else "utf-8-sig"))
    except LookupError as error:
        raise InputError(f"--encoding: {error}; name one such as cp1252") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} line {line}: not {error.encoding} text; save the file as UTF-8, or pass its"
            " encoding, such as --encoding cp1252"
        ) from None


def read_json_lines(text: str) -> Iterator[tuple[str, Any]]:
    """Yield (name of the line, value) of lines of JSON, a ValueError for a line that is wrong."""
    for line, row in enumerate(io.StringIO(text, newline=""), 1):
        if row.strip():
            try:
                yield f"line {line}", json.loads(row)
            except (ValueError, RecursionError) as error:
                yield f"line {line}", ValueError(f"not valid JSON ({error})")


def read_csv(
    text: str, is_row: Callable[[dict], bool], notes: list[str]
) -> Iterator[tuple[str, Any]]:
    """Read the rows of a CSV or TSV table.

    A quoted value may hold delimiters and line breaks (RFC 4180). Double quotes of a row are
    ordinary characters if other characters follow a closing quote, or if a quote is still open
    before a line that is a row by itself.

    Args:
        text: The table, which is not blank.
        is_row: Function that returns whether {column: value} of a line is a row by itself.
        notes: List to which the names of rows whose quotes are letters are added.

    Yields:
        The name of the row and its {column: value}, a ValueError if it has other columns.
    """
    lines = list(io.StringIO(text, newline=""))
    first = next(number for number, line in enumerate(lines) if line.strip())
    delimiter = max(DELIMITERS, key=lines[first].count)
    cells, read, _ = _read_record(lines, first, delimiter, lambda line: False)
    if cells is None:
        cells = _split_plainly(lines[first], delimiter)
        notes.append(f"line {first + 1}")
    names = [cell.strip() for cell in cells]
    width, at = len(names), first + read

    def begins_row(line: str) -> bool:
        cells = [cell.strip('"') for cell in _split_plainly(line, delimiter)]
        return len(cells) == width and is_row(dict(zip(names, cells, strict=True)))

    while at < len(lines):
        row = f"line {at + 1}"
        cells, read, problem = _read_record(lines, at, delimiter, begins_row)
        if cells is None or (read == 1 and any(cells) and len(cells) != width):
            cells = _split_plainly(lines[at], delimiter)
            if len(cells) == width:
                notes.append(row)
        at += read
        if not any(cells):  # spreadsheets end in rows of empty cells
            continue
        if len(cells) == width:
            yield row, dict(zip(names, cells, strict=True))
        else:
            error = f"{len(cells)} columns, but line {first + 1} has {width}{problem}; put a text"
            error += f" with {delimiter!r} in double quotes, and double each quote inside the text"
            yield row, ValueError(error)


def _read_record(
    lines: list[str], at: int, delimiter: str, begins_row: Callable[[str], bool]
) -> tuple[list[str] | None, int, str]:
    """Read the record that begins at line `at`, up to a line that begins another row.

    Return its cells, None if it is wrong, the number of its lines, and the problem.
    """
    # if a line begins another row, the reader misses the closing quote
    others = itertools.takewhile(
        lambda line: not begins_row(line), map(lines.__getitem__, range(at + 1, len(lines)))
    )
    record = itertools.chain([lines[at]], others)
    reader = csv.reader(record, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        return next(reader), reader.line_num, ""
    except csv.Error as error:
        return None, 1, f" ({error})"


def _split_plainly(line: str, delimiter: str) -> list[str]:
    """Return the cells of a line in which double quotes are letters."""
    return [cell.strip(" ") for cell in line.rstrip("\r\n").split(delimiter)]


def find_columns(
    names: Iterable[str], path_column: str | None, text_column: str | None, path: str
) -> tuple[str, str]:
    """Return the columns of paths and captions: as named, else the first known.

    Raises InputError if there are none.
    """
    known_as = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in names} | {
        name: name for name in names
    }
    columns = []
    for wanted, known, flag in (path_column, PATHS, "--path"), (text_column, TEXTS, "--text"):
        found = next(
            (known_as[name] for name in ([wanted] if wanted else known) if name in known_as), None
        )
        if found is None:
            raise InputError(
                f"{path}: none of the columns {', '.join(map(repr, names))} is called"
                f" {wanted or ' or '.join(known)}; name the right column with {flag} (in CSV"
                " and TSV files, line 1 holds the names of the columns)"
            )
        columns.append(found)
    image_column, caption_column = columns
    return image_column, caption_column


def read_table(
    path: str,
    data: bytes,
    captions: Captions,
    *,
    encoding: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
) -> None:
    """Read a table of image paths and captions.

    Args:
        path: File of the table, for messages.
        data: Content of the file.
        captions: Collection that the captions are added to.
        encoding: Encoding of the file, by default UTF-8, or UTF-16 if it has a byte order mark.
        image_column: Column of the image paths, by default recognized by its name.
        text_column: Column of the captions, by default recognized by its name.

    Raises:
        InputError: The file cannot be read.
    """
    columns, notes, root = None, [], captions.image_root

    def columns_of(row: dict) -> tuple[str, str]:
        nonlocal columns
        columns = columns or find_columns(row, image_column, text_column, path)
        return columns

    def is_row(row: dict) -> bool:
        image = row[columns_of(row)[0]].strip()
        suffix = os.path.splitext(image)[1].lower()
        return suffix in SUFFIXES or bool(image and _find(image, root))

    for name, row in _rows(path, decode(path, data, encoding), is_row, notes):
        try:
            captions.add(*read_pair(row, columns_of, root))
        except ValueError as error:
            captions.problems.append(f"{path} {name}: {error}")
    if columns:
        summary = "{}: images from column {!r}, captions from column {!r}".format(path, *columns)
        if notes:
            summary += (
                f"; double quotes are ordinary characters in {len(notes):,} rows, the first is"
                f" {notes[0]}"
            )
        captions.summaries.append(summary)


def _rows(
    path: str, text: str, is_row: Callable[[dict], bool], notes: list[str]
) -> Iterator[tuple[str, Any]]:
    """Yield the name and the value of each row of a table, see `read_csv`."""
    start = text.lstrip()[:1]
    if start == "[":
        for number, entry in enumerate(read_json_list(path)):
            yield f"entry {number} (counting from 0)", entry
    elif start == "{":
        yield from read_json_lines(text)
    elif start:
        yield from read_csv(text, is_row, notes)


def _find(image: str, image_root: str) -> str | None:
    """Return the spelling of a path, with slashes or backslashes, that is a file, else None."""
    spellings = image, image.replace("\\", "/")
    return next(
        (name for name in spellings if os.path.isfile(os.path.join(image_root, name))), None
    )


def read_pair(
    row: Any, columns_of: Callable[[dict], tuple[str, str]], image_root: str
) -> tuple[str, list[str]]:
    """Return the image path and captions of a row. Raises ValueError if the row is unusable."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    columns = columns_of(row)
    image, texts = map(row.get, columns)
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"{columns[0]!r} is empty or not text")
    found = _find(image.strip(), image_root)
    if found is None:
        raise ValueError(
            f"image {os.path.join(image_root, image.strip())} does not exist; paths are"
            " relative to --image_root"
        )
    texts = _clean(texts if isinstance(texts, list) else [texts])
    if not texts:
        raise ValueError(f"{columns[1]!r} is empty or not text")
    return os.path.normpath(found), texts


def _clean(texts: list) -> list[str]:
    """Return texts on one line each, [] if one of them is blank or not a text."""
    if not all(
        isinstance(text, str) and not is_blank(pre_caption(text, MAX_WORDS)) for text in texts
    ):
        return []
    return [" ".join(without_halves(text).split()) for text in texts]


def read_folder(folder: str, captions: Captions) -> None:
    """Read the images of a folder and its subfolders with the captions in files beside them.

    As in shards, captions are the .txt file of the image's name, else "caption" in the .json file.

    Args:
        folder: The folder.
        captions: Collection that the captions are added to.
    """
    problems = captions.problems
    for parent, folders, names in os.walk(folder):
        folders.sort()
        there, stems = set(names), set()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            stems.add(stem)
            path = os.path.join(parent, name)
            try:
                sample = {"__key__": stem, "jpg": b""}
                for kind in CAPTION_SUFFIXES:
                    if f"{stem}.{kind}" in there:
                        sample[kind] = read_regular(os.path.join(parent, f"{stem}.{kind}"))
                texts = _clean(image_and_captions(sample, path)[1])
                if not texts:
                    raise InputError(f"{path}: its caption is empty")
                captions.add(os.path.relpath(path, captions.image_root or os.curdir), texts)
            except OSError as error:
                problems.append(f"{path}: its caption cannot be read ({error.strerror})")
            except InputError as error:
                problems.append(str(error))
        problems += [
            f"{os.path.join(parent, name)}: no image of this name has one of the formats"
            f" {', '.join(FORMATS)}"
            for name in sorted(names)
            if name.endswith(".txt") and name[:-4] not in stems
        ]
    captions.summaries.append(
        f"{folder}: captions from .txt and .json files that are named like the images"
    )
