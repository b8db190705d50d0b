"""Sentences about one image or two with a label: what the data of VE and NLVR2 have in common."""

from typing import NamedTuple

import torch

from dataset.annotations import Entries
from dataset.base import EntryDataset
from dataset.images import load_image
from dataset.text import tokenize
from utils import Text


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
    """Sentences with their images and their class. form: dataset.ve.Entailment or dataset.nlvr.Statement."""

    def __init__(self, files, form, image_root, transform, seed=None):
        super().__init__(Entries(files, form), {"image_root": image_root}, transform, seed)

    def read(self, index):
        entry, files = self.entry(index), self.files(index)
        image = torch.stack([self.transform(load_image(file)) for file in files])
        return ClassificationSample(image, entry.clean(entry.sentence), entry.target, files)

    def collate(self, samples, tokenizer):
        """Samples -> ClassificationBatch; sentences are padded to the longest of the batch."""
        images, sentences, targets, files, skipped = zip(*samples)
        text = tokenize(sentences, tokenizer)
        return ClassificationBatch(
            torch.stack(images, dim=1).unbind(), text, torch.tensor(targets), sum(files, []), sum(skipped, [])
        )
