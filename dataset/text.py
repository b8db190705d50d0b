"""Clean-up of captions and questions before tokenization, as the released checkpoints were trained."""

import re

_CLEAN = str.maketrans({"-": " ", "/": " "} | dict.fromkeys(",.'!?\"()*#:;~"))
_BLANKS = re.compile(r"\s{2,}")


def pre_caption(caption, max_words):
    """Lower-case a caption, drop its punctuation, collapse its white space and keep the first `max_words` words.

    A single tab or line break inside the caption stays; only runs of white space become one blank.
    """
    caption = caption.lower().translate(_CLEAN).replace("<person>", "person")
    caption = _BLANKS.sub(" ", caption).rstrip("\n").strip(" ")
    return _first_words(caption, max_words)


def pre_question(question, max_words):
    """Lower-case a question, drop its punctuation and keep the first `max_words` words.

    Unlike in captions, leading and repeated blanks stay (each of those counts as a word), and so does <person>.
    """
    return _first_words(question.lower().translate(_CLEAN).rstrip(" "), max_words)


def _first_words(text, max_words):
    return " ".join(text.split(" ")[:max_words])
