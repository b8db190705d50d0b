"""Recall of image-text retrieval."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from evaluation.metrics.finite import require_finite
from utils import InputError

KS = (1, 5, 10)


def recall_at_k(
    scores_i2t: ArrayLike,
    scores_t2i: ArrayLike,
    txt2img: Sequence[int],
    img2txt: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Return the recall of image-to-text and text-to-image retrieval in percent.

    A query is a hit at k if fewer than k wrong candidates rank before its best positive. Equal
    scores count with the probability of a hit in random order, so that constant scores have the
    recall of chance.

    Args:
        scores_i2t: Scores [NI, NT] of texts for each image.
        scores_t2i: Scores [NT, NI] of images for each text.
        txt2img: Index of the image of each text.
        img2txt: Indices of the texts of each image. An image without a text is not a query.

    Returns:
        Image-to-text recall "txt_r1", "txt_r5", "txt_r10" and their mean "txt_r_mean",
        text-to-image recall "img_*" likewise, and the mean of both means "r_mean".

    Raises:
        NotFinite: Scores are not finite.
        InputError: There is no query.
    """
    results: dict[str, float] = {}
    for side, query, scores, positives in (
        ("txt", "image", scores_i2t, img2txt),
        ("img", "text", scores_t2i, [[image] for image in txt2img]),
    ):
        require_finite(scores, f"{query} {{}} (counting from 0)".format)
        standings = list(_standings(np.asarray(scores), positives))
        _require_queries(len(standings))
        recalls = []
        for k in KS:
            hits = [_hit_probability(k - above, right, wrong) for above, right, wrong in standings]
            recalls.append(float(100 * np.mean(hits)))
        results |= {f"{side}_r{k}": recall for k, recall in zip(KS, recalls, strict=True)}
        results[f"{side}_r_mean"] = sum(recalls) / len(KS)
    results["r_mean"] = (results["txt_r_mean"] + results["img_r_mean"]) / 2
    return results


def chance_recall(images: int, texts: int, img2txt: Iterable[Sequence[int]]) -> dict[str, float]:
    """Return the expected recall of a random ranking in percent, by name such as "txt_r1".

    Args:
        images: Number of images.
        texts: Number of texts.
        img2txt: Indices of the texts of each image. An image without a text is not a query.

    Raises:
        InputError: There is no text.
    """
    _require_queries(texts)
    results: dict[str, float] = {}
    counts = [len(own) for own in img2txt if len(own)]
    for k in KS:
        hits = [_hit_probability(k, count, texts - count) for count in counts]
        results[f"txt_r{k}"] = float(100 * np.mean(hits))
        results[f"img_r{k}"] = 100 * min(1, k / images)
    for side in ("txt", "img"):
        results[f"{side}_r_mean"] = sum(results[f"{side}_r{k}"] for k in KS) / len(KS)
    return results


def _require_queries(count: int) -> None:
    if not count:
        raise InputError(
            "no image has a text, so recall is not defined; give pairs of images and texts"
        )


def _hit_probability(k: int, right: int, wrong: int) -> float:
    """Return the probability of a right candidate among the first k in random order."""
    draws = np.arange(min(k, right + wrong))
    return 1 - np.prod(np.maximum(0, wrong - draws) / (right + wrong - draws))


def _standings(
    scores: np.ndarray, positives: Iterable[Sequence[int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield the standing of the best positive of each query that has one.

    Args:
        scores: Scores [Q, K] of the candidates.
        positives: Indices of the positives of each query.

    Yields:
        The wrong candidates above the best positive, the positives equal to it, and the wrong
        candidates equal to it.
    """
    for row, own in zip(scores, positives, strict=True):
        if len(own):
            own = np.asarray(own)
            best, others = row[own].max(), np.delete(row, own)
            yield (
                int((others > best).sum()),
                int((row[own] == best).sum()),
                int((others == best).sum()),
            )
