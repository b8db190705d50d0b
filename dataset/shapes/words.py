"""How this data set says things, and facts about objects in words.

*Facts* are a dict such as {"color": "red", "shape": "star"}: they fit the objects that have these
values, and {} fits every object.
"""

from itertools import product

from .scenes import COLORS, FILLS, SHAPES, SIZES

# Words for what is called by more than its name, the usual one first.
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
NOUNS = ("object", "one", "thing")  # where the shape is not said
KEYS = (*[("color", "shape")] * 3, ("shape",), ("color",))  # of facts, to draw from


def say(rng, name):
    """Draw one of the words for a color, shape, size, fill or background, mostly the usual one."""
    words = WORDS.get(name, (name,))
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def plural(noun):
    """Return the plural of a shape word."""
    return noun + ("es" if noun.endswith("s") else "s")


def with_article(words):
    """Put the indefinite article before a phrase: "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def facts_of(obj, keys):
    """Return what holds for an object under these keys."""
    return {key: obj[key] for key in keys}


def count_fitting(objects, facts):
    """Count the objects that the facts fit."""
    return sum(all(o[key] == value for key, value in facts.items()) for o in objects)


def draw_absent(rng, objects, keys):
    """Draw facts that fit no object, mostly near misses: each value occurs, though not together, or
    one of them does.
    """
    present = {tuple(o[key] for key in keys) for o in objects}
    seen = {value for values in present for value in values}
    free = [values for values in product(*(TABLES[key] for key in keys)) if values not in present]
    common = [sum(value in seen for value in values) for values in free]
    least = min(rng.choices((2, 1, 0), (5, 4, 1))[0], max(common))
    return dict(
        zip(keys, rng.choice([values for values, count in zip(free, common) if count >= least]))
    )


def phrase(rng, facts, count=1, noun=NOUNS[0]):
    """Put facts into words, without an article:

    "big red star", "objects"; `noun` is said where they name no shape.
    """
    words = [say(rng, facts[key]) for key in TABLES if key in facts]
    if "shape" not in facts:
        words.append(noun)
    return " ".join([*words[:-1], words[-1] if count == 1 else plural(words[-1])])
