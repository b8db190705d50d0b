"""Counts of texts and images: lengths, unknown words, sizes, formats, and what cannot be used (dataset.check)."""

import hashlib
import io
import itertools
import sys
import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image

from dataset.images import FORMATS, ImageError, decode_image, read_image
from dataset.shards import image_and_captions, read_sample
from dataset.text import is_blank, without_halves
from dataset.workers import begin_worker
from utils import InputError, TrainingStopped

TEXTS_A_BATCH = 1000
UNKNOWN_SHOWN, UNKNOWN_KEPT, UNKNOWN_LENGTH = 10, 100_000, 30  # words that the vocabulary lacks, and characters of one
SIDES = (64, 128, 256, 512, 1024)  # pixels of the shorter side at which the bins of the histogram begin


class Texts:
    """Lengths of texts after clean-up, in words and word pieces, and the words that the vocabulary lacks."""

    def __init__(self, clean, max_words, max_tokens, tokenizer):
        self.clean, self.max_words, self.max_tokens, self.tokenizer = clean, max_words, max_tokens, tokenizer
        self.words, self.pieces, self.unknown = Counter(), Counter(), Counter()
        self.known, self.rare = 0, 0  # words of the vocabulary, and unknown ones that are no longer counted by name
        self._waiting = []

    def add(self, text):
        """Counts a text; returns whether anything is left of it."""
        words = self.clean(text, sys.maxsize).split(" ")
        kept = " ".join(words[: self.max_words])
        usable = not is_blank(kept)
        self.words[len(words) if usable else 0] += 1
        self._waiting.append(without_halves(kept))
        if len(self._waiting) == TEXTS_A_BATCH:
            self._tokenize()
        return usable

    def _tokenize(self):
        texts, self._waiting = self._waiting, []
        if self.tokenizer is None or not texts:
            return
        unknown = self.tokenizer.unk_token_id
        for text, encoding in zip(texts, self.tokenizer.backend_tokenizer.encode_batch(texts)):
            ids = encoding.ids
            self.pieces[len(ids)] += 1
            # the first id is [CLS]; a word that the vocabulary cannot spell is one [UNK]
            self.known += (encoding.word_ids[-1] + 1 if len(ids) > 1 else 0) - ids.count(unknown)
            if unknown in ids:
                spans = [span for piece, span in zip(ids, encoding.offsets) if piece == unknown]
                self.unknown.update(text[start : min(end, start + UNKNOWN_LENGTH)] for start, end in spans)
        if len(self.unknown) > 2 * UNKNOWN_KEPT:
            kept = Counter(dict(self.unknown.most_common(UNKNOWN_KEPT)))
            self.rare += self.unknown.total() - kept.total()
            self.unknown = kept

    def summary(self):
        """What the report says of them."""
        self._tokenize()
        if not self.words:
            return {"texts": 0}
        result = {"texts": self.words.total(), "words": _lengths(self.words, self.max_words)}
        if self.pieces:
            unknown = self.unknown.total() + self.rare
            result["word_pieces"] = _lengths(self.pieces, self.max_tokens or self.tokenizer.model_max_length)
            result["unknown_words"] = {
                "count": unknown, "share_of_words": unknown / max(1, unknown + self.known),
                "share_of_word_pieces": unknown / sum(length * count for length, count in self.pieces.items()),
                "most_frequent": dict(self.unknown.most_common(UNKNOWN_SHOWN)),
            }  # fmt: skip
        return result


def _lengths(counts, limit):
    """Smallest, median, 95th percentile and largest of {length: number of texts}, and the share of those beyond the limit."""
    lengths = sorted(counts)
    sums = np.cumsum([counts[length] for length in lengths])
    median, p95 = (lengths[np.searchsorted(sums, share * sums[-1])] for share in (0.5, 0.95))
    cut = sum(count for length, count in counts.items() if length > limit) / int(sums[-1])
    return {"min": lengths[0], "median": median, "p95": p95, "max": lengths[-1], "limit": limit, "cut": cut}


# ---------------------------------------------------------------------------------------------------------------------
# images


class Look(NamedTuple):
    """What is known of an image after it was decoded."""

    reason: str = ""  # why it cannot be used, in short
    problem: str = ""  # and in full
    kind: str = ""  # format and mode of the file
    side: int = 0  # the shorter one, in pixels
    rotated: bool = False  # by EXIF
    animated: bool = False


class Images:
    """Sizes, formats and faults of the images that were looked at."""

    def __init__(self, image_res):
        self.image_res = image_res or 0
        self.sides, self.kinds, self.reasons = Counter(), Counter(), Counter()
        self.looked_at = self.small = self.rotated = self.animated = 0

    def add(self, look):
        """Counts an image."""
        self.looked_at += 1
        if look.reason:
            self.reasons[look.reason] += 1
            return
        self.sides[sum(look.side >= start for start in SIDES)] += 1
        self.kinds[look.kind] += 1
        self.small += look.side < self.image_res
        self.rotated += look.rotated
        self.animated += look.animated

    def summary(self):
        """What the report says of them."""
        names = [f"<{SIDES[0]}", *(f"{start}-{end - 1}" for start, end in itertools.pairwise(SIDES)), f">={SIDES[-1]}"]
        return {
            "looked_at": self.looked_at, "unusable": dict(self.reasons.most_common()),
            "shorter_side": {name: self.sides[i] for i, name in enumerate(names)},
            "image_res": self.image_res, "smaller_than_image_res": self.small,
            "formats": dict(self.kinds.most_common()), "exif_rotated": self.rotated, "animated": self.animated,
        }  # fmt: skip


def look_at(path, data=None):
    """Decodes the bytes of an image, those of the file `path` by default, as a run does -> Look."""
    try:
        data = read_image(path) if data is None else data
        side = min(decode_image(data, path).shape[1:])
    except ImageError as error:
        return Look(error.kind, error.problem)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            return Look("", "", f"{image.format} {image.mode}", side, rotated, getattr(image, "is_animated", False))
    except Exception:  # its pixels are there; what else it says of itself may be damaged
        return Look("", "", "other", side)


def look_at_files(items):
    """[(entry number, path), ...] -> [(entry number, path, Look), ...]."""
    return [(number, path, look_at(path)) for number, path in items]


def look_at_samples(job):
    """(shard, [(number, start, end), ...]) -> (shard, [(number, key, error, Look, captions, digest), ...], what ended it or "")."""
    path, places = job
    seen = []
    try:
        for number, start, end in places:
            sample = read_sample(path, start, end)
            key = sample["__key__"]
            try:
                image, captions = image_and_captions(sample, f"{path}: sample {key}")
                seen.append((number, key, None, look_at(path, image), captions, digest((image, captions))))
            except InputError as error:
                seen.append((number, key, error, None, [], 0))
    except TrainingStopped as error:
        return path, seen, str(error)
    return path, seen, ""


def digest(value):
    """64 bits that stand for a value."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little")


def prepare_process():
    """What a process that looks at images starts with."""
    begin_worker()
    warnings.simplefilter("ignore")  # of damaged files Pillow says a lot
    torch.set_num_threads(1)
