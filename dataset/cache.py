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
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from dataset.pool import in_processes, process_count
from utils import TEMPORARY, InputError

VERSION = 3  # of the formats of cached files
_INCOMPLETE = re.compile(rf"\.\w+-[0-9a-f]{{16}}-[0-9a-f]{{32}}\..*{re.escape(TEMPORARY)}")


def load_cached(paths, kind, build, load, version=None, processes=None):
    """Return load(name) for each path; the name is a path in the cache folder that changes with the
    file.

    If load returns None, build((path, name)) writes the cached file. Builds run in `processes`
    processes (default: the cores, 8 at most). If several runs start together, one builds for all.
    It also removes the cached files of earlier versions of these paths. kind: prefix of the names;
    version: a JSON value on which the content depends. Raises InputError if a file is missing or
    the cache cannot be written, and every exception of build.
    """
    folder = cache_folder()
    names = [os.path.join(folder, _name(path, kind, version)) for path in paths]
    loaded = [load(name) for name in names]
    if any(found is None for found in loaded):
        with _locked(folder) as locked:
            # another process may have built it meanwhile
            jobs = [job for job in zip(paths, names) if load(job[1]) is None]
            _remove_old(folder, [name for _, name in jobs], locked)
            with in_processes(process_count(len(jobs), processes)) as run:
                try:
                    for _ in tqdm(
                        run(build, jobs),
                        desc="reading the data",
                        total=len(jobs),
                        unit="file",
                        file=sys.stdout,
                        disable=len(jobs) == 1,
                        delay=1,
                        mininterval=1,
                        leave=False,
                        dynamic_ncols=True,
                    ):
                        pass
                except OSError as error:
                    raise InputError(
                        f"{folder}: cannot write the cache ({error.strerror}); free some space, or set the "
                        "environment variable ALBEF_CACHE to another folder"
                    ) from None
            # inside the lock, so that no process removes the files
            loaded = [load(name) for name in names]
        if any(found is None for found in loaded):
            raise InputError(
                f"{folder}: the cache does not hold what was written to it; set the environment variable "
                "ALBEF_CACHE to a folder on another disk"
            )
    return loaded


def locate(index, ends):
    """Return (file, index in it) of an index in joined files. ends: cumulative lengths.

    Raises IndexError.
    """
    if not 0 <= index < ends[-1]:
        raise IndexError(f"index {index} of {ends[-1]}")
    file = bisect.bisect(ends, index)
    return file, index - (ends[file - 1] if file else 0)


def cache_folder():
    """Return ALBEF_CACHE, else albef in XDG_CACHE_HOME or ~/.cache, else a private folder in the
    temporary folder.

    Raises InputError if none of them can be written, and for a folder that another user may have
    made or filled.
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


def _check_owner(folder, private):
    """Raise InputError if another user may have made a cache folder or written to it.

    private: only its owner may access it, and it is no link. Otherwise a group may share it, but
    not everyone.
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


def _refuse(path, problem):
    raise InputError(
        f"{path}: {problem}, but annotations and compiled code are read from this cache folder: remove it, or set "
        "the environment variable ALBEF_CACHE to a folder of your own"
    )


def _name(path, kind, version):
    """Return the name of a file in the cache: kind, hash of its path, hash of its version, size and
    date.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    path = os.path.abspath(path)
    return f"{kind}-{_hash(path)[:16]}-{_hash([VERSION, version, path, status.st_size, status.st_mtime_ns])}"


def _hash(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _remove_old(folder, names, locked):
    """Remove cached files of earlier versions of the same files, and incomplete files of killed
    processes.

    names: cached files that are built next; locked: no other process of this machine is building.
    """
    names = set(map(os.path.basename, names))
    files = {name.rpartition("-")[0] for name in names}
    for entry in os.listdir(folder):
        of_file = entry.rpartition("-")[0] in files and entry.partition(".")[0] not in names
        if of_file or (locked and _INCOMPLETE.fullmatch(entry)):
            # of another user, or removed by a process that cannot lock
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, entry))


def unreadable(path, error):
    """Return the InputError for an OSError of a data file."""
    return InputError(
        f"{path}: cannot read this file ({error.strerror}); correct its path in the config (relative paths start "
        "at the folder you run in)"
    )


@contextlib.contextmanager
def _locked(folder):
    """Lock the cache folder against the machine's other processes; yield whether the file system
    can lock.
    """
    lock = FileLock(os.path.join(folder, ".lock"), fallback_to_soft=False)
    # some network file systems cannot lock; then each process builds all files
    with contextlib.suppress(OSError):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()
