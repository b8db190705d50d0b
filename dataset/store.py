"""The entries of annotation files in arrays that all processes of a machine share.

A list of 14 million pairs as Python objects takes several gigabytes, in every data worker of every
rank. Here each entry, reduced to the fields of its form, is a line of JSON in the file NAME.jsonl,
and the array NAME.index holds the position and checksum of each group of lines. Both files are
mapped into memory. They are written once, to a cache folder. A group is compared with its checksum
when it is read; a comparison of whole files would take seconds at every start.
"""

import functools
import inspect
import itertools
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from dataset.cache import load_cached, locate
from dataset.entries import E, Entry, read_entries, refuse_shard, where
from dataset.text import pre_caption
from utils import InputError, TrainingStopped, atomic_write, hash_contents

_GROUP = 16  # entries with one checksum
_BATCH = 64 * _GROUP  # entries that are written at a time; they fit the processor's cache
_ENCODER = msgspec.json.Encoder()
_INDEX = np.dtype([("start", np.uint64), ("checksum", np.uint32)])  # of a group


class Entries(Sequence[E]):
    """The entries of one or several JSON lists, joined in order, as objects of `form`.

    The first use of a list checks all its entries and writes them to the cache. They are written
    again if the file changes or the cache is damaged. A pickle holds only names.

    Args:
        files: JSON lists.
        form: Class of the entries.
        names: Names of the stores to open, given by a pickle.

    Raises:
        InputError: No file is given, or `read_entries` refuses a file.
    """

    def __init__(
        self, files: Sequence[str], form: type[E], names: Sequence[str] | None = None
    ) -> None:
        if not files:
            raise InputError(
                "train_file: no annotation file is given; name at least one in the config"
            )
        self.files, self.form = [os.fspath(file) for file in files], form
        for file in self.files:
            refuse_shard(file)
        if names:
            self._stores = [
                _open(name) or self._repair(file, name) for file, name in enumerate(names)
            ]
        else:
            self._stores = _load(self.files, form)
        self._ends = list(itertools.accumulate(map(len, self._stores)))

    def __reduce__(self) -> tuple:
        return Entries, (self.files, self.form, [store.name for store in self._stores])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> E:  # ty: ignore[incompatible-method-override]  # no slices
        file, number = locate(i, self._ends)
        line = self._stores[file].read(number)
        if line is None:
            self._stores[file] = self._repair(file, self._stores[file].name)
            line = self._stores[file].read(number)
        # `_repair` has compared the line
        return self.form(*json.loads(line))  # ty: ignore[invalid-argument-type]

    def _repair(self, file: int, name: str) -> "_Store":
        """Open a damaged store: compare all of it, and build it again if it differs.

        Raises TrainingStopped if the list has changed or cannot be read.
        """
        try:
            (store,) = _load(self.files[file : file + 1], self.form, whole=True)
        except InputError as error:  # an InputError would make training skip the sample
            raise TrainingStopped(str(error)) from None
        if store.name != name:
            raise TrainingStopped(
                f"{self.files[file]}: has changed since the run started; restore it and"
                " continue with --resume"
            )
        return store

    def digest(self) -> str:
        """Return a digest of the checksums of all entries, 16 hexadecimal digits."""
        return hash_contents(np.ascontiguousarray(store.index) for store in self._stores)

    def where(self, i: int) -> str:
        """Return the file and number of entry i for error messages."""
        file, number = locate(i, self._ends)
        return where(self.files[file], number)


class _Store:
    """The cached entries of a list."""

    def __init__(self, name: str) -> None:
        self.name = name  # path of the files in the cache folder, without suffix
        self.lines = np.memmap(f"{name}.jsonl", np.uint8, "r").view(np.ndarray)
        # (start, checksum) of each group, then the end of the last one and the number of lines
        self.index = np.memmap(f"{name}.index", _INDEX, "r").view(np.ndarray)
        end, self._count = self.index[-1].tolist()
        if end != len(self.lines) or len(self.index) != -(-self._count // _GROUP) + 1:
            raise ValueError("the index does not match the lines")

    def __len__(self) -> int:
        return self._count

    def read(self, number: int) -> bytes | None:
        """Return the bytes of a line, None if its group does not match the checksum."""
        group, line = divmod(number, _GROUP)
        (start, checksum), (end, _) = self.index[group : group + 2].tolist()
        content = self.lines[start:end].tobytes()
        # an index of zeros, from a lost block, gives an empty group, whose checksum is 0
        if not content or zlib.crc32(content) != checksum:
            return None
        return content.splitlines()[line]


def _load(files: Sequence[str], form: type[Entry], *, whole: bool = False) -> list[_Store]:
    """Return the store of each file, and build those that are missing.

    With `whole` a store is also built again if any of it is damaged.
    """
    # the code of `form`, its bases and the clean-up decides which entries are accepted
    code = [base for base in form.__mro__ if issubclass(base, Entry)] + [pre_caption]
    fields = [(field.name, str(field.type)) for field in msgspec.structs.fields(form)]
    version = [fields, *map(_source, code)]
    build, load = functools.partial(_build, form=form), functools.partial(_open, whole=whole)
    # one list at a time: its bytes are in memory while its entries are checked
    return load_cached(files, form.__name__, build, load, version=version, processes=1)


def _source(definition: Any) -> str | None:
    """Return the source of the module of a class or function, None in a notebook."""
    try:
        return inspect.getsource(inspect.getmodule(definition))  # ty: ignore[invalid-argument-type]
    except (OSError, TypeError):  # TypeError for None
        return None


def _open(name: str, *, whole: bool = False) -> _Store | None:
    """Open a store. Return None if it is missing or damaged; with `whole` compare every group."""
    try:
        store = _Store(name)
    except (OSError, ValueError):
        return None
    return None if whole and None in map(store.read, range(0, len(store), _GROUP)) else store


def _build(job: tuple[str, str], form: type[Entry]) -> None:
    """Check the entries of a list and write its store. job: path and name of the store."""
    path, name = job
    entries, starts, checksums, end, count = read_entries(path, form), array("q"), array("I"), 0, 0
    with atomic_write(f"{name}.jsonl") as file:
        while batch := list(itertools.islice(entries, _BATCH)):
            groups = [_json_lines(batch[i : i + _GROUP]) for i in range(0, len(batch), _GROUP)]
            starts.extend(itertools.accumulate(map(len, groups[:-1]), initial=end))
            checksums.extend(map(zlib.crc32, groups))
            block = b"".join(groups)
            file.write(block)
            end += len(block)
            count += len(batch)
    index = np.array([*zip(starts, checksums, strict=True), (end, count)], _INDEX)
    with atomic_write(f"{name}.index") as file:  # last: a complete store has both files
        file.write(index.tobytes())


def _json_lines(entries: list[Entry]) -> bytes:
    """Return entries as lines of JSON, without field names."""
    values = list(map(msgspec.structs.astuple, entries))
    try:
        return _ENCODER.encode_lines(values)
    # halves of surrogate pairs, integers of more than 64 bits
    except (UnicodeEncodeError, OverflowError):
        return "".join(json.dumps(value) + "\n" for value in values).encode()
