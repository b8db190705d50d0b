"""Grounding data to test on: referring expressions with their images, and the boxes to choose from."""

import os
from typing import NamedTuple

import torch

from dataset.annotations import Entries, check_entry, grouped_entry, where
from dataset.samples import Samples
from dataset.text import MAX_TOKENS, MAX_WORDS, pre_caption, tokenize
from dataset.images import load_image
from utils import InputError, Text


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    text: str
    ref_id: int


class GroundingBatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    text: Text  # [B, L]
    ref_ids: list


def check_expression(entry, path, number, refer):
    """Raises InputError unless entry is {image, text, ref_id} with a text and a ref that refer knows."""
    grouped_entry(entry, "grounding", path, number)
    check_entry(entry, {"ref_id": int}, path, number)
    if entry["ref_id"] not in refer.refs:
        raise InputError(f"{where(path, number)}: ref_id {entry['ref_id']} is not among the refs of refcoco_data",
                         "unknown 'ref_id'")


class GroundingTestSet(Samples):
    """The referring expressions of files of {image, text, ref_id} whose ref belongs to one of `splits`.

    refer: from load_refer; detections: from load_detections. Raises InputError for a ref that refer does not know and
    where no expression is of these splits.
    """

    def __init__(self, files, image_root, transform, refer, detections, splits):
        super().__init__()
        self.roots = {"image_root": image_root}
        self.transform = transform
        self.refer, self.detections = refer, detections

        def checked(entry, path, number):
            check_expression(entry, path, number, refer)
            return entry if refer.refs[entry["ref_id"]]["split"] in splits else None

        self.entries = Entries(files, checked)
        if not len(self):
            raise InputError(f"test_file {files[0]} has no expression of {', '.join(splits)}")

    def __len__(self):
        return len(self.entries)

    def files(self, index):
        return [os.path.join(self.roots["image_root"], self.entries[index]["image"])]

    def where(self, index):
        return self.entries.where(index)

    def read(self, index):
        entry = self.entries[index]
        (file,) = self.files(index)
        return Sample(self.transform(load_image(file)), pre_caption(entry["text"], MAX_WORDS), entry["ref_id"])

    def collate(self, samples, tokenizer):
        """Samples -> GroundingBatch; expressions become at most 30 ids, padded to the longest of the batch."""
        return GroundingBatch(
            torch.stack([sample.image for sample in samples]),
            tokenize([sample.text for sample in samples], tokenizer, MAX_TOKENS), [sample.ref_id for sample in samples],
        )  # fmt: skip
