"""Base class: reproducible sampling, handling of unusable samples, existence checks."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.config import Config
from dataset.images import Exif, ImageError, load_image, no_file
from dataset.store import Entries
from dataset.text import NO_LIMITS, Limits, is_blank
from dataset.transforms import test_transform, train_transform
from utils import InputError, seed_of

MAX_ATTEMPTS = 100  # replacements tried for one unusable sample
FINE_TUNING_SCALE = 0.5  # smallest share of the image that a crop keeps in fine-tuning


class EntryDataset(Dataset):
    """Samples by index, for training if there is a seed, else for testing.

    A training sample depends on (seed, epoch, index) alone, not on the worker or on earlier
    samples. Another sample replaces an unusable one, because web data is noisy (Section 3.4). An
    unusable test sample raises InputError, because every test sample counts.

    A subclass has read(index), which raises ImageError or InputError for an unusable sample. In
    training it returns a NamedTuple with a list `skipped`.

    Args:
        entries: The entries, `dataset.store.Entries` or a list.
        roots: Image folder by configuration key.
        transform: Image transform, uint8 [3, H, W] -> uint8 [3, R, R].
        seed: Random seed of a training set, None for a test set.
        indices: Indices of the entries to use, by default all.
        limits: Limits of the texts. None keeps a limit of the entries' form.
        exif: Effect of the images' EXIF orientation, see `decode_image`.
    """

    collate: Callable[..., Any]  # of a training set: (samples, tokenizer) -> batch

    def __init__(
        self,
        entries: Entries[Any] | list[Any],
        roots: Mapping[str, str | None],
        transform: Callable[[torch.Tensor], torch.Tensor],
        *,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        limits: Limits = NO_LIMITS,
        exif: Exif = "stored",
    ) -> None:
        self.entries, self.roots, self.transform, self.seed = entries, roots, transform, seed
        self.indices = range(len(entries)) if indices is None else indices
        self.limits, self.exif, self.epoch = limits, exif, 0

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Any:
        """Read a sample, see the class."""
        raise NotImplementedError

    def digest(self) -> str:
        """Return a digest of the entries in hexadecimal digits."""
        return self.entries.digest()

    def entry(self, index: int) -> Any:
        """Return the entry of a sample."""
        return self.entries[self.indices[index]]

    def files(self, index: int) -> list[str]:
        """Return the paths of a sample's images."""
        entry = self.entry(index)
        return [os.path.join(self.roots[entry.root] or "", image) for image in entry.images]

    def load(self, file: str) -> torch.Tensor:
        """Read and decode an image, uint8 [3, H, W]. Raises ImageError."""
        return load_image(file, self.exif)

    @property
    def max_tokens(self) -> int | None:
        """The most token ids of a text, None for the model's limit."""
        return self.limits.tokens or self.entries.form.max_tokens

    def clean(self, index: int, text: str) -> str:
        """Clean up and cut a text of a sample. Raises InputError if the result is empty."""
        cleaned = self.entries.form.clean(text, self.limits.words)
        # happens only with a small max_words: the entry was checked with the limit of its form
        if is_blank(cleaned):
            raise InputError(
                f"{self.where(index)}: its text is empty after clean-up and truncation to"
                f" max_words {self.limits.words}; raise max_words"
            )
        return cleaned

    def where(self, index: int) -> str:
        """Return the file and number of a sample's entry for error messages."""
        return self.entries.where(self.indices[index])

    def __getitem__(self, index: int) -> Any:
        if self.seed is None:
            try:
                return self.read(index)
            except ImageError as error:
                raise InputError(
                    f"cannot read a test image, but an evaluation needs all of them: {error}"
                ) from None
        # torch.manual_seed would format a stack trace for every unused kind of device
        torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
        skipped = []
        for _ in range(MAX_ATTEMPTS):
            try:
                return self.read(index)._replace(skipped=skipped)
            except (ImageError, InputError) as error:
                skipped.append(str(error))
            index = int(torch.randint(len(self), ()))
        raise InputError(f"no usable entry in {MAX_ATTEMPTS} tries (last error: {skipped[-1]})")


def train_options(
    config: Config, seed: int, *, min_scale: float | None = FINE_TUNING_SCALE
) -> dict[str, Any]:
    """Return arguments of `EntryDataset` for the training set of a configuration.

    Args:
        config: Configuration of the task.
        seed: Random seed.
        min_scale: Smallest share of the image that a crop keeps unless the key min_scale is set,
            None to resize the whole image.

    Returns:
        The arguments roots, transform, seed, limits and exif.
    """
    if config.min_scale is not None:
        min_scale = config.min_scale
    transform = train_transform(
        config.resolution, min_scale, hflip=config.hflip, augment=config.randaugment
    )
    return {**test_options(config), "transform": transform, "seed": seed}


def test_options(config: Config) -> dict[str, Any]:
    """Return the arguments roots, transform, limits and exif of a test set."""
    return {
        "roots": {"image_root": config.image_root},
        "transform": test_transform(config.resolution),
        "limits": Limits(config.max_words, config.max_tokens),
        "exif": config.exif,
    }


def evenly(length: int, wanted: int | None) -> Sequence[int]:
    """Return `wanted` evenly spaced indices below `length`, or all if `wanted` is None."""
    if wanted is None or wanted >= length:
        return range(length)
    return np.linspace(0, length - 1, wanted).astype(int).tolist()


def check_images(dataset: EntryDataset, *, sample: int | None = None) -> None:
    """Check that the image folders and the images of the entries exist.

    Args:
        dataset: The data set; a root may be None or "" if the entries hold absolute paths.
        sample: Number of evenly spaced samples to check, None for all.

    Raises:
        InputError: A folder or an image is missing.
    """
    listed = len(dataset.indices)  # samples of shards have no files
    if not listed:
        return
    for key, root in dataset.roots.items():
        if root and not os.path.isdir(root):
            raise InputError(
                f"{key}: folder {root} does not exist; set {key} to the folder that image paths in"
                " the annotation files are relative to"
            )
    # look up an image once even if many samples share it; the first sample is reported
    checked = {path: i for i in reversed(evenly(listed, sample)) for path in dataset.files(i)}
    missing = [(i, path) for path, i in checked.items() if not os.path.isfile(path)]
    if missing:
        i, path = min(missing)
        share = len(missing) / len(checked)
        roots = ", ".join(f"{key} ({root or 'not set'})" for key, root in dataset.roots.items())
        problem, remedy = no_file(path).split("; ")
        raise InputError(
            f"{dataset.where(i)}: image {path} {problem} ({len(missing)} of {len(checked)}"
            f" checked images are missing, {share:.1%}); {remedy}, correct {roots}, or remove"
            " entries with missing images from the annotation file"
        )
