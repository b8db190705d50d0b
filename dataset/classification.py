"""Sentences about one image or two with a label: what the data of VE, NLVR2 and relevance have in
common.
"""

from typing import NamedTuple

import torch

from dataset.annotations import Entries
from dataset.base import EntryDataset
from dataset.images import load_image
from dataset.text import Limits, tokenize
from utils import InputError, Text


class ClassificationSample(NamedTuple):
    image: torch.Tensor  # uint8 [images, 3, R, R]
    sentence: str
    target: int
    files: list
    skipped: list = []


class ClassificationBatch(NamedTuple):
    image: tuple  # uint8 [B, 3, R, R] each: the images, or the first ones and the second ones
    text: Text  # [B, L]
    targets: torch.Tensor  # [B]
    files: list
    skipped: list


class ClassificationDataset(EntryDataset):
    """Sentences with their images and their class. form: an Entry with `sentence` and `target`."""

    def __init__(self, files, form, image_root, transform, seed=None, limits=Limits()):
        super().__init__(
            Entries(files, form), {"image_root": image_root}, transform, seed, limits=limits
        )

    def require_classes(self, count, key):
        """Raise InputError unless `count` classes occur; key: the configuration key of the files."""
        found = set()
        if not any(found.add(entry.target) or len(found) == count for entry in self.entries):
            (label,) = found
            raise InputError(
                f"{key} {self.entries.files[0]}: all labels are {label}, the ROC AUC needs both: add the other"
            )

    def read(self, index):
        entry, files = self.entry(index), self.files(index)
        image = torch.stack([self.transform(load_image(file)) for file in files])
        return ClassificationSample(image, self.clean(index, entry.sentence), entry.target, files)

    def collate(self, samples, tokenizer):
        """Samples -> ClassificationBatch; sentences are padded to the longest of the batch."""
        images, sentences, targets, files, skipped = zip(*samples)
        text = tokenize(sentences, tokenizer, self.limits.tokens)
        return ClassificationBatch(
            torch.stack(images, dim=1).unbind(),
            text,
            torch.tensor(targets),
            sum(files, []),
            sum(skipped, []),
        )
