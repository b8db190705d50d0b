"""WebDataset shards: tar files of image-caption pairs, as img2dataset writes them.

A sample is a run of members with one name up to the first dot after the folders: 000000012.jpg,
000000012.txt and 000000012.json. Names such as 22.04.jpg are cut at the last dot instead, if no
member of the shard is an image by the first dot. A scan of the headers finds the start of each
sample. A sample is then read by its index, in one piece.
"""

import contextlib
import functools
import glob
import io
import itertools
import json
import os
import re
import reprlib
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from braceexpand import braceexpand

from dataset.cache import load_cached, locate
from utils import InputError, TrainingStopped, atomic_write, hash_contents, open_regular

Sample = dict[str, Any]  # bytes by suffix, and the str __key__
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_SUFFIXES = ("txt", "json")
# shards that a process keeps open, because opening is slow on network file systems
MAX_OPEN = 128

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:", re.IGNORECASE)
# files that are in no sample, such as __meta__.json or __index__/0.txt
_META = re.compile(r"__([^/]*__/|[^/.]*__\.)")


def expand(entries: Iterable[Path | str]) -> tuple[list[str], list[str]]:
    """Split the names in train_file into JSON lists and shards.

    A name that ends in .tar is a shard, or a pattern of shards: {00000..01242} and {a,b} stand for
    each of these, * and ? for existing files.

    Args:
        entries: The names.

    Returns:
        The lists, and the shards in the order of the names.

    Raises:
        InputError: A shard does not exist or comes twice, or a name is a URL.
    """
    json_files, shards = [], []
    for entry in map(str, entries):
        if _URL.match(entry):
            raise InputError(
                f"train_file: {entry} is not a local file; download the shard or mount its"
                " storage, and name the local path"
            )
        if entry.endswith(".tar"):
            shards += _expand_pattern(entry)
        else:
            json_files.append(entry)
    for path, count in Counter(map(os.path.realpath, shards)).items():
        if count > 1:
            raise InputError(
                f"train_file: shard {path} is named {count} times, so an epoch would repeat its"
                " samples; name it once"
            )
    return json_files, shards


def _expand_pattern(pattern: str) -> list[str]:
    """Return the shards of a pattern. Raises InputError."""
    try:
        names = list(braceexpand(pattern, escape=False))
    except ValueError:
        raise InputError(
            f"train_file: {pattern} has an unmatched brace; write a range of shards as"
            " {00000..01242}.tar"
        ) from None
    # a wildcard without a match stays in the list and is reported as missing
    paths = [
        path
        for name in names
        for path in (sorted(glob.glob(name)) if re.search(r"[*?]", name) else []) or [name]
    ]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise InputError(
            f"train_file: shard {missing[0]} does not exist ({len(missing)} of the {len(paths)}"
            f" shards of {pattern} are missing); copy the missing shards, or correct train_file"
            " (relative paths start at the working directory)"
        )
    return paths


class Position(NamedTuple):
    """The position of a sample in a shard."""

    path: str  # path of the shard
    start: int  # first byte of the sample
    end: int
    last_dot: bool  # whether names are cut at their last dot


class Shards:
    """The samples of shards by index, one shard after another, as `read_sample` gives them.

    Shards that are new or have changed (size or date) are scanned. Positions are kept in the cache
    folder.

    Args:
        paths: The shards.
        processes: Processes that scan, by default the number of cores, 8 at most.

    Attributes:
        counts: Number of samples of each shard.

    Raises:
        InputError: A file is not a complete tar file, has sparse members or names that cannot be
            cut into samples, or no shard has a sample.
    """

    def __init__(self, paths: list[str], processes: int | None = None) -> None:
        self.paths = paths
        self._kept = load_cached(paths, "shard", _scan, _load, processes=processes)
        self.counts = [len(kept) - 2 for kept in self._kept]
        self._ends = list(itertools.accumulate(self.counts))
        if not len(self):
            others = ", nor does any other shard" if paths[1:] else ""
            raise InputError(
                f"train_file: {paths[0]} holds no sample{others}; a shard must hold files such as"
                " 000000012.jpg and 000000012.txt"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.position(index))

    def digest(self) -> str:
        """Return a digest of the positions of all samples, 16 hexadecimal digits."""
        return hash_contents(map(np.ascontiguousarray, self._kept))

    def position(self, index: int) -> Position:
        """Return the Position of a sample."""
        shard, number = locate(index, self._ends)
        last_dot, *positions = self._kept[shard][[0, number + 1, number + 2]].tolist()
        return Position(self.paths[shard], *positions, bool(last_dot))

    def prefetch(self, indices: Iterable[int]) -> None:
        """Ask the kernel to read several samples ahead."""
        if hasattr(os, "posix_fadvise"):  # macOS lacks it
            for path, start, end, _ in map(self.position, indices):
                with _errors_of(path, TrainingStopped):
                    os.posix_fadvise(
                        _open(path).fileno(), start, end - start, os.POSIX_FADV_WILLNEED
                    )


def read_sample(position: Position) -> Sample:
    """Read a sample.

    Args:
        position: Position of the sample.

    Returns:
        {"__key__": str, suffix: bytes, ...} with suffixes in lower case. If a sample has a suffix
        twice, the first file counts. A file that is neither image nor caption is b"".

    Raises:
        TrainingStopped: The shard cannot be read or has changed.
    """
    path, start, end, last_dot = position
    sample = {}
    with _errors_of(path, TrainingStopped):
        # by position: data workers forked from this process share the open file
        data = os.pread(_open(path).fileno(), end - start, start)
        with _archive(io.BytesIO(data)) as archive:
            for member in _members(archive):
                name = _cut(member.name, last_dot)
                if not (member.isreg() and name):
                    continue
                key, suffix = name
                if sample.setdefault("__key__", key) != key or member.issparse():
                    break
                if suffix not in sample:
                    used = suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES
                    sample[suffix] = archive.extractfile(member).read() if used else b""
            else:
                if sample and len(data) == end - start:
                    return sample
    raise TrainingStopped(
        f"{path}: has changed since the run started; restore it and continue with --resume"
    )


def image_and_captions(sample: Sample, where: str) -> tuple[bytes, list[str]]:
    """Return the image and the captions of a sample.

    Captions are the text of .txt, else "caption" in .json, a string or a list of strings.

    Args:
        sample: Result of `read_sample`.
        where: Name of the sample, for messages.

    Returns:
        The bytes of the image, and the captions.

    Raises:
        InputError: The sample has no image or no caption.
    """
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if suffix is None:
        held = reprlib.repr([name for name in sample if name != "__key__"])
        raise InputError(f"{where}: no image (.{', .'.join(IMAGE_SUFFIXES)}), only {held}")
    if "txt" in sample:
        return sample[suffix], [sample["txt"].decode("utf-8", "replace")]
    if "json" not in sample:
        raise InputError(f"{where}: no caption (.txt or .json)")
    try:
        entry = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: its .json is not valid ({error})") from None
    caption = entry.get("caption") if isinstance(entry, dict) else None
    captions = [caption] if isinstance(caption, str) else caption
    if not (
        isinstance(captions, list) and captions and all(isinstance(text, str) for text in captions)
    ):
        raise InputError(
            f"{where}: 'caption' in its .json is {reprlib.repr(caption)}, not a string or a list of"
            " strings"
        )
    return sample[suffix], captions


def _load(name: str) -> np.ndarray | None:
    """Return the cached result of `_scan`, int64; None if it is missing or damaged."""
    try:
        data = Path(f"{name}.index").read_bytes()
    except OSError:
        return None
    return np.frombuffer(data[4:], np.int64) if data[:4] == _checksum(data[4:]) else None


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _scan(job: tuple[str, str]) -> None:
    """Find the samples of a shard and write their positions to the cache.

    The result holds whether names are cut at the last dot, the start of each sample and the end of
    the last one.

    Args:
        job: Path of the shard, and name in the cache folder.
    """
    path, name = job
    files = []  # (name, position) of each member of a sample
    with _errors_of(path, InputError), open_regular(path) as file, _archive(file) as archive:
        for member in _members(archive):
            if member.issparse():
                raise InputError(
                    f"{path}: member {reprlib.repr(member.name)} is a sparse file, which is not"
                    " supported; make this shard again without tar's --sparse"
                )
            if member.isreg() and _cut(member.name):
                files.append((member.name, member.offset))
        # tarfile accepts any bytes after a whole member as the end
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut short, or damaged after an intact member")
    last_dot = _cut_at_last_dot(path, [file for file, _ in files])
    runs = itertools.groupby(files, key=lambda file: _cut(file[0], last_dot)[0])
    starts = [next(members)[1] for _, members in runs]
    data = np.array([last_dot, *starts, archive.offset], np.int64).tobytes()
    with atomic_write(f"{name}.index") as file:
        file.write(_checksum(data) + data)


def _cut_at_last_dot(path: str, names: list[str]) -> bool:
    """Return whether only names that are cut at the last dot give images with captions.

    Raises InputError if some files are images by the first dot and others by the last one.
    """
    lost, image, known = None, False, set(map(str.lower, names))
    for _, run in itertools.groupby(names, key=lambda name: _cut(name)[0]):
        run = list(run)
        if any(_cut(name)[1] in IMAGE_SUFFIXES for name in run):
            image = True
        else:
            lost = lost or next((name for name in run if _is_image_by_last_dot(name, known)), None)
    if lost and image:
        raise InputError(
            f"{path}: the suffix of a name starts at the first dot, so member"
            f" {reprlib.repr(lost)} has no image suffix, but other members have one; rename the"
            " members so that each name has one dot, before the suffix"
        )
    return lost is not None


def _is_image_by_last_dot(name: str, names: set[str]) -> bool:
    """Return whether a name cut at the last dot is an image with a caption in `names`.

    The `names` are in lower case.
    """
    key, _, suffix = name.lower().rpartition(".")
    return suffix in IMAGE_SUFFIXES and any(f"{key}.{kind}" in names for kind in CAPTION_SUFFIXES)


@functools.lru_cache(MAX_OPEN)
def _open(path: str) -> io.RawIOBase:
    return open_regular(path).detach()  # unbuffered, because it is read by position


def _archive(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _errors_of(path: str, kind: type[Exception]) -> Iterator[None]:
    """Turn errors of reading a shard into an exception of `kind`."""
    try:
        yield
    except (tarfile.TarError, OverflowError) as error:
        raise kind(
            f"{path}: not a complete tar file ({error}); copy or download this shard again"
        ) from None
    except OSError as error:
        raise kind(
            f"{path}: cannot read this shard ({error.strerror}); check its storage and permissions"
        ) from None


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Iterate over the members of an open tar file."""
    while True:
        try:
            member = archive.next()
        # a wrong map of a sparse member, or an impossible size
        except (ValueError, MemoryError) as error:
            raise tarfile.ReadError(f"wrong header: {error}") from None
        if member is None:
            return
        # tarfile keeps every member that it has read
        archive.members.clear()  # ty: ignore[missing-attribute]  # typeshed lacks it
        yield member


def _cut(name: str, last_dot: bool = False) -> tuple[str, str] | None:
    """Cut a member's name at a dot after the folders.

    Return the key and the suffix, None if the member is in no sample.
    """
    folders, slash, base = name.rpartition("/")
    key, dot, suffix = base.rpartition(".") if last_dot else base.partition(".")
    if not dot or base.startswith(".") or _META.match(name):
        return None
    return folders + slash + key, suffix.lower()
