"""Signs that a run does not learn, each logged once with a remedy."""

import logging
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dataset.base import EntryDataset, evenly
from dataset.text import NOTABLE, count_words, without_halves
from engine.metric_logger import summarize
from models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.trainer import TrainState
    from models.albef import ALBEF

SAMPLE = 500  # entries whose texts are looked at
EARLIEST = 100  # iterations; before, nothing can have been learned
ALIKE = 0.99  # mean cosine of features that are nearly identical
# the loss of a head that has learned only that one of three pairs matches, less 1% (Equation 4)
GUESSING = 0.99 * (math.log(3) - 2 / 3 * math.log(2))
# by metric: the largest value of a run that learns, and the sign of a larger one
SIGNS = {
    "train_image_cos": (
        ALIKE,
        "the features of different images are nearly identical; raise the learning rate, or start"
        " from another vision_encoder",
    ),
    "train_text_cos": (
        ALIKE,
        "the features of different texts are nearly identical; raise the learning rate, or start"
        " from another text_encoder",
    ),
    "train_loss_itm": (
        GUESSING,
        "matching (ITM) has not begun to learn; rank by ITC, and train for more epochs or on more"
        " pairs",
    ),
}

log = logging.getLogger(__name__)


def warn_without_negatives(model: "ALBEF") -> None:
    """Warn if a model needs negatives and no batch of a rank has one."""
    is_pairs = model.task == "nlvr_pretrain"
    if model.config.batch_size == 1 and (is_pairs or "itm" in getattr(model, "objectives", ())):
        what = "text assignment" if is_pairs else "matching (ITM)"
        log.warning(
            "%s is not trained, because no batch has a negative; set batch_size to 2 or more", what
        )


def warn_of_texts(train_set: EntryDataset, tokenizer: Tokenizer) -> None:
    """Warn if many words of the training texts are unknown, or if many texts are cut."""
    for line in text_signs(train_set, tokenizer):
        log.warning("%s", line)


def text_signs(train_set: EntryDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a line for each limit of the texts that costs much, judged by a sample of the lists."""
    indices = evenly(len(train_set.indices), SAMPLE)
    if not indices:  # all samples are in shards
        return
    form, most = train_set.entries.form, tokenizer.model_max_length
    limits = {
        "max_words": train_set.limits.words or form.max_words,
        "max_tokens": min(train_set.max_tokens or most, most),
    }
    texts, words, unknown, cut = 0, 0, [], dict.fromkeys(limits, 0)
    for text in (text for index in indices for text in train_set.entry(index).texts):
        whole = without_halves(form.clean(text, sys.maxsize))
        kept = form.clean(whole, limits["max_words"])
        pieces, count, missing = count_words(kept, tokenizer)
        texts, words, unknown = texts + 1, words + count, unknown + missing
        cut["max_words"] += len(kept) < len(whole)
        cut["max_tokens"] += pieces > limits["max_tokens"]
    if len(unknown) > NOTABLE * words:
        yield (
            f"{len(unknown) / words:.0%} of the words are unknown to the vocabulary, such as"
            f" {unknown[0]!r}; make a vocabulary from the captions (python -m tools.vocabulary)"
        )
    for key, number in cut.items():
        if number > NOTABLE * texts:
            yield f"{number / texts:.0%} of the texts are cut by {key} {limits[key]}; raise {key}"


def warn_of_training(state: "TrainState") -> None:
    """Warn of signs in the metrics of a finished epoch that have not been named before.

    An epoch counts if it began after the warm-up and after EARLIEST iterations.
    """
    if state.epoch * state.iterations < max(state.schedule.warmup_iters or 0, EARLIEST):
        return
    means = summarize(state)
    for name, (limit, sign) in SIGNS.items():
        if means.get(name, 0) > limit and name not in state.warned:
            log.warning("epoch %d: %s (%s is %.3f)", state.epoch, sign, name, means[name])
            state.warned.add(name)
