"""Query-ad relevance: is an ad, an image with its title and other words, relevant to a query?"""

import reprlib
from typing import ClassVar, Literal, Self

from configs.config import Config
from dataset.classification import ClassificationDataset, Labeled, build_test_set, build_train_set
from dataset.text import is_blank, pre_caption
from utils import InputError

SEPARATOR = " [SEP] "  # between the query and the words of the ad
MAX_AD_WORDS = 512  # of the query or the ad; MAX_AD_TOKENS cuts earlier
MAX_AD_TOKENS = 64  # ids of query, separator and the words of the ad


def pre_ad(text: str, max_words: int) -> str:
    """Clean up a query and, after SEPARATOR, the words of an ad like captions."""
    return SEPARATOR.join(pre_caption(part, max_words) for part in text.split(SEPARATOR, 1))


class Ad(Labeled):
    """A query and an ad."""

    wanted = (
        'relevance needs entries {"image": path, "query": text, "text": the words of the ad,'
        ' "label": 0 or 1}'
    )
    max_words: ClassVar[int] = MAX_AD_WORDS
    max_tokens = MAX_AD_TOKENS
    image: str
    query: str
    text: str
    label: Literal[0, 1]
    labels = (0, 1)

    @property
    def sentence(self) -> str:
        """Query, separator and the words of the ad."""
        return f"{self.query}{SEPARATOR}{self.text}"

    @classmethod
    def clean(cls, text: str, max_words: int | None = None) -> str:
        """Clean up a sentence."""
        return pre_ad(text, max_words or cls.max_words)

    def check(self, first: Self) -> None:
        """Raise InputError if the query or the words of the ad are blank."""
        for field, text in (("query", self.query), ("text", self.text)):
            if is_blank(pre_caption(text, MAX_AD_WORDS)):
                raise InputError(f"its {field} {reprlib.repr(text)} is empty after clean-up")


FORMS = {"train": Ad, "val": Ad, "test": Ad}


def train_set(config: Config, seed: int) -> ClassificationDataset:
    """Build the training set of relevance."""
    return build_train_set(Ad, config, seed)


def test_set(config: Config, split: str) -> ClassificationDataset:
    """Build a test set of relevance. Raises InputError if it has one label only."""
    dataset = build_test_set(Ad, config, split)
    labels = {entry.label for entry in dataset.entries}
    if len(labels) == 1:
        raise InputError(
            f"{split}_file {dataset.entries.files[0]}: all labels are {labels.pop()}, but the ROC"
            " AUC needs both classes; add entries with the other label"
        )
    return dataset
