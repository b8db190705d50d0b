"""Annotation files: a streaming reader of JSON lists, and their entries in arrays that processes
share.

A list of 14 million pairs as Python objects takes several gigabytes, in every data worker of every
rank. Here each entry, reduced to the fields of its form, is a line of JSON in the file NAME.jsonl.
The array NAME.index holds the position and checksum of each line. Both files are mapped into
memory, and all processes of a machine share the pages. They are made once and kept in a cache
folder. Each line is compared with its checksum when it is read; to compare whole files would take
seconds at every start.

Python's json reads the lists in pieces. msgspec checks the entries, but it needs a whole list in
memory, and it refuses NaN and halves of surrogate pairs, which Python writes.
"""

import codecs
import functools
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import reprlib
import zlib
from array import array
from typing import Annotated, ClassVar, NamedTuple

import msgspec
import numpy as np

from dataset.cache import load_cached, locate, unreadable
from dataset.official import advice
from dataset.text import MAX_WORDS, is_blank, pre_caption
from utils import (
    InputError,
    TrainingStopped,
    atomic_write,
    hash_contents,
    open_regular,
    read_regular,
)

_CHUNK = 1 << 22  # characters of an annotation file in memory at a time
_BATCH = 1 << 12  # entries that are checked and written at a time
_CUT_SHORT = "seems cut short: copy it again"
# characters, more than in any token or escape sequence that the end of a chunk can cut
_LONGEST_TOKEN = 16

_DECODER = json.JSONDecoder()
_ENCODER = msgspec.json.Encoder()
_SPACE = " \t\n\r"  # JSON's white space
_OPENING = re.compile(rf"[{_SPACE}]*\[[{_SPACE}]*(\]?)")
_SEPARATOR = re.compile(rf"[{_SPACE}]*([,\]]?)[{_SPACE}]*")


Texts = Annotated[list[str], msgspec.Meta(min_length=1)]


class Entry(msgspec.Struct):
    """The form of a list's entries: its fields and their types.

    A subclass has `texts`, all texts of an entry, and `wanted`, the form in the words of messages.
    No text may be blank.
    """

    wanted: ClassVar[str]
    max_words: ClassVar[int] = MAX_WORDS  # of a text, unless the configuration has max_words
    # ids of a text, unless the configuration has max_tokens; None: the model's limit
    max_tokens: ClassVar[int | None] = None

    @property
    def root(self):
        """The configuration key of the folder that the image paths start from."""
        return "image_root"

    @property
    def images(self):
        """The paths of the images."""
        return [self.image]

    @classmethod
    def clean(cls, text: str, max_words: int | None = None) -> str:
        """Return one of `texts` as a model reads it."""
        return pre_caption(text, max_words or cls.max_words)

    def check(self):
        """Raise InputError, without the place, if a text is blank. Subclasses may check more."""
        for text in self.texts:
            if is_blank(self.clean(text)):
                raise InputError(
                    f"its text {reprlib.repr(text)} is empty after clean-up", "empty text"
                )

    def check_with(self, first: "Entry") -> None:
        """Raise InputError, without the place, if this entry and the first one cannot be in the
        same list.
        """


def check_entry(entry, form, path, number, first=None):
    """Convert a value of a list to `form`, an Entry. Raises InputError that names the wrong field.

    first: the list's first entry, converted, to compare this one with.
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
            missing, null = (
                problem.startswith("Object missing"),
                "got 'null'" in problem and not field[2],
            )
            kind = (
                f"no '{field[1]}'"
                if missing
                else f"'{field[1]}' is null"
                if null
                else f"wrong '{field[1]}'"
            )
    except InputError as error:
        problem, kind = str(error), error.kind
    shown = reprlib.repr(entry)
    raise InputError(
        f"{where(path, number)}: {problem} in {shown}; {form.wanted}: correct or remove the entry",
        kind,
    )


def where(path, number):
    """Return the name of an entry of an annotation file for error messages."""
    return f"{path}: entry {number} (counting from 0)"


class Entries:
    """The entries of one or several JSON lists, joined in order, as objects of `form`, an Entry.

    The first use of a list checks all its entries and writes them to the cache. They are written
    again if the file changes or the cache is damaged. A pickle holds only names. Raises InputError
    as `read_json_list` and `check_entry` do.
    """

    def __init__(self, files, form, names=None):
        if not files:
            raise InputError(
                "train_file: no annotation file is given; name at least one in the config"
            )
        self.files, self.form = [os.fspath(file) for file in files], form
        for file in self.files:
            _refuse_shard(file)
        if names:
            self._stores = [
                _open(name) or self._repair(file, name) for file, name in enumerate(names)
            ]
        else:
            self._stores = _load(self.files, form)
        self._ends = list(itertools.accumulate(len(store.index) - 1 for store in self._stores))

    def __reduce__(self):
        return Entries, (self.files, self.form, [store.name for store in self._stores])

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, i):
        file, number = locate(i, self._ends)
        line = self._stores[file].read(number)
        if line is None:
            self._stores[file] = self._repair(file, self._stores[file].name)
            line = self._stores[file].read(number)
        return self.form(*json.loads(line))

    def _repair(self, file, name):
        """Open a list's damaged store: compare all lines, and build the store again if one differs.

        Raises TrainingStopped.
        """
        try:
            (store,) = _load(self.files[file : file + 1], self.form, whole=True)
        except InputError as error:  # training would take an InputError for that of one entry
            raise TrainingStopped(str(error)) from None
        if store.name != name:
            raise TrainingStopped(
                f"{self.files[file]}: has changed since the run started: put it back as it was, and continue "
                "with --resume"
            )
        return store

    def digest(self) -> str:
        """Return a digest of all entries, 16 hexadecimal digits, computed from the checksums of
        their lines.
        """
        return hash_contents(np.ascontiguousarray(store.index) for store in self._stores)

    def where(self, i):
        """Return the file and number of entry i for error messages."""
        file, number = locate(i, self._ends)
        return where(self.files[file], number)


class _Store(NamedTuple):
    """The cached entries of a list."""

    name: str  # path of the files in the cache folder, without suffix
    lines: np.ndarray  # bytes
    index: np.ndarray  # (start, checksum) of each line, and the end of the last one

    def read(self, number):
        """Return the bytes of a line, None if they do not match its checksum."""
        (start, checksum), (end, _) = self.index[number : number + 2].tolist()
        line = self.lines[start:end].tobytes()
        return line if _checksum(line) == checksum else None


def _load(files, form, whole=False):
    """Return the _Store of each file, built if it is missing; with `whole` also if one of its lines
    is damaged.
    """
    # the code of `form` and of the clean-up decides which entries are accepted
    version = [
        [(field.name, str(field.type)) for field in msgspec.structs.fields(form)],
        _source(form),
        _source(pre_caption),
    ]
    build, load = functools.partial(_build, form=form), functools.partial(_open, whole=whole)
    return load_cached(files, form.__name__, build, load, version)


def _source(definition):
    """Return the source of the module of a class or function, None in a notebook."""
    try:
        return inspect.getsource(inspect.getmodule(definition))
    except (OSError, TypeError):
        return None


def _open(name, whole=False):
    """Return the cached _Store, None if it is missing or damaged; with `whole` compare every line."""
    try:
        lines = np.memmap(f"{name}.jsonl", np.uint8, "r").view(np.ndarray)
        index = np.memmap(f"{name}.index", _index_type(len(lines)), "r").view(np.ndarray)
    except (OSError, ValueError):
        return None
    store = _Store(name, lines, index)
    if index["start"][-1] != len(lines) or (
        whole and None in map(store.read, range(len(index) - 1))
    ):
        return None
    return store


def _index_type(size):
    """Return the dtype of the index of a store with `size` bytes."""
    return np.dtype([("start", np.min_scalar_type(size)), ("checksum", np.uint32)])


def _checksum(line):
    # from 1: an index of zeros, from a lost block, must not match an empty line
    return zlib.crc32(line, 1)


def _build(job, form):
    """Check the entries of a list and write them: job is (path, name in the cache folder)."""
    path, name = job
    entries, first, end, starts, checksums = read_json_list(path), None, 0, array("q"), array("I")
    with atomic_write(f"{name}.jsonl") as file:
        for number in itertools.count(0, _BATCH):
            batch = [entry for _, entry in itertools.islice(entries, _BATCH)]
            if not batch:
                break
            first = first or check_entry(batch[0], form, path, number)
            for line in _json_lines(_checked(batch, form, path, number, first)).splitlines(
                keepends=True
            ):
                file.write(line)
                starts.append(end)
                checksums.append(_checksum(line))
                end += len(line)
    index = np.zeros(len(starts) + 1, _index_type(end))
    index["start"][:-1], index["start"][-1], index["checksum"][:-1] = starts, end, checksums
    with atomic_write(f"{name}.index") as file:  # last: a complete store has both files
        file.write(index.tobytes())


def _checked(batch, form, path, number, first):
    """Convert the entries of a batch to `form`. number: of its first entry; first: the list's first
    entry.
    """
    try:
        checked = msgspec.convert(batch, list[form])
        for entry in checked:
            entry.check()
            entry.check_with(first)
        return checked
    except (msgspec.ValidationError, InputError):
        # names the entry
        return [check_entry(entry, form, path, number + i, first) for i, entry in enumerate(batch)]


def _json_lines(entries):
    """Return entries as lines of JSON, without field names."""
    values = list(map(msgspec.structs.astuple, entries))
    try:
        return _ENCODER.encode_lines(values)
    # halves of surrogate pairs, integers of more than 64 bits
    except (UnicodeEncodeError, OverflowError):
        return "".join(json.dumps(value) + "\n" for value in values).encode()


def digest(value):
    """64 bits that stand for a value."""
    return int.from_bytes(
        hashlib.blake2b(repr(value).encode(errors="surrogatepass"), digest_size=8).digest(),
        "little",
    )


def read_json(path, form, remedy):
    """A small JSON file as an object of `form`, a type that msgspec knows. Raises InputError."""
    try:
        content = msgspec.json.decode(read_regular(path).removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from None
    return as_form(content, form, path, remedy)


def as_form(value, form, where, remedy):
    """A value of a file as an object of `form`, a type that msgspec knows.

    Raises InputError, which begins with `where`.
    """
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {_without_ticks(error)}; {remedy}") from None


def by_id(values, path, what):
    """Return {id: value}.

    Raises InputError if two different values have one id; `what` names a value in the message.
    """
    found = {}
    for value in values:
        if found.setdefault(value.id, value) != value:
            raise InputError(
                f"{path}: {what} {value.id} occurs twice, with different content: correct one of them"
            )
    return found


def _without_ticks(error):
    """A message of msgspec, in which names stand as in Python's."""
    return str(error).replace("`", "'")


def read_json_list(path):
    """Yield (number, value) for the values of a JSON list, counted from 0, without holding the file
    in memory.

    Raises InputError if the file cannot be read, is not valid JSON, not a list or empty.
    """
    _refuse_shard(path)
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as file:
            yield from enumerate(_decode_list(file, path))
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        cut_short = error.reason == "unexpected end of data"
        remedy = f"it {_CUT_SHORT}" if cut_short else "save it as UTF-8 JSON"
        raise InputError(f"{path}: this annotation file is not UTF-8 text; {remedy}") from None


def _refuse_shard(path):
    if os.fspath(path).endswith(".tar"):
        raise InputError(
            f"{path}: is a WebDataset shard; only train_file of pre-training and text assignment"
            " reads shards"
        )


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
            # A chunk may end inside the entry: then the error is at its end, or a string has no end
            # yet.
            cut = end > len(text) - _LONGEST_TOKEN or problem.startswith("Unterminated string")
            complete = at_end or not cut
        # nested too deeply, or a number of thousands of digits
        except (RecursionError, ValueError) as error:
            problem, end, complete = str(error), pos, True
        if not complete:
            line, column = _advance(text, pos, line, column)
            # doubling, so that a long entry takes linear time
            more = file.read(max(_CHUNK, len(text) - pos))
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
        raise InputError(
            f"{path}: invalid JSON at line {line} column {column} ({problem}); {remedy}"
        )


def _opening(text, path):
    """Position of the first element of the JSON list that `text` begins with."""
    opening = _OPENING.match(text)
    if opening and not opening[1]:
        return opening.end()
    start = text.lstrip(_SPACE)[:1]
    if start == "{":
        raise InputError(
            f"{path}: "
            + (
                advice(path)
                or "holds a JSON object, not a list of entries; if it is JSON lines (an "
                f"object a line), convert it: jq -s . {path} > list.json"
            )
        )
    found = "is an empty list" if opening else "is not a JSON list" if start else "is empty"
    raise InputError(
        f'{path}: {found}; an annotation file is a list of entries: [{{"image": ..., ...}}, ...]. '
        "python -m dataset.to_json converts tables, folders and official files"
    )


def _advance(text, pos, line, column):
    """Line and column of text[pos], given those of text[0]."""
    newlines = text.count("\n", 0, pos)
    return line + newlines, pos - text.rfind("\n", 0, pos) if newlines else column + pos
