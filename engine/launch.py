"""Start and end a script: environment, logging, signals, exit codes."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType

from utils import SIGNALS, InputError, TrainingStopped, gather_lists, is_distributed, rank

PACKAGES = ("configs", "dataset", "engine", "evaluation", "inference", "models", "tools")


class Interrupted(KeyboardInterrupt):
    """A signal ends the run. `run_script` prints the message and exits with 128 + signal."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message and f"{signal.Signals(signum).name}: {message}")
        self.signum = signum


def run_script(main: Callable[[], None]) -> None:
    """Run the main function of a script and turn its errors into exit codes.

    InputError is one line and exit code 2, TrainingStopped one line and 1, a signal one line and
    128 + signal. Every other exception keeps its traceback, on every rank.

    Args:
        main: Function that parses the command line and does the work. Its imports of torch see the
            environment that is set here.
    """
    set_environment()
    configure_logging()
    status, message = 0, ""
    try:
        with interruptible("the command ended before it was complete"):
            main()
            if is_distributed():
                gather_lists([])  # the launcher ends all processes as soon as one has exited
    except KeyboardInterrupt as error:
        status, message = 128 + getattr(error, "signum", signal.SIGINT), str(error)
    except (TrainingStopped, InputError) as error:
        status, message = 2 if isinstance(error, InputError) else 1, f"error: {one_line(error)}"
        # all ranks probably have the same message, and the launcher ends this one once the first
        # exits
        time.sleep(min(launched_rank(), 8))
    except Exception as error:
        add_memory_hint(error)
        if not is_distributed():
            raise
        status = 1
        print_traceback(error)
    if message and (not launched_rank() or status in (1, 2)):
        print(message, file=sys.stderr, flush=True)
    if is_distributed():
        # a normal exit would wait for pending collective operations, in which other ranks wait for
        # this process; after a complete run gloo's threads may abort the process
        sys.stdout.flush()
        os._exit(status)
    if status:
        sys.exit(status)


def set_environment() -> None:
    """Set the environment that torch and its libraries read when they are imported."""
    # OpenMP threads of torch would spin while they wait and slow down other programs
    if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
        # a short spin, because sleeping at once is slower on an idle machine
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # each data worker tokenizes in one thread; without this the library warns at every fork
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # from Pillow; dataset.images refuses such an image
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    # missing in a notebook, and stdout is None if it was closed; file names may not be UTF-8
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


class _Stderr(logging.Handler):
    """Write records to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        prefix = "note: " if record.levelno >= logging.WARNING else ""
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def configure_logging() -> None:
    """Send the log of rank 0 to stderr, warnings with the prefix "note: "."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Stderr) for handler in root.handlers):
        handler = _Stderr(logging.INFO)
        handler.addFilter(lambda record: not launched_rank() or record.levelno >= logging.ERROR)
        root.addHandler(handler)
        for package in PACKAGES:  # libraries log only warnings
            logging.getLogger(package).setLevel(logging.INFO)


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks and terminal escape sequences."""
    text = " ".join(str(error).splitlines())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def add_memory_hint(error: Exception) -> None:
    """Add a line with the keys that save memory to an error of exhausted memory."""
    torch = sys.modules.get("torch")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError):
        error.add_note(
            "out of memory; lower batch_size but keep it above 1, set precision to bf16, or set"
            " gradient_checkpointing to true. In an evaluation, lower batch_size_test"
        )


def print_traceback(error: Exception) -> None:
    """Print the traceback of a rank, and record it for torchrun, which shows the first one."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    error.add_note(
        f"rank {rank()}: if another rank failed first, the error of that rank is the cause; add"
        " --resume to continue the run"
    )
    print("".join(traceback.format_exception(error)), end="", file=sys.stderr, flush=True)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


@contextlib.contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Context in which a first signal raises Interrupted and a second one ends the process.

    Args:
        message: Text of Interrupted after the name of the signal.
    """
    process = os.getpid()

    def interrupt(signum: int, _: FrameType | None) -> None:
        if os.getpid() == process:  # not a newly forked data worker
            for other in SIGNALS:
                signal.signal(other, end_at_once)
            raise Interrupted(signum, message)

    def repeat(unraisable: "sys.UnraisableHookArgs") -> None:
        # Python ignores exceptions in callbacks, such as hooks after a fork: send the signal again
        error = unraisable.exc_value
        if isinstance(error, Interrupted):
            signal.signal(error.signum, interrupt)
            threading.Timer(0.01, os.kill, (process, error.signum)).start()
        else:
            report(unraisable)

    before = {signum: signal.signal(signum, interrupt) for signum in SIGNALS}
    report, sys.unraisablehook = sys.unraisablehook, repeat
    try:
        yield
    finally:
        sys.unraisablehook = report
        for signum, handler in before.items():
            if signal.getsignal(signum) is interrupt:
                signal.signal(signum, handler)


def end_at_once(signum: int, _: FrameType | None) -> None:
    """Handle a signal: end this process without cleaning up."""
    if not launched_rank():
        # os.write, because the signal may have interrupted print
        os.write(2, f"{signal.Signals(signum).name}: ended at once\n".encode())
    os._exit(128 + signum)


def launched_rank() -> int:
    """Return the rank from the launcher's variables, which are set before the group is joined."""
    text = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(text) if text.isdecimal() else 0
