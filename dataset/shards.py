"""WebDataset shards: tar files of image-caption pairs, as img2dataset writes them, read where they lie.

A sample is a run of members of one name up to the first dot after the folders: 000000012.jpg, 000000012.txt and
000000012.json. A scan of the headers finds where the samples begin; each is then read by its index, in one piece.
"""

import contextlib
import functools
import glob
import io
import itertools
import json
import operator
import os
import re
import reprlib
import tarfile

import numpy as np
from braceexpand import braceexpand

from dataset.cache import load_cached, locate
from utils import InputError, TrainingStopped, atomic_write

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_SUFFIXES = ("txt", "json")
MAX_OPEN = 128  # shards that a process keeps open: on a network file system it is opening that takes long

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:", re.IGNORECASE)
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")  # of a member: key and suffix
_META = re.compile(r"__[^/]*__($|/)")  # keys of what is not a sample, such as __meta__.json or __index__/0.txt


def expand(entries):
    """The names in train_file -> (JSON lists, shards), lists of paths in the order of the names.

    A name that ends in .tar is a shard, or a pattern of shards: {00000..01242} and {a,b} stand for each of these, * and ? for
    what there is. Raises InputError for shards that do not exist or come twice, and for URLs.
    """
    json_files, shards = [], []
    for entry in map(os.fspath, entries):
        if _URL.match(entry):
            raise InputError(f"train_file: {entry} is not a file of this machine: mount the storage it is on, or download it, "
                             "and name the local path")
        if entry.endswith(".tar"):
            shards += _expand_pattern(entry)
        else:
            json_files.append(entry)
    seen = {}
    for path in shards:
        real = os.path.realpath(path)
        if real in seen:
            same = "" if seen[real] == path else f" (as {seen[real]})"
            raise InputError(f"train_file: shard {path} is named twice{same}; name it once, or an epoch has its samples twice")
        seen[real] = path
    return json_files, shards


def _expand_pattern(pattern):
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError:
        raise InputError(f"train_file: {pattern} has a brace without its other one; write shards as "
                         "{00000..01242}.tar") from None
    # a wildcard that matches nothing stays as it is, and so is missing
    paths = [path for name in names for path in (sorted(glob.glob(name)) if re.search(r"[*?]", name) else []) or [name]]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise InputError(f"train_file: shard {missing[0]} does not exist ({len(missing)} of the {len(paths)} that {pattern} "
                         "stands for are missing): copy them there, or correct train_file (relative paths start at the folder "
                         "you run in)")
    return paths


class Shards:
    """The samples of shards by index, one shard after another, as `read_sample` gives them.

    counts: samples of each shard. Shards that are new, or of another size or time of change than before, are scanned in that
    many processes (default: the cores, 8 at most); what is found is kept in the cache folder. Raises InputError for a file that
    is not a complete tar file, and if there is no sample in any.
    """

    def __init__(self, paths, processes=None):
        self.paths, self._offsets = paths, load_cached(paths, "shard", _scan, _load, processes)
        self.counts = [len(offsets) - 1 for offsets in self._offsets]
        self._ends = list(itertools.accumulate(self.counts))
        if not len(self):
            others = ", nor do the other shards" if paths[1:] else ""
            raise InputError(f"train_file: {paths[0]} holds no sample{others}; a shard holds files like 000000012.jpg and "
                             "000000012.txt")

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        return read_sample(*self.place(index))

    def place(self, index):
        """(path, start, end): where the bytes of a sample are."""
        shard, number = locate(index, self._ends)
        return self.paths[shard], *self._offsets[shard][number : number + 2].tolist()

    def prefetch(self, indices):
        """Have the kernel begin to read samples, all at a time."""
        if hasattr(os, "posix_fadvise"):  # macOS lacks it
            for path, start, end in map(self.place, indices):
                with _errors_of(path, TrainingStopped):
                    os.posix_fadvise(_open(path).fileno(), start, end - start, os.POSIX_FADV_WILLNEED)


def read_sample(path, start, end):
    """The sample whose members are bytes start..end-1 of a shard: {"__key__": str, suffix: bytes, ...}.

    Suffixes are in lower case; where a sample has one twice, the first counts. A member that is neither image nor caption is
    b"". Raises TrainingStopped if the shard cannot be read or has changed.
    """
    sample = {}
    with _errors_of(path, TrainingStopped):
        # by position: data workers forked from this process share the open file
        data = os.pread(_open(path).fileno(), end - start, start)
        with _archive(fileobj=io.BytesIO(data)) as archive:
            for key, suffix, member in _members(archive):
                if sample.setdefault("__key__", key) != key:
                    break
                if suffix not in sample:
                    used = suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES
                    sample[suffix] = archive.extractfile(member).read() if used else b""
            else:
                if sample and len(data) == end - start:
                    return sample
    raise TrainingStopped(f"{path}: has changed since the run started: put it back as it was, and continue with --resume")


def image_and_captions(sample, where):
    """(bytes of the image, list of captions) of a sample; where names it in messages.

    The caption is that of .txt, else those of "caption" in .json, a string or a list of strings. Raises InputError if there is
    no image or no caption.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        held = ", ".join(f".{name}" for name in sample if name != "__key__")
        raise InputError(f"{where}: no image (.{', .'.join(IMAGE_SUFFIXES)}), only {held}", "no image")
    if "txt" in sample:
        return sample[suffix], [sample["txt"].decode("utf-8", "replace")]
    if "json" not in sample:
        raise InputError(f"{where}: no caption (.txt or .json)", "no caption")
    try:
        entry = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its .json is not valid: {error}", "wrong 'json'") from None
    caption = entry.get("caption") if isinstance(entry, dict) else None
    captions = [caption] if isinstance(caption, str) else caption
    if not (isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions)):
        raise InputError(f"{where}: 'caption' in its .json is {reprlib.repr(caption)}, not a string or a list of strings",
                         "wrong 'caption'")
    return sample[suffix], captions


def _load(name):
    try:
        return np.load(f"{name}.npy")
    except (OSError, ValueError, EOFError):  # not there, or damaged
        return None


def _scan(job):
    """Write where the samples of a shard begin, and where the last one ends: job is (path, name in the cache folder)."""
    path, name = job
    with _errors_of(path, InputError), _archive(path) as archive:
        samples = itertools.groupby(_members(archive), key=operator.itemgetter(0))
        starts = [next(members)[-1].offset for _, members in samples]
        # tarfile takes anything after a whole member for the end
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut short or damaged after a whole member")
    with atomic_write(f"{name}.npy") as file:
        np.save(file, np.array([*starts, archive.offset], np.int64))


@functools.lru_cache(MAX_OPEN)
def _open(path):
    return open(path, "rb", buffering=0)


def _archive(path=None, fileobj=None):
    # a file, not a stream: what is not wanted is passed over without being read
    return tarfile.open(path, "r:", fileobj, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _errors_of(path, kind):
    try:
        yield
    except (tarfile.TarError, OverflowError) as error:
        raise kind(f"{path}: not a complete tar file ({error}): copy or download this shard again") from None
    except OSError as error:
        raise kind(f"{path}: cannot read this shard ({error.strerror}): see to its storage and permissions") from None


def _members(archive):
    """Iterate over (key, suffix, member) of the members of an open tar file that are of samples."""
    for member in iter(archive.next, None):
        archive.members.clear()  # where tarfile keeps all it has seen
        name = _NAME.fullmatch(member.name)
        if member.isreg() and name and not _META.match(name[1]):
            yield name[1], name[2].lower(), member
