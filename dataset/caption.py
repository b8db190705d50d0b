"""Image-caption pairs for pre-training and text assignment, from JSON lists and shards."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from configs.config import Config
from dataset.base import EntryDataset, train_options
from dataset.entries import Entry, Texts, digest
from dataset.images import decode_image
from dataset.shards import Shards, expand, image_and_captions, read_sample
from dataset.store import Entries
from dataset.text import SHORT_TOKENS, is_blank, tokenize, without_halves
from utils import InputError, Text

UNIT = 1000  # entries of JSON lists that stay together if they are mixed with shards
MIN_SCALE = 0.2  # smallest share of the image that a crop keeps in pre-training


class Captioned(Entry):
    """One or several captions."""

    wanted = 'a list of captions needs entries {"caption": text or list of texts}'
    caption: str | Texts

    @property
    def texts(self) -> list[str]:
        """All captions."""
        return [self.caption] if isinstance(self.caption, str) else self.caption


class Pair(Captioned):
    """An image with one or several captions. Each epoch draws one of them."""

    wanted = 'pre-training needs entries {"image": path, "caption": text or list of texts}'
    max_tokens = SHORT_TOKENS
    image: str

    @property
    def group(self) -> None:
        """Key of the image. None: each entry of pre-training counts as an image of its own."""
        return None

    def check(self, first: Self) -> None:
        """Accept blank captions, which are replaced when they are drawn."""


FORMS = {"train": Pair}


class CaptionSample(NamedTuple):
    """A training sample of an image and a text."""

    image: Tensor  # uint8 [3, R, R]
    caption: str
    image_id: int  # equal for the captions of one image in retrieval and grounding, else -1
    file: str
    skipped: list[str] = []  # reasons why earlier candidates for this sample were unusable


class CaptionBatch(NamedTuple):
    """A training batch of images and texts."""

    image: Tensor  # uint8 [B, 3, R, R]
    text: Text  # [B, L]
    idx: Tensor  # image ids [B]
    files: list[str]
    skipped: list[str]
    masked: tuple | None = None  # masked ids and labels, which the pre-training model adds


def draw_caption(captions: Sequence[str], where: str, max_words: int | None = None) -> str:
    """Draw one of several captions, clean it up and cut it.

    Raises InputError, which begins with `where`, if the result is empty.
    """
    caption = Pair.clean(without_halves(captions[int(torch.randint(len(captions), ()))]), max_words)
    if is_blank(caption):
        raise InputError(f"{where}: a caption is empty after clean-up")
    return caption


class CaptionDataset(EntryDataset):
    """Pairs of a transformed image and one of its captions, cleaned up and cut to the limits.

    A pair is unusable if its image cannot be read or its caption is empty after clean-up. It takes
    the arguments of `EntryDataset`.
    """

    def read(self, index: int) -> CaptionSample:
        """Read a sample, with a caption drawn by torch's generator."""
        entry, (file,) = self.entry(index), self.files(index)
        caption = draw_caption(entry.texts, self.where(index), self.limits.words)
        image_id = -1 if entry.group is None else digest(entry.group) >> 1  # 63 bits
        return CaptionSample(self.transform(self.load(file)), caption, image_id, file)

    def collate(self, samples: list[CaptionSample], tokenizer: Any) -> CaptionBatch:
        """Collate samples, with captions padded to the longest one."""
        images, captions, image_ids, files, skipped = zip(*samples, strict=True)
        return CaptionBatch(
            torch.stack(images),
            tokenize(captions, tokenizer, self.max_tokens),
            torch.tensor(image_ids),
            list(files),
            sum(skipped, []),
        )


class ShardedCaptions(CaptionDataset):
    """The pairs of JSON lists, followed by the samples of shards.

    Args:
        entries: Entries of JSON lists, may be empty.
        shards: Samples of shards.
        shuffle_buffer: Number of samples of shards that are shuffled together.
        **options: Further arguments of `EntryDataset`.
    """

    max_tokens = property(lambda self: self.limits.tokens or Pair.max_tokens)

    def __init__(
        self,
        entries: Entries[Any] | list[Any],
        shards: Shards,
        *,
        shuffle_buffer: int,
        **options: Any,
    ) -> None:
        super().__init__(entries, **options)
        self.listed, self.shards, self.shuffle_buffer = len(entries), shards, shuffle_buffer

    def __len__(self) -> int:
        return self.listed + len(self.shards)

    def digest(self) -> str:
        """Return a digest of the entries and of the positions of all samples."""
        return (self.entries.digest() if self.listed else "") + self.shards.digest()

    def order(self, length: int, generator: torch.Generator) -> Tensor:
        """Draw the order of an epoch: shards in random order, mixed within a window.

        So samples that are read at about the same time lie near each other. Entries of lists
        take part in units of UNIT.

        Returns:
            Indices [length].
        """
        lists = torch.randperm(self.listed, generator=generator)
        samples = torch.arange(self.listed, length)
        units = [*lists.split(UNIT), *samples.split(self.shards.counts)]
        units = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        windows = torch.cat(units).split(self.shuffle_buffer)
        return torch.cat(
            [window[torch.randperm(len(window), generator=generator)] for window in windows]
        )

    def __getitems__(self, indices: list[int]) -> list[CaptionSample]:
        self.shards.prefetch(index - self.listed for index in indices if index >= self.listed)
        return [self[index] for index in indices]

    def read(self, index: int) -> CaptionSample:
        """Read a sample of a list or shard, with a caption drawn by torch's generator."""
        if index < self.listed:
            return super().read(index)
        position = self.shards.position(index - self.listed)
        sample = read_sample(position)
        where = f"{position.path}: sample {sample['__key__']}"
        image, captions = image_and_captions(sample, where)
        caption = draw_caption(captions, where, self.limits.words)
        image = self.transform(decode_image(image, where, self.exif))
        return CaptionSample(image, caption, -1, f"{position.path}/{sample['__key__']}")


def train_set(config: Config, seed: int) -> CaptionDataset:
    """Build the training set of pre-training and text assignment."""
    lists, shards = expand(config.files("train"))
    entries = Entries(lists, Pair) if lists or not shards else []
    options = train_options(config, seed, min_scale=MIN_SCALE)
    if not shards:
        return CaptionDataset(entries, **options)
    return ShardedCaptions(entries, Shards(shards), shuffle_buffer=config.shuffle_buffer, **options)
