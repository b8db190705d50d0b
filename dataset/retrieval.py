"""Image-text retrieval data: pairs for training, images with all their captions for testing."""

import os
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from configs.config import Config
from dataset.base import EntryDataset, test_options, train_options
from dataset.caption import CaptionDataset, Captioned
from dataset.entries import Entry, Texts
from dataset.images import absolute
from dataset.store import Entries
from dataset.text import MAX_TOKENS
from utils import InputError


class RetrievalPair(Captioned):
    """An image with one or several captions. Each epoch draws one of them."""

    wanted = (
        'retrieval trains on entries {"image": path, "caption": text or list of texts},'
        ' and "image_id": text or number in all entries or in none'
    )
    max_tokens = MAX_TOKENS
    image: str
    image_id: str | int | None = None

    @property
    def group(self) -> str | int:
        """Key of the image: `image_id`, or the path if the list has no ids."""
        return os.path.normpath(self.image) if self.image_id is None else self.image_id

    def check(self, first: Self) -> None:
        """Raise InputError if a text is blank, or only one of the entries has an image_id."""
        super().check(first)
        if (self.image_id is None) != (first.image_id is None):
            has, others = ("no", "has one") if self.image_id is None else ("an", "has none")
            raise InputError(f"it has {has} 'image_id', but entry 0 {others}")


class CaptionedImage(Entry):
    """An image with all its captions, for testing."""

    wanted = (
        'a retrieval test needs an entry {"image": path, "caption": list of texts} for each image'
    )
    max_tokens = MAX_TOKENS
    image: str
    caption: Texts

    @property
    def texts(self) -> list[str]:
        """All captions."""
        return self.caption


FORMS = {"train": RetrievalPair, "val": CaptionedImage, "test": CaptionedImage}


class RetrievalTestSet(EntryDataset):
    """Images of retrieval test files with their captions; item i is uint8 [3, R, R].

    Entries with the same absolute image path become one image with all their captions, duplicates
    included.

    Args:
        files: JSON lists.
        **options: Further arguments of `EntryDataset`, with the root image_root.

    Attributes:
        images: Path of each image, as in its first entry.
        texts: All captions, cleaned up, image by image.
        img2txt: Indices of the texts of each image.
        txt2img: Index of the image of each text.
    """

    def __init__(self, files: Sequence[str], **options: Any) -> None:
        entries, captions, first = Entries(files, CaptionedImage), {}, []
        for i, entry in enumerate(entries):
            path = absolute(options["roots"]["image_root"], entry.image)
            if path not in captions:
                first.append(i)
            captions.setdefault(path, []).extend(entry.texts)
        super().__init__(entries, indices=first, **options)
        self.images = [entries[i].image for i in first]
        self.texts, self.img2txt, self.txt2img = [], [], []
        for i, texts in enumerate(captions.values()):
            self.img2txt.append(list(range(len(self.texts), len(self.texts) + len(texts))))
            self.txt2img.extend([i] * len(texts))
            self.texts.extend(self.clean(i, text) for text in texts)

    def read(self, index: int) -> Tensor:
        """Read an image, uint8 [3, R, R]."""
        (file,) = self.files(index)
        return self.transform(self.load(file))


def train_set(config: Config, seed: int) -> CaptionDataset:
    """Build the training set of retrieval."""
    return CaptionDataset(
        Entries(config.files("train"), RetrievalPair), **train_options(config, seed)
    )


def test_set(config: Config, split: str) -> RetrievalTestSet:
    """Build a test set of retrieval, also for pre-training."""
    return RetrievalTestSet(config.files(split), **test_options(config))
