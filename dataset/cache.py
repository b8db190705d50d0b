"""A cache folder for data derived from files, valid until the file or the code changes."""

import bisect
import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from filelock import FileLock
from tqdm import tqdm

from dataset.entries import unreadable
from dataset.pool import in_processes, process_count
from utils import TEMPORARY, InputError

T = TypeVar("T")
VERSION = 5  # version of the formats of cached files
_INCOMPLETE = re.compile(rf"\.\w+-[0-9a-f]{{16}}-[0-9a-f]{{32}}\..*{re.escape(TEMPORARY)}")


def load_cached(
    paths: Sequence[str],
    kind: str,
    build: Callable[[tuple[str, str]], None],
    load: Callable[[str], T | None],
    *,
    version: Any = None,
    processes: int | None = None,
) -> list[T]:
    """Load the cached data of each file, and build missing data.

    Of runs that start together one builds, and removes the files of earlier versions.

    Args:
        paths: The files.
        kind: Prefix of the names of cached files.
        build: Function (path, name) that writes the cached file.
        load: Function (name) -> cached data, None if the cached file is missing or damaged.
        version: JSON value on which the cached content depends.
        processes: Processes that build, by default the number of cores, 8 at most.

    Returns:
        The result of `load` for each path.

    Raises:
        InputError: A file is missing, the cache cannot be written, or `build` raises it.
    """
    folder = cache_folder()
    names = [os.path.join(folder, _name(path, kind, version)) for path in paths]
    loaded = [load(name) for name in names]
    if any(content is None for content in loaded):
        with _locked(folder) as locked:
            # another process may have built it meanwhile
            jobs = [job for job in zip(paths, names, strict=True) if load(job[1]) is None]
            _remove_old(folder, [name for _, name in jobs], locked)
            _build_all(build, jobs, process_count(len(jobs), processes), folder)
            # inside the lock, so that no process removes the files
            loaded = [load(name) for name in names]
    usable = [content for content in loaded if content is not None]
    if len(usable) < len(loaded):
        raise _unusable(folder, "the cache lost files that were just written; start again")
    return usable


def _build_all(
    build: Callable[[tuple[str, str]], None],
    jobs: list[tuple[str, str]],
    processes: int,
    folder: str,
) -> None:
    """Run `build` on the jobs, with a progress bar if there are several."""
    try:
        with in_processes(processes) as run:
            bar = tqdm(
                run(build, jobs),
                desc="reading the data",
                total=len(jobs),
                unit="file",
                disable=True if len(jobs) == 1 else None,
                delay=1,
                leave=False,
                dynamic_ncols=True,
            )
            for _ in bar:
                pass
    except OSError as error:
        raise _unusable(folder, f"cannot write the cache ({error.strerror}); free space") from None


def _unusable(folder: str, problem: str) -> InputError:
    return InputError(
        f"{folder}: {problem}, or set the environment variable ALBEF_CACHE to another folder on a"
        " local disk"
    )


def locate(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """Locate an index of joined files.

    Args:
        index: Index in all files together.
        ends: Cumulative lengths of the files.

    Returns:
        The file and the index in it.

    Raises:
        IndexError: The index is negative or too large.
    """
    if not 0 <= index < ends[-1]:
        raise IndexError(f"index {index} is out of range for length {ends[-1]}")
    file = bisect.bisect(ends, index)
    return file, index - (ends[file - 1] if file else 0)


def cache_folder() -> str:
    """Return the cache folder, and create it if it does not exist.

    Returns:
        ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache.

    Raises:
        InputError: The folder cannot be written, or everyone can write to it.
    """
    folder = os.environ.get("ALBEF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "albef"
    )
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unusable(folder, "cannot write to this cache folder; change its permissions")
    if os.stat(folder).st_mode & stat.S_IWOTH:
        raise _unusable(
            folder,
            "every user can write to this cache folder, which also holds compiled code; change its"
            " mode",
        )
    return folder


def _name(path: str, kind: str, version: Any) -> str:
    """Return a name in the cache: kind, hash of the path, hash of version, size and date."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    path = os.path.abspath(path)
    state = [VERSION, version, path, status.st_size, status.st_mtime_ns]
    return f"{kind}-{_hash(path)[:16]}-{_hash(state)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _remove_old(folder: str, names: Iterable[str], locked: bool) -> None:
    """Remove earlier versions of cached files, and incomplete files of killed processes.

    Args:
        folder: The cache folder.
        names: Cached files that are built next.
        locked: Whether no other process of this machine builds.
    """
    names = set(map(os.path.basename, names))
    files = {name.rpartition("-")[0] for name in names}
    for entry in os.listdir(folder):
        of_file = entry.rpartition("-")[0] in files and entry.partition(".")[0] not in names
        if of_file or (locked and _INCOMPLETE.fullmatch(entry)):
            # the file has another owner, or a process without the lock has removed it
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, entry))


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[bool]:
    """Lock the cache folder against other processes. Yield whether the file system can lock."""
    lock = FileLock(os.path.join(folder, ".lock"), fallback_to_soft=False)
    # some network file systems cannot lock; then each process builds all files
    with contextlib.suppress(OSError):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()
