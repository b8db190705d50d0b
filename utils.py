"""What every room uses: errors, ranks, seeds, atomic files."""

import contextlib
import contextvars
import errno
import hashlib
import os
import random
import secrets
import signal
import stat
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

# NumPy and torch are imported inside functions: they take seconds, and --help must not wait for
# them


TIMEOUT = 1800  # seconds that a process waits for other ranks


class InputError(Exception):
    """A wrong input of the user. The message is one line that names the file, key or line, and the
    remedy.

    Scripts print it without a traceback and exit with status 2. kind: short name of the problem of
    a list's entry, for counts.
    """

    def __init__(self, message, kind="other"):
        super().__init__(message)
        self.kind = kind


class TrainingStopped(Exception):
    """Training cannot go on (a loss is not finite, too many broken images).

    Scripts exit with status 1.
    """


# Ctrl-C; sent by the launcher or the batch system to end the run
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal of SIGNALS ends the run.

    Scripts print the message, if there is one, and exit with status 130 or 143.
    """

    def __init__(self, signum, message=""):
        super().__init__(message and f"{signal.Signals(signum).name}: {message}")
        self.signum = signum


def begin_script(flags):
    """Parse a script's flags before its imports, which take seconds, so that --help and mistakes
    print at once.

    A signal during the imports ends the process with one line.
    """
    # OpenMP threads of torch would spin while they wait and slow down other programs on the machine
    if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
        # a short spin: to sleep at once slows down a quiet machine
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # each data worker tokenizes in one thread; without this variable the library warns at every
    # fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # from Pillow; dataset.images refuses such an image
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    for signum in SIGNALS:
        signal.signal(signum, end_at_once)
    run_script(flags.parse_args)


def run_script(main):
    """Run a script's main function. A signal, InputError or TrainingStopped becomes one line and
    the exit status.

    Every other exception keeps its traceback, on every rank.
    """
    status, message = 0, ""
    # missing in a notebook, or if stdout is None because it was closed at the start
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be UTF-8
    try:
        with interruptible("ended before it was complete"):
            main()
            if is_distributed():
                gather_lists([])  # the launcher ends all processes as soon as one has exited
    except KeyboardInterrupt as error:
        status, message = 128 + getattr(error, "signum", signal.SIGINT), str(error)
    except (TrainingStopped, InputError) as error:
        # a message may hold text of a library or server, with line breaks and escape sequences of
        # the terminal
        text = "".join(
            c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).splitlines())
        )
        status, message = 2 if isinstance(error, InputError) else 1, f"error: {text}"
        # most likely all ranks have the same message; the launcher ends this one once the first has
        # exited
        time.sleep(min(_launched_rank(), 8))
    except Exception as error:
        _add_memory_hint(error)
        if not is_distributed():
            raise
        status = 1
        _print_traceback(error)
    if message and (not _launched_rank() or status in (1, 2)):
        print(message, file=sys.stderr, flush=True)
    if is_distributed():
        # a normal exit would wait for pending collective operations, in which other ranks wait for
        # this process; after a complete run gloo's threads may abort the process
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def _add_memory_hint(error):
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError):
        error.add_note(
            "out of memory: lower batch_size (not below 2; batch_size_test in an evaluation), set precision to bf16 "
            "or gradient_checkpointing to true"
        )


def _print_traceback(error):
    """Print the traceback of a rank, and record it for torchrun, which shows the first one of all
    ranks.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    error.add_note(
        f"rank {rank()}: if another rank has ended before, its error is the cause; continue with --resume"
    )
    print("".join(traceback.format_exception(error)), end="", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


@contextlib.contextmanager
def interruptible(message):
    """Context in which a signal raises Interrupted with this message and a second signal ends the
    process at once.
    """
    process = os.getpid()

    def interrupt(signum, _):
        if os.getpid() == process:  # and not a data worker that has only just been forked
            for other in SIGNALS:
                signal.signal(other, end_at_once)
            raise Interrupted(signum, message)

    before = {signum: signal.signal(signum, interrupt) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is interrupt:
                signal.signal(signum, handler)


def end_at_once(signum, _):
    """Handle a signal: end this process."""
    if not _launched_rank():
        # the signal may have interrupted a print
        os.write(2, f"{signal.Signals(signum).name}: ended at once\n".encode())
    os._exit(128 + signum)


def _launched_rank():
    """Return the rank of this process from the launcher's variables, which are set before it joins
    the group.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(rank) if rank.isdecimal() else 0


# --------------------------------------------------------------------------------------------------
# processes and seeds


_alone = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone():
    """Context in which this process computes by itself: it neither shares work with other ranks nor
    waits for them.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _group():
    """Return torch.distributed if this process has joined a group, else None.

    Without the import there is no group.
    """
    dist = sys.modules.get("torch.distributed")
    return (
        dist
        if dist and dist.is_available() and dist.is_initialized() and not _alone.get()
        else None
    )


def is_distributed():
    return _group() is not None


def rank():
    return _group().get_rank() if is_distributed() else 0


def world_size():
    return _group().get_world_size() if is_distributed() else 1


def is_main():
    return rank() == 0


def gather_lists(values):
    """Return the lists of all processes in one, in the order of the ranks, on every process."""
    if not is_distributed():
        return list(values)
    parts = [None] * world_size()
    _group().all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def cores():
    """Return the number of CPU cores that this process may use."""
    # macOS has no sched_getaffinity
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def environment_number(name: str, default: int | None = None) -> int:
    """Return a whole number from the environment.

    Raises InputError if it is no number, or missing without a default.
    """
    text = os.environ.get(name) or default
    if text is None:
        raise InputError(
            f"{name} is missing in the environment: start several processes by torchrun or srun, or unset WORLD_SIZE"
        )
    if not str(text).isdecimal():
        raise InputError(
            f"{name}={text} in the environment is not a whole number: unset it, or start by torchrun or srun"
        )
    return int(text)


def local_rank():
    """Return the rank within this machine. Raises InputError."""
    return environment_number("LOCAL_RANK", environment_number("SLURM_LOCALID", 0))


def seed_of(*coordinates):
    """Return a well-mixed 63-bit seed for whole-number coordinates such as (seed, epoch, iteration,
    rank).
    """
    import numpy as np

    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*coordinates):
    """Seed Python, NumPy and torch (all devices).

    Every training step does so: resuming needs no generator state.
    """
    import numpy as np
    import torch

    value = seed_of(*coordinates)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def make_deterministic():
    """Make every operation give the same result each time (key deterministic), also where a GPU has
    a faster one.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a help against bugs, of which every allocation pays the cost
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


# --------------------------------------------------------------------------------------------------
# files


def printable(path):
    """Return a path for the screen or a list: unchanged, or quoted with escapes if it has
    unprintable characters.
    """
    return path if path.isprintable() else ascii(path)


def open_regular(path):
    """Open a regular file to read its bytes.

    Raises OSError for another kind: a FIFO would block, a device would never end.
    """
    file = open(
        os.fspath(path), "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_regular(path):
    """Return the bytes of a regular file. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        return file.read()


TEMPORARY = ".tmp"  # how the names of files end that are not complete; they begin with a dot


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside path and rename it to path after the block, so that no
    incomplete file appears.

    Raises OSError, also if `path` exists but is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and not a file", str(path))
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


def hash_contents(contents) -> str:
    """Return one digest of an iterable of byte strings or contiguous arrays, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def make_output_dir(path, writes=True, patience=10, flag="--output_dir"):
    """Create an output folder and check that it can be written to, before anything expensive.
    Raises InputError.

    writes: a run will write its checkpoints there. Then no other run may until this process ends,
    and what a killed one has left half written is removed. Called on all processes; one of them
    holds the folder. patience: seconds that the run before may take to die. flag: what names the
    folder, for messages.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"{flag} {path}: cannot write there ({error.strerror}), name another folder"
        ) from None
    if writes and is_main():
        _hold(path, patience, flag)
        for leftover in path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)


_held = {}  # output_dir -> the lock that this process has until it ends, however it ends


def _hold(folder, patience, flag):
    """Lock a folder for this process. Raises InputError."""
    from filelock import FileLock, Timeout

    # filelock takes it from forked processes: data workers that outlive this one do not keep it
    lock = _held.setdefault(
        str(folder.resolve()), FileLock(folder / ".lock", fallback_to_soft=False)
    )
    try:
        if not lock.is_locked:
            lock.acquire(timeout=patience)
    except Timeout:
        raise InputError(
            f"{flag} {folder}: another run is writing there, name another folder or end it"
        ) from None
    except OSError:  # a file system without locks
        pass


# --------------------------------------------------------------------------------------------------
# what data sets give and models take


class Text(NamedTuple):
    """A batch of tokenized texts: [CLS] and word pieces, padded at the end."""

    input_ids: Any  # tensor [B, L]
    attention_mask: Any  # tensor [B, L], 1 for a token, 0 for padding

    def to(self, device):
        """Return the same text on a device."""
        return Text(*(x.to(device, non_blocking=True) for x in self))
