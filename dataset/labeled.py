"""Sentences about one image or two with a label: what the data of VE and NLVR2 have in common."""

import functools
import os
from typing import NamedTuple

import torch

from dataset.annotations import Entries, where
from dataset.samples import Samples
from dataset.text import MAX_WORDS, is_blank, pre_caption, tokenize
from dataset.images import load_image
from utils import InputError, Text


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 [images, 3, R, R]
    sentence: str
    target: int
    files: list
    skipped: list = []


class LabeledBatch(NamedTuple):
    image: tuple  # uint8 [B, 3, R, R] each: the images, or the first ones and the second ones
    text: Text  # [B, L]
    targets: torch.Tensor  # [B]
    files: list
    skipped: list


def labeled_entry(check, entry, path, number):
    """What check (LabeledDataset says of what form) makes of an entry, its sentence cleaned up and cut to 30 words.

    Raises InputError, also where the sentence is empty then.
    """
    kept = check(entry, path, number)
    kept["sentence"] = pre_caption(kept["sentence"], MAX_WORDS)
    if is_blank(kept["sentence"]):
        raise InputError(f"{where(path, number)}: its sentence is empty after clean-up; correct or remove the entry",
                         "empty text")
    return kept


class LabeledDataset(Samples):
    """Sentences with the paths of their images and their class, cleaned up and cut to 30 words.

    check(entry, path, number) -> {"images": paths under image_root, "sentence", "target"} reads an entry of the files or
    raises InputError.
    """

    def __init__(self, files, check, image_root, transform, seed=None):
        super().__init__(seed)
        self.roots = {"image_root": image_root}
        self.transform = transform

        self.entries = Entries(files, functools.partial(labeled_entry, check))

    def __len__(self):
        return len(self.entries)

    def files(self, index):
        return [os.path.join(self.roots["image_root"], image) for image in self.entries[index]["images"]]

    def where(self, index):
        return self.entries.where(index)

    def read(self, index):
        entry, files = self.entries[index], self.files(index)
        image = torch.stack([self.transform(load_image(file)) for file in files])
        return Sample(image, entry["sentence"], entry["target"], files)

    def collate(self, samples, tokenizer):
        """Samples -> LabeledBatch; sentences are padded to the longest of the batch."""
        return LabeledBatch(
            torch.stack([sample.image for sample in samples], dim=1).unbind(),
            tokenize([sample.sentence for sample in samples], tokenizer),
            torch.tensor([sample.target for sample in samples]), [file for sample in samples for file in sample.files],
            [reason for sample in samples for reason in sample.skipped],
        )  # fmt: skip
