"""Grounding data to test on: referring expressions with their images, and the boxes to choose from."""

from pathlib import PurePath
from typing import NamedTuple

import torch

from dataset.annotations import Entries, Entry
from dataset.base import EntryDataset
from dataset.images import load_image
from dataset.text import Limits, tokenize
from utils import InputError, Text


class Expression(Entry):
    """A referring expression to test on."""

    wanted = 'test_file of grounding needs entries {"image": path, "text": referring expression, "ref_id": number}'
    image: str
    text: str
    ref_id: int

    @property
    def texts(self):
        return [self.text]

    def check_ref(self, refer):
        """Raise InputError, without the place, if the ref is not in `refer` or has another image.

        An image is the same if one of the two paths ends with the other.
        """
        if self.ref_id not in refer.refs:
            raise InputError(
                f"ref_id {self.ref_id} is not among the refs of refcoco_data", "unknown 'ref_id'"
            )
        image = refer.images[refer.refs[self.ref_id]["image_id"]]["file_name"]
        own, of_ref = (PurePath(path).parts for path in (self.image, image))
        common = min(len(own), len(of_ref))
        if own[-common:] != of_ref[-common:]:
            raise InputError(
                f"image {self.image} is not {image}, the image of ref_id {self.ref_id}; correct the entry, or set "
                "refer_dataset or refcoco_data to the data set of this file",
                "another image than its ref's",
            )


class GroundingSample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    text: str
    ref_id: int


class GroundingBatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    text: Text  # [B, L]
    ref_ids: list


class GroundingTestSet(EntryDataset):
    """The referring expressions of files of {image, text, ref_id} whose ref belongs to one of
    `splits`.

    refer: from load_refer; detections: from load_detections. Raises InputError if a ref is not in
    `refer`, if an entry's image is not the image of its ref, and if no expression belongs to these
    splits.
    """

    def __init__(self, files, image_root, transform, refer, detections, splits, limits=Limits()):
        entries, indices = Entries(files, Expression), []
        for i, entry in enumerate(entries):
            try:
                entry.check_ref(refer)
            except InputError as error:
                raise InputError(f"{entries.where(i)}: {error}", error.kind) from None
            if refer.refs[entry.ref_id]["split"] in splits:
                indices.append(i)
        super().__init__(
            entries, {"image_root": image_root}, transform, indices=indices, limits=limits
        )
        self.refer, self.detections = refer, detections
        if not len(self):
            raise InputError(
                f"test_file {', '.join(files)}: has no expression of {', '.join(splits)}; name the files of all "
                "splits"
            )

    def read(self, index):
        entry, (file,) = self.entry(index), self.files(index)
        return GroundingSample(
            self.transform(load_image(file)), self.clean(index, entry.text), entry.ref_id
        )

    def collate(self, samples, tokenizer):
        """Samples -> GroundingBatch; expressions are padded to the longest of the batch."""
        images, texts, ref_ids = zip(*samples)
        return GroundingBatch(
            torch.stack(images), tokenize(texts, tokenizer, self.limits.tokens), list(ref_ids)
        )
