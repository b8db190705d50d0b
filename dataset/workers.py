"""Processes that work for a run: none outlives it, and what they meet reaches it as it is."""

import atexit
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import weakref
from collections import deque
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling

from utils import SIGNALS, InputError, TrainingStopped, cores

MAX_PROCESSES = 8  # more would wait for the disk


def begin_worker(_=None):
    """What a process that works for a run does first: it leaves signals to the run, and ends when
    the run does.

    Ctrl-C, torchrun and Slurm signal the whole group, and a run that saves before it leaves may
    need another batch for that.
    """
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    # where the run leaves while a tensor is handed over to it, multiprocessing's thread for that
    # would show a stack trace
    sys.excepthook = lambda *_: None
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """End this process with the run, also when that is killed: otherwise it would wait for its next
    task forever.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


_data_workers = weakref.WeakSet()  # processes of all Loaders
_starting = threading.Lock()


@atexit.register  # before multiprocessing's own, which would ask them to end and wait for it
def _end_workers():
    """Kill the data workers that are left if an error has ended the run."""
    for process in _data_workers:
        process.kill()


@contextlib.contextmanager
def _starting_workers():
    """Set flags of torch and tokenizers for the data workers that start in the block, and note
    these workers.

    torch's SIGCHLD handler raises an error in the middle of any computation when a worker dies,
    even while other workers start. Without the handler the error comes with the next batch.
    """
    with _starting:
        handled, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, True
        parallel = os.environ.get("TOKENIZERS_PARALLELISM")
        # or the library warns at the fork
        os.environ["TOKENIZERS_PARALLELISM"] = parallel or "false"
        before = multiprocessing.active_children()
        try:
            yield
        finally:
            _data_workers.update(
                process for process in multiprocessing.active_children() if process not in before
            )
            if parallel is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            signal_handling._SIGCHLD_handler_set = handled


class WorkerDied(TrainingStopped):
    """A data worker is gone, or the thread that pins what it has read; not an error that it has
    met.
    """


class Loader(DataLoader):
    """Batches of a data set, read by data workers whose errors reach the run as they are.

    collate: samples -> batch. count: data workers, 0 to read in this process. batching: as
    DataLoader takes it. Iterating raises WorkerDied, and what the data set raises.
    """

    def __init__(self, dataset, collate, count, device, **batching):
        collate = functools.partial(_read, dataset=dataset, collate=collate or default_collate)
        super().__init__(
            range(len(dataset)),
            collate_fn=collate,
            num_workers=count,
            pin_memory=device.type == "cuda",
            worker_init_fn=begin_worker,
            **batching,
        )

    def __iter__(self):
        try:
            with _starting_workers():
                batches = super().__iter__()
            for batch in batches:
                if isinstance(batch, _Failure):
                    break
                yield batch
            else:
                return
        # the latter two if it dies while it sends a batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            of_torch = re.search(r"DataLoader worker \(pid|Pin memory thread exited", str(error))
            if not self.num_workers or (isinstance(error, RuntimeError) and not of_torch):
                raise
            raise WorkerDied(
                f"a data worker died ({str(error) or type(error).__name__}); if memory ran out, lower num_workers "
                "or the batch size; if shared memory did (/dev/shm), start the container with a larger --shm-size"
            ) from None
        if isinstance(batch.error, ExceptionWrapper):
            batch.error.reraise()
        raise batch.error


class _Failure(NamedTuple):
    """What takes the place of a batch that a data set could not give."""

    error: Exception | ExceptionWrapper  # the latter carries the traceback of a data worker


def _read(indices, dataset, collate):
    """Return a batch, or the _Failure of the data set, so that it is not taken for the death of a
    data worker.
    """
    several = getattr(dataset, "__getitems__", None)
    try:
        return collate(several(indices) if several else [dataset[index] for index in indices])
    except (InputError, TrainingStopped) as error:
        return _Failure(error)
    except Exception:
        if get_worker_info() is None:  # read in the run's own process
            raise
        return _Failure(ExceptionWrapper(where="in a data worker"))


def process_count(tasks, wanted=None):
    """The processes for so many tasks on files:

    `wanted`, by default the cores, 8 at most; 0, this one, instead of one.
    """
    count = min(wanted or min(MAX_PROCESSES, cores()), tasks)
    return count if count > 1 else 0


@contextlib.contextmanager
def in_processes(count, begin=begin_worker):
    """Give jobs(function, items), which yields function(item) of the items in order, computed by
    `count` processes.

    Few items are taken ahead of the results. count: 0 to compute them in this process. begin: what
    a process does first, begin_worker among it. Raises TrainingStopped if a process dies.
    """
    if not count:
        yield map
        return

    def jobs(function, items):
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
                    f"a process died while it worked on {first} or what follows: if memory ran out, lower "
                    "--processes; else remove that file"
                ) from None
            yield done

    others = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(count, initializer=begin)
    try:
        yield jobs
    except BaseException:
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()  # what it is computing is of no use any more
        raise
    finally:
        pool.shutdown()
