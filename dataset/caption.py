"""Image-caption pairs to train on, skipping what cannot be read (Section 3.4: web data is noisy)."""

import os
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from dataset.text import pre_caption
from dataset.transforms import load_image
from utils import InputError, seed_of

MAX_ATTEMPTS = 100  # replacements tried for one unusable entry


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    caption: str
    image_id: int  # equal for the captions of one image in retrieval training, else -1
    file: str
    skipped: list  # why each entry before this one could not be used


class CaptionBatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    input_ids: torch.Tensor  # [B, L]
    attention_mask: torch.Tensor  # [B, L]
    idx: torch.Tensor  # image ids [B]
    files: list
    skipped: list


class CaptionDataset(Dataset):
    """Pairs of a transformed image and one of its captions, cleaned up and cut to max_words.

    annotations: from load_annotations. What an index gives depends on (seed, epoch, index) alone, not on the worker or on
    what came before. An entry whose image cannot be read or whose caption is empty after clean-up is replaced by another.
    """

    def __init__(self, annotations, image_root, transform, seed, max_tokens, max_words=30):
        self.annotations = annotations
        self.image_root = image_root
        self.transform = transform
        self.seed = seed
        self.max_tokens = max_tokens
        self.max_words = max_words
        self.epoch = 0

    def __len__(self):
        return len(self.annotations)

    def __getitem__(self, index):
        torch.manual_seed(seed_of(self.seed, self.epoch, index))
        skipped = []
        for _ in range(MAX_ATTEMPTS):
            captions = self.annotations.captions(index)
            caption = pre_caption(captions[int(torch.randint(len(captions), ()))], self.max_words)
            file = os.path.join(self.image_root, self.annotations.image(index))
            try:
                if not caption:
                    raise ValueError(f"{self.annotations.where(index)}: a caption is empty after clean-up")
                return Sample(self.transform(load_image(file)), caption, self.annotations.image_id(index), file, skipped)
            except (OSError, ValueError) as error:
                skipped.append(str(error))
            index = int(torch.randint(len(self), ()))
        raise InputError(f"no usable entry in {MAX_ATTEMPTS} tries, the last one: {skipped[-1]}")

    def collate(self, samples, tokenizer):
        """Samples -> CaptionBatch; captions become at most max_tokens ids, padded to the longest of the batch."""
        text = tokenizer(
            [sample.caption for sample in samples],
            padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt",
        )  # fmt: skip
        return CaptionBatch(
            torch.stack([sample.image for sample in samples]), text["input_ids"], text["attention_mask"],
            torch.tensor([sample.image_id for sample in samples]), [sample.file for sample in samples],
            [reason for sample in samples for reason in sample.skipped],
        )  # fmt: skip
