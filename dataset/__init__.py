"""Data sets by task and split, and the loaders that feed them."""

import functools
import os
import signal

import torch
from torch.utils.data import DataLoader, Sampler

from dataset.annotations import check_images, load_annotations
from dataset.caption import CaptionDataset
from dataset.retrieval import RetrievalTestSet
from dataset.transforms import test_transform, train_transform
from utils import InputError, require, seed_of


# what tells the training sets of captions apart: token ids of a text, smallest share of the image that a crop keeps
CAPTIONS = {"pretrain": (25, 0.2), "retrieval_train": (30, 0.5)}


def build_dataset(name, config, seed=0):
    """The data set `name`: pretrain or retrieval_train (of train_file), retrieval_val (of val_file), retrieval_test.

    All its annotation files are checked here. Raises InputError.
    """
    image_root, image_res = config["image_root"], config["image_res"]
    require(config, "image_res")
    if name in CAPTIONS:
        require(config, "train_file")
        max_tokens, min_scale = CAPTIONS[name]
        annotations = load_annotations(config["train_file"], image_ids=name == "retrieval_train")
        check_images(annotations, image_root)
        min_scale = min_scale if config["min_scale"] is None else config["min_scale"]
        transform = train_transform(image_res, min_scale, config["hflip"], config["randaugment"])
        return CaptionDataset(annotations, image_root, transform, seed, max_tokens)
    if name in ("retrieval_val", "retrieval_test"):
        key = name.removeprefix("retrieval_") + "_file"
        require(config, key)
        test_set = RetrievalTestSet(config[key], image_root, test_transform(image_res))
        missing = [path for path in map(test_set.path, range(len(test_set))) if not os.path.isfile(path)]
        if missing:
            raise InputError(f"{config[key][0]}: image {missing[0]} does not exist, nor do {len(missing) - 1} others; "
                             f"correct image_root ({image_root or 'not set'}) or the file")
        return test_set
    raise InputError(f"data set {name!r} is unknown, there are {', '.join(CAPTIONS)}, retrieval_val and retrieval_test")


class EpochBatches(Sampler):
    """Batches of indices of one process: a new permutation each epoch, the same for all processes, divided among them.

    Together the processes' batches number b hold what a single process with the sum of their batch sizes has as its
    batch b. The last, incomplete batch is dropped. Set `epoch`, and `start` to leave out the first batches.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1):
        if length < batch_size * world_size:
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise InputError(f"train_file has {length} entries, less than one batch of {batch_size}{processes}: "
                             "lower batch_size")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self):
        """Batches in an epoch, whatever `start` is."""
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        mine = torch.randperm(self.length, generator=generator)[self.rank :: self.world_size]
        for batch in range(self.start, len(self)):
            yield mine[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


def workers(config):
    """Data workers of each process: num_workers, else the cores of this machine divided by its processes, 8 at most."""
    if config["num_workers"] is not None:
        return config["num_workers"]
    return min(8, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _ignore_signals(_):
    # Ctrl-C reaches the whole process group; the training process decides when its workers leave
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train_loader(dataset, batches, tokenizer, config, device):
    """A loader of what dataset.collate makes, over EpochBatches; start a new iteration for every epoch."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=functools.partial(dataset.collate, tokenizer=tokenizer),
        num_workers=workers(config),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
    )


def test_loader(dataset, config, device):
    """A loader of image batches in the order of the data set."""
    return DataLoader(
        dataset, batch_size=config["batch_size_test"], num_workers=workers(config), pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
    )  # fmt: skip
