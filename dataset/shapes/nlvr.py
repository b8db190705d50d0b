"""NLVR2: statements on pairs of images, each true of one pair and false of another, so that it
alone tells nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

from .scenes import each_scene
from .words import KEYS, NUMBERS, count_fitting, facts_of, phrase, with_article

FILES = ("nlvr_train.json", "nlvr_dev.json", "nlvr_test.json")
PER_SCENE = {"train": 2, "val": 1, "test": 1}  # statements


class Statement(NamedTuple):
    """Sentences that mean the same, and when that is true.

    truth(l, r, n) says it for l objects in the left and r in the right image that the facts fit,
    and returns None where people may differ or the answer is too easy; truth(l, r, l2, r2, n) where
    there are two kinds of facts. `numbers`: what n may be, for all objects, and for those of a
    color, shape or both.
    """

    sentences: tuple[str, ...]
    truth: Callable
    kinds: int = 1
    numbers: tuple = ((0,), (0,))


SETS = (
    Statement(
        ("both images have {a}", "there is {a} in both images"), lambda l, r, n: l > 0 and r > 0
    ),
    Statement(
        ("only one of the images has {a}", "exactly one of the images has {a}"),
        lambda l, r, n: (l > 0) != (r > 0),
    ),
    Statement(
        ("neither image has {a}", "there is no {kind} in either image"), lambda l, r, n: l == r == 0
    ),
    Statement(("the left image has {a}", "there is {a} in the left image"), lambda l, r, n: l > 0),
    Statement(
        ("the right image has {a}", "there is {a} in the right image"), lambda l, r, n: r > 0
    ),
    Statement(
        ("the left image has no {kind}", "there is no {kind} in the left image"),
        lambda l, r, n: l == 0,
    ),
    Statement(
        ("the right image has no {kind}", "there is no {kind} in the right image"),
        lambda l, r, n: r == 0,
    ),
    Statement(
        ("there is {a} in one of the images", "one of the images has {a}"),
        lambda l, r, n: None if l and r else l + r > 0,
    ),
    Statement(
        (
            "one image has {a} and the other one has {a2}",
            "there is {a} in one image and {a2} in the other one",
        ),
        lambda l, r, l2, r2, n: l * r2 + r * l2 > 0 if l + r + l2 + r2 else None,
        kinds=2,
    ),
)
NUMERIC = (
    Statement(
        ("there {are} {n} {kind} in total", "the images have {n} {kind} in total"),
        lambda l, r, n: l + r == n if abs(l + r - n) < 2 else None,
        numbers=((2, 3, 4, 5), (1, 2, 2, 3)),
    ),
    Statement(
        (
            "there are more {kinds} in the left image than in the right image",
            "the left image has more {kinds} than the right image",
        ),
        lambda l, r, n: l > r if l or r else None,
    ),
    Statement(
        (
            "there are more {kinds} in the right image than in the left image",
            "the right image has more {kinds} than the left image",
        ),
        lambda l, r, n: r > l if l or r else None,
    ),
    Statement(
        ("one image has exactly {n} {kind}", "there {are} exactly {n} {kind} in one of the images"),
        lambda l, r, n: None if l == r == n or min(abs(l - n), abs(r - n)) > 1 else n in (l, r),
        numbers=((1, 2, 3, 4), (1, 2)),
    ),
    Statement(
        ("each image has at least {n} {kind}", "there {are} at least {n} {kind} in each image"),
        lambda l, r, n: None if min(l, r) < n - 1 else min(l, r) >= n,
        numbers=((2, 3), (1,)),
    ),
)
NUMERIC_SHARE = 0.3
TEXTS = tuple(text for statement in SETS + NUMERIC for text in statement.sentences)


def index_scenes(scenes):
    """Return the indices of the scenes with some object, by the values of the facts on it: {("red",
    "star"): [0, 7], ...}.
    """
    found = {(): range(len(scenes))}
    for i, scene in enumerate(scenes):
        for values in sorted(
            {tuple(o[key] for key in keys) for o in scene["objects"] for keys in KEYS}
        ):
            found.setdefault(values, []).append(i)
    return found


def find_pair(rng, scenes, found, facts, is_true, label, tries=60):
    """Return indices (left, right) of two scenes with is_true(left, right) == label, or None if
    chance finds none.
    """
    for _ in range(tries):
        pair = []
        for wanted in rng.choices(facts, k=2) if len(facts) == 1 else rng.sample(facts, 2):
            values, drawn = tuple(wanted.values()), rng.random()
            if 0.55 < drawn < 0.85 and values:  # a near miss, perhaps: one value is right
                values = (rng.choice(values),)
            pair.append(rng.choice(found[values if drawn < 0.85 else ()]))
        if pair[0] != pair[1] and is_true(*(scenes[i] for i in pair)) is label:
            return pair


def state(rng, scenes, found, tries=100):
    """Draw a statement on pairs of these scenes: (sentence, {True: pair, False: pair}), each pair
    two indices (left, right).

    None if chance finds none, as for scenes that are all alike. `found`: from index_scenes.
    """
    for _ in range(tries):
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

        def is_true(*pair):
            return statement.truth(
                *(count_fitting(scene["objects"], wanted) for wanted in facts for scene in pair), n
            )

        pairs = {
            label: find_pair(rng, scenes, found, facts, is_true, label) for label in (True, False)
        }
        if all(pairs.values()):
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


def annotations(scenes, seed):
    """Return the contents of FILES for {split: scenes}."""
    entries = {split: [] for split in scenes}
    found = {split: index_scenes(scenes[split]) for split in scenes}
    for split, _, _, rng in each_scene(scenes, seed, "nlvr"):
        for _ in range(PER_SCENE[split]):
            sentence, pairs = state(rng, scenes[split], found[split]) or ("", {})
            for label in rng.sample(list(pairs), len(pairs)):
                images = [scenes[split][k]["image"] for k in pairs[label]]
                entries[split].append({"images": images, "sentence": sentence, "label": str(label)})
    return tuple(entries.values())
