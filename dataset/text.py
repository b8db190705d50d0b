"""Clean-up of captions and questions as in the released code, and tokenization."""

import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from utils import Text

MAX_WORDS = 30  # words of a caption, a sentence or a training question
MAX_QUESTION_WORDS = 50  # words of a test question
# ids of a text in pre-training and text assignment, and of a VQA question in training
SHORT_TOKENS = 25
MAX_TOKENS = 30  # ids of a text in retrieval and grounding
NOTABLE = 0.05  # share of unknown words or cut texts that is worth a note


class Limits(NamedTuple):
    """Limits of a text: max_words and max_tokens. None is the limit of the entries' form."""

    words: int | None = None
    tokens: int | None = None


NO_LIMITS = Limits()
_CLEAN = str.maketrans({"-": " ", "/": " "} | dict.fromkeys(",.'!?\"()*#:;~"))
# categories of characters that make no word: control, zero-width, private, halves of surrogate
# pairs, combining marks, white space; uncased BERT drops all of them, and a vocabulary with accents
# has marks only together with their letter
_DROPPED = {"Cc", "Cf", "Co", "Cs", "Mn", "Zl", "Zp", "Zs"}
_BLANKS = re.compile(r"\s{2,}")


def pre_caption(caption: str, max_words: int) -> str:
    """Clean up a caption and cut it.

    It becomes lower case without punctuation. Runs of white space become one blank; a single tab or
    line break inside the caption stays.

    Args:
        caption: The caption.
        max_words: Number of words to keep.
    """
    caption = caption.lower().translate(_CLEAN).replace("<person>", "person")
    caption = _BLANKS.sub(" ", caption).rstrip("\n").strip(" ")
    return _first_words(caption, max_words)


def pre_question(question: str, max_words: int) -> str:
    """Clean up a question and cut it.

    It becomes lower case without punctuation. Unlike in captions, <person> and leading and repeated
    blanks stay. Each of these blanks counts as a word.

    Args:
        question: The question.
        max_words: Number of words to keep.
    """
    return _first_words(question.lower().translate(_CLEAN).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])


def count_words(text: str, tokenizer: Any) -> tuple[int, int, list[str]]:
    """Return the numbers of token ids and words of a text, and its words that become [UNK]."""
    encoding = tokenizer.backend_tokenizer.encode(text)
    # the first piece is [CLS]
    words = encoding.word_ids[-1] + 1 if encoding.word_ids[1:] else 0
    pieces = zip(encoding.ids, encoding.offsets, strict=True)
    unknown = [text[slice(*span)] for piece, span in pieces if piece == tokenizer.unk_token_id]
    return len(encoding.ids), words, unknown


def is_blank(text: str) -> bool:
    """Return whether a cleaned-up text has only characters that make no word, or none."""
    return all(
        unicodedata.category(character) in _DROPPED or character == "\ufffd" for character in text
    )


def without_halves(text: str) -> str:
    """Remove halves of surrogate pairs, which JSON can hold but a tokenizer refuses."""
    return text.encode("utf-8", "ignore").decode()


def tokenize(texts: Iterable[str], tokenizer: Any, max_tokens: int | None = None) -> Text:
    """Tokenize texts, pad them to the longest one and cut them.

    Threads may share the tokenizer, because its settings of truncation and padding do not change.

    Args:
        texts: Texts after clean-up.
        tokenizer: Tokenizer of the model.
        max_tokens: The most ids of a text, by default the model's limit.

    Returns:
        Token ids and attention mask [B, L].
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
