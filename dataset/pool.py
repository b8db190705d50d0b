"""Pools of worker processes that never outlive the program."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from utils import SIGNALS, TrainingStopped, cores

MAX_PROCESSES = 8  # more would wait for the disk


def begin_worker() -> None:
    """Initialize a worker process: ignore SIGINT and SIGTERM, and exit when the parent exits.

    Ctrl-C, torchrun and Slurm signal the whole process group, but a run that saves before it exits
    may still need batches.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    # hides the stack trace of multiprocessing's thread if the parent exits during a transfer
    sys.excepthook = lambda *_: None
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent does. A worker of a killed parent would wait for tasks forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def process_count(tasks: int, wanted: int | None = None) -> int:
    """Return how many worker processes to start for `tasks` files.

    Args:
        tasks: Number of tasks.
        wanted: Largest number of processes, by default the number of cores, 8 at most.

    Returns:
        The number of processes, 0 in place of 1: the parent does the work.
    """
    count = min(wanted or min(MAX_PROCESSES, cores()), tasks)
    return count if count > 1 else 0


@contextlib.contextmanager
def in_processes(
    count: int, begin: Callable[..., None] = begin_worker
) -> Iterator[Callable[[Callable, Iterable], Iterator]]:
    """Yield a function like `map` that computes its results in a pool of processes.

    Args:
        count: Number of processes, 0 to compute in this process.
        begin: Initializer of a process, which calls `begin_worker`.

    Yields:
        jobs(function, items), which yields function(item) in the order of the items and takes only
        a few items ahead.

    Raises:
        TrainingStopped: A process died.
    """
    if not count:
        yield map
        return

    def jobs(function: Callable, items: Iterable) -> Iterator:
        items, ahead = iter(items), deque()
        while True:
            more = list(itertools.islice(items, 4 * count - len(ahead)))
            if not more and not ahead:
                return
            try:
                ahead.extend((item, pool.submit(function, item)) for item in more)
                item, result = ahead.popleft()
                done = result.result()
            except BrokenProcessPool:
                first = item[0] if isinstance(item, (list, tuple)) else item
                raise TrainingStopped(
                    f"a worker process died at {first} or soon after. If memory ran out, lower"
                    " --workers; otherwise remove that file"
                ) from None
            yield done

    others = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(count, initializer=begin)
    try:
        yield jobs
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()  # its results are not needed any more
        pool.shutdown(wait=False)  # its thread may not have started yet
        raise
    pool.shutdown()
