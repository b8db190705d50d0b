"""WebDataset shards: tar files of image-caption pairs, as img2dataset writes them, read where they lie.

A sample is a run of members of one name up to the first dot after the folders: 000000012.jpg, 000000012.txt and
000000012.json. Counting and reading group the members by the same function, so a sample's number means the same in both.
"""

import contextlib
import glob
import itertools
import json
import multiprocessing
import operator
import os
import re
import reprlib
import signal
import sys
import tarfile
import threading

from braceexpand import braceexpand
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from dataset.annotations import cache_folder, fingerprint, locked
from utils import InputError, cores

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
CAPTION_SUFFIXES = ("txt", "json")
MAX_PROCESSES = 8  # that count at a time; more wait for the disk

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|pipe:", re.IGNORECASE)
_META = re.compile(r"__[^/]*__($|/)")  # keys of what is no sample, such as __meta__.json or __index__/0.txt


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


def count_shards(paths, processes=None):
    """[(path, number of its samples), ...] of shards, counted by that many processes (default: of the cores, 8 at most).

    Only the headers of the members are read, and the counts are kept in the cache folder until a shard's size or time of
    change is another. Raises InputError for a file that is not a complete tar file, and if there is no sample in any.
    """
    keys = {path: fingerprint([path], "shard") for path in paths}
    folder = os.path.join(cache_folder(), "shards")
    os.makedirs(folder, exist_ok=True)
    cache = os.path.join(folder, "counts.txt")
    counts = _read_counts(cache)
    if not counts.keys() >= set(keys.values()):
        with locked(folder):
            counts = _read_counts(cache)  # by now another process of the run may have counted
            new = [path for path, key in keys.items() if key not in counts]
            counted = in_processes(_count, new, processes)
            for path, count in tqdm(counted, total=len(new), desc="counting samples", unit="shard", delay=1, leave=False,
                                    file=sys.stdout, dynamic_ncols=True, mininterval=1):
                counts[keys[path]] = count
                with contextlib.suppress(OSError), open(cache, "a") as file:  # on a full disk they are counted again
                    file.write(f"\n{count} {keys[path]}\n")  # the line before may not be whole
    counted = [(path, counts[key]) for path, key in keys.items()]
    if not any(count for _, count in counted):
        others = ", nor do the other shards" if paths[1:] else ""
        raise InputError(f"train_file: {paths[0]} holds no sample{others}; a shard holds files like 000000012.jpg and "
                         "000000012.txt")
    return counted


def in_processes(function, items, processes=None):
    """Yields function(item) of the items in the order they get done, in a pool of that many processes (default as above)."""
    processes = min(processes or min(MAX_PROCESSES, cores()), len(items))
    if processes <= 1:
        yield from map(function, items)
        return
    with multiprocessing.Pool(processes, _begin_process) as pool:
        yield from pool.imap_unordered(function, items)


def _begin_process():
    # Ctrl-C reaches the whole process group, but it is the main process that ends the pool, by SIGTERM, which the run may have
    # had a handler for
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A process whose parent was killed would wait for work for ever, and keep the lock of the counts."""
    multiprocessing.parent_process().join()
    os._exit(1)


def read_shard(path, numbers):
    """Yields the samples of the given numbers, increasing and counted from 0: {"__key__": str, suffix: bytes, ...}.

    Suffixes are in lower case; where a sample has one twice, the first counts. Of members that are neither image nor caption
    the bytes are not read but b"". What lies between the samples is skipped, and nothing is read after the last.
    Raises InputError if the shard cannot be read or has fewer samples.
    """
    numbers = iter(numbers)
    wanted, number = next(numbers, None), -1
    if wanted is None:
        return
    with _opened(path) as archive:
        for number, (key, members) in enumerate(_samples(archive)):
            if number == wanted:
                sample = {"__key__": key}
                for _, suffix, member in members:
                    if suffix not in sample:
                        used = suffix in IMAGE_SUFFIXES or suffix in CAPTION_SUFFIXES
                        sample[suffix] = archive.extractfile(member).read() if used else b""
                yield sample
                if (wanted := next(numbers, None)) is None:
                    return
    raise InputError(f"{path}: has {number + 1} samples, but had at least {wanted + 1} when the run started: put the shard "
                     "back as it was, and continue with --resume")


def image_and_captions(sample, where):
    """(bytes of the image, list of captions) of a sample of `read_shard`; where names it in messages.

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


def _read_counts(cache):
    """{fingerprint: count}; a line that was not written whole has too short a fingerprint, which no shard has."""
    try:
        with open(cache, encoding="ascii", errors="replace") as file:
            lines = [line.split() for line in file]
    except OSError:
        return {}
    return {fields[1]: int(fields[0]) for fields in lines if len(fields) == 2 and fields[0].isdecimal()}


def _count(path):
    with _opened(path) as archive:
        return path, sum(1 for _ in _samples(archive))


@contextlib.contextmanager
def _opened(path):
    try:
        # a file, not a stream: what is not wanted is passed over without being read
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as archive:
            yield archive
    except (tarfile.TarError, OverflowError) as error:
        raise InputError(f"{path}: not a complete tar file ({error}): copy or download this shard again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read this shard ({error.strerror}): see to its storage and permissions") from None


def _samples(archive):
    """Iterates over (key, iterator over (key, suffix, member)) of the samples of an open tar file."""
    return itertools.groupby(_members(archive), key=operator.itemgetter(0))


def _members(archive):
    for member in iter(archive.next, None):
        archive.members.clear()  # where tarfile keeps all it has seen
        key, suffix = base_plus_ext(member.name)
        if member.isreg() and key is not None and not _META.match(key):
            yield key, suffix.lower(), member
    # tarfile takes anything after a whole member for the end
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut short or damaged after a whole member")
