"""Evaluation over a data set, divided among the processes without a sample twice, whatever the task."""

import functools
import sys

import torch
import torch.distributed as dist
from torch.utils.data import Subset
from tqdm import tqdm

from dataset import test_loader, to_device
from engine import autocast
from utils import is_distributed, is_main, rank, world_size


def progress_bar(iterable, what):
    """iterable with a bar on the main process's screen, gone when it is done."""
    return tqdm(iterable, desc=what, leave=False, disable=not is_main(), file=sys.stdout, dynamic_ncols=True, mininterval=1)


def divided(dataset, config, device, what, collate=None):
    """Yields (numbers of the samples, batch) of this process's samples, every world_size-th of the data set.

    what: said before the progress bar; collate: as a loader takes it.
    """
    mine = range(rank(), len(dataset), world_size())
    batch_size = config["batch_size_test"]
    loader = test_loader(Subset(dataset, mine), config, device, collate)
    for number, batch in enumerate(progress_bar(loader, what)):
        yield mine[number * batch_size : (number + 1) * batch_size], batch


def gathered(results):
    """What the processes found for their samples, {number: result} -> that of all samples on every process, in order."""
    if is_distributed():
        parts = [None] * world_size()
        dist.all_gather_object(parts, results)
        results = {number: result for part in parts for number, result in part.items()}
    return [results[number] for number in sorted(results)]


@torch.no_grad()
def class_accuracy(predict, dataset, tokenizer, config, device):
    """Share of the right classes of a LabeledDataset, in [0, 1], as {"acc"}; predict(batch on the device) -> logits [B, K]."""
    right, collate = {}, functools.partial(dataset.collate, tokenizer=tokenizer)
    with autocast(config, device):
        for numbers, batch in divided(dataset, config, device, "sentences", collate):
            batch = to_device(batch, device)
            right.update(zip(numbers, (predict(batch).argmax(dim=1) == batch.targets).tolist()))
    right = gathered(right)
    return {"acc": sum(right) / len(right)}


def print_accuracy(title, metrics, dataset, classes):
    """The accuracy that class_accuracy found, on the main process."""
    if is_main():
        print(f"{title}: accuracy {100 * metrics['acc']:.2f}% of {len(dataset)} sentences (chance {100 / classes:.1f}%)")
