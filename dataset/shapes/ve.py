"""Visual entailment: hypotheses on pictures with a curtain over a quadrant.

A hypothesis names the only object with a shape or a color, and affirms or denies another fact of
the object. The label is neutral if the curtain hides the object. Each hypothesis has three
pictures, one for each label. So neither the hypothesis nor the curtain alone tells the label.
"""

from collections import Counter, defaultdict
from random import Random

from .scenes import QUADRANTS, SPLITS, Object, Scene, Scenes, center_of, each_scene
from .words import count_fitting, phrase, with_article

FILES = tuple(f"ve_{split}.json" for split in SPLITS)
LABELS = {  # whether the stated fact is true, by label and whether the hypothesis affirms it
    True: {"entailment": "true", "contradiction": "false", "neutral": "hidden"},
    False: {"entailment": "false", "contradiction": "true", "neutral": "hidden"},
}
HYPOTHESES = {  # sentences by whether they affirm
    True: (
        "the {subject} is {a} {predicate}",
        "the {subject} in this scene is {a} {predicate}",
        "this scene includes one {subject}, and the {subject} is {a} {predicate}",
    ),
    False: (
        "the {subject} is no {predicate}",
        "the scene contains one {subject}, and the {subject} is no {predicate}",
        "one {subject} is part of the scene, and the {subject} is no {predicate}",
    ),
}
TEXTS = (*HYPOTHESES[True], *HYPOTHESES[False])
# keys of the fact that names an object, and of the fact that a hypothesis affirms or denies
KEYS = (("shape", "color"), ("color", "shape"), ("shape", "size"))
TRIES = 20
DRAWN = 12  # pictures that are drawn for a label; the one that was used least is taken


Pictures = dict[str | None, list[int]]  # scenes by the value of a fact, None if it is out of sight
Index = dict[tuple[str, str, str], Pictures]  # by two keys, and the value of the first


def visible_objects(scene: Scene, cover: str | None) -> list[Object]:
    """Return the objects that no curtain over the quadrant `cover`, if any, hides."""
    middle = scene["image_size"] / 2
    return [
        o
        for o in scene["objects"]
        if not cover or tuple(v > middle for v in center_of(o["box"])) != QUADRANTS[cover]
    ]


def draw_cover(rng: Random, scene: Scene) -> str | None:
    """Draw a quadrant for a curtain that hides an object and leaves one in sight.

    Return None if there is no such quadrant.
    """
    seen = {cover: len(visible_objects(scene, cover)) for cover in QUADRANTS}
    covers = [cover for cover, count in seen.items() if 0 < count < len(scene["objects"])]
    return rng.choice(covers) if covers else None


def covered_image(path: str) -> str:
    """Return the path of the copy of an image with a curtain, in images/{split}_covered."""
    return "{}_covered/{}".format(*path.rsplit("/", 1))


def index_scenes(scenes: list[Scene]) -> Index:
    """Return the covered scenes by the facts of each object that is the only one of its kind."""
    index: Index = defaultdict(lambda: defaultdict(list))
    for i, scene in enumerate(scenes):
        visible = visible_objects(scene, scene["covered"])
        for obj in scene["objects"] if scene["covered"] else ():
            for subject, predicate in KEYS:
                if count_fitting(scene["objects"], {subject: obj[subject]}) == 1:
                    fact = obj[predicate] if obj in visible else None
                    index[subject, predicate, obj[subject]][fact].append(i)
    return index


def find_scenes(
    rng: Random, scene: Scene, index: Index
) -> tuple[dict[str, str], dict[str, str], dict[str, list[int]]] | None:
    """Draw the subject and the predicate of a hypothesis, and find scenes for each label.

    Args:
        rng: Generator of random numbers.
        scene: A scene with an object of the kind that is named.
        index: Result of `index_scenes`.

    Returns:
        Facts that name an object, the stated fact, and the scenes in which the stated fact is true,
        false and hidden. None if random tries find no fact with all three.
    """
    for _ in range(TRIES):
        subject, predicate = rng.choice(KEYS)
        name = rng.choice(scene["objects"])[subject]
        pictures = index.get((subject, predicate, name), {})
        facts = sorted(fact for fact in pictures if fact)
        if len(facts) > 1 and None in pictures:
            stated = rng.choice(facts)
            others = [i for fact in facts if fact != stated for i in pictures[fact]]
            found = {"true": pictures[stated], "false": others, "hidden": pictures[None]}
            return {subject: name}, {predicate: stated}, found
    return None


def suppose(
    rng: Random, scene: Scene, index: Index, used: Counter[tuple[str, int]]
) -> tuple[str, dict[str, int]] | None:
    """Write a hypothesis on an object of a scene, and choose a picture for each label.

    Args:
        rng: Generator of random numbers.
        scene: A scene.
        index: Result of `index_scenes`.
        used: How often a scene has a label. The chosen scenes are counted.

    Returns:
        The sentence, and the index of a scene by label. None if a label has no scene.
    """
    found = find_scenes(rng, scene, index)
    if not found:
        return None
    named, stated, scenes = found
    affirms = rng.random() < 0.5
    chosen = {}
    for label, truth in LABELS[affirms].items():
        drawn = rng.choices(scenes[truth], k=DRAWN)
        chosen[label] = min(drawn, key=lambda i, label=label: used[label, i])
    used.update(chosen.items())
    words = phrase(rng, stated)
    sentence = rng.choice(HYPOTHESES[affirms]).format(
        subject=phrase(rng, named), a=with_article(words).split()[0], predicate=words
    )
    return sentence, chosen


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES."""
    entries = {split: [] for split in scenes}
    indices = {split: index_scenes(scenes[split]) for split in scenes}
    used = {split: Counter() for split in scenes}
    for split, _, scene, rng in each_scene(scenes, seed, "ve"):
        sentence, pictures = suppose(rng, scene, indices[split], used[split]) or ("", {})
        for label in rng.sample(list(pictures), len(pictures)):
            image = covered_image(scenes[split][pictures[label]]["image"])
            entries[split].append(
                {"image": image.removesuffix(".jpg"), "sentence": sentence, "label": label}
            )
    return tuple(entries.values())
