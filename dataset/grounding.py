"""Grounding data: referring expressions, and the detected boxes to choose from in a test."""

import functools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.config import Config
from configs.load import require
from dataset.base import EntryDataset, test_options, train_options
from dataset.caption import CaptionDataset
from dataset.entries import Entry
from dataset.images import exif_of_boxes
from dataset.refer import Refer, load_detections, load_refer
from dataset.store import Entries
from dataset.text import MAX_TOKENS, tokenize
from utils import InputError, Text


class GroundingPair(Entry):
    """A referring expression for training."""

    wanted = 'grounding trains on entries {"image": path, "text": referring expression}'
    max_tokens = MAX_TOKENS
    image: str
    text: str

    @property
    def texts(self) -> list[str]:
        """The expression."""
        return [self.text]

    @property
    def group(self) -> str:
        """Key of the image, its path."""
        return self.image


class Expression(GroundingPair):
    """A referring expression for testing."""

    wanted = (
        'test_file of grounding needs entries {"image": path, "text": referring expression,'
        ' "ref_id": number}'
    )
    ref_id: int

    def check_ref(self, refer: Refer) -> None:
        """Raise InputError if `refer` lacks the ref or gives it another image.

        Images are equal if one of the two paths ends with the other.
        """
        if self.ref_id not in refer.refs:
            raise InputError(
                f"ref_id {self.ref_id} is not among the refs of refcoco_data; correct ref_id, or"
                " set refcoco_data and refer_dataset to the data set that test_file was made from"
            )
        image = refer.images[refer.refs[self.ref_id]["image_id"]]["file_name"]
        parts, ref_parts = PurePath(self.image).parts, PurePath(image).parts
        common = min(len(parts), len(ref_parts))
        if parts[-common:] != ref_parts[-common:]:
            raise InputError(
                f"image is {self.image}, but the image of ref_id {self.ref_id} is {image}; correct"
                " the entry, or set refcoco_data and refer_dataset to the data set that test_file"
                " was made from"
            )


FORMS = {"train": GroundingPair, "val": Expression, "test": Expression}


class GroundingSample(NamedTuple):
    """A test sample of an image and a referring expression."""

    image: Tensor  # uint8 [3, R, R]
    text: str
    ref_id: int


class GroundingBatch(NamedTuple):
    """A test batch of images and referring expressions."""

    image: Tensor  # uint8 [B, 3, R, R]
    text: Text  # [B, L]
    ref_ids: list[int]


class GroundingTestSet(EntryDataset):
    """The referring expressions of one or several splits of REFER.

    Args:
        files: JSON lists of {image, text, ref_id}.
        refer: Result of `load_refer`.
        detections: Result of `load_detections`.
        splits: Splits of the refs, by default all but train and val.
        **options: Further arguments of `EntryDataset`.

    Raises:
        InputError: A ref is missing in `refer` or has another image, or no expression belongs to
            the splits.
    """

    def __init__(
        self,
        files: Sequence[str],
        refer: Refer,
        detections: dict[int, list],
        *,
        splits: list[str] | None = None,
        **options: Any,
    ) -> None:
        if splits is None:
            splits = sorted({ref["split"] for ref in refer.refs.values()} - {"train", "val"})
        entries, indices = Entries(files, Expression), []
        for i, entry in enumerate(entries):
            try:
                entry.check_ref(refer)
            except InputError as error:
                raise InputError(f"{entries.where(i)}: {error}") from None
            if refer.refs[entry.ref_id]["split"] in splits:
                indices.append(i)
        super().__init__(entries, indices=indices, **options)
        self.refer, self.detections = refer, detections
        if not len(self):
            raise InputError(
                f"test_file {', '.join(files)}: no expression belongs to the splits"
                f" {', '.join(splits)}; test_file must name the files of all splits"
            )

    def read(self, index: int) -> GroundingSample:
        """Read a sample."""
        entry, (file,) = self.entry(index), self.files(index)
        image = self.transform(self.load(file))
        return GroundingSample(image, self.clean(index, entry.text), entry.ref_id)

    def collate(self, samples: list[GroundingSample], tokenizer: Any) -> GroundingBatch:
        """Collate samples, with expressions padded to the longest one."""
        images, texts, ref_ids = zip(*samples, strict=True)
        text = tokenize(texts, tokenizer, self.max_tokens)
        return GroundingBatch(torch.stack(images), text, list(ref_ids))


@functools.lru_cache(maxsize=1)
def load_refer_and_detections(
    refcoco_data: str, det_file: str, refer_dataset: str
) -> tuple[Refer, dict[int, list]]:
    """Read a data set of REFER and the detected boxes, once for val and test."""
    refer = load_refer(refcoco_data, refer_dataset)
    return refer, load_detections(det_file, refer)


def train_set(config: Config, seed: int) -> CaptionDataset:
    """Build the training set of grounding, which resizes images instead of cropping them."""
    entries = Entries(config.files("train"), GroundingPair)
    return CaptionDataset(entries, **train_options(config, seed, min_scale=None))


def test_set(config: Config, split: str) -> GroundingTestSet:
    """Build the test set of val, or of all test splits together."""
    require(config, "refcoco_data", "det_file")
    keys = ("refcoco_data", "det_file", "refer_dataset")
    refer, detections = load_refer_and_detections(*(getattr(config, key) for key in keys))
    splits = ["val"] if split == "val" else None
    # test_file holds all splits together
    options = {**test_options(config), "exif": exif_of_boxes(config.exif)}
    return GroundingTestSet(config.files("test"), refer, detections, splits=splits, **options)
