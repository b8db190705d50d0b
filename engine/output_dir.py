"""Output folders: create, check and lock them, and write files there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from utils import TEMPORARY, InputError, TrainingStopped, atomic_write, is_main, permitted

LOCK_TIMEOUT = 10  # seconds that an earlier process may take to end

_locks: dict[str, FileLock] = {}  # locks, which the system releases when this process ends


def make_output_dir(path: Path | str, *, lock: bool = True, flag: str = "--output_dir") -> None:
    """Create a folder and check that it can be written to, before anything expensive.

    Args:
        path: The folder.
        lock: Lock the folder until this process ends, and remove the temporary files of a killed
            process. In a process group rank 0 holds the lock.
        flag: Flag or key that names the folder, for messages.

    Raises:
        InputError: The folder cannot be written to, or another process holds its lock.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot write there ({error.strerror}); name another folder"
        ) from None
    if lock and is_main():
        _hold(path, flag)
        for leftover in path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)


def _hold(folder: Path, flag: str) -> None:
    # filelock closes it in forked processes, so data workers that outlive this one do not keep it
    lock = _locks.setdefault(
        str(folder.resolve()), FileLock(folder / ".lock", fallback_to_soft=False)
    )
    try:
        if not lock.is_locked:
            lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise InputError(
            f"{flag} {folder}: another process is writing there; name another folder, or end"
            " that process"
        ) from None
    except OSError:  # a file system without locks
        pass


@contextlib.contextmanager
def writing(
    path: Path, kept: str = "", failures: type[Exception] | tuple[type[Exception], ...] = OSError
) -> Iterator[None]:
    """Context that writes a file of a run.

    Args:
        path: The file, for the message.
        kept: Part of the message that names the unharmed files.
        failures: Errors that mean that the file cannot be written.

    Raises:
        TrainingStopped: One of `failures` occurred.
    """
    try:
        yield
    except failures as error:
        # torch.save reports only a wrong position; the operating system's error has the reason
        reasons = (getattr(e, "strerror", None) for e in (error, error.__context__))
        reason = next(filter(None, reasons), error)
        raise TrainingStopped(f"cannot write {path}: {reason}{kept and '; '}{kept}") from None


@permitted()
def check_output(path: Path | str, flag: str = "--output", *, overwrite: bool = True) -> None:
    """Raise InputError if a file cannot be written there, or exists and must stay."""
    path = Path(path)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{flag} {path}: cannot write there; name a file in an existing folder")
    if path.exists() and not overwrite:
        raise InputError(f"{flag} {path} exists already; name another file or add --overwrite")


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write the contents of files, each atomically. Raises TrainingStopped as `writing` does."""
    for path, content in files.items():
        with writing(path), atomic_write(path) as file:
            file.write(content)
