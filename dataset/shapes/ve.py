"""Visual entailment: hypotheses on pictures, half of them with a curtain over a quadrant.

An object out of sight is neutral only if there is a curtain. Affirming a visible object is always
true, and denying it is always false.
"""

from random import Random

from .scenes import QUADRANTS, SPLITS, Object, Scene, Scenes, center_of, each_scene
from .words import KEYS, count_fitting, draw_absent, facts_of, phrase, with_article

FILES = tuple(f"ve_{split}.json" for split in SPLITS)
HYPOTHESES = {  # sentences by whether they affirm
    True: (
        "there is {}",
        "the scene has {}",
        "the scene contains {}",
        "{} is part of the scene",
        "this scene includes {}",
    ),
    False: (
        "there is no {}",
        "the scene has no {}",
        "the scene contains no {}",
        "no {} is part of the scene",
        "this scene includes no {}",
    ),
}
TEXTS = (*HYPOTHESES[True], *HYPOTHESES[False])
# (label, affirmative) of the hypotheses for six pictures, by whether a curtain covers the picture.
# Every possible case occurs. Each label has a third of the hypotheses, half of them affirmative.
PREMISES = {
    True: [
        ("entailment", True),
        ("contradiction", False),
        *[("neutral", True), ("neutral", False)] * 2,
    ],
    False: [
        ("entailment", True),
        ("contradiction", False),
        *[("entailment", False), ("contradiction", True)] * 2,
    ],
}


def plan(split: str, index: int, seed: int) -> tuple[bool, list[tuple[str, bool]]]:
    """Return whether a scene is covered, and its two hypotheses as (label, affirmative).

    Six scenes share PREMISES.
    """
    rng, plans = Random(f"{seed}/{split}/{index // 6}/entailment"), []
    for covered, hypotheses in PREMISES.items():
        drawn = rng.sample(hypotheses, len(hypotheses))
        plans += [(covered, drawn[i : i + 2]) for i in range(0, len(drawn), 2)]
    return rng.sample(plans, len(plans))[index % 6]


def visible_objects(scene: Scene, cover: str | None) -> list[Object]:
    """Return the objects that no curtain over the quadrant `cover`, if any, hides."""
    middle = scene["image_size"] / 2
    return [
        o
        for o in scene["objects"]
        if not cover or tuple(v > middle for v in center_of(o["box"])) != QUADRANTS[cover]
    ]


def draw_cover(rng: Random, scene: Scene) -> str:
    """Draw a quadrant for a curtain that leaves an object in sight.

    In half of the scenes the curtain hides an object, if possible.
    """
    left = {cover: len(visible_objects(scene, cover)) for cover in QUADRANTS}
    covers = [cover for cover, count in left.items() if count]
    hiding = [cover for cover in covers if left[cover] < len(scene["objects"])]
    return rng.choice(hiding if hiding and rng.random() < 0.5 else covers)


def covered_image(path: str) -> str:
    """Return the path of the copy of an image with a curtain, in images/{split}_covered."""
    return "{}_covered/{}".format(*path.rsplit("/", 1))


def suppose(rng: Random, scene: Scene, label: str, *, affirmative: bool) -> str:
    """Write a sentence that affirms or denies that an object exists, with the given label.

    A visible object exists. Any other object does not exist, or is undecided if there is a curtain,
    whether or not the curtain hides it.
    """
    keys, seen = rng.choice(KEYS), visible_objects(scene, scene["covered"])
    hidden = [
        facts
        for facts in (facts_of(o, keys) for o in scene["objects"])
        if not count_fitting(seen, facts)
    ]
    if label != "neutral" and (label == "entailment") == affirmative:
        facts = facts_of(rng.choice(seen), keys)
    elif hidden and rng.random() < 0.5:
        facts = rng.choice(hidden)
    else:
        facts = draw_absent(rng, seen, keys)
    sentence, words = rng.choice(HYPOTHESES[affirmative]), phrase(rng, facts)
    return sentence.format(with_article(words) if affirmative else words)


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES."""
    entries = {split: [] for split in scenes}
    for split, i, scene, rng in each_scene(scenes, seed, "ve"):
        image = covered_image(scene["image"]) if scene["covered"] else scene["image"]
        for label, affirmative in plan(split, i, seed)[1]:
            sentence = suppose(rng, scene, label, affirmative=affirmative)
            entries[split].append(
                {"image": image.removesuffix(".jpg"), "sentence": sentence, "label": label}
            )
    return tuple(entries.values())
