"""What is worked out once from a file and kept in a cache folder, until the file changes."""

import bisect
import contextlib
import hashlib
import json
import os
import sys
import tempfile

from filelock import FileLock
from tqdm import tqdm

from dataset.workers import in_processes, process_count
from utils import InputError

VERSION = 2  # of what is kept


def load_cached(paths, kind, build, load, processes=None):
    """[load(name), ...] of what is kept of each path, under names in the cache folder that change with the files.

    Where load gives None, build((path, name)) makes it, in as many processes at a time (default: the cores, 8 at most); of
    processes that start together one does it for all. kind: what it is, by which the names begin. Raises InputError if a file
    cannot be found or the cache not be written, and what build raises.
    """
    folder = cache_folder()
    names = [os.path.join(folder, f"{kind}-{_fingerprint(path)}") for path in paths]
    loaded = [load(name) for name in names]
    if any(found is None for found in loaded):
        with _locked(folder):
            jobs = [job for job in zip(paths, names) if load(job[1]) is None]  # another process may have built it meanwhile
            with in_processes(process_count(len(jobs), processes)) as run:
                try:
                    for _ in tqdm(run(build, jobs), desc="reading the data", total=len(jobs), unit="file", file=sys.stdout,
                                  disable=len(jobs) == 1, delay=1, mininterval=1, leave=False, dynamic_ncols=True):  # fmt: skip
                        pass
                except OSError as error:
                    raise InputError(f"{folder}: cannot write the cache ({error.strerror}); free some space, or set the "
                                     "environment variable ALBEF_CACHE to another folder") from None
        loaded = [load(name) for name in names]
    return loaded


def locate(index, ends):
    """(file, index in it) of an index in files that are joined in order; ends: their summed lengths. Raises IndexError."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"index {index} of {ends[-1]}")
    file = bisect.bisect(ends, index)
    return file, index - (ends[file - 1] if file else 0)


def cache_folder():
    """ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache, else in the temporary folder.

    Raises InputError if none of them can be written.
    """
    wanted = os.environ.get("ALBEF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "albef")
    for folder in wanted, os.path.join(tempfile.gettempdir(), f"albef-{os.getuid()}"):
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise InputError(f"ALBEF_CACHE: cannot write to the cache folder {wanted}; set the environment variable "
                     f"ALBEF_CACHE to a folder on a local disk")


def _fingerprint(path):
    """A hash of name, size and time of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    version = [VERSION, os.path.abspath(path), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(version).encode()).hexdigest()[:32]


def unreadable(path, error):
    """The InputError for an OSError of a file of the data."""
    return InputError(f"{path}: cannot read this file ({error.strerror}); correct its path in the config (relative paths start "
                      "at the folder you run in)")


@contextlib.contextmanager
def _locked(folder):
    """Within the block no other process of this machine is in such a block of the same folder."""
    lock = FileLock(os.path.join(folder, ".lock"), fallback_to_soft=False)
    with contextlib.suppress(OSError):  # some network file systems cannot lock; then each builds all, as a whole
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
