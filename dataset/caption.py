"""Image-caption pairs to train on, in pre-training, retrieval and grounding."""

import os
from typing import NamedTuple

import torch

from dataset.annotations import Entry, Texts, digest
from dataset.base import EntryDataset
from dataset.images import decode_image, load_image
from dataset.shards import image_and_captions, read_sample
from dataset.text import is_blank, tokenize, without_halves
from utils import InputError, Text

UNIT = 1000  # entries of JSON lists that stay together where they are mixed with shards


class Captioned(Entry):
    """One or several captions."""

    wanted = 'captions are entries {"caption": text or list of texts}'
    caption: str | Texts

    @property
    def texts(self):
        return [self.caption] if isinstance(self.caption, str) else self.caption


class Pair(Captioned):
    """An image with one or several captions, of which one is drawn each time."""

    wanted = 'pre-training needs entries {"image": path, "caption": text or list of texts}'
    image: str

    @property
    def group(self):
        """What the entries of one image have in common, where that matters."""
        return None

    def check(self):
        """A blank caption is replaced when it is drawn."""


class RetrievalPair(Entry):
    """An image with one or several captions to train retrieval on; each epoch draws one caption."""

    wanted = (
        'retrieval trains on entries {"image": path, "caption": text or list of texts}, of which all or none have '
        '"image_id": text or number'
    )
    image: str
    caption: str | Texts
    image_id: str | int | None = None

    texts = Captioned.texts

    @property
    def group(self):
        """Return the key that all captions of one image share:

        `image_id`, or the path if the list has no ids.
        """
        return os.path.normpath(self.image) if self.image_id is None else self.image_id

    def check_with(self, first):
        """Raise InputError if only one of the two entries has an image_id."""
        if (self.image_id is None) != (first.image_id is None):
            has, others = ("no", "has one") if self.image_id is None else ("an", "has none")
            raise InputError(f"it has {has} 'image_id', but entry 0 {others}", "wrong 'image_id'")


class GroundingPair(Entry):
    """A referring expression to train on."""

    wanted = 'grounding trains on entries {"image": path, "text": referring expression}'
    image: str
    text: str

    @property
    def texts(self):
        return [self.text]

    @property
    def group(self):
        return self.image


class CaptionSample(NamedTuple):
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


def draw_caption(captions, where, max_words=None):
    """Return one of an entry's captions at random, cleaned up and cut.

    Raises InputError if it is empty then.
    """
    caption = Pair.clean(without_halves(captions[int(torch.randint(len(captions), ()))]), max_words)
    if is_blank(caption):
        raise InputError(f"{where}: a caption is empty after clean-up")
    return caption


class CaptionDataset(EntryDataset):
    """Pairs of a transformed image and one of its captions, cleaned up and cut to the limits.

    entries: Entries of pairs. A pair is unusable if its image cannot be read or its caption is
    empty after clean-up.
    """

    def __init__(self, entries, image_root, transform, seed, limits):
        super().__init__(entries, {"image_root": image_root}, transform, seed, limits=limits)

    def read(self, index):
        entry, (file,) = self.entry(index), self.files(index)
        caption = draw_caption(entry.texts, self.where(index), self.limits.words)
        image_id = -1 if entry.group is None else digest(entry.group) >> 1  # of 63 bits
        return CaptionSample(self.transform(load_image(file)), caption, image_id, file)

    def collate(self, samples, tokenizer):
        """Samples -> CaptionBatch; captions are padded to the longest of the batch."""
        images, captions, image_ids, files, skipped = zip(*samples)
        text = tokenize(captions, tokenizer, self.limits.tokens)
        return CaptionBatch(
            torch.stack(images), text, torch.tensor(image_ids), list(files), sum(skipped, [])
        )


class ShardedCaptions(CaptionDataset):
    """The pairs of entries, which may be empty, and after them the samples of shards
    (dataset.shards.Shards).

    shuffle_buffer: samples that are mixed with one another.
    """

    def __init__(self, entries, image_root, transform, seed, limits, shards, shuffle_buffer):
        super().__init__(entries, image_root, transform, seed, limits)
        self.listed, self.shards, self.shuffle_buffer = len(entries), shards, shuffle_buffer

    def __len__(self):
        return self.listed + len(self.shards)

    def digest(self) -> str:
        return (self.entries.digest() if self.listed else "") + self.shards.digest()

    def order(self, length, generator):
        """An epoch's order: shards one after another, mixed within windows of shuffle_buffer
        samples.

        Samples that are read at about the same time so lie near each other. The entries of lists
        take part in units.
        """
        lists, samples = (
            torch.randperm(self.listed, generator=generator),
            torch.arange(self.listed, length),
        )
        units = [*lists.split(UNIT), *samples.split(self.shards.counts)]
        units = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        windows = torch.cat(units).split(self.shuffle_buffer)
        return torch.cat(
            [window[torch.randperm(len(window), generator=generator)] for window in windows]
        )

    def __getitems__(self, indices):
        self.shards.prefetch(index - self.listed for index in indices if index >= self.listed)
        return [self[index] for index in indices]

    def read(self, index):
        if index < self.listed:
            return super().read(index)
        place = self.shards.place(index - self.listed)
        sample = read_sample(place)
        where = f"{place.path}: sample {sample['__key__']}"
        image, captions = image_and_captions(sample, where)
        caption = draw_caption(captions, where, self.limits.words)
        return CaptionSample(
            self.transform(decode_image(image, where)),
            caption,
            -1,
            f"{place.path}/{sample['__key__']}",
        )
