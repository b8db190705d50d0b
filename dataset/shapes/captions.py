"""Pre-training and retrieval: captions of scenes, partly wrong in pretrain.json."""

from random import Random

from .scenes import COLORS, SHAPES, Object, Scene, Scenes, combination_of
from .words import NUMBERS, WORDS, plural, say, with_article

FILES = ("pretrain.json", "retrieval_train.json", "val.json", "test.json")
MAX_WORDS = 16  # 17 ids with [CLS]; texts cost as much as the longest caption of a batch
OPENINGS = (
    "there is",
    "here is",
    "a picture of",
    "an image of",
    "picture of",
    "a drawing of",
    "an image with",
    "a scene with",
    "this picture shows",
    "we see",
    "i can see",
)
GROUNDS = ("on a {} background", "on {}", "against a {} background", "with a {} background")
# words in place of a fact that a noisy caption omits
UNNAMED = {"color": "colored", "shape": "thing"}
JUNK = (
    "click here for free download",
    "best price buy online now free shipping",
    "img {} jpg",
    "untitled {}",
    "photo {} of {} next page",
    "free clip art and wallpaper hd {}",
    "all rights reserved",
    "share this on my page",
    "top {} shapes for kids you must see",
)
TEXTS = (
    *OPENINGS,
    *GROUNDS,
    *UNNAMED.values(),
    plural(UNNAMED["shape"]),
    *JUNK,
    "an the and are in",
)
NOISE_KINDS = ("wrong", "missing", "other", "junk")
TRAIN_DETAIL = (0.5, 0.8, 1.1, 1.4)  # detail of captions, see caption(); one value is drawn
# detail for 1 to 5 objects, at which a caption identifies its scene
EVAL_DETAIL = (1.6, 1.4, 1.2, 0.6, 0.2)
PARTIAL = 0.08  # share of train captions that leave objects out


def name_group(rng: Random, group: list[Object], detail: float) -> str:
    """Name the objects of one color and shape: "a big striped red star", "two green hearts"."""
    color, noun = say(rng, group[0]["color"]), say(rng, group[0]["shape"])
    sizes, fills = ({o[key] for o in group} for key in ("size", "fill"))
    adjectives = []
    if len(sizes) == 1 and rng.random() < detail:
        adjectives.append(say(rng, sizes.pop()))
    if len(fills) == 1 and rng.random() < detail * (0.3 if "solid" in fills else 1):
        adjectives.append(say(rng, fills.pop()))
    if len(group) > 1:
        return " ".join([NUMBERS[len(group)], *adjectives, color, plural(noun)])
    words = " ".join(
        [*adjectives, noun, "in", color] if rng.random() < 0.06 else [*adjectives, color, noun]
    )
    return rng.choice((f"one {words}", f"the {words}", *[with_article(words)] * 10))


def describe(rng: Random, scene: Scene, detail: float, *, partial: bool = False) -> str:
    """Write a caption of a scene, of any length.

    Args:
        rng: Generator of random numbers.
        scene: The scene.
        detail: Probability of an optional fact (an object's size, fill, position or relation, the
            background), which is multiplied by a weight from 0.3 to 1.
        partial: Whether to name only some of the objects.
    """
    objects, groups = scene["objects"], {}
    for i in rng.sample(range(len(objects)), len(objects)):
        groups.setdefault((objects[i]["color"], objects[i]["shape"]), []).append(i)
    groups = list(groups.values())
    if partial:
        groups = groups[: rng.randint(1, max(1, len(groups) - 1))]
    phrases = {g[0]: name_group(rng, [objects[i] for i in g], detail) for g in groups}
    single = {g[0] for g in groups if len(g) == 1}
    related = [r for r in scene["relations"] if r[0] in single and r[2] in single]
    if related and rng.random() < 0.2 + 0.5 * detail:
        i, name, j = rng.choice(related)
        phrases[i] += f" {rng.choice(WORDS[name])} {phrases.pop(j)}"
        single -= {i, j}
    for i in single:
        if rng.random() < 0.6 * detail:
            phrases[i] += f" {rng.choice(WORDS[objects[i]['position']])}"
    phrases = rng.sample(list(phrases.values()), len(phrases))
    joint = rng.choice((" and ", " with ", ", ")) if len(phrases) == 2 else " and "
    text = joint.join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    if rng.random() < 0.35:
        opening = rng.choice(OPENINGS)
        if text.split()[0] in NUMBERS[2:]:
            opening = opening.replace(" is", " are")
        text = f"{opening} {text}"
    if rng.random() < 0.7 * detail:
        text += " " + rng.choice(GROUNDS).format(say(rng, scene["background"]))
    return text


def caption(rng: Random, scene: Scene, detail: float, *, partial: bool = False) -> str:
    """Write a caption of at most MAX_WORDS words, reducing detail until it fits."""
    while len((text := describe(rng, scene, detail, partial=partial)).split()) > MAX_WORDS:
        detail *= 0.8
    return text


def noisy_caption(rng: Random, scene: Scene, other: Scene, kind: str) -> str:
    """Write a wrong caption as on the web.

    Args:
        rng: Generator of random numbers.
        scene: The scene.
        other: Another scene.
        kind: wrong (a fact), missing (colors or shapes), other (of the other scene) or junk.
    """
    detail = rng.choice(TRAIN_DETAIL)
    if kind == "other":
        return caption(rng, other, detail)
    if kind == "junk":
        text = rng.choice(JUNK)
        text = text.format(*(rng.randint(1, 9) for _ in range(text.count("{}"))))
        longer = f"{caption(rng, scene, 0, partial=True)} {text}"
        return longer if rng.random() < 0.3 and len(longer.split()) <= MAX_WORDS else text
    key, names = rng.choice((("color", COLORS), ("shape", SHAPES)))
    objects = [dict(o) if kind == "wrong" else {**o, key: UNNAMED[key]} for o in scene["objects"]]
    if kind == "wrong":
        rng.choice(objects)[key] = rng.choice(
            [name for name in names if name not in {o[key] for o in objects}]
        )
    return caption(rng, {**scene, "objects": objects}, detail)


def write_captions(
    rng: Random, scene: Scene, split: str, *, count: int, noise: float, others: list[Scene]
) -> list[dict[str, str | None]]:
    """Write different captions.

    Captions of val and test are true and name every object. Captions of scenes with fewer objects
    have more detail.

    Args:
        rng: Generator of random numbers.
        scene: The scene.
        split: Its split.
        count: Number of captions.
        noise: Share of wrong captions in train.
        others: Scenes for captions of another scene.

    Returns:
        {"caption", "noise"} each; noise is None (true) or one of NOISE_KINDS.
    """
    captions = {}
    while len(captions) < count:
        kind = None
        if split != "train":
            text = caption(rng, scene, EVAL_DETAIL[len(scene["objects"]) - 1])
        elif rng.random() < noise:
            kind, other = rng.choice(NOISE_KINDS), rng.choice(others)
            if kind == "other" and combination_of(other) == combination_of(scene):
                kind = "junk"
            text = noisy_caption(rng, scene, other, kind)
        else:
            text = caption(rng, scene, rng.choice(TRAIN_DETAIL), partial=rng.random() < PARTIAL)
        captions.setdefault(text, kind)
    return [{"caption": text, "noise": kind} for text, kind in captions.items()]


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES."""
    train, val, test = (
        [{"image": s["image"], "caption": [c["caption"] for c in s["captions"]]} for s in split]
        for split in scenes.values()
    )
    pairs = [
        {"image": s["image"], "caption": c["caption"], "image_id": f"train_{i:06d}"}
        for i, s in enumerate(scenes["train"])
        for c in s["captions"]
        if not c["noise"]
    ]
    return train, pairs, val, test
