"""Annotation files: the forms of their entries, checks, and messages that name file and entry."""

import codecs
import hashlib
import itertools
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self, TypeVar

import msgspec

from dataset.official import advice
from dataset.text import MAX_WORDS, is_blank, pre_caption
from utils import InputError, read_regular

T = TypeVar("T")
E = TypeVar("E", bound="Entry")
V = TypeVar("V", bound="Identified")
Texts = Annotated[list[str], msgspec.Meta(min_length=1)]

_SPACE = " \t\n\r"  # JSON's white space
_BLOCK = 1 << 16  # bytes that are decoded at a time
_COMMA = re.compile(rb"(?<=\}),(?=\s*\{)")  # between two objects


class Entry(msgspec.Struct, gc=False):
    """Base class of the forms of entries: fields, their types, and checks.

    A subclass defines `image` or `images`, `texts`, and `wanted`, the form for messages.
    """

    wanted: ClassVar[str]
    max_words: ClassVar[int] = MAX_WORDS  # limit of a text if max_words is not set
    # limit of token ids if max_tokens is not set; None: the model's limit
    max_tokens: ClassVar[int | None] = None

    @property
    def root(self) -> str:
        """The configuration key of the folder that the image paths start from."""
        return "image_root"

    @property
    def images(self) -> list[str]:
        """The paths of the images."""
        return [self.image]  # ty: ignore[missing-attribute]  # a field of most subclasses

    @property
    def texts(self) -> list[str]:
        """All texts. A blank one is an error."""
        raise NotImplementedError

    @classmethod
    def clean(cls, text: str, max_words: int | None = None) -> str:
        """Clean up one of `texts` as a model reads it."""
        return pre_caption(text, max_words or cls.max_words)

    def check(self, first: Self) -> None:
        """Raise InputError if a text is blank; subclasses may check more.

        `first` is the first entry of the list.
        """
        for text in self.texts:
            if is_blank(self.clean(text)):
                raise InputError(f"its text {reprlib.repr(text)} is empty after clean-up")


def check_entry(
    value: Any, form: type[E], path: Path | str, number: int, *, first: E | None = None
) -> E:
    """Convert a JSON value to an entry and check it.

    Args:
        value: Value of a JSON list.
        form: Class of the entry.
        path: File of the list, for messages.
        number: Index of the value in the list.
        first: First entry of the list, for comparison.

    Returns:
        The entry.

    Raises:
        InputError: The value has another form; the message names the entry and the wrong field.
    """
    try:
        entry = msgspec.convert(value, form)
        entry.check(first or entry)
        return entry
    # UnicodeEncodeError if a refused value has half of a surrogate pair
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        problem = _without_ticks(error).replace("'$.", "'")
    except InputError as error:
        problem = str(error)
    shown = reprlib.repr(value)
    raise InputError(
        f"{where(path, number)}: {problem} in {shown}; correct or remove the entry ({form.wanted})"
    )


def where(path: Path | str, number: int) -> str:
    """Return the name of an entry of an annotation file for error messages."""
    return f"{path}: entry {number} (counting from 0)"


def read_entries(
    path: Path | str,
    form: type[E],
    *,
    refuse: Callable[[int, InputError], None] | None = None,
) -> Iterator[E]:
    """Iterate over the entries of a JSON list, and check each of them.

    Args:
        path: File of the list.
        form: Class of the entries.
        refuse: Function (number, error) for each wrong entry, which becomes None in the result. By
            default the first error is raised.

    Yields:
        The entries.

    Raises:
        InputError: The file cannot be read, is not a JSON list, is empty, or has a wrong entry.
    """
    return itertools.chain.from_iterable(_read_blocks(path, form, refuse))


def _read_blocks(
    path: Path | str, form: type[E], refuse: Callable[[int, InputError], None] | None
) -> Iterator[list[E]]:
    """Yield the entries of `read_entries` in lists."""
    data, first, count = _read_list(path), None, 0
    try:
        for entries in _decode_blocks(data, form):
            first = first or entries[0]
            for entry in entries:
                entry.check(first)
            yield entries
            count += len(entries)
        return
    # a mistake, or a value that only Python's json reads, such as NaN or half a surrogate pair
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InputError):
        pass
    for number, value in enumerate(_decode_list(data, path)[count:], count):
        try:
            entry = check_entry(value, form, path, number, first=first)
        except InputError as error:
            if refuse is None:
                raise
            refuse(number, error)
            entry = None
        yield [entry]  # ty: ignore[invalid-yield]  # None only if `refuse` is given
        first = first or entry


def _decode_blocks(data: bytes, form: type[E]) -> Iterator[list[E]]:
    """Decode a JSON list in blocks that fit the processor's cache, which halves the time.

    A block ends between two entries. A cut inside a string or a nested object leaves a block that
    is no list; then the rest of the list is one block.

    Raises what msgspec raises, also if the list is empty.
    """

    def decode(block: bytes) -> list[E]:
        # msgspec accepts bytes that are not UTF-8 in fields that it skips
        if not block.isascii():
            block.decode()
        return decoder.decode(block)

    whole = Annotated[list[form], msgspec.Meta(min_length=1)]  # ty: ignore[invalid-type-form]
    decoder = msgspec.json.Decoder(whole)
    data, start, opening = data.removeprefix(codecs.BOM_UTF8), 0, b""
    while comma := _COMMA.search(data, start + _BLOCK):
        try:
            entries = decode(opening + data[start : comma.start()] + b"]")
        except msgspec.MsgspecError:
            break
        yield entries
        start, opening = comma.end(), b"["
    yield decode(opening + data[start:])


def read_json_list(path: Path | str) -> list:
    """Read the values of a JSON list.

    Raises InputError if the file cannot be read, is not a JSON list or is empty.
    """
    return _decode_list(_read_list(path), path)


def _read_list(path: Path | str) -> bytes:
    """Return the bytes of an annotation file. Raises InputError."""
    refuse_shard(path)
    try:
        return read_regular(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _decode_list(data: bytes, path: Path | str) -> list:
    """Return the values of a JSON list by Python's json. Raises InputError with the position."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        cut_short = error.reason == "unexpected end of data"
        remedy = " and seems cut short; copy it again" if cut_short else "; save it as UTF-8 JSON"
        raise InputError(f"{path}: this annotation file is not UTF-8 text{remedy}") from None
    start = text.lstrip(_SPACE)[:1]
    values = []
    if start == "[":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            cut_short = not text.rstrip(_SPACE).endswith("]")
            remedy = (
                ", the file seems cut short; copy it again" if cut_short else "; correct it there"
            )
            raise InputError(
                f"{path}: invalid JSON at line {error.lineno} column {error.colno} ({error.msg})"
                f"{remedy}"
            ) from None
        # nested too deeply, or a number of thousands of digits
        except (RecursionError, ValueError) as error:
            raise InputError(f"{path}: invalid JSON ({error}); correct it") from None
    if not values:
        _refuse_content(path, start)
    return values


def _refuse_content(path: Path | str, start: str) -> None:
    """Raise InputError for a file without entries. start: its first character, if any."""
    if start == "{":
        lines = (
            "holds a JSON object, not a list of entries; if it has one JSON object per line,"
            f" convert it with jq -s . {path} > list.json"
        )
        raise InputError(f"{path}: {advice(path) or lines}")
    problem = {"": "is empty", "[": "is an empty list"}.get(start, "is not a JSON list")
    raise InputError(
        f'{path}: {problem}, but an annotation file is a list of entries [{{"image": ..., ...}},'
        " ...]; to convert tables, folders or official files, run python -m tools.to_json"
    )


def refuse_shard(path: Path | str) -> None:
    """Raise InputError if a list is named like a WebDataset shard."""
    if os.fspath(path).endswith(".tar"):
        raise InputError(
            f"{path}: is a WebDataset shard; only train_file of pre-training and of text"
            " assignment may name shards"
        )


def unreadable(path: Path | str, error: OSError) -> InputError:
    """Return the InputError for an OSError of a data file."""
    return InputError(
        f"{path}: cannot read this file ({error.strerror}); correct its path in the config"
        " (relative paths start at the working directory)"
    )


# --------------------------------------------------------------------------------------------------
# small JSON files


def read_json(path: Path | str, form: type[T] | Any, remedy: str) -> T:
    """Read a small JSON file.

    Args:
        path: The file.
        form: Type of the content, supported by msgspec.
        remedy: End of the error message.

    Returns:
        The content as an object of `form`.

    Raises:
        InputError: The file cannot be read or has another form.
    """
    try:
        content = msgspec.json.decode(read_regular(path).removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None
    return as_form(content, form, path, remedy)


def as_form(value: Any, form: type[T] | Any, where: Path | str, remedy: str) -> T:
    """Convert a value of a file to `form`, a type that msgspec supports.

    Raises InputError, which begins with `where`.
    """
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_without_ticks(error)}; {remedy}") from None


class ImageInfo(msgspec.Struct):
    """An image in a file of objects, in the form of COCO."""

    id: int
    height: Annotated[int, msgspec.Meta(ge=1)]
    width: Annotated[int, msgspec.Meta(ge=1)]
    file_name: str


BBox = Annotated[list[float], msgspec.Meta(min_length=4, max_length=4)]  # x, y, w, h in pixels


class Identified(Protocol):
    """A value with an id."""

    id: int


def by_id(values: Iterable[V], path: Path | str, what: str) -> dict[int, V]:
    """Return values by their attribute `id`.

    Raises InputError if two different values have one id; `what` names a value in the message.
    """
    found = {}
    for value in values:
        if found.setdefault(value.id, value) != value:
            raise InputError(
                f"{path}: {what} {value.id} occurs twice with different content; correct one of the"
                " two"
            )
    return found


def _without_ticks(error: Exception) -> str:
    """Return a message of msgspec with quotes in place of backticks."""
    return str(error).replace("`", "'")


def digest(value: Any) -> int:
    """Return a 64-bit hash of a value."""
    content = repr(value).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
