"""Construction of the data set of a task and split."""

from typing import Any

from configs.schema import require
from configs.tasks import find, find_task
from dataset.base import EntryDataset, check_images
from utils import InputError


def build_dataset(task: str, split: str, config: Any, *, seed: int = 0) -> EntryDataset:
    """Build the data set of a task and split, and check all of its annotation files.

    The images of a training set are checked on a sample of 1,000, those of a test set all.

    Args:
        task: Name of the task in `configs.tasks`.
        split: train, val or test.
        config: Configuration of the task.
        seed: Random seed of a training set.

    Returns:
        The data set, whose class depends on the task.

    Raises:
        InputError: The task lacks the split, the configuration lacks a key, or a file is missing or
            wrong.
    """
    row = find_task(task)
    files = {"train": "train_file"} if row.trains else {}
    files |= row.files
    if split not in files:
        raise InputError(f"task {task} has no split {split!r}, only {', '.join(files) or 'none'}")
    require(config, "image_res", files[split])
    if split == "train":
        dataset = find(row.train_data)(config, seed)
        check_images(dataset, sample=1000)
    else:
        dataset = find(row.test_data)(config, split)
        check_images(dataset)
    return dataset
