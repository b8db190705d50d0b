"""Image-caption pairs to train on, in pre-training, retrieval and grounding."""

import os
from typing import NamedTuple

import torch

from dataset.images import load_image
from dataset.samples import Samples
from dataset.text import MAX_WORDS, is_blank, pre_caption, tokenize
from utils import Text


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    caption: str
    image_id: int  # equal for the captions of one image in retrieval and grounding, else -1
    file: str
    skipped: list = []  # why each entry before this one could not be used


class CaptionBatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    text: Text  # [B, L]
    idx: torch.Tensor  # image ids [B]
    files: list
    skipped: list
    masked: NamedTuple = None  # the text with masked tokens, which the pre-training model adds


def draw_caption(captions, where):
    """One of an entry's captions at random, cleaned up and cut to 30 words. Raises ValueError if it is empty then."""
    caption = pre_caption(captions[int(torch.randint(len(captions), ()))], MAX_WORDS)
    if is_blank(caption):
        raise ValueError(f"{where}: a caption is empty after clean-up")
    return caption


def caption_batch(samples, tokenizer, max_tokens):
    """Samples -> CaptionBatch; captions become at most max_tokens ids, padded to the longest of the batch."""
    return CaptionBatch(
        torch.stack([sample.image for sample in samples]),
        tokenize([sample.caption for sample in samples], tokenizer, max_tokens),
        torch.tensor([sample.image_id for sample in samples]), [sample.file for sample in samples],
        [reason for sample in samples for reason in sample.skipped],
    )  # fmt: skip


class CaptionDataset(Samples):
    """Pairs of a transformed image and one of its captions, cleaned up and cut to 30 words.

    annotations: from load_annotations. A pair cannot be used if its image cannot be read or its caption is empty after
    clean-up.
    """

    def __init__(self, annotations, image_root, transform, seed, max_tokens):
        super().__init__(seed)
        self.annotations = annotations
        self.roots = {"image_root": image_root}
        self.transform = transform
        self.max_tokens = max_tokens

    def __len__(self):
        return len(self.annotations)

    def files(self, index):
        return [os.path.join(self.roots["image_root"] or "", self.annotations.image(index))]

    def where(self, index):
        return self.annotations.where(index)

    def read(self, index):
        caption = draw_caption(self.annotations.captions(index), self.where(index))
        (file,) = self.files(index)
        return Sample(self.transform(load_image(file)), caption, self.annotations.image_id(index), file)

    def collate(self, samples, tokenizer):
        """Samples -> CaptionBatch."""
        return caption_batch(samples, tokenizer, self.max_tokens)
