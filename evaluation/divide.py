"""Evaluation over a data set, divided among the processes without a sample twice, whatever the task."""

import sys

import torch.distributed as dist
from torch.utils.data import Subset
from tqdm import tqdm

from dataset import test_loader, to_device
from utils import is_distributed, is_main, rank, world_size


def progress_bar(iterable, what):
    """iterable with a bar on the main process's screen, gone when it is done."""
    return tqdm(iterable, desc=what, leave=False, disable=not is_main(), file=sys.stdout, dynamic_ncols=True, mininterval=1)


def divided(dataset, config, device, what, collate=None):
    """Yields (indices of the samples, batch on the device) of this process's samples, every world_size-th of the data set.

    what: said before the progress bar; collate: as a loader takes it.
    """
    mine = range(rank(), len(dataset), world_size())
    batch_size = config["batch_size_test"]
    loader = test_loader(Subset(dataset, mine), config, device, collate)
    for number, batch in enumerate(progress_bar(loader, what)):
        yield mine[number * batch_size : (number + 1) * batch_size], to_device(batch, device)


def gathered(results):
    """What the processes found for their samples, {number: result} -> that of all samples on every process, in order."""
    if is_distributed():
        parts = [None] * world_size()
        dist.all_gather_object(parts, results)
        results = {number: result for part in parts for number, result in part.items()}
    return [results[number] for number in sorted(results)]
