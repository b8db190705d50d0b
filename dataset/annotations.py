"""Annotation files: a streaming reader of JSON lists, and their entries in buffers that processes share.

A list of 14 million pairs as Python objects takes several gigabytes, in every data worker of every rank. Here it
is one read-only file, mapped into memory, whose pages all processes of a machine share:

    magic, position of the layout   2 x 8 bytes
    text                            UTF-8 of image path, caption 1, caption 2, ... of each entry, without separators
    offsets                         where each string starts in the file, and the end of the last one
    first                           number of each entry's first string; not stored if all have one caption
    groups                          number of each entry's image_id among the different ones, where the task needs them
    layout                          JSON: type, length and position of the arrays, number of entries of each file

The file is built once from the annotation files and kept in a cache folder.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import re
import reprlib
import tempfile
import uuid
from array import array

import numpy as np

from dataset.text import MAX_WORDS, is_blank, pre_caption
from utils import InputError

PAIR_KEYS = {"image": str, "caption": (str, list)}
GROUPED_KEYS = {  # of lists whose texts belong together if their images do
    "retrieval": {"image": str, "caption": str, "image_id": (str, int)},
    "grounding": {"image": str, "text": str},
}

_CHUNK = 1 << 22  # characters of an annotation file in memory at a time
_BATCH = 1 << 14  # strings that are written at a time
_UINT32_END = 1 << 32  # larger offsets take 8 bytes each
_MAGIC = int.from_bytes(b"ALBEFan1", "little")  # its last digit is the version of the cache format
_HEADER_BYTES = 16
_CUT_SHORT = "seems cut short: copy it again"
_LONGEST_TOKEN = 16  # characters, more than in any token or escape sequence that the end of a chunk can cut

_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"  # all that JSON takes for white space
_OPENING = re.compile(rf"[{_SPACE}]*\[[{_SPACE}]*(\]?)")
_SEPARATOR = re.compile(rf"[{_SPACE}]*([,\]]?)[{_SPACE}]*")
_TYPE_NAMES = {str: "a string", list: "a non-empty list of strings", int: "an integer", dict: "an object"}


def read_json_list(path):
    """Yield (number, entry) for the objects of a JSON list, counted from 0, without holding the file in memory.

    Raises InputError for what `read_json_values` refuses, or if an entry is not an object.
    """
    for number, entry in read_json_values(path):
        check_entry(entry, {}, path, number)
        yield number, entry


def read_json_values(path):
    """Yield (number, value) for the values of a JSON list, be they objects or not.

    Raises InputError if the file cannot be read, is not valid JSON, not a list or empty.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from enumerate(_decode_list(file, path))
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        cut_short = error.reason == "unexpected end of data"
        remedy = f"it {_CUT_SHORT}" if cut_short else "save it as UTF-8 JSON"
        raise InputError(f"{path}: this annotation file is not UTF-8 text; {remedy}") from None


def check_entry(entry, keys, path, number):
    """Raise InputError unless `entry` is an object with every key of `keys`, {key: type or tuple of types}.

    A list must hold strings, at least one.
    """
    if type(entry) is not dict:
        raise InputError(f"{where(path, number)} is {reprlib.repr(entry)}, not an object; every entry must be like "
                         f'{{"image": ..., ...}}', "no object")
    for key, types in keys.items():
        value = entry.get(key)
        if isinstance(value, types) and (type(value) is not list or _is_list_of_strings(value)):
            continue
        if key not in entry:
            raise InputError(f"{where(path, number)} has no '{key}', {_describe(types)}; it has "
                             f"{reprlib.repr(list(entry))}: correct or remove the entry", f"no '{key}'")
        kind = f"'{key}' is null" if value is None else f"wrong '{key}'"
        raise InputError(f"{where(path, number)}: '{key}' is {reprlib.repr(value)}, but must be {_describe(types)}", kind)


def where(path, number):
    """How error messages name an entry of an annotation file."""
    return f"{path}: entry {number} (counting from 0)"


class Annotations:
    """Image paths and captions of image-caption lists, in a memory-mapped file. Made by `load_annotations`.

    Processes that hold the same lists share the memory. A pickle holds only the names of the files.
    """

    def __init__(self, cache_path, files):
        self._cache_path, self._files = cache_path, files
        with open(cache_path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        magic, position = np.frombuffer(self._map, "<u8", 2).tolist()
        if magic != _MAGIC:
            raise ValueError(f"{cache_path} is not an annotation cache")
        layout = json.loads(self._map[position:])
        self._offsets = np.frombuffer(self._map, *layout["offsets"])
        self._first = np.frombuffer(self._map, *layout["first"]) if layout["first"] else None
        self._groups = np.frombuffer(self._map, *layout["groups"]) if layout["groups"] else None
        self._ends = list(itertools.accumulate(layout["entries"]))

    def __reduce__(self):
        return Annotations, (self._cache_path, self._files)

    def __len__(self):
        return self._ends[-1]

    def image(self, i):
        """Image path of entry i, as written in the annotation file."""
        return self._string(self._strings(i)[0])

    def captions(self, i):
        """Captions of entry i, a list of at least one string."""
        first, end = self._strings(i)
        return [self._string(k) for k in range(first + 1, end)]

    def image_id(self, i):
        """A number that entries share if and only if their image_id is the same; -1 where the lists were read without."""
        return -1 if self._groups is None else int(self._groups[i])

    def where(self, i):
        """File and number of entry i, for error messages."""
        file = next(file for file, end in enumerate(self._ends) if i < end)
        return where(self._files[file], i - (self._ends[file - 1] if file else 0))

    def _strings(self, i):
        if not 0 <= i < self._ends[-1]:
            raise IndexError(f"entry {i} of {len(self)}")
        if self._first is None:
            return 2 * i, 2 * i + 2
        return int(self._first[i]), int(self._first[i + 1])

    def _string(self, k):
        return self._map[self._offsets[k]:self._offsets[k + 1]].decode("utf-8", "surrogatepass")


class Entries:
    """The entries of JSON lists as one buffer, which forked data workers share, where Python objects would be copied.

    check(entry, path, number) raises InputError, or returns what is kept of an entry, None to leave it out.
    """

    def __init__(self, files, check):
        encoded, self._ends, self._files, self._numbers = [], [], files, array("I")
        for path in files:
            for number, entry in read_json_list(path):
                if (kept := check(entry, path, number)) is not None:
                    encoded.append(json.dumps(kept).encode())
                    self._numbers.append(number)
            self._ends.append(len(encoded))
        self._offsets = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self._offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"entry {i} of {len(self)}")
        return json.loads(self._bytes[self._offsets[i] : self._offsets[i + 1]].tobytes())

    def where(self, i):
        """File and number of entry i, for error messages."""
        return where(next(file for file, end in zip(self._files, self._ends) if i < end), self._numbers[i])


def load_annotations(files, form="pretrain"):
    """Annotations of one or several JSON lists of {"image": str, "caption": str or list of str}, joined in order.

    Of the form retrieval they are {"image": str, "caption": str, "image_id": str or int}, of the form grounding {"image":
    str, "text": str}: there no text may be empty after clean-up, and texts of one image share an image_id.
    The first call checks every entry and writes the cache, later ones open it, until one of the files changes.
    The cache folder is ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache; if that cannot be written, it is in
    the temporary folder.
    Raises InputError for what `read_json_list` and `check_entry` refuse, or if the cache cannot be written.
    """
    files = [os.fspath(files)] if isinstance(files, (str, os.PathLike)) else [os.fspath(file) for file in files]
    if not files:
        raise InputError("train_file: no annotation file is given; name at least one in the config")
    folder = cache_folder()
    cache_path = os.path.join(folder, f"annotations-{fingerprint(files, form)}.bin")
    if annotations := _open_cache(cache_path, files):
        return annotations
    with locked(folder):
        # The process that had the lock before may have built it, and a second copy would not share its memory.
        if annotations := _open_cache(cache_path, files):
            return annotations
        _build_cache(cache_path, files, form)
    return Annotations(cache_path, files)


def _unreadable(path, error):
    return InputError(f"{path}: cannot read this annotation file ({error.strerror}); correct its path in the config "
                      f"(relative paths start at the folder you run in)")


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
        raise InputError(f"{path}: holds a JSON object, not a list of entries; if it is JSON lines (an object a "
                         f"line), convert it: jq -s . {path} > list.json")
    found = "is an empty list" if opening else "is not a JSON list" if start else "is empty"
    raise InputError(f'{path}: {found}; an annotation file is a list of entries: [{{"image": ..., ...}}, ...]')


def _advance(text, pos, line, column):
    """Line and column of text[pos], given those of text[0]."""
    newlines = text.count("\n", 0, pos)
    return line + newlines, pos - text.rfind("\n", 0, pos) if newlines else column + pos


def _is_list_of_strings(value):
    return bool(value) and all(isinstance(item, str) for item in value)


def _describe(types):
    return " or ".join(_TYPE_NAMES[kind] for kind in (types if isinstance(types, tuple) else (types,)))


def cache_folder():
    """ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache, else in the temporary folder. Raises InputError if none can be
    written."""
    wanted = os.environ.get("ALBEF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "albef")
    for folder in wanted, os.path.join(tempfile.gettempdir(), f"albef-{os.getuid()}"):
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise InputError(f"ALBEF_CACHE: cannot write to the cache folder {wanted}; set the environment variable "
                     f"ALBEF_CACHE to a folder on a local disk")


def fingerprint(files, form):
    """Hash of names, sizes and times of the files: a changed file gets another cache."""
    versions = [_MAGIC, form]
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise _unreadable(file, error) from None
        versions.append((os.path.abspath(file), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:32]


@contextlib.contextmanager
def locked(folder):
    """Within the block no other process of this machine is in such a block of the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot lock; then several processes may build the file, each a complete one.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _open_cache(cache_path, files):
    """Annotations in the cache, or None if there are none, or damaged ones."""
    try:
        return Annotations(cache_path, files)
    except (OSError, ValueError):
        return None


def _build_cache(cache_path, files, form):
    # Renamed when complete, so that no process ever opens half a cache.
    temporary = f"{cache_path}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as out:
            _write_cache(out, files, form)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, cache_path)
    except OSError as error:
        raise InputError(f"{cache_path}: cannot write the annotation cache ({error.strerror}); free some space, or "
                         f"set the environment variable ALBEF_CACHE to another folder") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _write_cache(out, files, form):
    out.write(bytes(_HEADER_BYTES))
    lengths, counts, entries = array("I"), array("I"), []  # bytes of strings, strings of entries, entries of files
    numbers, groups = {}, array("I")  # image_id -> its number, numbers of the entries
    for path in files:
        before = len(counts)
        checked = read_json_list(path)
        if form in GROUPED_KEYS:
            checked = _with_groups(checked, form, path, numbers, groups)
        for strings, string_counts in _encoded_batches(checked, path):
            out.write(b"".join(strings))
            lengths.extend(map(len, strings))
            counts.extend(string_counts)
        entries.append(len(counts) - before)
    dtype = "<u4" if out.tell() < _UINT32_END else "<u8"
    one_caption = len(lengths) == 2 * len(counts)
    layout = {
        "entries": entries,
        "offsets": _write_sums(out, lengths, _HEADER_BYTES, dtype),
        "first": None if one_caption else _write_sums(out, counts, 0, dtype),
        "groups": _write_array(out, groups) if form in GROUPED_KEYS else None,
    }
    position = out.tell()
    out.write(json.dumps(layout).encode())
    out.seek(0)
    out.write(np.array([_MAGIC, position], "<u8").tobytes())


def _with_groups(entries, form, path, numbers, groups):
    """Yield image and caption of a list of GROUPED_KEYS, checked; append to groups the number of each one's image."""
    for number, entry in entries:
        image, caption, image_id = grouped_entry(entry, form, path, number)
        groups.append(numbers.setdefault(image_id, len(numbers)))
        yield number, {"image": image, "caption": caption}


def grouped_entry(entry, form, path, number):
    """(image path, text, what the texts of one image share) of an entry of a list of GROUPED_KEYS. Raises InputError."""
    if form == "retrieval" and type(entry.get("caption")) is list and "image_id" not in entry:
        raise InputError(f"{where(path, number)} has a list of captions and no 'image_id': this is a test or pre-training "
                         "list; train_file of retrieval needs an entry for each caption, with image_id", "no 'image_id'")
    check_entry(entry, GROUPED_KEYS[form], path, number)
    caption, image_id = ("caption", "image_id") if form == "retrieval" else ("text", "image")
    if is_blank(pre_caption(entry[caption], MAX_WORDS)):
        raise InputError(f"{where(path, number)}: its {caption} {reprlib.repr(entry[caption])} is empty after clean-up; "
                         "correct or remove the entry", "empty text")
    return entry["image"], entry[caption], entry[image_id]


def _encoded_batches(entries, path):
    """Yield (strings, counts): UTF-8 of image path, caption 1, ... of some entries; number of strings of each."""
    strings, counts = [], array("I")
    for number, entry in entries:
        check_entry(entry, PAIR_KEYS, path, number)
        captions = entry["caption"]
        captions = [captions] if type(captions) is str else captions
        # JSON can hold halves of surrogate pairs. In a path they stand for bytes that are not UTF-8 and must stay;
        # in a caption they are a broken character, which a tokenizer would refuse: it becomes "?".
        strings.append(entry["image"].encode("utf-8", "surrogatepass"))
        strings += [caption.encode("utf-8", "replace") for caption in captions]
        counts.append(1 + len(captions))
        if len(strings) >= _BATCH:
            yield strings, counts
            strings, counts = [], array("I")
    if strings:
        yield strings, counts


def _write_array(out, numbers):
    """Write whole numbers. Returns (dtype, count, position) for np.frombuffer."""
    position = out.seek(-out.tell() % 8, os.SEEK_CUR)  # aligned
    out.write(np.asarray(numbers, "<u4").tobytes())
    return "<u4", len(numbers), position


def _write_sums(out, numbers, start, dtype):
    """Write `start` and its running sums with the numbers. Returns (dtype, count, position) for np.frombuffer."""
    position = out.seek(-out.tell() % 8, os.SEEK_CUR)  # aligned
    out.write(np.array([start], dtype).tobytes())
    for i in range(0, len(numbers), _BATCH):
        sums = start + np.cumsum(numbers[i:i + _BATCH], dtype=np.uint64)
        start = int(sums[-1])
        out.write(sums.astype(dtype).tobytes())
    return dtype, 1 + len(numbers), position
