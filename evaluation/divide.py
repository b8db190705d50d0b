"""Evaluation over a data set, divided among the processes without a sample twice, whatever the
task.
"""

from torch.utils.data import Subset
from tqdm import tqdm

from dataset.loading import test_loader, to_device
from utils import gather_lists, is_main, rank, world_size


def progress_bar(iterable, what):
    """Iterate with a bar on the main process's terminal, shown after one second and removed at the
    end.
    """
    return tqdm(
        iterable,
        desc=what,
        leave=False,
        disable=None if is_main() else True,
        dynamic_ncols=True,
        mininterval=1,
        delay=1,
    )


def divide(dataset, config, device, what, collate=None):
    """Yield (indices of the samples, batch on the device) of this process's samples, every
    world_size-th of the data set.

    what: said before the progress bar; collate: as a loader takes it.
    """
    mine = range(rank(), len(dataset), world_size())
    batch_size = config["batch_size_test"]
    loader = test_loader(Subset(dataset, mine), config, device=device, collate=collate)
    for number, batch in enumerate(progress_bar(loader, what)):
        yield mine[number * batch_size : (number + 1) * batch_size], to_device(batch, device)


def gather(results):
    """Return the results of all processes, {index of a sample: result} each, in the order of the
    samples, on every process.
    """
    results = dict(gather_lists(results.items()))
    return [results[index] for index in sorted(results)]
