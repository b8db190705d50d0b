"""Shared basics: errors, ranks, seeds, atomic files, tokenized texts."""

import contextlib
import contextvars
import errno
import hashlib
import json
import os
import random
import secrets
import signal
import stat
import sys
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

# NumPy and torch are imported inside functions: they take seconds, and --help must not wait
if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; sent by a launcher or a batch system
TEMPORARY = ".tmp"  # suffix of incomplete files, whose names begin with a dot


class InputError(Exception):
    """A wrong input of the user: one line that names the file, key or line, and the remedy.

    Scripts print the line without a traceback and exit with code 2.
    """


class TrainingStopped(Exception):
    """A run cannot go on, such as after a loss that is not finite. Scripts exit with code 1."""


class Text(NamedTuple):
    """A batch of tokenized texts: [CLS] and word pieces, padded at the end.

    Attributes:
        input_ids: Token ids [B, L].
        attention_mask: 1 for a token and 0 for padding [B, L].
    """

    input_ids: "torch.Tensor"
    attention_mask: "torch.Tensor"

    def to(self, device: "torch.device") -> "Text":
        """Return the text on a device."""
        return Text(*(x.to(device, non_blocking=True) for x in self))


# --------------------------------------------------------------------------------------------------
# ranks and seeds

_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Context in which this process neither shares work with other ranks nor waits for them."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _group() -> ModuleType | None:
    """Return torch.distributed if this process is in a group. Without the import there is none."""
    dist = sys.modules.get("torch.distributed")
    joined = dist and dist.is_available() and dist.is_initialized() and not _alone.get()
    return dist if joined else None


def is_distributed() -> bool:
    """Return whether this process works with others."""
    return _group() is not None


def rank() -> int:
    """Return the rank of this process, 0 without a group."""
    dist = _group()
    return dist.get_rank() if dist else 0


def world_size() -> int:
    """Return the number of processes of the group, 1 without a group."""
    dist = _group()
    return dist.get_world_size() if dist else 1


def is_main() -> bool:
    """Return whether this process has rank 0."""
    return rank() == 0


def gather_lists(values: Iterable[Any]) -> list[Any]:
    """Concatenate the lists of all ranks, in the order of the ranks; every rank must call it."""
    dist = _group()
    if not dist:
        return list(values)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def environment_number(name: str, default: int = 0) -> int:
    """Return a whole number from the environment, as a launcher sets it. Raises InputError."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(
            f"environment variable {name}={text} is not a whole number; unset {name}, or start the"
            " script with torchrun or srun"
        )
    return int(text)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    # macOS has no sched_getaffinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_of(*coordinates: int) -> int:
    """Return a well-mixed 63-bit seed for numbers such as (seed, epoch, iteration, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*coordinates: int) -> None:
    """Seed Python, NumPy and torch on all devices.

    Every training step calls it, so that resuming needs no generator state.
    """
    import numpy as np
    import torch

    value = seed_of(*coordinates)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


# --------------------------------------------------------------------------------------------------
# files


def printable(path: str) -> str:
    """Return a path for the screen, quoted with escapes if it has unprintable characters."""
    return path if path.isprintable() else ascii(path)


def percent(probability: float) -> str:
    """Return a probability for the screen, in percent."""
    # also in a large index, where all are small, one is not 0
    return f"{probability:.1%}" if probability >= 0.001 else f"{100 * probability:.1g}%"


def open_regular(path: Path | str) -> BufferedReader:
    """Open a regular file to read its bytes.

    Raises:
        OSError: The path is of another kind: a FIFO would block, a device would never end.
    """
    file = open(
        os.fspath(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path: Path | str) -> bytes:
    """Return the bytes of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


@contextlib.contextmanager
def permitted() -> Iterator[None]:
    """Turn PermissionError into InputError: a context or decorator for look-ups of user paths."""
    try:
        yield
    except PermissionError as error:  # from Path.exists and others too, until Python 3.14
        raise InputError(
            f"{error.filename}: {error.strerror}; change its permissions, or name another path"
        ) from None


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Return the objects of a run's log.txt, [] if it is missing.

    Raises:
        InputError: The file cannot be read, or a line is not a JSON object.
    """
    import msgspec

    entries: list[dict[str, Any]] = []
    try:
        content = read_regular(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entries.append(msgspec.convert(json.loads(line), dict[str, Any]))
        except ValueError as error:
            raise InputError(
                f"{path} line {number}: not a JSON object ({error}); correct the line, or move the"
                " file away"
            ) from None
    return entries


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file and rename it to `path` after the block.

    No incomplete file ever has the name `path`.

    Raises:
        OSError: The file cannot be written, or `path` exists but is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it exists and is not a regular file", str(path))
    name = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with open(name, mode.replace("w", "x")) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    # the new name should also survive a power failure, if the file system can sync folders
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def hash_contents(contents: Iterable[Any]) -> str:
    """Return a digest of byte strings or contiguous arrays, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
