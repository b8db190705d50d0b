"""Which samples make up the batches of an epoch, on any number of processes and from any point of it on."""

import functools
import os
import sys
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, Sampler

from dataset.workers import Loader, WorkerDied
from utils import InputError, TrainingStopped, cores, gather_lists, rank, seed_of, world_size

MAX_WORKER_DEATHS = 3  # in a row, without a batch between them


class Phase(NamedTuple):
    """A stretch of an epoch that was run with one layout of processes and data workers."""

    batches: int  # of each process
    batch_size: int  # of each process
    world_size: int
    lanes: int  # data workers of each process, 1 where it reads its data itself


def continued(history, phase):
    """history with another Phase at its end, one Phase with the last if the layout is the same."""
    if history and history[-1]._replace(batches=0) == phase._replace(batches=0):
        return [*history[:-1], phase._replace(batches=history[-1].batches + phase.batches)]
    return [*history, phase]


def samples_of(phases):
    """Samples that all processes together have seen in phases."""
    return sum(phase.batches * phase.batch_size * phase.world_size for phase in phases)


def check_length(length, batch_size, world_size):
    """Raises InputError for a training set of less than one batch."""
    if length < batch_size * world_size:
        processes = f" on each of {world_size} processes" if world_size > 1 else ""
        raise InputError(f"train_file has {length} entries, less than one batch of {batch_size}{processes}: "
                         "lower batch_size")


class EpochBatches(Sampler):
    """Batches of indices of one process: a new permutation each epoch, the same for all processes, divided among them.

    Together the processes' batches number b hold what a single process with the sum of their batch sizes has as its
    batch b. The last, incomplete batch is dropped.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1):
        check_length(length, batch_size, world_size)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.begin(0)

    def begin(self, epoch, history=()):
        """Makes the next iteration that of an epoch, without what history, the Phases of it that are done, has used.

        The processes, their batch size and their data workers may have been others then.
        """
        self.epoch, self.done = epoch, samples_of(history)

    @property
    def batches(self):
        """Batches that are left of the epoch."""
        return (self.length - self.done) // (self.batch_size * self.world_size)

    def __len__(self):
        return self.batches

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        permutation = torch.randperm(self.length, generator=generator)
        mine = permutation[self.done :][self.rank :: self.world_size].to(torch.int32)
        del permutation  # of as many numbers as there are entries, of which this process needs few
        for batch in range(self.batches):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def workers(config):
    """Data workers of each process: num_workers, else the cores of this machine divided by its processes, 8 at most."""
    if config["num_workers"] is not None:
        return config["num_workers"]
    return min(8, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def train_workers(config):
    """The data workers that all processes can have; to be called on all. What a worker reads depends on their number."""
    return min(gather_lists([workers(config)]))


class TrainBatches:
    """The batches of a training set for this process, from any point of any epoch on.

    dataset: what build_dataset gives for training. layout: the Phase, of no batches, of runs with these processes, batch size
    and data workers. A data worker that dies is replaced, and what it had begun is done again: no sample is lost or repeated.
    """

    def __init__(self, dataset, tokenizer, config, device, seed):
        number, batch_size = train_workers(config), config["batch_size"]
        self.dataset = dataset
        self.layout = Phase(0, batch_size, world_size(), max(1, number))
        if isinstance(dataset, IterableDataset):  # a Stream, which knows its batches itself
            self.source, batching = dataset, {"batch_size": batch_size}
        else:
            self.source = EpochBatches(len(dataset), batch_size, seed, rank(), world_size())
            batching = {"batch_sampler": self.source}
        self.loader = Loader(dataset, functools.partial(dataset.collate, tokenizer=tokenizer), number, device, **batching)

    def begin(self, epoch, history=()):
        """The next iteration is over what history, the Phases of the epoch that are done, has left of it."""
        self.dataset.epoch, self.epoch, self.history = epoch, epoch, list(history)
        self.source.begin(epoch, self.history)

    @property
    def batches(self):
        """Batches that are left of the epoch."""
        return self.source.batches

    def __iter__(self):
        begun, done, failures = self.history, 0, 0
        while True:
            try:
                for batch in self.loader:
                    yield batch
                    done, failures = done + 1, 0
                return
            except WorkerDied as error:
                failures += 1
                if failures > MAX_WORKER_DEATHS:
                    raise TrainingStopped(f"{failures} times in a row {error}") from None
                print(f"note: {error}; starting the workers again", file=sys.stderr, flush=True)
                self.begin(self.epoch, continued(begun, self.layout._replace(batches=done)))
