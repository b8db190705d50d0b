"""Visual question answering: existence, number, color, shape, size, and comparisons."""

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random

from .scenes import COLORS, SHAPES, SPLITS, Object, Scene, Scenes, each_scene
from .words import KEYS, WORDS, count_fitting, draw_absent, facts_of, phrase, with_article

FILES = (*(f"vqa_{split}.json" for split in SPLITS), "answer_list.json")
PER_SCENE = {"train": 3, "val": 2, "test": 2}
ANNOTATORS = 10
AGREEING = {10: 35, 9: 25, 8: 25, 7: 10, 6: 5}  # number of annotators with the true answer: weight
YES_NO = ("yes", "no")
EXISTENCE = ("is there {}?", "can you see {}?")
COUNT = ("how many {} are there?", "how many {} do you see?")
COLOR = ("what color is the {}?", "what color are the {}?")  # for one object, for several
SHAPE = "what shape is the {}?"
SIZE = "is the {} big or small?"
MORE = "are there more {} than {}?"
SAME = {
    "color": "are the {} and the {} the same color?",
    "size": "are the {} and the {} the same size?",
}
BIGGER = "is the {} bigger than the {}?"
TEXTS = (*YES_NO, *EXISTENCE, *COUNT, *COLOR, SHAPE, SIZE, MORE, *SAME.values(), BIGGER)
# plausible wrong answers
MISTAKEN = {
    "yes": ("no",),
    "no": ("yes",),
    "big": ("small",),
    "small": ("big",),
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange",),
    "green": ("cyan",),
    "blue": ("purple", "cyan"),
    "cyan": ("blue", "green"),
    "purple": ("blue", "pink"),
    "pink": ("red", "purple"),
    "circle": ("moon",),
    "square": ("diamond",),
    "triangle": ("diamond",),
    "star": ("cross",),
    "heart": ("triangle",),
    "cross": ("star",),
    "diamond": ("square",),
    "moon": ("circle",),
    "0": ("1",),
    "1": ("0", "2"),
    "2": ("1", "3"),
    "3": ("2", "4"),
    "4": ("3", "5"),
    "5": ("4",),
}
SYNONYMS = {usual: others for usual, *others in WORDS.values()}


def ask_existence(rng: Random, objects: list[Object]) -> tuple[str, str]:
    """Ask whether an object exists. Yes and no are equally frequent."""
    keys, answer = rng.choice((*KEYS, ("size", "shape"))), rng.choice(YES_NO)
    facts = (
        facts_of(rng.choice(objects), keys) if answer == "yes" else draw_absent(rng, objects, keys)
    )
    return rng.choice(EXISTENCE).format(with_article(phrase(rng, facts))), answer


def ask_count(rng: Random, objects: list[Object]) -> tuple[str, str]:
    """Ask for a number of objects.

    Some answers are 0. The others are balanced, because otherwise nearly all would be 1.
    """
    drawn = rng.random()
    if drawn < 0.2:
        facts = {}
    elif drawn < 0.3:
        facts = draw_absent(rng, objects, rng.choice(KEYS))
    else:
        by_count = {}
        for facts in (facts_of(obj, keys) for obj in objects for keys in sorted(set(KEYS))):
            by_count.setdefault(count_fitting(objects, facts), []).append(facts)
        facts = rng.choice(by_count[rng.choice(sorted(by_count))])
    return rng.choice(COUNT).format(phrase(rng, facts, count=2)), str(count_fitting(objects, facts))


def ask_color(rng: Random, objects: list[Object]) -> tuple[str, str] | None:
    """Ask for the color of a shape that occurs in one color only."""
    colors = {shape: {o["color"] for o in objects if o["shape"] == shape} for shape in SHAPES}
    shapes = [shape for shape in SHAPES if len(colors[shape]) == 1]
    if shapes:
        facts = {"shape": rng.choice(shapes)}
        count = count_fitting(objects, facts)
        return COLOR[count > 1].format(phrase(rng, facts, count)), *colors[facts["shape"]]
    return None


def ask_fact(
    rng: Random, objects: list[Object], *, key: str, question: str, given: Sequence[tuple[str, ...]]
) -> tuple[str, str] | None:
    """Ask for a fact of an object that other facts identify.

    Args:
        rng: Generator of random numbers.
        objects: Objects of the scene.
        key: Key of the fact.
        question: Template of the question.
        given: Keys of the other facts; one of the tuples is used.
    """
    named = [(facts_of(o, keys), o[key]) for o in objects for keys in given]
    single = [(facts, value) for facts, value in named if count_fitting(objects, facts) == 1]
    if single:
        facts, value = rng.choice(single)
        return question.format(phrase(rng, facts)), WORDS.get(value, (value,))[0]
    return None


def ask_comparison(rng: Random, objects: list[Object]) -> tuple[str, str]:
    """Compare two shapes: their numbers, or color and size of the two objects.

    Yes and no are equally frequent answers of each.
    """
    answer = rng.choice(YES_NO)
    yes, counts = answer == "yes", Counter(o["shape"] for o in objects)
    present = [shape for shape in SHAPES if counts[shape]]
    pairs = [
        (a, b) for a, b in itertools.permutations(present, 2) if (counts[a] > counts[b]) == yes
    ]
    if not pairs:
        pairs = [
            (a, b)
            for a, b in itertools.permutations(SHAPES, 2)
            if counts[a] != counts[b] and (counts[a] > counts[b]) == yes
        ]
    forms = [(MORE, *rng.choice(pairs))]
    single = [o for o in objects if counts[o["shape"]] == 1]
    if len(single) > 1:
        a, b = rng.sample(single, 2)
        # only 1 pair in 8 has the same color, so few of the other pairs are asked about
        if (a["color"] == b["color"]) == yes and (yes or rng.random() < 1 / (len(COLORS) - 1)):
            forms += 2 * [(SAME["color"], a["shape"], b["shape"])]
        if rng.random() < 0.5:
            if (a["size"] == b["size"]) == yes:
                forms += 2 * [(SAME["size"], a["shape"], b["shape"])]
        elif a["size"] != b["size"]:
            first, second = (a, b) if (a["size"] == "large") == yes else (b, a)
            forms += 2 * [(BIGGER, first["shape"], second["shape"])]
    form, *shapes = rng.choice(forms)
    return form.format(
        *(phrase(rng, {"shape": shape}, 2 if form == MORE else 1) for shape in shapes)
    ), answer


KINDS = (
    ask_existence,
    ask_count,
    ask_color,
    partial(ask_fact, key="shape", question=SHAPE, given=[("color",)]),
    partial(ask_fact, key="size", question=SIZE, given=[("shape",), ("color", "shape")]),
    ask_comparison,
)


def ask(rng: Random, scene: Scene, count: int) -> list[tuple[str, str]]:
    """Ask up to `count` questions of different kinds, as many as the scene allows.

    Returns:
        The questions with their true answers.
    """
    questions = (ask_kind(rng, scene["objects"]) for ask_kind in rng.sample(KINDS, len(KINDS)))
    return [pair for pair in questions if pair][:count]


def annotate(rng: Random, answer: str) -> list[str]:
    """Answer as ten annotators do.

    6 to 10 of them give the truth, the others a synonym or a mistake.
    """
    agreeing = rng.choices(list(AGREEING), list(AGREEING.values()))[0]
    others = (*2 * SYNONYMS.get(answer, []), *MISTAKEN[answer])
    return rng.sample(
        [answer] * agreeing + rng.choices(others, k=ANNOTATORS - agreeing), ANNOTATORS
    )


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES. The answer list has all train and true answers."""
    entries, ids = {split: [] for split in scenes}, itertools.count()
    for split, _, scene, rng in each_scene(scenes, seed, "vqa"):
        for question, answer in ask(rng, scene, PER_SCENE[split]):
            kind = "yes/no" if answer in YES_NO else "number" if answer.isdigit() else "other"
            entries[split].append(
                {
                    "image": scene["image"],
                    "question": question,
                    "question_id": next(ids),
                    "dataset": "vqa",
                    "answer": annotate(rng, answer),
                    "answer_type": kind,
                }
            )
    counts = Counter(dict.fromkeys(MISTAKEN, 0))
    for entry in entries["train"]:
        counts.update(entry["answer"])
    return *entries.values(), sorted(counts, key=lambda answer: (-counts[answer], answer))
