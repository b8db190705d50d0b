"""Clean-up of captions and questions, as the released checkpoints were trained, and tokenization of
a batch.
"""

import re
import unicodedata
from typing import NamedTuple

import torch

from utils import Text

MAX_WORDS = 30  # of a caption, a sentence, or a question in training
MAX_QUESTION_WORDS = 50  # of a question in testing
# ids of a text in pre-training and text assignment, and of a VQA question in training
SHORT_TOKENS = 25
MAX_TOKENS = 30  # ids of a text in retrieval and grounding


class Limits(NamedTuple):
    """Limits of a text, the keys max_words and max_tokens; None for those of the entries' form."""

    words: int | None = None
    tokens: int | None = None


NO_LIMITS = Limits()
_CLEAN = str.maketrans({"-": " ", "/": " "} | dict.fromkeys(",.'!?\"()*#:;~"))
# categories of characters that make no word: control, zero-width, private, halves of surrogate
# pairs, combining marks, white space; uncased BERT drops all of them, and a vocabulary with accents
# has marks only together with their letter
_DROPPED = {"Cc", "Cf", "Co", "Cs", "Mn", "Zl", "Zp", "Zs"}
_BLANKS = re.compile(r"\s{2,}")


def pre_caption(caption, max_words):
    """Lower-case a caption, drop its punctuation, collapse its white space and keep the first
    `max_words` words.

    A single tab or line break inside the caption stays; only runs of white space become one blank.
    """
    caption = caption.lower().translate(_CLEAN).replace("<person>", "person")
    caption = _BLANKS.sub(" ", caption).rstrip("\n").strip(" ")
    return _first_words(caption, max_words)


def pre_question(question, max_words):
    """Lower-case a question, drop its punctuation and keep the first `max_words` words.

    Unlike in captions, leading and repeated blanks stay, and so does <person>. Each such blank
    counts as a word.
    """
    return _first_words(question.lower().translate(_CLEAN).rstrip(" "), max_words)


def _first_words(text, max_words):
    return " ".join(text.split(" ")[:max_words])


def is_blank(text):
    """Return whether a cleaned-up text is empty or has only characters that make no word."""
    return all(
        unicodedata.category(character) in _DROPPED or character == "\ufffd" for character in text
    )


def without_halves(text):
    """Remove halves of surrogate pairs from a text:

    JSON can hold them, but a tokenizer refuses them.
    """
    return text.encode("utf-8", "ignore").decode()


def tokenize(texts, tokenizer, max_tokens=None):
    """Tokenize texts -> Text [B, L], padded to the longest, with at most max_tokens ids or the
    model's limit.

    Threads may share the tokenizer, because its truncation and padding, which change its settings,
    are not used.
    """
    limit = min(max_tokens or tokenizer.model_max_length, tokenizer.model_max_length)
    rows = [
        row[:limit]
        for row in tokenizer(list(map(without_halves, texts)), verbose=False)["input_ids"]
    ]
    lengths = torch.tensor(list(map(len, rows)))
    length = int(lengths.max())
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    return Text(ids, (torch.arange(length) < lengths[:, None]).long())
