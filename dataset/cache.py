"""A cache folder for data derived from files, valid until the file or the code changes."""

import bisect
import contextlib
import hashlib
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from tqdm import tqdm

from dataset.entries import unreadable
from dataset.pool import in_processes, process_count
from utils import TEMPORARY, InputError

T = TypeVar("T")
VERSION = 4  # version of the formats of cached files
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
            try:
                _build_all(build, jobs, process_count(len(jobs), processes))
            except OSError as error:
                raise InputError(
                    f"{folder}: cannot write the cache ({error.strerror}); free some space, or set"
                    " the environment variable ALBEF_CACHE to another folder"
                ) from None
            # inside the lock, so that no process removes the files
            loaded = [load(name) for name in names]
    usable = [content for content in loaded if content is not None]
    if len(usable) < len(loaded):
        raise InputError(
            f"{folder}: the cache lost files that were just written; set the environment"
            " variable ALBEF_CACHE to a folder on another disk"
        )
    return usable


def _build_all(
    build: Callable[[tuple[str, str]], None], jobs: list[tuple[str, str]], processes: int
) -> None:
    """Run `build` on the jobs, with a progress bar if there are several."""
    with in_processes(processes) as run:
        bar = tqdm(
            run(build, jobs),
            desc="reading the data",
            total=len(jobs),
            unit="file",
            file=sys.stderr,
            disable=True if len(jobs) == 1 else None,
            delay=1,
            leave=False,
            dynamic_ncols=True,
        )
        for _ in bar:
            pass


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
        raise IndexError(f"index {index} of {ends[-1]}")
    file = bisect.bisect(ends, index)
    return file, index - (ends[file - 1] if file else 0)


def cache_folder() -> str:
    """Return the cache folder, and create it if it does not exist.

    Returns:
        ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache, else a private folder in the
        temporary folder.

    Raises:
        InputError: None of them can be written, or another user may have made or filled the folder.
    """
    wanted = os.environ.get("ALBEF_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "albef"
    )
    temporary = os.path.join(tempfile.gettempdir(), f"albef-{os.getuid()}")
    for folder in wanted, temporary:
        with contextlib.suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            _check_owner(folder, private=folder == temporary)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    raise InputError(
        f"ALBEF_CACHE: cannot write to the cache folder {wanted}; set the environment variable "
        f"ALBEF_CACHE to a folder on a local disk"
    )


def _check_owner(folder: str, private: bool) -> None:
    """Raise InputError if another user may have made a cache folder or written to it.

    A private folder is no link, and only its owner has access to it. Other folders may be shared
    with a group, but not with everyone.
    """
    for whole in map(Path, (os.path.abspath(folder), os.path.realpath(folder))):
        shared = False  # whether everyone may write to a parent folder
        for path in *reversed(whole.parents), whole:
            status = path.lstat()
            if shared and status.st_uid not in (0, os.getuid()):
                _refuse(path, "belongs to another user")
            shared = shared or (
                stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_IWOTH)
            )
    if status.st_mode & (0o077 if private else stat.S_IWOTH):
        _refuse(folder, f"has mode {stat.S_IMODE(status.st_mode):04o}, so others have access to it")
    if private and os.path.islink(folder):
        _refuse(folder, "is a link")
    if private and status.st_uid != os.getuid():
        _refuse(folder, "belongs to another user")


def _refuse(path: Path | str, problem: str) -> None:
    raise InputError(
        f"{path}: {problem}, but annotations and compiled code are read from this cache folder:"
        " remove it, or set the environment variable ALBEF_CACHE to a folder of your own"
    )


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
