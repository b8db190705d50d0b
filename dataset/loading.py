"""Loaders: the order of training samples, batches by data workers, transfer to the device."""

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Semaphore
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling

from configs.config import Config, as_config
from dataset.base import EntryDataset
from dataset.pool import begin_worker
from dataset.transforms import normalize
from utils import InputError, TrainingStopped, cores, environment_number, rank, seed_of, world_size

log = logging.getLogger(__name__)

MAX_WORKER_DEATHS = 3  # deaths in a row, without a batch in between
MAX_STARTS = 3  # attempts to start the data workers of a loader
START_TIMEOUT = 30  # seconds in which a forked data worker begins, usually milliseconds
MAX_WORKERS = 8  # largest default of num_workers

# --------------------------------------------------------------------------------------------------
# training batches


def check_length(length: int, batch_size: int, world_size: int) -> None:
    """Raise InputError if a training set has less than one batch."""
    if length < batch_size * world_size:
        processes = f" on each of {world_size} processes" if world_size > 1 else ""
        raise InputError(
            f"train_file has {length} entries, fewer than one batch of {batch_size}{processes}; "
            "lower batch_size"
        )


class EpochBatches(Sampler):
    """Batch sampler of one rank: a new order in every epoch, the same on all ranks.

    Batch b of all ranks together equals batch b of a single rank with the global batch size. The
    last, incomplete batch is dropped.

    Args:
        length: Number of samples.
        batch_size: Samples in a batch of one rank.
        seed: Random seed; the order depends on it and on the epoch.
        rank: Rank of this process.
        world_size: Number of ranks.
        order: Function (length, generator=...) -> indices [length], the order of an epoch.

    Raises:
        InputError: The data set has less than one batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[..., Tensor] = torch.randperm,
    ) -> None:
        check_length(length, batch_size, world_size)
        self.length, self.batch_size, self.seed, self.order = length, batch_size, seed, order
        self.rank, self.world_size = rank, world_size
        self.begin(0)

    def begin(self, epoch: int, seen: int = 0) -> None:
        """Set the epoch and skip its first `seen` samples, counted over all ranks.

        The skipped samples may have had another world size and batch size.
        """
        self.epoch, self.seen = epoch, seen

    def __len__(self) -> int:
        return (self.length - self.seen) // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = self.order(self.length, generator=generator)
        share = order[self.seen :][self.rank :: self.world_size].to(torch.int32)
        del order  # 8 bytes for each entry of the data set
        for batch in range(len(self)):
            yield share[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def workers(config: Config) -> int:
    """Return num_workers, by default the number of cores of each local rank, 8 at most."""
    if config.num_workers is not None:
        return config.num_workers
    local_ranks = max(1, environment_number("LOCAL_WORLD_SIZE", 1))
    return min(MAX_WORKERS, max(1, cores() // local_ranks))


class TrainBatches:
    """Training batches of this rank, starting at any point of an epoch.

    A data worker that dies is replaced, and its batches are read again: no sample is lost or
    repeated.

    Args:
        dataset: A training set of `build_dataset`. Its method `order`, if any, replaces
            torch.randperm.
        tokenizer: Tokenizer of the model.
        config: Configuration; batch_size and num_workers are read.
        device: Device of the model; batches for a GPU are in pinned memory.
        seed: Random seed of the order.
    """

    def __init__(
        self,
        dataset: EntryDataset,
        tokenizer: Any,
        config: Config | dict,
        *,
        device: torch.device,
        seed: int,
    ) -> None:
        self.dataset, config = dataset, as_config(config)
        self.sampler = EpochBatches(
            len(dataset),
            config.train_batch_size,
            seed=seed,
            rank=rank(),
            world_size=world_size(),
            order=getattr(dataset, "order", torch.randperm),
        )
        collate = functools.partial(dataset.collate, tokenizer=tokenizer)
        self.loader = Loader(
            dataset, collate, workers=workers(config), device=device, batch_sampler=self.sampler
        )

    def begin(self, epoch: int, seen: int = 0) -> None:
        """Set the epoch and skip its first `seen` samples, counted over all ranks."""
        self.dataset.epoch = epoch
        self.sampler.begin(epoch, seen)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        seen, failures = self.sampler.seen, 0
        while True:
            try:
                for batch in self.loader:
                    yield batch
                    seen, failures = seen + self.sampler.batch_size * self.sampler.world_size, 0
                return
            except WorkerDied as error:
                failures += 1
                if failures > MAX_WORKER_DEATHS:
                    raise TrainingStopped(f"{failures} failures in a row: {error}") from None
                log.warning("%s. Starting the workers again.", error)
                self.sampler.begin(self.sampler.epoch, seen)


def test_loader(
    dataset: Dataset,
    config: Config | dict,
    *,
    device: torch.device,
    collate: Callable | None = None,
) -> "Loader":
    """Return a loader of batches of batch_size_test in the order of the data set."""
    config = as_config(config)
    return Loader(
        dataset,
        collate,
        workers=workers(config),
        device=device,
        batch_size=config.batch_size_test,
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Move a nested batch to `device` and normalize its uint8 images.

    Args:
        value: A tensor, a (named) tuple of values, or anything else, which is returned unchanged.
        device: Target device.

    Returns:
        The batch; images are float32 [..., 3, H, W].
    """
    if isinstance(value, Tensor):
        if device.type == "cuda":
            # tensors that the loader has not pinned; a copy from pageable memory blocks
            value = value.pin_memory()
        value = value.to(device, non_blocking=True)
        return normalize(value) if value.dtype == torch.uint8 else value
    if isinstance(value, tuple):
        moved = [to_device(part, device) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


# --------------------------------------------------------------------------------------------------
# data workers

_data_workers = weakref.WeakSet()  # worker processes of all Loaders
_starting = threading.Lock()


@atexit.register  # runs before multiprocessing's handler, which would wait for the workers
def _kill_workers() -> None:
    """Kill the data workers that remain when an error ends the run."""
    for process in _data_workers:
        process.kill()


@contextlib.contextmanager
def _starting_workers() -> Iterator[list]:
    """Yield a list that holds the data workers started in the block after it.

    torch (2.x) installs a SIGCHLD handler that raises an error inside any computation when a worker
    dies. Without the handler the loader raises the error at the next batch.
    """
    started = []
    with _starting:
        handled, signal_handling._SIGCHLD_handler_set = signal_handling._SIGCHLD_handler_set, True
        parallel = os.environ.get("TOKENIZERS_PARALLELISM")
        # if unset, tokenizers warns at every fork
        os.environ["TOKENIZERS_PARALLELISM"] = parallel or "false"
        before = multiprocessing.active_children()
        try:
            yield started
        finally:
            started += [child for child in multiprocessing.active_children() if child not in before]
            _data_workers.update(started)
            if parallel is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            signal_handling._SIGCHLD_handler_set = handled


class WorkerDied(TrainingStopped):
    """A data worker died, for example because memory ran out."""


class Loader(DataLoader):
    """DataLoader that distinguishes errors of the data set from deaths of data workers.

    Args:
        dataset: Map-style data set.
        collate: Function samples -> batch, by default torch's.
        workers: Number of data workers, 0 to read in this process.
        device: Device of the model; batches for a GPU are in pinned memory.
        **batching: batch_size or batch_sampler of DataLoader.

    Raises:
        WorkerDied: A data worker died; raised by iteration, like every error of the data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable | None,
        *,
        workers: int,
        device: torch.device,
        **batching: Any,
    ) -> None:
        collate = functools.partial(_read, dataset=dataset, collate=collate or default_collate)
        super().__init__(
            # a sequence is a data set too, and Dataset of torch has no __len__
            range(len(dataset)),  # ty: ignore[invalid-argument-type]
            collate_fn=collate,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            **batching,
        )

    def _start(self) -> tuple[Iterator[Any], list]:
        """Start the data workers. Return the batches and the workers.

        A forked worker may hang before it begins: CPython before 3.11.10 has a deadlock if a thread
        of gloo enters Python during the fork (python/cpython#112275). Then all are started again.

        Raises:
            TrainingStopped: A worker did not begin in MAX_STARTS attempts.
        """
        forks = multiprocessing.get_start_method() == "fork"
        for _ in range(MAX_STARTS):
            begun = multiprocessing.Semaphore(0)
            self.worker_init_fn = functools.partial(_begin, begun)
            with _starting_workers() as started:
                batches = super().__iter__()
            if not forks or all(begun.acquire(timeout=START_TIMEOUT) for _ in started):
                return batches, started
            log.warning(
                "a data worker did not begin in %g s; starting the workers again", START_TIMEOUT
            )
            for worker in started:
                worker.kill()
            del batches  # waits for the workers
        # not WorkerDied, after which the loaders of training would try again
        raise TrainingStopped(
            f"a data worker did not begin in {MAX_STARTS} attempts; set num_workers to 0"
        )

    # the base class promises an iterator of its own class
    def __iter__(self) -> Iterator[Any]:  # ty: ignore[incompatible-method-override]
        batches, started = self._start()
        try:
            for batch in batches:
                if isinstance(batch, _Failure):
                    break
                yield batch
            else:
                return
        # EOFError and ConnectionError if a worker dies while it sends a batch
        except (RuntimeError, EOFError, ConnectionError) as error:
            alive = sum(worker.is_alive() for worker in started)
            if not self.num_workers or (
                isinstance(error, RuntimeError) and alive == self.num_workers
            ):
                raise
            raise WorkerDied(
                f"a data worker died ({str(error) or type(error).__name__}). If memory ran out,"
                " lower num_workers or the batch size. If shared memory (/dev/shm) ran out, start"
                " the container with a larger --shm-size"
            ) from None
        # The workers end now. If the error's traceback kept the iterator, garbage collection would
        # wait 10 seconds for each worker (torch 2.x).
        del batches
        if isinstance(batch.error, ExceptionWrapper):
            batch.error.reraise()
        raise batch.error


def _begin(begun: Semaphore, _: int) -> None:
    """Initialize a data worker and tell its parent."""
    begin_worker()
    begun.release()


class _Failure(NamedTuple):
    """Placeholder of a batch if the data set raised an error."""

    error: Exception | ExceptionWrapper  # ExceptionWrapper has the traceback of a data worker


def _read(indices: list[int], dataset: Dataset, collate: Callable) -> Any:
    """Return a batch, or a _Failure if the data set raised an error."""
    several = getattr(dataset, "__getitems__", None)
    try:
        return collate(several(indices) if several else [dataset[index] for index in indices])
    except (InputError, TrainingStopped) as error:
        return _Failure(error)
    except Exception:
        if get_worker_info() is None:  # read in the run's own process
            raise
        return _Failure(ExceptionWrapper(where="in a data worker"))
