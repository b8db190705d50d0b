"""Query-ad relevance: an ad is a picture with a title, each with facts that the other lacks.

A query names an object. Half of the relevant ads show the object, and the other half name it in the
title. No ad does both. Titles depend on the query only. A model that reads only pictures or only
titles finds half of the relevant ads. It cannot tell the other half from irrelevant ads, which
gives a ROC AUC of 75%.
"""

from itertools import product
from random import Random

from .captions import GROUNDS
from .scenes import COLORS, FILLS, SHAPES, SIZES, SPLITS, Object, Scene, Scenes, each_scene
from .words import KEYS, Facts, count_fitting, facts_of, phrase, say

FILES = tuple(f"relevance_{split}.json" for split in SPLITS)
TITLES = ("best price {}", "buy {} online now", "free {}", "{} free shipping now")
TEXTS = TITLES
# reasons why an ad is relevant, equally frequent
REASONS = ("image", "text", None, None)
PER_SCENE = 2
DETAIL = 0.3  # probability that a title names size, fill or background
OBJECTS = [dict(zip(("color", "shape"), pair, strict=True)) for pair in product(COLORS, SHAPES)]


def draw_unlike(rng: Random, facts: Facts) -> Facts:
    """Draw color and shape of an object that does not fit the facts."""
    return dict(rng.choice([obj for obj in OBJECTS if not count_fitting([obj], facts)]))


def draw_query(rng: Random, objects: list[Object], keys: tuple[str, ...], *, shown: bool) -> Facts:
    """Draw facts under the keys that fit one of the objects if `shown`, else none of them."""
    drawn = [facts_of(obj, keys) for obj in (objects if shown else OBJECTS)]
    return rng.choice([facts for facts in drawn if shown or not count_fitting(objects, facts)])


def write_title(rng: Random, scene: Scene, facts: Facts, *, says: bool) -> str:
    """Write a title that names an object and perhaps the background.

    The object fits the facts if `says` is set.
    """
    obj = draw_unlike(rng, facts) | (facts if says else {})
    obj |= {
        key: rng.choice(list(table))
        for key, table in (("size", SIZES), ("fill", FILLS))
        if rng.random() < DETAIL
    }
    title = rng.choice(TITLES).format(phrase(rng, obj))
    return (
        f"{title} {rng.choice(GROUNDS).format(say(rng, scene['background']))}"
        if rng.random() < DETAIL
        else title
    )


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES. `reason`, one of REASONS, is for people."""
    entries = {split: [] for split in scenes}
    for split, _, scene, rng in each_scene(scenes, seed, "relevance"):
        for _ in range(PER_SCENE):
            reason = rng.choice(REASONS)
            facts = draw_query(rng, scene["objects"], rng.choice(KEYS), shown=reason == "image")
            entries[split].append(
                {
                    "image": scene["image"],
                    "query": phrase(rng, facts),
                    "text": write_title(rng, scene, facts, says=reason == "text"),
                    "label": int(reason is not None),
                    "reason": reason,
                }
            )
    return tuple(entries.values())
