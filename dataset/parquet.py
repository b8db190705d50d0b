"""Reader of captions in Parquet tables, as Hugging Face data sets publish them.

A row has an image, {bytes, path}, bytes or a path, and one or several captions. The bytes of images
are written to files.
"""

import importlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dataset.images import FORMATS
from dataset.official import SPLITS
from dataset.tables import Captions, find_columns, read_pair
from utils import InputError, TrainingStopped, atomic_write, hash_contents, open_regular

NAMES = {**SPLITS, "validation": "val", "valid": "val"}  # splits by their names in data sets
SPLIT_COLUMN = "split"
ROWS = 64  # rows in memory, with their images


class Columns(NamedTuple):
    """Columns of a table.

    Attributes:
        image: Column of the images.
        text: Name of the captions.
        texts: Columns of the captions, several if they are numbered.
        split: Whether there is a column of splits.
    """

    image: str
    text: str
    texts: list[str]
    split: bool

    def names(self) -> list[str]:
        """Return the columns to read."""
        return [self.image, *self.texts, *[SPLIT_COLUMN] * self.split]


def is_parquet(source: str) -> bool:
    """Return whether a source is a Parquet table by its name."""
    return source.lower().endswith(".parquet")


def read_parquet(
    source: str,
    captions: Captions,
    folder: Path,
    *,
    image_column: str | None = None,
    text_column: str | None = None,
) -> None:
    """Read a Parquet table and write the images that it holds.

    The split of a row is in the column `split`, else in the name of the file, as in
    `validation-00000-of-00002.parquet` or `test/0000.parquet`, else it is train.

    Args:
        source: File of the table.
        captions: Collection that the captions are added to.
        folder: Folder of the written images, which are named by their content.
        image_column: Column of the images, by default recognized by its type or name.
        text_column: Column of the captions, by default recognized by its name. NAME reads
            NAME_0, NAME_1, ... if there is no such column.

    Raises:
        InputError: The table cannot be read.
        TrainingStopped: An image cannot be written.
    """
    with _open(source) as table:
        columns = _find_columns(source, table.schema_arrow, image_column, text_column)
        named = _split_of_name(source)
        captions.summaries.append(_describe(source, columns, named))
        for number, row in enumerate(_rows(source, table, columns.names()), 1):
            try:
                split = _split_of_row(row, columns, named)
                image, texts = _pair(row, columns, captions.image_root, folder)
                captions.add(image, texts, split)
            except ValueError as error:
                captions.problems.append(f"{source} row {number}: {error}")


def _open(source: str) -> Any:
    """Open a table, a pyarrow.parquet.ParquetFile. Raises InputError."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")  # an optional requirement
        return parquet.ParquetFile(open_regular(source))
    except ImportError:
        raise InputError(f"{source}: Parquet files need pyarrow; run pip install pyarrow") from None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: cannot be read as a Parquet file ({error}); name an undamaged file"
        ) from None


def _rows(source: str, table: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as {column: value}. Raises InputError."""
    try:
        for batch in table.iter_batches(ROWS, columns=names):
            yield from batch.to_pylist()
    # a damaged page raises OSError, text that is not UTF-8 ValueError
    except (OSError, ValueError) as error:
        raise InputError(f"{source}: cannot be read ({error}); download the file again") from None


def _find_columns(
    source: str, schema: Any, image_column: str | None, text_column: str | None
) -> Columns:
    """Return the columns of a table. Raises InputError if there are none."""
    types = {field.name: str(field.type) for field in schema}
    # a type such as struct<bytes: binary, path: string>, or binary
    holding = [name for name, kind in types.items() if re.match(r"(struct<.*)?\w*binary", kind)]
    numbered: dict[str, list[str]] = {}
    for name in types:
        if match := re.fullmatch(r"(.*\D)_?\d+", name):
            numbered.setdefault(match[1].rstrip("_"), []).append(name)
    image, text = find_columns(
        [*types, *(name for name in numbered if name not in types)],
        image_column or next(iter(holding), None),
        text_column,
        source,
    )
    texts = [text] if text in types else numbered[text]
    return Columns(image, text, texts, SPLIT_COLUMN in types)


def _split_of_name(source: str) -> str | None:
    """Return the split that the name of a file begins with, or its folder if it is a number."""
    path = Path(source)
    name = path.parent.name if path.stem.isdecimal() else re.split(r"[-_.]", path.stem)[0]
    return NAMES.get(name.lower())


def _describe(source: str, columns: Columns, named: str | None) -> str:
    """Return a line with the columns and the split of a table."""
    texts = f"column{'s' * (len(columns.texts) > 1)} {', '.join(map(repr, columns.texts))}"
    split = f"; split {named} from the name of the file" if named else ""
    split = f"; splits from column {SPLIT_COLUMN!r}" if columns.split else split
    return f"{source}: images from column {columns.image!r}, captions from {texts}{split}"


def _split_of_row(row: dict[str, Any], columns: Columns, named: str | None) -> str:
    """Return the split of a row. Raises ValueError if it is unknown."""
    if not columns.split:
        return named or "train"
    if row[SPLIT_COLUMN] not in NAMES:
        raise ValueError(f"its {SPLIT_COLUMN} {row[SPLIT_COLUMN]!r} is unknown")
    return NAMES[row[SPLIT_COLUMN]]


def _pair(
    row: dict[str, Any], columns: Columns, image_root: str, folder: Path
) -> tuple[str, list[str]]:
    """Return the path and captions of a row. Raises ValueError if the row is unusable."""
    image, texts = row[columns.image], [row[name] for name in columns.texts]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        image = os.path.relpath(_write_image(image, folder), image_root or os.curdir)
    text = texts[0] if len(texts) == 1 else [text for text in texts if text is not None]
    names = columns.image, columns.text
    return read_pair(dict(zip(names, (image, text), strict=True)), lambda _: names, image_root)


def _write_image(data: bytes, folder: Path) -> Path:
    """Write an image and return its path. Raises ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            suffix = str(image.format).lower().replace("jpeg", "jpg")
    except Exception:  # on broken data Pillow raises SyntaxError, struct.error and more
        raise ValueError(
            f"its image is damaged, or its format is none of {', '.join(FORMATS)}"
        ) from None
    path = folder / f"{hash_contents([data])}.{suffix}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)
    except OSError as error:
        raise TrainingStopped(f"cannot write {path}: {error.strerror}") from None
    return path
