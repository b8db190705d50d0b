"""NLVR2: statements on pairs of images, each true of one pair and false of another."""

import functools
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from .scenes import Scene, Scenes, each_scene
from .words import (
    KEYS,
    NUMBERS,
    Facts,
    Index,
    count_fitting,
    facts_of,
    index_scenes,
    phrase,
    with_article,
)

TRIES, PAIR_TRIES = 100, 60
FILES = ("nlvr_train.json", "nlvr_dev.json", "nlvr_test.json")
PER_SCENE = {"train": 2, "val": 1, "test": 1}  # statements of a scene


class Statement(NamedTuple):
    """Sentences with one meaning, and a function that tests whether it is true.

    Attributes:
        sentences: Templates of the sentences.
        truth: Function (a, b, n) of the numbers a and b of objects in the left and right image that
            fit the facts. With two kinds of facts it takes (a, b, a2, b2, n). It returns None if
            people may disagree or the answer is too easy.
        kinds: Number of kinds of facts.
        numbers: Values of n for all objects, and for those of a color, shape or both.
    """

    sentences: tuple[str, ...]
    truth: Callable
    kinds: int = 1
    numbers: tuple = ((0,), (0,))


SETS = (
    Statement(
        ("both images have {a}", "there is {a} in both images"), lambda a, b, n: a > 0 and b > 0
    ),
    Statement(
        ("only one of the images has {a}", "exactly one of the images has {a}"),
        lambda a, b, n: (a > 0) != (b > 0),
    ),
    Statement(
        ("neither image has {a}", "there is no {kind} in either image"), lambda a, b, n: a == b == 0
    ),
    Statement(("the left image has {a}", "there is {a} in the left image"), lambda a, b, n: a > 0),
    Statement(
        ("the right image has {a}", "there is {a} in the right image"), lambda a, b, n: b > 0
    ),
    Statement(
        ("the left image has no {kind}", "there is no {kind} in the left image"),
        lambda a, b, n: a == 0,
    ),
    Statement(
        ("the right image has no {kind}", "there is no {kind} in the right image"),
        lambda a, b, n: b == 0,
    ),
    Statement(
        ("there is {a} in one of the images", "one of the images has {a}"),
        lambda a, b, n: None if a and b else a + b > 0,
    ),
    Statement(
        (
            "one image has {a} and the other one has {a2}",
            "there is {a} in one image and {a2} in the other one",
        ),
        lambda a, b, a2, b2, n: a * b2 + b * a2 > 0 if a + b + a2 + b2 else None,
        kinds=2,
    ),
)
NUMERIC = (
    Statement(
        ("there {are} {n} {kind} in total", "the images have {n} {kind} in total"),
        lambda a, b, n: a + b == n if abs(a + b - n) < 2 else None,
        numbers=((2, 3, 4, 5), (1, 2, 2, 3)),
    ),
    Statement(
        (
            "there are more {kinds} in the left image than in the right image",
            "the left image has more {kinds} than the right image",
        ),
        lambda a, b, n: a > b if a or b else None,
    ),
    Statement(
        (
            "there are more {kinds} in the right image than in the left image",
            "the right image has more {kinds} than the left image",
        ),
        lambda a, b, n: b > a if a or b else None,
    ),
    Statement(
        ("one image has exactly {n} {kind}", "there {are} exactly {n} {kind} in one of the images"),
        lambda a, b, n: None if a == b == n or min(abs(a - n), abs(b - n)) > 1 else n in (a, b),
        numbers=((1, 2, 3, 4), (1, 2)),
    ),
    Statement(
        ("each image has at least {n} {kind}", "there {are} at least {n} {kind} in each image"),
        lambda a, b, n: None if min(a, b) < n - 1 else min(a, b) >= n,
        numbers=((2, 3), (1,)),
    ),
)
NUMERIC_SHARE = 0.3
TEXTS = tuple(text for statement in SETS + NUMERIC for text in statement.sentences)


def find_pair(
    rng: Random,
    scenes: list[Scene],
    index: Index,
    *,
    facts: list[Facts],
    is_true: Callable[..., bool | None],
    label: bool,
) -> list[int] | None:
    """Find two scenes for which a statement is true, or false.

    Args:
        rng: Generator of random numbers.
        scenes: Scenes of the split.
        index: Result of `index_scenes`.
        facts: Facts of the statement.
        is_true: Function of two scenes that returns whether the statement is true.
        label: Wanted result of `is_true`.

    Returns:
        The indices of the left and the right scene, None if random tries find none.
    """
    for _ in range(PAIR_TRIES):
        pair = []
        for wanted in rng.choices(facts, k=2) if len(facts) == 1 else rng.sample(facts, 2):
            values, drawn = tuple(wanted.values()), rng.random()
            if 0.55 < drawn < 0.85 and values:  # perhaps a near miss, in which one value is right
                values = (rng.choice(values),)
            pair.append(rng.choice(index[values if drawn < 0.85 else ()]))
        if pair[0] != pair[1] and is_true(*(scenes[i] for i in pair)) is label:
            return pair
    return None


def state(
    rng: Random, scenes: list[Scene], index: Index
) -> tuple[str, dict[bool, list[int]]] | None:
    """Draw a statement on pairs of scenes.

    Args:
        rng: Generator of random numbers.
        scenes: Scenes of the split.
        index: Result of `index_scenes`.

    Returns:
        The sentence, and the indices of a pair for which it is true and of one for which it is
        false. None if random tries find none, for example if all scenes are alike.
    """
    for _ in range(TRIES):
        numeric = rng.random() < NUMERIC_SHARE
        statement = rng.choice(NUMERIC if numeric else SETS)
        keys = () if numeric and rng.random() < 0.4 else rng.choice(KEYS)
        facts = [
            facts_of(rng.choice(rng.choice(scenes)["objects"]), keys)
            for _ in range(statement.kinds)
        ]
        n = rng.choice(statement.numbers[bool(keys)])
        if statement.kinds == 2 and facts[0] == facts[1]:
            continue
        is_true = functools.partial(_is_true, statement, facts, n)
        found = {
            label: find_pair(rng, scenes, index, facts=facts, is_true=is_true, label=label)
            for label in (True, False)
        }
        pairs = {label: pair for label, pair in found.items() if pair}
        if len(pairs) == len(found):
            words = {
                "a": with_article(phrase(rng, facts[0])),
                "a2": with_article(phrase(rng, facts[-1])),
                "n": NUMBERS[n],
                "are": "is" if n == 1 else "are",
                "kind": phrase(rng, facts[0], max(n, 1)),
                "kinds": phrase(rng, facts[0], 2),
            }
            return rng.choice(statement.sentences).format(**words), pairs
    return None


def _is_true(statement: Statement, facts: list[Facts], n: int, *pair: Scene) -> bool | None:
    """Return whether a statement with these facts is true of two scenes."""
    counts = (count_fitting(scene["objects"], wanted) for wanted in facts for scene in pair)
    return statement.truth(*counts, n)


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES."""
    entries = {split: [] for split in scenes}
    indices = {split: index_scenes(scenes[split]) for split in scenes}
    for split, _, _, rng in each_scene(scenes, seed, "nlvr"):
        for _ in range(PER_SCENE[split]):
            sentence, pairs = state(rng, scenes[split], indices[split]) or ("", {})
            for label in rng.sample(list(pairs), len(pairs)):
                images = [scenes[split][k]["image"] for k in pairs[label]]
                entries[split].append({"images": images, "sentence": sentence, "label": str(label)})
    return tuple(entries.values())
