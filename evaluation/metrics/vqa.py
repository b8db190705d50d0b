"""VQA accuracy with the oddities of the official script, as in published numbers."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from utils import InputError

OFFICIAL_ANSWERS = 10  # answers of a question to which the official formula applies
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # a period that is not a decimal point
_ARTICLES = ("a", "an", "the")
_NUMBERS = {
    word: str(i)
    for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
# words by the ending that they take. The official list lacks some English contractions: "its",
# "id" and words such as "wed" must stay.
_CONTRACTED = {
    "n't": (
        "ai are ca could did does do had has have is might must need ought sha should was were wo"
        " would"
    ),
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all",
}


def _contractions() -> dict[str, str]:
    """Return each contraction by its spellings that lack one apostrophe."""
    spellings = {"somebody'd": "somebodyd"}  # the wrong way round in the official list
    for ending, words in _CONTRACTED.items():
        for full in (word + ending for word in words.split()):
            marks = [i for i, letter in enumerate(full) if letter == "'"]
            spellings |= {full[:i] + full[i + 1 :]: full for i in marks}
    return spellings


_CONTRACTIONS = _contractions()


def vqa_accuracy(
    predictions: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the VQA accuracy in percent.

    With ten answers the accuracy is the official one. Against nine of the ten a prediction scores
    min(1, m / 3) if m of the nine equal it. The accuracy is the mean over the ten ways to leave one
    answer out. As in the official script, predictions are fully normalized (white space,
    punctuation, lower case, number words, articles, contractions). Annotators' answers lose only
    their punctuation, and keep it if all ten are equal.

    With another number n of answers both sides are normalized. A prediction that equals m of the
    answers scores min(1, m / min(3, n)).

    Args:
        predictions: {question_id, answer} of each question.
        annotations: {question_id, answer or answers, perhaps answer_type} of each question.
            `answer` is a list of str, `answers` a list of {answer}.

    Returns:
        "overall", "per_answer_type" by type and "per_question" by question_id, rounded to two
        digits. "overall" and "per_answer_type" are means of unrounded accuracies.

    Raises:
        InputError: Predictions and annotations do not pair up one to one, or an annotation has no
            answers.
    """
    predicted = _by_question(predictions, "prediction")
    annotated = _by_question(annotations, "annotation")
    for question_id in {**annotated, **predicted}:
        if question_id not in predicted or question_id not in annotated:
            lacking = "prediction" if question_id in annotated else "annotation"
            raise InputError(
                f"question {question_id} has no {lacking} ({len(predicted)} predictions,"
                f" {len(annotated)} annotated questions); give predictions and annotations of"
                " the same questions"
            )
    if not annotated:
        raise InputError("there are no predictions and no annotations to score; give both")
    per_question, by_type = {}, defaultdict(list)
    for question_id, annotation in annotated.items():
        answer = _normalized(predicted[question_id]["answer"])
        per_question[question_id] = _accuracy(answer, _human_answers(annotation))
        if "answer_type" in annotation:
            by_type[annotation["answer_type"]].append(per_question[question_id])
    return {
        "overall": _percent(per_question.values()),
        "per_answer_type": {kind: _percent(values) for kind, values in by_type.items()},
        "per_question": {key: _percent([value]) for key, value in per_question.items()},
    }


def count_vqa_formulas(annotations: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count the questions of each formula of `vqa_accuracy`, and those without a full score.

    Args:
        annotations: As in `vqa_accuracy`.

    Returns:
        The number of questions with the "official" formula, with our "own" one, and "capped"
        questions, on which no prediction can have 100%.

    Raises:
        InputError: An annotation has no answers.
    """
    counts: Counter[str] = Counter()
    for annotation in annotations:
        given = _human_answers(annotation)
        # only the answer itself can equal it
        reachable = {human for human in given if _normalized(human) == human}
        counts["official" if len(given) == OFFICIAL_ANSWERS else "own"] += 1
        counts["capped"] += max((_accuracy(human, given) for human in reachable), default=0) < 1
    return counts


def describe_vqa_formulas(counts: Mapping[str, int]) -> str:
    """Return one line on the counts of `count_vqa_formulas`."""
    formulas = {
        "official": (
            f"by the official formula for the {counts['official']} questions with"
            f" {OFFICIAL_ANSWERS} answers"
        ),
        "own": (
            f"by min(1, matches / min(3, n)) of normalized answers for the {counts['own']}"
            f" questions whose number n of answers is not {OFFICIAL_ANSWERS}"
        ),
    }
    capped = (
        f"; on {counts['capped']} questions no prediction can have 100%, because their answers"
        " differ or are not in normalized spelling"
    )
    used = " and ".join(text for name, text in formulas.items() if counts[name])
    return used + capped * (counts["capped"] > 0)


@cache
def _without_punctuation(answer: str) -> str:
    """Replace punctuation by spaces, or remove it.

    A mark is removed if it is next to a space somewhere in the answer, or if the answer has a
    number such as "1,000".
    """
    cleaned = answer
    numeric = _DIGITS_WITH_COMMA.search(answer)
    for mark in _PUNCTUATION:
        goes = numeric or f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if goes else " ")
    return _PERIOD.sub("", cleaned)


@cache
def _normalized(answer: str) -> str:
    """Normalize a predicted answer for comparison.

    It has no punctuation and articles, lower case, digits for numbers, and apostrophes.
    """
    # before punctuation, whose rule depends on spaces only
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _by_question(entries: Iterable[Mapping[str, Any]], kind: str) -> dict[Any, Mapping[str, Any]]:
    """Return the entries by question_id. Raises InputError for a second entry of a question."""
    questions: dict[Any, Mapping[str, Any]] = {}
    for entry in entries:
        if entry["question_id"] in questions:
            raise InputError(f"question {entry['question_id']} has more than one {kind}; keep one")
        questions[entry["question_id"]] = entry
    return questions


def _human_answers(annotation: Mapping[str, Any]) -> list[str]:
    """Return the annotators' answers, normalized for the comparison. Raises InputError."""
    answers = annotation.get("answers", annotation.get("answer"))
    given = answers if isinstance(answers, list) else []
    given = [answer.get("answer") if isinstance(answer, dict) else answer for answer in given]
    if not given or not all(isinstance(answer, str) for answer in given):
        raise InputError(
            f"question {annotation['question_id']}: its annotation lacks the annotators'"
            ' answers; give "answer": ["yes", ...] or "answers": [{"answer": "yes"}, ...]'
        )
    if len(given) != OFFICIAL_ANSWERS:
        return [_normalized(answer) for answer in given]
    return [_without_punctuation(answer) for answer in given] if len(set(given)) > 1 else given


def _accuracy(answer: str, given: Sequence[str]) -> float:
    """Return the accuracy of a normalized answer against the answers of `_human_answers`."""
    equal = [human == answer for human in given]
    if len(given) == OFFICIAL_ANSWERS:
        return sum(min(1, (sum(equal) - left_out) / 3) for left_out in equal) / len(equal)
    return min(1, sum(equal) / min(3, len(given)))


def _percent(accuracies: Iterable[float]) -> float:
    accuracies = list(accuracies)
    return round(100 * sum(accuracies) / len(accuracies), 2)
