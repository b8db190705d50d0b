"""Construction of the data set of a task and split."""

from configs.config import Config, as_config
from configs.load import require
from configs.tasks import Task, find, find_task
from dataset.base import EntryDataset, check_images
from dataset.entries import Entry
from utils import InputError


def build_dataset(task: str, split: str, config: Config | dict, *, seed: int = 0) -> EntryDataset:
    """Build the data set of a task and split, and check all of its annotation files.

    The check covers all images of a test set, and a sample of 1,000 of a training set.

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
    config = as_config(config)
    dataset = construct_dataset(task, split, config, seed=seed)
    check_images(dataset, sample=1000 if split == "train" else None)
    return dataset


def construct_dataset(task: str, split: str, config: Config, *, seed: int = 0) -> EntryDataset:
    """Build a data set as `build_dataset` does, but do not check its images."""
    row = find_task(task)
    files = split_keys(row)
    if split not in files:
        raise InputError(f"task {task} has no split {split!r}, only {', '.join(files) or 'none'}")
    require(config, "image_res", files[split])
    if split == "train":
        return find(row.train_data)(config, seed)
    return find(row.test_data)(config, split)


def split_keys(task: Task) -> dict[str, str]:
    """Return the configuration key of the files of each split, the training set included."""
    return {"train": "train_file", **task.files} if task.trains else dict(task.files)


def find_form(task: Task, split: str) -> type[Entry] | None:
    """Return the form of the entries of a split, None for files that are no lists of entries."""
    path = task.train_data if split == "train" else task.test_data
    return find(f"{path.partition(':')[0]}:FORMS").get(split)
