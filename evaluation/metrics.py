"""Metrics as pure functions. Scores that are not finite raise NotFinite."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from dataset.refer import box_iou, is_tested
from utils import InputError


class NotFinite(InputError):
    """Scores that a metric would rank or compare are NaN or infinite."""


def require_finite(scores, name):
    """Raise NotFinite unless all scores are finite.

    A comparison with NaN is false, so NaN would rank first in one metric and last in another.

    Args:
        scores: array [N, ...], the scores of N samples.
        name: function from the number of a sample to its name in the message.
    """
    scores = np.asarray(scores)
    bad = np.flatnonzero(~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim))))
    if len(bad):
        raise NotFinite(
            f"{name(bad[0])}: its scores are not finite, as for {len(bad)} of {len(scores)}"
        )


def _hit_probability(k, right, wrong):
    """Return the probability that a random order of candidates has one of the right ones among its
    first k.
    """
    draws = np.arange(min(k, right + wrong))
    return 1 - np.prod(np.maximum(0, wrong - draws) / (right + wrong - draws))


def _standings(scores, positives):
    """Count for each query the wrong candidates above its best positive, and the positives and
    wrong candidates equal to it.

    scores: [Q, K]; positives: for each query the indices of its positives. A query without a
    positive is left out.
    """
    for row, own in zip(scores, positives):
        if len(own):
            best, others = row[own].max(), np.delete(row, own)
            yield (
                int((others > best).sum()),
                int((row[own] == best).sum()),
                int((others == best).sum()),
            )


def recall_at_k(scores_i2t, scores_t2i, txt2img, img2txt):
    """Return the recall at 1, 5 and 10 of image-to-text (txt_*) and text-to-image (img_*)
    retrieval, in percent.

    scores_i2t: [NI, NT]; scores_t2i: [NT, NI]; txt2img: the image of each text; img2txt: the texts
    of each image, any number; images without a text are not queries. A query is a hit at k if fewer
    than k wrong candidates rank before its best positive. Equal scores count with the probability
    of a hit in random order, so constant scores have the recall of chance. Raises NotFinite, and
    InputError if there is no query.
    """
    results = {}
    directions = {
        "txt": (np.asarray(scores_i2t), [np.asarray(own, dtype=int) for own in img2txt]),
        "img": (np.asarray(scores_t2i), [np.asarray([own], dtype=int) for own in txt2img]),
    }
    for name, (scores, positives) in directions.items():
        require_finite(
            scores, f"{'image' if name == 'txt' else 'text'} {{}} (counting from 0)".format
        )
        standings = list(_standings(scores, positives))
        if not standings:
            raise InputError(
                "no image has a text, so recall is not defined: give pairs of images and texts"
            )
        recalls = {
            k: float(
                100
                * np.mean(
                    [_hit_probability(k - above, right, wrong) for above, right, wrong in standings]
                )
            )
            for k in (1, 5, 10)
        }
        results.update({f"{name}_r{k}": recall for k, recall in recalls.items()})
        results[f"{name}_r_mean"] = sum(recalls.values()) / 3
    results["r_mean"] = (results["txt_r_mean"] + results["img_r_mean"]) / 2
    return results


def chance_recall(images, texts, img2txt):
    """Return the expected recall at 1, 5 and 10 of a random ranking of `images` and `texts`
    candidates, in percent.

    Raises InputError without a text.
    """
    if not texts:
        raise InputError(
            "no image has a text, so recall is not defined: give pairs of images and texts"
        )
    results = {}
    for k in (1, 5, 10):
        hits = [_hit_probability(k, len(own), texts - len(own)) for own in filter(len, img2txt)]
        results[f"txt_r{k}"] = float(100 * np.mean(hits))
        results[f"img_r{k}"] = 100 * min(1, k / images)
    return results


# --------------------------------------------------------------------------------------------------
# VQA accuracy, with the oddities of the official evaluation script: the published numbers have them
# too

OFFICIAL_ANSWERS = 10  # answers of a question to which the official formula applies
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # one that is not a decimal point
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
# ending -> the words that take it. Not all that English has: "its" and "id" must stay, and so do
# words such as "wed".
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions():
    """Return {a contraction without one of its apostrophes: the contraction}."""
    spellings = {"somebody'd": "somebodyd"}  # the wrong way round in the official list
    for ending, words in _CONTRACTED.items():
        for full in (word + ending for word in words.split()):
            spellings.update(
                (full[:i] + full[i + 1 :], full) for i, letter in enumerate(full) if letter == "'"
            )
    return spellings


_CONTRACTIONS = _contractions()


@cache
def _without_punctuation(answer):
    """Replace marks by spaces, or by nothing where one is next to a space in the answer or it has a
    "1,000".
    """
    cleaned = answer
    numeric = _DIGITS_WITH_COMMA.search(answer)
    for mark in _PUNCTUATION:
        goes = numeric or f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", cleaned)


@cache
def _normalized(answer):
    """Return a predicted answer as it is compared: no punctuation, lower case, digits, no articles,
    apostrophes.
    """
    # before punctuation, which looks at spaces alone
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _by_question(entries, kind):
    """Return {question_id: entry}. Raises InputError for a second entry of a question."""
    questions = {}
    for entry in entries:
        if entry["question_id"] in questions:
            raise InputError(f"question {entry['question_id']} has more than one {kind}: keep one")
        questions[entry["question_id"]] = entry
    return questions


def _human_answers(annotation):
    """Return the annotators' answers, normalized for the comparison with predictions.

    Raises InputError.
    """
    answers = annotation.get("answers", annotation.get("answer"))
    if isinstance(answers, list):
        answers = [given.get("answer") if isinstance(given, dict) else given for given in answers]
    if (
        not isinstance(answers, list)
        or not answers
        or not all(isinstance(given, str) for given in answers)
    ):
        raise InputError(
            f"question {annotation['question_id']}: its annotation must have the annotators' answers, as "
            'answer: ["yes", ...] or answers: [{"answer": "yes"}, ...]'
        )
    if len(answers) != OFFICIAL_ANSWERS:
        return [_normalized(given) for given in answers]
    return [_without_punctuation(given) for given in answers] if len(set(answers)) > 1 else answers


def _accuracy(answer, given):
    """Return the accuracy of a normalized answer against the answers of _human_answers."""
    equal = [human == answer for human in given]
    if len(given) == OFFICIAL_ANSWERS:
        return sum(min(1, (sum(equal) - left_out) / 3) for left_out in equal) / len(equal)
    return min(1, sum(equal) / min(3, len(given)))


def count_vqa_formulas(annotations):
    """Count the questions that vqa_accuracy scores by each formula, "official" or "own", and the
    "capped" questions.

    On a capped question no prediction can have 100%. Returns a Counter. Raises InputError as
    vqa_accuracy does.
    """
    counts = Counter()
    for annotation in annotations:
        given = _human_answers(annotation)
        # only the answer itself can equal it
        reachable = {human for human in given if _normalized(human) == human}
        counts["official" if len(given) == OFFICIAL_ANSWERS else "own"] += 1
        counts["capped"] += max((_accuracy(human, given) for human in reachable), default=0) < 1
    return counts


def describe_vqa_formulas(counts):
    """Return one line on the counts of count_vqa_formulas."""
    formulas = {
        "official": f"by the official formula for {counts['official']} questions with {OFFICIAL_ANSWERS} answers",
        "own": f"by min(1, matches / min(3, n)) with both sides normalized for {counts['own']} questions with another number n of answers",
    }
    used = " and ".join(text for name, text in formulas.items() if counts[name])
    capped = f"; no prediction can have 100% on {counts['capped']}: their answers differ, or are not spelled as normalized"
    return used + capped * (counts["capped"] > 0)


def vqa_accuracy(predictions, annotations):
    """Return the VQA accuracy in percent: {"overall", "per_answer_type": {type: ...},
    "per_question": {id: ...}}.

    predictions: list of {question_id, answer}; annotations: list of {question_id, the annotators'
    answers as answer (list of str) or answers (list of {answer}), perhaps answer_type}. All numbers
    are rounded to two digits, as the official script reports them; overall and per type are means
    of unrounded accuracies.

    With ten answers the accuracy is the official one. Against nine of the ten a prediction scores
    min(1, m / 3) if m of the nine equal it. The accuracy is the mean over the ten ways to leave one
    answer out. As in the official script, predictions are fully normalized (white space,
    punctuation, lower case, number words, articles, contractions). Annotators' answers lose only
    their punctuation, and they keep it if all ten are equal.

    With another number n of answers both sides are normalized, and a prediction that equals m of
    the answers scores min(1, m / min(3, n)). Raises InputError that names the question_id if
    predictions and annotations do not pair up one to one or if an annotation has no answers.
    """
    predicted, annotated = (
        _by_question(predictions, "prediction"),
        _by_question(annotations, "annotation"),
    )
    counts = f"{len(predicted)} predictions, {len(annotated)} annotated questions"
    for question_id in {**annotated, **predicted}:
        if question_id not in predicted or question_id not in annotated:
            lacking = "prediction" if question_id in annotated else "annotation"
            raise InputError(
                f"question {question_id} has no {lacking} ({counts}): give both for the same questions"
            )
    if not annotated:
        raise InputError("there are no predictions and no annotations to score")
    per_question, by_type = {}, defaultdict(list)
    for question_id, annotation in annotated.items():
        accuracy = _accuracy(
            _normalized(predicted[question_id]["answer"]), _human_answers(annotation)
        )
        per_question[question_id] = accuracy
        if "answer_type" in annotation:
            by_type[annotation["answer_type"]].append(accuracy)
    return {
        "overall": _percent(per_question.values()),
        "per_answer_type": {kind: _percent(accuracies) for kind, accuracies in by_type.items()},
        "per_question": {
            question_id: _percent([accuracy]) for question_id, accuracy in per_question.items()
        },
    }


def _percent(accuracies):
    return round(100 * sum(accuracies) / len(accuracies), 2)


# --------------------------------------------------------------------------------------------------
# grounding


def grounding_accuracy(cams, refs, boxes, images, detections, alpha=0.5):
    """Return the share of referring expressions whose best detected box is right, in [0, 1], by
    split.

    The keys of RefCOCO+ are "val_d", "testA_d" and "testB_d".

    cams: {ref_id: map [h, w], any size}, or pairs (ref_id, map), because a ref may have several
    expressions. refs: {ref_id: {image_id, split}}; boxes: {ref_id: [x, y, w, h]}, the box referred
    to; images: {image_id: {height, width}} in pixels; detections: {image_id: list of [x, y, w, h,
    score]}, the score unused. Ids are integers, or strings of them as JSON has; one call may mix
    the two.

    A map is resized bicubically to its image, and a detected box scores the map's sum over the
    box's pixels, divided by (w * h)^alpha (Section 5, Visual Grounding). A box without pixels in
    the image loses to every other box. The best box, the first of equals, is right if its IoU with
    the referred box is at least 0.5. The result has only splits that occur in cams, and never
    train. Raises InputError if refs lacks a ref_id or an image has no detected box, and NotFinite
    if a map is not finite.
    """
    refs, boxes, images, detections = map(_by_id, (refs, boxes, images, detections))
    hits, cams = defaultdict(list), list(cams.items() if isinstance(cams, Mapping) else cams)
    # a sum is finite only if the whole map is
    sums = [torch.as_tensor(cam).double().sum().item() for _, cam in cams]
    require_finite(sums, lambda number: f"heat map of ref_id {cams[number][0]}")
    for ref_id, cam in cams:
        ref_id = int(ref_id)
        ref = _find_ref(refs, ref_id)
        if not is_tested(ref):
            continue
        candidates = _candidates(detections, ref, ref_id)
        image = images[int(ref["image_id"])]
        best = candidates[
            int(np.argmax(box_scores(cam, image["height"], image["width"], candidates, alpha)))
        ]
        hits[ref["split"]].append(box_iou(best, boxes[ref_id]) >= 0.5)
    return _mean_by_split(hits)


def _mean_by_split(values):
    """Return {"SPLIT_d": mean of a split's values}, val first."""
    return {
        f"{split}_d": float(np.mean(values[split]))
        for split in sorted(values, key=lambda split: (split != "val", split))
    }


def box_scores(cam, height, width, boxes, alpha=0.5):
    """Return the score of each box [x, y, w, h, ...] of an image by a heat map [h, w], as
    grounding_accuracy has it.
    """
    cam = torch.as_tensor(cam, dtype=torch.float32)[None, None]
    cam = F.interpolate(cam, (height, width), mode="bicubic", align_corners=False)[0, 0]
    return [_box_score(cam, box, alpha) for box in boxes]


def chance_grounding(refs, boxes, detections, ref_ids=None):
    """Return the expected `grounding_accuracy` of detected boxes drawn at random, with its
    arguments, keys and errors.

    ref_ids: the ref of each expression evaluated (a ref counts as often as it occurs); without it
    every ref counts once.
    """
    refs, boxes, detections = map(_by_id, (refs, boxes, detections))
    shares = defaultdict(list)
    for ref_id in refs if ref_ids is None else map(int, ref_ids):
        ref = _find_ref(refs, ref_id)
        if is_tested(ref):
            right = [
                box_iou(box, boxes[ref_id]) >= 0.5 for box in _candidates(detections, ref, ref_id)
            ]
            shares[ref["split"]].append(np.mean(right))
    return _mean_by_split(shares)


def _by_id(mapping):
    return {int(key): value for key, value in mapping.items()}


def _find_ref(refs, ref_id):
    if ref_id not in refs:
        raise InputError(
            f"ref_id {ref_id} of test_file is not among the refs: correct test_file, refcoco_data or refer_dataset"
        )
    return refs[ref_id]


def _candidates(detections, ref, ref_id):
    """Return the detected boxes of a ref's image. Raises InputError."""
    image_id = int(ref["image_id"])
    if not detections.get(image_id):
        raise InputError(
            f"det_file has no box for image {image_id} (ref_id {ref_id}, split {ref['split']}): it must hold "
            "detections for every image outside of the split train"
        )
    return detections[image_id]


def _box_score(cam, box, alpha):
    """Return the sum of a map [H, W] inside a box [x, y, w, h, ...], divided by (w * h)^alpha."""
    x, y, w, h = box[:4]
    # a negative start would count from the far edge
    inside = cam[max(0, int(y)) : max(0, int(y + h)), max(0, int(x)) : max(0, int(x + w))]
    return inside.sum().item() / (w * h) ** alpha if inside.numel() else -float("inf")
