"""Query-ad relevance: is an ad, an image with its title and other words, relevant to a query?"""

import reprlib
from typing import ClassVar, Literal

from dataset.annotations import Entry
from dataset.text import is_blank, pre_caption
from utils import InputError

SEPARATOR = " [SEP] "  # between the query and the words of the ad
MAX_AD_WORDS = 512  # of the query or the ad; the limit of ids cuts earlier
MAX_AD_TOKENS = 64  # ids of query, separator and the words of the ad


def pre_ad(text, max_words):
    """Clean up a query and, after SEPARATOR, the words of an ad, as captions are."""
    return SEPARATOR.join(pre_caption(part, max_words) for part in text.split(SEPARATOR, 1))


class Ad(Entry):
    """A query and an ad."""

    wanted = 'relevance needs entries {"image": path, "query": text, "text": the words of the ad, "label": 0 or 1}'
    image: str
    query: str
    text: str
    label: Literal[0, 1]
    max_words: ClassVar[int] = MAX_AD_WORDS

    @property
    def sentence(self):
        return f"{self.query}{SEPARATOR}{self.text}"

    @property
    def texts(self):
        return [self.sentence]

    @property
    def target(self):
        return self.label

    @classmethod
    def clean(cls, text, max_words=None):
        return pre_ad(text, max_words or cls.max_words)

    def check(self):
        for field, text in (("query", self.query), ("text", self.text)):
            if is_blank(pre_caption(text, MAX_AD_WORDS)):
                raise InputError(
                    f"its {field} {reprlib.repr(text)} is empty after clean-up", "empty text"
                )
