"""Metrics as pure functions."""

import numpy as np


def _ranks(scores, positives):
    """For each query the rank (0 is best) of its best positive; ties count half, so that order plays no part.

    scores: [Q, K]; positives: for each query the indices of its positives. A query without a positive has no rank.
    """
    ranks = []
    for row, own in zip(scores, positives):
        if len(own):
            best = row[own].max()
            others = np.delete(row, own)
            ranks.append((others > best).sum() + 0.5 * (others == best).sum())
    return np.array(ranks)


def recall_at_k(scores_i2t, scores_t2i, txt2img, img2txt):
    """Recall at 1, 5 and 10 of image-to-text (txt_*) and text-to-image (img_*) retrieval, in percent.

    scores_i2t: [NI, NT]; scores_t2i: [NT, NI]; txt2img: the image of each text; img2txt: the texts of each image, any
    number; images without a text are no queries. A query is a hit at k when fewer than k wrong candidates stand before its
    best positive; a wrong candidate with the same score counts half.
    """
    results = {}
    directions = {
        "txt": (np.asarray(scores_i2t), [np.asarray(own, dtype=int) for own in img2txt]),
        "img": (np.asarray(scores_t2i), [np.asarray([own], dtype=int) for own in txt2img]),
    }
    for name, (scores, positives) in directions.items():
        ranks = _ranks(scores, positives)
        recalls = {k: float(100 * np.mean(ranks < k)) for k in (1, 5, 10)}
        results.update({f"{name}_r{k}": recall for k, recall in recalls.items()})
        results[f"{name}_r_mean"] = sum(recalls.values()) / 3
    results["r_mean"] = (results["txt_r_mean"] + results["img_r_mean"]) / 2
    return results


def chance_recall(images, texts, img2txt):
    """Expected recall at 1, 5 and 10 of a random ranking of `images` and `texts` candidates, in percent."""
    results = {}
    for k in (1, 5, 10):
        misses = []
        for own in filter(len, img2txt):
            draws = np.arange(min(k, texts))  # the probability that none of k texts drawn is one of the image's own
            misses.append(np.prod(np.maximum(0, texts - len(own) - draws) / (texts - draws)))
        results[f"txt_r{k}"] = float(100 * (1 - np.mean(misses)))
        results[f"img_r{k}"] = 100 * min(1, k / images)
    return results
