"""Which samples make up the batches of an epoch, on any number of processes and from any point of
it on.
"""

import functools
import sys

import torch
from torch.utils.data import Sampler

from dataset.workers import Loader, WorkerDied
from utils import InputError, TrainingStopped, cores, environment_number, rank, seed_of, world_size

MAX_WORKER_DEATHS = 3  # in a row, without a batch between them


def check_length(length, batch_size, world_size):
    """Raise InputError for a training set of less than one batch."""
    if length < batch_size * world_size:
        processes = f" on each of {world_size} processes" if world_size > 1 else ""
        raise InputError(
            f"train_file has {length} entries, less than one batch of {batch_size}{processes}: "
            "lower batch_size"
        )


class EpochBatches(Sampler):
    """Batches of indices of one process: every epoch in a new order, the same for all processes,
    divided among them.

    Together the processes' batches number b hold what a single process with the sum of their batch
    sizes has as its batch b. The last, incomplete batch is dropped. order(length, generator=...)
    draws an epoch's order, a tensor of indices.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1, order=torch.randperm):
        check_length(length, batch_size, world_size)
        self.length, self.batch_size, self.seed, self.order = length, batch_size, seed, order
        self.rank, self.world_size = rank, world_size
        self.begin(0)

    def begin(self, epoch, seen=0):
        """Set the epoch and skip its first `seen` samples, counted over all processes.

        The number of processes and the batch size may have changed since.
        """
        self.epoch, self.seen = epoch, seen

    def __len__(self):
        """Batches that are left of the epoch."""
        return (self.length - self.seen) // (self.batch_size * self.world_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = self.order(self.length, generator=generator)
        mine = order[self.seen :][self.rank :: self.world_size].to(torch.int32)
        del order  # of as many numbers as there are entries, of which this process needs few
        for batch in range(len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def workers(config):
    """Data workers of each process: num_workers, else the cores of this machine divided by its
    processes, 8 at most.
    """
    if config["num_workers"] is not None:
        return config["num_workers"]
    return min(8, max(1, cores() // max(1, environment_number("LOCAL_WORLD_SIZE", 1))))


class TrainBatches:
    """The batches of a training set for this process, from any point of any epoch on.

    dataset: what build_dataset gives for training; it may have an order of its own (EpochBatches).
    A data worker that dies is replaced, and what it had begun is done again: no sample is lost or
    repeated.
    """

    def __init__(self, dataset, tokenizer, config, device, seed):
        self.dataset = dataset
        order = getattr(dataset, "order", torch.randperm)
        self.sampler = EpochBatches(
            len(dataset), config["batch_size"], seed, rank(), world_size(), order
        )
        collate = functools.partial(dataset.collate, tokenizer=tokenizer)
        self.loader = Loader(dataset, collate, workers(config), device, batch_sampler=self.sampler)

    def begin(self, epoch, seen=0):
        """Set the epoch and skip its first `seen` samples, counted over all processes."""
        self.dataset.epoch = epoch
        self.sampler.begin(epoch, seen)

    def __len__(self):
        """Batches that are left of the epoch."""
        return len(self.sampler)

    def __iter__(self):
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
                    raise TrainingStopped(f"{failures} times in a row {error}") from None
                print(f"note: {error}; starting the workers again", file=sys.stderr, flush=True)
                self.sampler.begin(self.sampler.epoch, seen)
