"""What every room uses: errors, ranks, seeds, atomic files."""

import contextlib
import errno
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

# NumPy and torch are imported where they are used: they take seconds, which --help and a mistyped flag need not wait for

# the data workers tokenize, each in one thread; without this the library warns at every fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


TIMEOUT = 1800  # seconds that a process waits for the others


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file, key or line, and the remedy.

    Scripts print it without a stack trace and exit with status 2. kind: what is wrong with an entry of a list, for counts.
    """

    def __init__(self, message, kind="other"):
        super().__init__(message)
        self.kind = kind


class TrainingStopped(RuntimeError):
    """Training cannot go on (a loss is not finite, too many broken images). Scripts exit with status 1."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; the launcher or the batch system ends the run


class Interrupted(KeyboardInterrupt):
    """A signal of SIGNALS ends the run. Scripts exit with its status, 130 or 143.

    together: all processes raise it, at the same place.
    """

    def __init__(self, signum, message, together=False):
        super().__init__(f"{signal.Signals(signum).name}: {message}")
        self.signum, self.together = signum, together


def begin_script(flags):
    """Parse a script's flags before its imports, which take seconds: --help and mistakes are answered at once.

    A signal during the imports ends the process with one line.
    """
    for signum in SIGNALS:
        signal.signal(signum, _leave_at_once)
    run_script(flags.parse_args)


def run_script(main):
    """Run a script's main function and turn signals and the errors a user can do something about into a line and a status."""
    status, message, together = 0, "", False
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's lacks it; it is None where it was closed from the beginning
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be UTF-8
    try:
        with interruptible("ended before it was complete"), _flushing():
            main()
            if is_distributed():
                gather_lists([])  # the launcher ends all processes as soon as one has left
    except KeyboardInterrupt as error:
        status, message = 128 + getattr(error, "signum", signal.SIGINT), str(error) or "interrupted"
        together = getattr(error, "together", False)
    except (TrainingStopped, InputError) as error:
        # what a library says, which a message may hold, can have several lines
        status, message = 2 if isinstance(error, InputError) else 1, f"error: {' '.join(str(error).splitlines())}"
        if _launched_rank():
            # most likely all processes say the same; the launcher ends this one once the first has left
            time.sleep(1 + local_rank())
    except Exception as error:
        said = explain(error)
        if not (said or is_distributed()):
            raise
        process = f"process {rank()}: " if is_distributed() else ""
        status, message = 1, f"error: {process}" + (said or f"\n{traceback.format_exc()}")
    if message and (not _launched_rank() or status in (1, 2)):
        print(message, file=sys.stderr, flush=True)
    if together:
        with contextlib.suppress(RuntimeError):  # a second signal has ended another process
            gather_lists([])  # until the main process has said so, which the launcher would end
    if is_distributed():
        # a normal exit would wait for the collective operations that are under way, and the others in them for this process;
        # and at the end of a good run gloo's threads may abort it
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


@contextlib.contextmanager
def _flushing():
    """Write what is printed within it at its end. Raises OSError where standard output is closed or full."""
    try:
        yield
    finally:
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at exit, and says so
            raise


@contextlib.contextmanager
def interruptible(message):
    """Have a signal raise Interrupted with this message within it, and a second one end the process at once."""
    process, show = os.getpid(), sys.unraisablehook

    def interrupt(signum, _):
        if os.getpid() == process:  # and not a data worker that has only just been forked
            for other in SIGNALS:
                signal.signal(other, _leave_at_once)
            raise Interrupted(signum, message)

    def unraisable(told):  # a signal while an object is being destroyed
        if isinstance(told.exc_value, Interrupted):
            _leave_at_once(told.exc_value.signum, None)
        show(told)

    before = {signum: signal.signal(signum, interrupt) for signum in SIGNALS}
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = show
        for signum, handler in before.items():
            if signal.getsignal(signum) is interrupt:
                signal.signal(signum, handler)


def _leave_at_once(signum, _):
    if not _launched_rank():
        os.write(2, f"{signal.Signals(signum).name}: ended at once\n".encode())  # print may be what was interrupted
    os._exit(128 + signum)


def _launched_rank():
    """Return the rank of this process by what the launcher says, also before it has joined the others."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


# ---------------------------------------------------------------------------------------------------------------------
# processes and seeds


# errors of files that are not mistakes of the code: no room, no right, the other end is gone, too many are open
OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EPIPE, errno.EIO, errno.EMFILE)
LOST = "another process of the run has ended or does not answer; continue with --resume"
# what NCCL says in its own words, and what to do about it
NCCL_REMEDIES = {
    "duplicate gpu": "start as many processes as there are GPUs (torchrun --nproc_per_node)",
    "shm|shared memory": "/dev/shm is too small; start the container with more, such as docker run --shm-size=16g",
    "out of memory|cuda (calloc|malloc|host alloc)": "lower batch_size, or end what else runs on this GPU",
}


def explain(error):
    """Return one line on an error of other processes, NCCL, memory or a disk, which no stack trace explains; else ""."""
    torch, text = sys.modules.get("torch"), str(error)
    if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
        what = f"use {error.filename}" if error.filename else "write a file, or to standard output"
        return f"cannot {what}: {error.strerror}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        return (f"out of memory: make the model, its queue or batch_size smaller, or end what else runs here "
                f"({' '.join(text.split()[:40])})")  # fmt: skip
    if not (torch and isinstance(error, RuntimeError)):
        return ""
    if isinstance(error, torch.OutOfMemoryError) or re.search("CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED", text):
        return (f"out of GPU memory: lower batch_size, in an evaluation batch_size_test, or end what else runs on this GPU "
                f"({' '.join(text.splitlines()[0].split()[:40])})")  # fmt: skip
    dist = torch.distributed
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return explain_nccl(text) or LOST
    return LOST if re.search("gloo|pair closure|connection (closed|reset)|timed out", text, re.IGNORECASE) else ""


def explain_nccl(text):
    """Return a line with NCCL's own words and a remedy for the text of an error of torch, "" if it is not NCCL's."""
    words = re.search(r"Last error:[ \t]*\n(?!Exception raised)[ \t]*(\S.*)", text)
    words = words or re.search(r"^(nccl[A-Z]\w+: .*)", text, re.MULTILINE)
    if not words:
        return ""
    said = f"NCCL: {words[1].strip()}"
    for pattern, remedy in NCCL_REMEDIES.items():
        if re.search(pattern, said, re.IGNORECASE):
            return f"{said}; {remedy}"
    if re.search("ncclRemoteError|closed by remote peer|connection (reset|refused)|abort", text, re.IGNORECASE):
        return f"{LOST} ({said})"
    return f"{said}; NCCL_DEBUG=INFO in the environment tells more"


def _group():
    """Return torch.distributed if this process has joined others, which it cannot have without importing it; else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


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


def local_rank():
    """Return the rank within this machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def seed_of(*coordinates):
    """Return a well-mixed 63-bit seed for whole-number coordinates such as (seed, epoch, iteration, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*coordinates):
    """Seed Python, NumPy and torch (all devices). Every training step does so: resuming needs no generator state."""
    import numpy as np
    import torch

    value = seed_of(*coordinates)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def make_deterministic():
    """Make every operation give the same result each time (key deterministic), also where a GPU has a faster one."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help against bugs, of which every allocation pays the cost
    torch.backends.cudnn.benchmark = False


# ---------------------------------------------------------------------------------------------------------------------
# files


def printable(path):
    """Return a path for the screen or a list: as it is, or in quotes with escapes where it has a line break or the like."""
    return path if path.isprintable() else ascii(path)


TEMPORARY = ".tmp"  # how the names of files end that are not complete; they begin with a dot
os.umask(UMASK := os.umask(0))  # read once: while it is read another thread's files would get unintended rights


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside path and rename it to path when the block ends well: never a half-written file.

    Raises OSError, also for what is there and no file: a folder, or a device such as /dev/null, whose place it would take.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and not a file", str(path))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        os.chmod(name, 0o666 & ~UMASK)
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the new name, too, is to survive a power failure; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def hash_file(path):
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_record(path):
    """Return where the SHA-256 of a file is recorded: PATH.sha256, which `sha256sum --check` reads."""
    return Path(f"{path}.sha256")


def recorded_hash(path):
    """Return the recorded SHA-256 of a file in hexadecimal, None without a record. Raises InputError."""
    record = hash_record(path)
    try:
        found = re.search(r"^\\?([0-9a-fA-F]{64})\b", record.read_text(), re.MULTILINE)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{record}: cannot be read ({error}), remove it or repair it") from None
    if not found:
        raise InputError(f"{record}: holds no SHA-256; remove it, or write it anew with sha256sum")
    return found[1].lower()


_verified = {}  # path -> recorded hash, size and time of change of a file that this process has read whole


def verify_hash(path):
    """Return whether a file has a recorded SHA-256. It is read for it once per process. Raises InputError if it has another."""
    expected = recorded_hash(path)
    if expected is None:
        return False
    try:
        stat = os.stat(path)
        state = expected, stat.st_size, stat.st_mtime_ns
        differs = _verified.get(str(path)) != state and hash_file(path) != expected
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if differs:
        raise InputError(
            f"{path}: its SHA-256 is not the one in {hash_record(path)}, so it was damaged or changed: move it away and "
            f"download it again (Download.py), or remove {hash_record(path)} if the change is meant"
        )
    _verified[str(path)] = state
    return True


def make_output_dir(path, writes=True, patience=10, flag="--output_dir"):
    """Create an output folder and check that it can be written to, before anything expensive. Raises InputError.

    writes: a run will write its checkpoints there. Then no other run may until this process ends, and what a killed one has
    left half written is removed. Called on all processes; one of them holds the folder. patience: seconds that the run before
    may take to die. flag: what names the folder, for messages.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot write there ({error.strerror}), name another folder") from None
    if writes and is_main():
        _hold(path, patience, flag)
        for leftover in path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)


def remake_output_dir(path):
    """Make the folder of a running run again if it is gone, and say so. Raises OSError."""
    if not Path(path).is_dir():
        Path(path).mkdir(parents=True, exist_ok=True)
        print(f"note: {path} was gone and is made anew; what it held is lost", file=sys.stderr, flush=True)


_held = {}  # output_dir -> the lock that this process has until it ends, however it ends


def _hold(folder, patience, flag):
    """Lock a folder for this process. Raises InputError."""
    from filelock import FileLock, Timeout

    # filelock takes it from forked processes: data workers that outlive this one do not keep it
    lock = _held.setdefault(str(folder.resolve()), FileLock(folder / ".lock", fallback_to_soft=False))
    try:
        if not lock.is_locked:
            lock.acquire(timeout=patience)
    except Timeout:
        raise InputError(f"{flag} {folder}: another run is writing there, name another folder or end it") from None
    except OSError:  # a file system without locks
        pass


# ---------------------------------------------------------------------------------------------------------------------
# what data sets give and models take


class Text(NamedTuple):
    """A batch of tokenized texts: [CLS] and word pieces, padded at the end."""

    input_ids: Any  # tensor [B, L]
    attention_mask: Any  # tensor [B, L], 1 for a token, 0 for padding

    def to(self, device):
        """Return the same text on a device."""
        return Text(*(x.to(device, non_blocking=True) for x in self))
