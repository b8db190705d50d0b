"""Signs that a run does not learn, each logged once with a remedy."""

import logging
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from configs.config import Config
from dataset.base import EntryDataset, evenly
from dataset.text import NOTABLE, count_words, without_halves
from engine.metric_logger import summarize
from models.tokenizer import Tokenizer
from scheduler import WARMUP_STEP

if TYPE_CHECKING:
    from engine.trainer import TrainState
    from models.albef import ALBEF

SAMPLE = 500  # entries whose texts are looked at
EARLIEST = 100  # iterations; before, nothing can have been learned
ALIKE = 0.99  # mean cosine of features that are nearly identical
# the loss of a head that has learned only that one of three pairs matches, less 1% (Equation 4)
GUESSING = 0.99 * (math.log(3) - 2 / 3 * math.log(2))

log = logging.getLogger(__name__)


def warn_without_negatives(model: "ALBEF") -> None:
    """Warn if a model needs negatives and no batch of a rank has one."""
    is_pairs = model.task == "nlvr_pretrain"
    if model.config.batch_size == 1 and (is_pairs or "itm" in getattr(model, "objectives", ())):
        what = "text assignment" if is_pairs else "matching (ITM)"
        log.warning(
            "%s is not trained, because no batch has a negative: set batch_size to 2 or more", what
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
            f" {unknown[0]!r}: make a vocabulary from the captions (python -m tools.vocabulary)"
        )
    for key, number in cut.items():
        if number > NOTABLE * texts:
            yield f"{number / texts:.0%} of the texts are cut by {key} {limits[key]}: raise {key}"


def warn_of_training(state: "TrainState") -> None:
    """Warn of signs in the metrics of a finished epoch that have not been named before."""
    if not warmed_up(state):
        return
    means = summarize(state)
    for name, line in training_signs(means, state.config):
        if name not in state.warned:
            log.warning("epoch %d: %s", state.epoch, line)
            state.warned.add(name)


def warmed_up(state: "TrainState") -> bool:
    """Return whether the warm-up and EARLIEST iterations were over in the middle of the epoch."""
    schedule = state.schedule
    warmup = schedule.warmup_iters
    if warmup is None:  # it is within epoch 0
        warmup = min(schedule.warmup_epochs * WARMUP_STEP, state.iterations / 2)
    return (state.epoch + 0.5) * state.iterations >= max(warmup, EARLIEST)


def training_signs(means: dict[str, Any], config: Config) -> Iterator[tuple[str, str]]:
    """Yield a metric and a line for each sign in an epoch's means, keys train_*."""
    for side, encoder in (("image", "vision_encoder"), ("text", "text_encoder")):
        alike = means.get(f"train_{side}_cos", 0)
        if alike > ALIKE:
            other = "pre-trained" if getattr(config, encoder) == "random" else "different"
            yield (
                f"{side}_cos",
                f"the features of different {side}s are nearly identical (mean cosine {alike:.3f}):"
                f" raise the learning rate, or start from a {other} {encoder}",
            )
    loss = means.get("train_loss_itm", 0)
    if loss > GUESSING:
        yield (
            "loss_itm",
            f"matching (ITM) has not begun to learn: its loss {loss:.3f} is the loss of guessing;"
            " rank by ITC, and train for more epochs or on more pairs",
        )
