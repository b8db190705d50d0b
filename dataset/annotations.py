"""Annotation files: a streaming reader of JSON lists, and their entries in arrays that processes share.

A list of 14 million pairs as Python objects takes several gigabytes, in every data worker of every rank. Here its entries,
reduced to the fields of their form, are lines of JSON in one file, NAME.jsonl, whose positions are an array, NAME.npy. Both are
mapped into memory, and all processes of a machine share the pages. They are made once and kept in a cache folder.

The lists are read by Python's json, in pieces: msgspec, which checks the entries, needs a whole list in memory, and refuses NaN
and halves of surrogate pairs, which Python writes.
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import re
import reprlib
from array import array
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from dataset.cache import load_cached, locate, unreadable
from dataset.official import advice
from dataset.text import MAX_WORDS, is_blank, pre_caption
from utils import InputError, atomic_write

_CHUNK = 1 << 22  # characters of an annotation file in memory at a time
_BATCH = 1 << 12  # entries that are checked and written at a time
_CUT_SHORT = "seems cut short: copy it again"
_LONGEST_TOKEN = 16  # characters, more than in any token or escape sequence that the end of a chunk can cut

_DECODER = json.JSONDecoder()
_ENCODER = msgspec.json.Encoder()
_SPACE = " \t\n\r"  # all that JSON takes for white space
_OPENING = re.compile(rf"[{_SPACE}]*\[[{_SPACE}]*(\]?)")
_SEPARATOR = re.compile(rf"[{_SPACE}]*([,\]]?)[{_SPACE}]*")


Texts = Annotated[list[str], msgspec.Meta(min_length=1)]


class Entry(msgspec.Struct):
    """The form of a list's entries: its fields and their types.

    A subclass has `texts`, all texts of an entry, of which none may be blank, and `wanted`, the form in the words of messages.
    """

    wanted: ClassVar[str]

    @property
    def root(self):
        """The key of the configuration whose folder the paths of the images start from."""
        return "image_root"

    @property
    def images(self):
        """The paths of the images."""
        return [self.image]

    def clean(self, text):
        """One of `texts` as a model reads it."""
        return pre_caption(text, MAX_WORDS)

    def check(self):
        """Raise InputError, without the place, for what the types do not say."""
        for text in self.texts:
            if is_blank(self.clean(text)):
                raise InputError(f"its text {reprlib.repr(text)} is empty after clean-up", "empty text")

    def check_with(self, first: "Entry") -> None:
        """Raise InputError, without the place, if this entry and the first one cannot be in the same list."""


def check_entry(entry, form, path, number, first=None):
    """A value of a list as an object of `form`, an Entry. Raises InputError, which says what is wrong in which field.

    first: the list's first entry, as an object of `form`. Default: not compared.
    """
    try:
        checked = msgspec.convert(entry, form)
        checked.check()
        if first is not None:
            checked.check_with(first)
        return checked
    except msgspec.ValidationError as error:
        problem = _without_ticks(error).replace("'$.", "'")
        kind, field = "no object", re.search(r"'(\w+)((?:\[\d+\])?)'$", problem)
        if field and isinstance(entry, dict):
            missing, null = problem.startswith("Object missing"), "got 'null'" in problem and not field[2]
            kind = f"no '{field[1]}'" if missing else f"'{field[1]}' is null" if null else f"wrong '{field[1]}'"
    except InputError as error:
        problem, kind = str(error), error.kind
    shown = reprlib.repr(entry)
    raise InputError(f"{where(path, number)}: {problem} in {shown}; {form.wanted}: correct or remove the entry", kind)


def where(path, number):
    """How error messages name an entry of an annotation file."""
    return f"{path}: entry {number} (counting from 0)"


class Entries:
    """The entries of one or several JSON lists, joined in order, as objects of `form`, an Entry.

    The first use of a list checks all its entries and fills the cache, until the file changes. A pickle holds only names.
    Raises InputError for what `read_json_list` and `check_entry` refuse.
    """

    def __init__(self, files, form, names=None):
        if not files:
            raise InputError("train_file: no annotation file is given; name at least one in the config")
        self.files, self.form = [os.fspath(file) for file in files], form
        build = functools.partial(_build, form=form)
        stores = map(_open, names) if names else load_cached(self.files, form.__name__, build, _open)
        self._names, self._lines, self._offsets = zip(*stores)
        self._ends = list(itertools.accumulate(len(offsets) - 1 for offsets in self._offsets))

    def __reduce__(self):
        return Entries, (self.files, self.form, self._names)

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, i):
        file, number = locate(i, self._ends)
        start, end = self._offsets[file][number : number + 2].tolist()
        return self.form(*json.loads(self._lines[file][start:end].tobytes()))

    def where(self, i):
        """File and number of entry i, for error messages."""
        file, number = locate(i, self._ends)
        return where(self.files[file], number)


def _open(name):
    """(name, lines, offsets of the lines and of their end) of what is in the cache, None if it is not there or damaged."""
    try:
        lines = np.memmap(f"{name}.jsonl", np.uint8, "r").view(np.ndarray)
        offsets = np.load(f"{name}.npy", mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError, EOFError):
        return None
    return (name, lines, offsets) if offsets[-1] == len(lines) else None


def _build(job, form):
    """Check the entries of a list and write them: job is (path, name in the cache folder)."""
    path, name = job
    entries, offsets, first = read_json_list(path), array("q", [0]), None
    with atomic_write(f"{name}.jsonl") as file:
        for number in itertools.count(0, _BATCH):
            batch = [entry for _, entry in itertools.islice(entries, _BATCH)]
            if not batch:
                break
            first = first or check_entry(batch[0], form, path, number)
            lines = _json_lines(_checked(batch, form, path, number, first))
            file.write(lines)
            ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n")) + 1 + offsets[-1]
            offsets.frombytes(ends.astype(np.int64).tobytes())
    with atomic_write(f"{name}.npy") as file:  # what is complete has both
        np.save(file, np.asarray(offsets).astype(np.min_scalar_type(offsets[-1])))


def _checked(batch, form, path, number, first):
    """The entries of a batch as objects of `form`; number: that of its first one; first: the first one of the list."""
    try:
        checked = msgspec.convert(batch, list[form])
        for entry in checked:
            entry.check()
            entry.check_with(first)
        return checked
    except (msgspec.ValidationError, InputError):
        return [check_entry(entry, form, path, number + i, first) for i, entry in enumerate(batch)]  # which says where


def _json_lines(entries):
    """Entries, without the names of their fields, as lines of JSON."""
    values = list(map(msgspec.structs.astuple, entries))
    try:
        return _ENCODER.encode_lines(values)
    except (UnicodeEncodeError, OverflowError):  # halves of surrogate pairs, integers of more than 64 bits
        return "".join(json.dumps(value) + "\n" for value in values).encode()


def digest(value):
    """64 bits that stand for a value."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def read_json(path, form, remedy):
    """A small JSON file as an object of `form`, a type that msgspec knows. Raises InputError."""
    try:
        content = msgspec.json.decode(Path(path).read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None
    return as_form(content, form, path, remedy)


def as_form(value, form, where, remedy):
    """A value of a file as an object of `form`, a type that msgspec knows. Raises InputError, which begins with `where`."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_without_ticks(error)}; {remedy}") from None


def _without_ticks(error):
    """A message of msgspec, in which names stand as in Python's."""
    return str(error).replace("`", "'")


def read_json_list(path):
    """Yield (number, value) for the values of a JSON list, counted from 0, without holding the file in memory.

    Raises InputError if the file cannot be read, is not valid JSON, not a list or empty.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from enumerate(_decode_list(file, path))
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        cut_short = error.reason == "unexpected end of data"
        remedy = f"it {_CUT_SHORT}" if cut_short else "save it as UTF-8 JSON"
        raise InputError(f"{path}: this annotation file is not UTF-8 text; {remedy}") from None


def _decode_list(file, path):
    """Yield the elements of the JSON list in a text file, reading it in chunks."""
    text = file.read(_CHUNK)
    at_end = not text
    while len(text.strip(_SPACE)) < 2 and not at_end:
        more = file.read(_CHUNK)
        text, at_end = text + more, not more
    pos = _opening(text, path)
    line = column = 1  # of text[0]
    while True:
        problem = None
        try:
            entry, end = _DECODER.raw_decode(text, pos)
            separator = _SEPARATOR.match(text, end)
            end = separator.end()
            complete = end < len(text) or at_end
        except json.JSONDecodeError as error:
            problem, end = error.msg, error.pos
            # A chunk may end inside the entry: then the error is at its end, or a string has no end yet.
            cut = end > len(text) - _LONGEST_TOKEN or problem.startswith("Unterminated string")
            complete = at_end or not cut
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            problem, end, complete = str(error), pos, True
        if not complete:
            line, column = _advance(text, pos, line, column)
            more = file.read(max(_CHUNK, len(text) - pos))  # doubling, so that a long entry takes linear time
            text, pos, at_end = text[pos:] + more, 0, not more
            continue
        if problem is None:
            yield entry
            pos = end
            if separator[1] == ",":
                continue
            if separator[1] and end == len(text):
                return
            problem = "Extra data after the list" if separator[1] else "Expecting ',' or ']'"
        line, column = _advance(text, end, line, column)
        cut_short = at_end and not text.rstrip(_SPACE).endswith("]")
        remedy = f"the file {_CUT_SHORT}" if cut_short else "correct it there"
        raise InputError(f"{path}: invalid JSON at line {line} column {column} ({problem}); {remedy}")


def _opening(text, path):
    """Position of the first element of the JSON list that `text` begins with."""
    opening = _OPENING.match(text)
    if opening and not opening[1]:
        return opening.end()
    start = text.lstrip(_SPACE)[:1]
    if start == "{":
        raise InputError(f"{path}: " + (advice(path) or "holds a JSON object, not a list of entries; if it is JSON lines (an "
                                        f"object a line), convert it: jq -s . {path} > list.json"))  # fmt: skip
    found = "is an empty list" if opening else "is not a JSON list" if start else "is empty"
    raise InputError(f'{path}: {found}; an annotation file is a list of entries: [{{"image": ..., ...}}, ...]')


def _advance(text, pos, line, column):
    """Line and column of text[pos], given those of text[0]."""
    newlines = text.count("\n", 0, pos)
    return line + newlines, pos - text.rfind("\n", 0, pos) if newlines else column + pos
