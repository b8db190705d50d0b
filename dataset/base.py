"""What every data set has: draws that can be repeated, a way with unusable samples, a check that
its images exist.
"""

import os

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.images import ImageError, no_file
from dataset.text import Limits, is_blank
from utils import InputError, seed_of

MAX_ATTEMPTS = 100  # replacements tried for one unusable sample


class EntryDataset(Dataset):
    """Samples by index, to train on if there is a seed, else to test on.

    In training a sample depends on (seed, epoch, index) alone, not on the worker or on earlier
    samples. An unusable sample is replaced by another one, because web data is noisy (Section 3.4).
    In testing it is an InputError, because every sample counts.

    entries: dataset.annotations.Entries; indices: the entries that are samples (default: all);
    roots: image folders by configuration key; limits: of the texts. A subclass has read(index),
    which raises ImageError or InputError for an unusable sample. In training it returns a
    NamedTuple with a list `skipped`.
    """

    def __init__(self, entries, roots, transform, seed=None, indices=None, limits=Limits()):
        self.entries, self.roots, self.transform, self.seed = entries, roots, transform, seed
        self.indices = range(len(entries)) if indices is None else indices
        self.limits, self.epoch = limits, 0

    def __len__(self):
        return len(self.indices)

    def digest(self) -> str:
        """Return a digest of the entries in hexadecimal digits."""
        return self.entries.digest()

    def entry(self, index):
        return self.entries[self.indices[index]]

    def files(self, index):
        """The paths of a sample's images."""
        entry = self.entry(index)
        return [os.path.join(self.roots[entry.root] or "", image) for image in entry.images]

    def clean(self, index, text):
        """Clean up and cut a text of a sample's entry. Raises InputError if it is empty then."""
        cleaned = self.entries.form.clean(text, self.limits.words)
        # only if max_words is small: the entry was checked with the limit of its form
        if is_blank(cleaned):
            raise InputError(
                f"{self.where(index)}: its text is empty after clean-up and max_words {self.limits.words}"
            )
        return cleaned

    def where(self, index):
        """File and number of a sample's entry, for error messages."""
        return self.entries.where(self.indices[index])

    def __getitem__(self, index):
        if self.seed is None:
            try:
                return self.read(index)
            except ImageError as error:
                raise InputError(
                    f"cannot read a test image: {error}; every image of the test file counts"
                ) from None
        # torch.manual_seed would format a stack trace for every kind of device not in use
        torch.default_generator.manual_seed(seed_of(self.seed, self.epoch, index))
        skipped = []
        for _ in range(MAX_ATTEMPTS):
            try:
                return self.read(index)._replace(skipped=skipped)
            except (ImageError, InputError) as error:
                skipped.append(str(error))
            index = int(torch.randint(len(self), ()))
        raise InputError(f"no usable entry in {MAX_ATTEMPTS} tries, the last one: {skipped[-1]}")


def evenly(length, wanted):
    """Indices below `length`: `wanted` of them, evenly spaced, or all (None)."""
    return (
        range(length)
        if wanted is None or wanted >= length
        else np.linspace(0, length - 1, wanted).astype(int).tolist()
    )


def check_images(dataset, sample=1000):
    """Raise InputError unless the image folders and the images of `sample` evenly spaced samples
    exist (None: of all).

    A root may be None or empty if the annotation files hold absolute paths; those win over it.
    """
    for key, root in dataset.roots.items():
        if root and not os.path.isdir(root):
            raise InputError(
                f"{key}: folder {root} does not exist; set {key} to the folder that the image paths of the "
                "annotation files start from"
            )
    # many samples may share an image, which is looked up once: its first sample remains
    checked = {path: i for i in reversed(evenly(len(dataset), sample)) for path in dataset.files(i)}
    missing = [(i, path) for path, i in checked.items() if not os.path.isfile(path)]
    if missing:
        i, path = min(missing)
        share = f"{len(missing)} of the {len(checked)} images checked are missing, {len(missing) / len(checked):.1%}"
        roots = ", ".join(f"{key} ({root or 'not set'})" for key, root in dataset.roots.items())
        problem, remedy = no_file(path).split(": ")
        raise InputError(
            f"{dataset.where(i)}: image {path} {problem} ({share}); {remedy}, correct {roots}, or remove such "
            "entries from the annotation file"
        )
