"""Divide an evaluation among the ranks, each sample once, and merge the results."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from configs.config import Config
from dataset.loading import test_loader, to_device
from utils import gather_lists, is_main, rank, world_size


def progress_bar(iterable: Iterable[Any], what: str) -> tqdm:
    """Iterate with a bar on rank 0's terminal, shown after one second and removed at the end."""
    return tqdm(
        iterable,
        desc=what,
        leave=False,
        disable=None if is_main() else True,
        dynamic_ncols=True,
        mininterval=1,
        delay=1,
    )


def iter_rank_share(
    dataset: Dataset,
    config: Config,
    device: torch.device,
    what: str,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[tuple[range, Any]]:
    """Yield this rank's samples, every world_size-th of the data set, batch by batch.

    Args:
        dataset: The data set.
        config: The configuration; batch_size_test samples are a batch.
        device: Device of the batches.
        what: Label of the progress bar.
        collate: Makes a batch of a list of samples, torch's default if None.

    Yields:
        The indices of the samples, and their batch.
    """
    # Dataset of torch has no __len__
    indices = range(rank(), len(dataset), world_size())  # ty: ignore[invalid-argument-type]
    size = config.batch_size_test
    loader = test_loader(Subset(dataset, indices), config, device=device, collate=collate)
    for number, batch in enumerate(progress_bar(loader, what)):
        yield indices[number * size : (number + 1) * size], to_device(batch, device)


def merge_results(results: dict[int, Any]) -> list[Any]:
    """Return the results of all ranks in the order of the samples, on every rank.

    Args:
        results: This rank's result of each sample, by index.
    """
    merged = dict(gather_lists(results.items()))
    return [merged[index] for index in sorted(merged)]
