"""Visual question answering: existence, number, color, shape, size, and comparisons.

Each question has two pictures with different answers, as in VQA v2, so that the question alone
does not tell the answer.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import NamedTuple

from .scenes import SHAPES, SPLITS, Object, Scene, Scenes, each_scene
from .words import (
    KEYS,
    WORDS,
    Facts,
    Index,
    count_fitting,
    facts_of,
    index_scenes,
    phrase,
    with_article,
)

FILES = (*(f"vqa_{split}.json" for split in SPLITS), "answer_list.json")
PER_SCENE = {"train": 2, "val": 1, "test": 1}  # questions; each is asked about two scenes
TRIES = 100
ANNOTATORS = 10
AGREEING = {10: 35, 9: 25, 8: 25, 7: 10, 6: 5}  # number of annotators with the true answer: weight
YES_NO = ("no", "yes")
EXISTENCE = ("is there {}?", "can you see {}?")
COUNT = ("how many {} are there?", "how many {} do you see?")
COLOR = "what color is the {}?"
SHAPE = "what shape is the {}?"
SIZE = "is the {} big or small?"
MORE = "are there more {} than {}?"
SAME = {
    "color": "are the {} and the {} the same color?",
    "size": "are the {} and the {} the same size?",
}
BIGGER = "is the {} bigger than the {}?"
TEXTS = (*YES_NO, *EXISTENCE, *COUNT, COLOR, SHAPE, SIZE, MORE, *SAME.values(), BIGGER)
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


class Question(NamedTuple):
    """A question that can be asked about many scenes.

    Attributes:
        text: The question.
        answer: Function of the objects of a scene that returns the answer, None if the question
            does not fit the scene.
        about: Facts, some of which fit an object of a scene that is worth asking about.
    """

    text: str
    answer: Callable[[list[Object]], str | None]
    about: list[Facts]


def ask_existence(rng: Random, objects: list[Object]) -> Question:
    """Ask whether an object exists. A scene in which it does not exist is a near miss."""
    keys = rng.choice((*KEYS, ("size", "shape")))
    facts = facts_of(rng.choice(objects), keys)
    text = rng.choice(EXISTENCE).format(with_article(phrase(rng, facts)))
    near = [{key: value} for key, value in facts.items() if (key,) in KEYS]
    return Question(text, lambda seen: YES_NO[count_fitting(seen, facts) > 0], near)


def ask_count(rng: Random, objects: list[Object]) -> Question:
    """Ask for a number of objects. Numbers above 1 are as frequent as 1 if the scene has them."""
    facts: Facts = {}
    if rng.random() < 0.75:
        by_count = {}
        for some in (facts_of(obj, keys) for obj in objects for keys in sorted(set(KEYS))):
            by_count.setdefault(count_fitting(objects, some), []).append(some)
        facts = rng.choice(by_count[rng.choice(sorted(by_count))])
    text = rng.choice(COUNT).format(phrase(rng, facts, count=2))
    near = [{key: value} for key, value in facts.items()]
    return Question(text, lambda seen: str(count_fitting(seen, facts)), near or [facts])


def ask_fact(
    rng: Random, objects: list[Object], *, key: str, question: str, given: Sequence[tuple[str, ...]]
) -> Question | None:
    """Ask for a fact of an object that other facts identify.

    Args:
        rng: Generator of random numbers.
        objects: Objects of the scene.
        key: Key of the fact.
        question: Template of the question.
        given: Keys of the other facts; one of the tuples is used.
    """
    named = [facts_of(o, keys) for o in objects for keys in given]
    single = [facts for facts in named if count_fitting(objects, facts) == 1]
    if not single:
        return None
    facts = rng.choice(single)

    def answer(seen: list[Object]) -> str | None:
        fitting = [o[key] for o in seen if facts_of(o, facts) == facts]
        return WORDS.get(fitting[0], fitting)[0] if len(fitting) == 1 else None

    return Question(question.format(phrase(rng, facts)), answer, [facts])


def ask_more(rng: Random, objects: list[Object]) -> Question:
    """Ask whether there are more objects of one shape than of another."""
    first = rng.choice(objects)["shape"]
    shapes = [first, rng.choice([shape for shape in SHAPES if shape != first])]
    a, b = ({"shape": shape} for shape in rng.sample(shapes, 2))
    text = MORE.format(phrase(rng, a, 2), phrase(rng, b, 2))
    return Question(
        text, lambda seen: YES_NO[count_fitting(seen, a) > count_fitting(seen, b)], [a, b]
    )


def ask_comparison(rng: Random, objects: list[Object], *, key: str, form: str) -> Question | None:
    """Compare color or size of two objects, each the only one of its shape.

    Args:
        rng: Generator of random numbers.
        objects: Objects of the scene.
        key: Key of the fact.
        form: Template of the question.
    """
    counts = Counter(o["shape"] for o in objects)
    single = [shape for shape in SHAPES if counts[shape] == 1]
    if len(single) < 2:
        return None
    a, b = rng.sample(single, 2)

    def answer(seen: list[Object]) -> str | None:
        first, second = ([o[key] for o in seen if o["shape"] == shape] for shape in (a, b))
        if len(first) != 1 or len(second) != 1 or (form == BIGGER and first == second):
            return None
        return YES_NO[first == ["large"] if form == BIGGER else first == second]

    facts: list[Facts] = [{"shape": a}, {"shape": b}]
    return Question(form.format(*(phrase(rng, some) for some in facts)), answer, facts)


def ask_two(rng: Random, objects: list[Object]) -> Question | None:
    """Compare two shapes: their numbers, or color and size of the two objects."""
    forms = [
        ask_more,
        *2 * [partial(ask_comparison, key="color", form=SAME["color"])],
        partial(ask_comparison, key="size", form=SAME["size"]),
        partial(ask_comparison, key="size", form=BIGGER),
    ]
    return rng.choice(forms)(rng, objects)


KINDS = (
    ask_existence,
    ask_count,
    partial(ask_fact, key="color", question=COLOR, given=[("shape",)]),
    partial(ask_fact, key="shape", question=SHAPE, given=[("color",)]),
    partial(ask_fact, key="size", question=SIZE, given=[("shape",), ("color", "shape")]),
    ask_two,
)


def find_pair(
    rng: Random, question: Question, scene: Scene, scenes: list[Scene], index: Index
) -> list[tuple[Scene, str]] | None:
    """Return a scene and another one with their different answers to a question.

    Return None if the question does not fit the scene, or random tries find no other scene.
    """
    answer = question.answer(scene["objects"])
    for _ in range(TRIES if answer else 0):
        facts = rng.choice(question.about)
        other = scenes[rng.choice(index.get(tuple(facts.values()), index[()]))]
        different = question.answer(other["objects"])
        if answer and different and different != answer:
            return [(scene, answer), (other, different)]
    return None


def ask(
    rng: Random, scene: Scene, count: int, scenes: list[Scene], index: Index
) -> list[tuple[str, list[tuple[Scene, str]]]]:
    """Ask up to `count` questions of different kinds, as many as the scenes allow.

    Args:
        rng: Generator of random numbers.
        scene: The scene to ask about.
        count: Largest number of questions.
        scenes: Scenes of the split.
        index: Result of `index_scenes`.

    Returns:
        The questions, each with the scene and another one, and the two different answers.
    """
    asked = []
    for ask_kind in rng.sample(KINDS, len(KINDS)):
        question = ask_kind(rng, scene["objects"]) if len(asked) < count else None
        pair = question and find_pair(rng, question, scene, scenes, index)
        if question and pair:
            asked.append((question.text, pair))
    return asked


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
    indices = {split: index_scenes(scenes[split]) for split in scenes}
    for split, _, scene, rng in each_scene(scenes, seed, "vqa"):
        asked = ask(rng, scene, PER_SCENE[split], scenes[split], indices[split])
        for question, pair in asked:
            for shown, answer in pair:
                kind = "yes/no" if answer in YES_NO else "number" if answer.isdigit() else "other"
                entries[split].append(
                    {
                        "image": shown["image"],
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
