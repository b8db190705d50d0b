"""Words and phrases of the data set, and facts about objects.

*Facts* are a dict such as {"color": "red", "shape": "star"}: they fit the objects that have these
values, and {} fits every object.
"""

from collections.abc import Iterable
from random import Random

from .scenes import COLORS, FILLS, SHAPES, SIZES, Object, Scene

Facts = dict[str, str]
Index = dict[tuple[str, ...], list[int]]  # see index_scenes

# Synonyms by name, the usual word first.
WORDS = {
    "small": ("small", "little", "tiny"),
    "large": ("big", "large"),
    "solid": ("solid", "filled"),
    "outlined": ("outlined", "hollow"),
    "cyan": ("cyan", "turquoise"),
    "purple": ("purple", "violet"),
    "circle": ("circle", "disc"),
    "moon": ("moon", "crescent"),
    "gray": ("gray", "grey"),
    "top left": ("in the top left corner", "at the top left", "in the upper left"),
    "top right": ("in the top right corner", "at the top right", "in the upper right"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "center": ("in the middle", "in the center"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
# in the order of English adjectives
TABLES = {"size": SIZES, "fill": FILLS, "color": COLORS, "shape": SHAPES}
NUMBERS = ("", "one", "two", "three", "four", "five")
NOUNS = ("object", "one", "thing")  # words in place of an unnamed shape
KEYS = (*[("color", "shape")] * 3, ("shape",), ("color",))  # keys of facts, to draw from


def say(rng: Random, name: str) -> str:
    """Draw one of the words for a color, shape, size, fill or background, mostly the first."""
    words = WORDS.get(name, (name,))
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def plural(noun: str) -> str:
    """Return the plural of a shape word."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(words: str) -> str:
    """Put the indefinite article before a phrase: "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def facts_of(obj: Object, keys: Iterable[str]) -> Facts:
    """Return the facts of an object under these keys."""
    return {key: obj[key] for key in keys}


def count_fitting(objects: Iterable[Object], facts: Facts) -> int:
    """Count the objects that the facts fit."""
    return sum(all(o[key] == value for key, value in facts.items()) for o in objects)


def phrase(rng: Random, facts: Facts, count: int = 1, noun: str = NOUNS[0]) -> str:
    """Put facts into words without an article, such as "big red star".

    The words are in the plural unless `count` is 1. `noun` stands for a missing shape.
    """
    words = [say(rng, facts[key]) for key in TABLES if key in facts]
    if "shape" not in facts:
        words.append(noun)
    return " ".join([*words[:-1], words[-1] if count == 1 else plural(words[-1])])


def index_scenes(scenes: list[Scene]) -> Index:
    """Return the indices of scenes by the values of facts, as {("red", "star"): [0, 7], ...}."""
    index = {(): list(range(len(scenes)))}
    for i, scene in enumerate(scenes):
        for values in sorted(
            {tuple(o[key] for key in keys) for o in scene["objects"] for keys in KEYS}
        ):
            index.setdefault(values, []).append(i)
    return index
