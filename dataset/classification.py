"""Sentences about one or two images with a label: data of VE, NLVR2 and relevance."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from configs.config import Config
from dataset.base import EntryDataset, test_options, train_options
from dataset.entries import Entry
from dataset.store import Entries
from dataset.text import tokenize
from utils import Text


class Labeled(Entry):
    """A labeled sentence; a subclass has `sentence`, `label` and, in order, the labels."""

    labels: ClassVar[tuple[Any, ...]]

    @property
    def texts(self) -> list[str]:
        """The sentence."""
        return [self.sentence]  # ty: ignore[missing-attribute]  # a field of subclasses

    @property
    def target(self) -> int:
        """The class."""
        return self.labels.index(self.label)  # ty: ignore[missing-attribute]  # likewise


class ClassificationSample(NamedTuple):
    """A sentence with its images and its class."""

    image: Tensor  # uint8 [images, 3, R, R]
    sentence: str
    target: int
    files: list[str]
    skipped: list[str] = []


class ClassificationBatch(NamedTuple):
    """A batch of sentences with their images and classes."""

    image: tuple[Tensor, ...]  # uint8 [B, 3, R, R] each: the first images, then the second ones
    text: Text  # [B, L]
    targets: Tensor  # [B]
    files: list[str]
    skipped: list[str]


class ClassificationDataset(EntryDataset):
    """Sentences with their images and their class.

    Args:
        files: JSON lists.
        form: Form of the entries, with `sentence` and `target`.
        **options: Further arguments of `EntryDataset`.
    """

    def __init__(self, files: Sequence[str], form: type[Entry], **options: Any) -> None:
        super().__init__(Entries(files, form), **options)

    def read(self, index: int) -> ClassificationSample:
        """Read a sample."""
        entry, files = self.entry(index), self.files(index)
        image = torch.stack([self.transform(self.load(file)) for file in files])
        return ClassificationSample(image, self.clean(index, entry.sentence), entry.target, files)

    def collate(self, samples: list[ClassificationSample], tokenizer: Any) -> ClassificationBatch:
        """Collate samples, with sentences padded to the longest one."""
        images, sentences, targets, files, skipped = zip(*samples, strict=True)
        return ClassificationBatch(
            torch.stack(images, dim=1).unbind(),
            tokenize(sentences, tokenizer, self.max_tokens),
            torch.tensor(targets),
            sum(files, []),
            sum(skipped, []),
        )


def build_train_set(form: type[Entry], config: Config, seed: int) -> ClassificationDataset:
    """Build the training set with entries of `form`."""
    return ClassificationDataset(config.files("train"), form, **train_options(config, seed))


def build_test_set(form: type[Entry], config: Config, split: str) -> ClassificationDataset:
    """Build a test set with entries of `form`."""
    return ClassificationDataset(config.files(split), form, **test_options(config))
