"""Grounding in the form of RefCOCO+: expressions without places, REFER's files, detected boxes."""

import itertools
from random import Random

from dataset.refer import box_iou

from .scenes import GRID, SHAPES, Object, Scene, Scenes, each_scene
from .words import NOUNS, TABLES, count_fitting, facts_of, phrase, plural, say

FILES = (
    "grounding_train.json",
    "grounding_test.json",
    "refcoco+/refs(unc).p",
    "refcoco+/instances.json",
    "refcoco+/dets.json",
)
TEXTS = (*NOUNS, plural(NOUNS[0]))
REFS = 2  # largest number of objects of a scene that are referred to
EXPRESSIONS = 2  # largest number of expressions of an object
CATEGORIES = {shape: i for i, shape in enumerate(SHAPES, 1)}
TESTA_SHAPES = ("circle", "heart", "moon")  # curved shapes; testB has the others
FALSE_IOU = 0.45  # largest IoU of a distractor with any object; 0.5 would be right


def refer(rng: Random, objects: list[Object], target: Object) -> list[str]:
    """Write expressions that fit the target alone, by size, fill, color and shape, never by place.

    They have as few facts as needed or one more.

    Returns:
        The expressions, [] if another object has all facts of the target.
    """
    unique = [
        set(keys)
        for size in range(1, len(TABLES) + 1)
        for keys in itertools.combinations(TABLES, size)
        if count_fitting(objects, facts_of(target, keys)) == 1
    ]
    minimal = [keys for keys in unique if not any(fewer < keys for fewer in unique)]
    texts = {}
    for _ in range(4 * EXPRESSIONS if minimal else 0):
        keys = rng.choice(minimal)
        more = [key for key in TABLES if key not in keys]
        if more and rng.random() < 0.4:
            keys = keys | {rng.choice(more)}
        facts = facts_of(target, [key for key in TABLES if key in keys])
        if {"color", "shape"} <= keys and rng.random() < 0.15:
            color = facts.pop("color")
            text = f"{phrase(rng, facts)} in {say(rng, color)}"
        else:
            text = phrase(rng, facts, noun=rng.choice(NOUNS))
        texts[text] = f"the {text}" if rng.random() < 0.4 else text
    return list(texts.values())[:EXPRESSIONS]


def detect(rng: Random, scene: Scene) -> list[list[float]]:
    """Draw the boxes of a detector.

    Each object has a box, shifted by up to 6% of its sides. Three or four boxes fit no object: they
    show background, a part of an object, or too much around one or two objects.

    Returns:
        [x, y, w, h, score] of each box in pixels, best first, with a score from 0 to 1.
    """
    side, objects = scene["image_size"], [o["box"] for o in scene["objects"]]
    cell = side / GRID

    def within(x: float, y: float, w: float, h: float) -> list[float]:
        """Return a box that is moved and cut to lie in the image."""
        w, h = min(w, side), min(h, side)
        return [round(v, 2) for v in (min(max(x, 0), side - w), min(max(y, 0), side - h), w, h)]

    def draw_distractor() -> list[float]:
        """Draw a box that probably fits no object."""
        kind = rng.choice(("background", "part", "around", "group"))
        x, y, w, h = rng.choice(objects)
        if kind == "background":
            return within(
                rng.uniform(0, side),
                rng.uniform(0, side),
                *(cell * rng.uniform(0.4, 1) for _ in range(2)),
            )
        if kind == "group":
            u, v, a, b = rng.choice(objects)
            return within(
                min(x, u), min(y, v), max(x + w, u + a) - min(x, u), max(y + h, v + b) - min(y, v)
            )
        a, b = (rng.uniform(*((0.5, 0.65) if kind == "part" else (1.5, 2.2))) for _ in range(2))
        return within(x + (1 - a) * w * rng.random(), y + (1 - b) * h * rng.random(), a * w, b * h)

    boxes = []
    for x, y, w, h in objects:
        dx, dy, dw, dh = (rng.uniform(-0.06, 0.06) for _ in range(4))
        boxes.append(
            [
                *within(x + dx * w, y + dy * h, (1 + dw) * w, (1 + dh) * h),
                round(rng.uniform(0.5, 0.99), 3),
            ]
        )
    count = len(boxes) + rng.choice((3, 3, 4))
    while len(boxes) < count:
        box = draw_distractor()
        if max(box_iou(box, other) for other in objects) < FALSE_IOU:
            boxes.append([*box, round(rng.uniform(0.3, 0.8), 3)])
    return sorted(boxes, key=lambda box: -box[4])


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES.

    All objects have boxes, images of val and test have detections.
    """
    train, test, refs, images, boxes, sent_ids = [], [], [], [], [], itertools.count()
    for split, _, scene, rng in each_scene(scenes, seed, "refs"):
        objects, size, first = scene["objects"], scene["image_size"], len(boxes)
        image_id, name = len(images), scene["image"]
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for k, o in enumerate(objects, first):
            category = CATEGORIES[o["shape"]]
            box = {"id": k, "image_id": image_id, "category_id": category, "bbox": o["box"]}
            boxes.append(box)
        order = rng.sample(range(len(objects)), len(objects))
        drawn = [(k, refer(rng, objects, objects[k])) for k in order]
        drawn = [(k, texts) for k, texts in drawn if texts][:REFS] if len(objects) > 1 else []
        for k, texts in drawn:
            sentences = [
                {"sent_id": next(sent_ids), "raw": text, "sent": text, "tokens": text.split()}
                for text in texts
            ]
            shape, ref_split = objects[k]["shape"], split
            if split == "test":
                ref_split = "testA" if shape in TESTA_SHAPES else "testB"
            entries = train if split == "train" else test
            entries += [{"image": name, "text": text, "ref_id": len(refs)} for text in texts]
            refs.append(
                {
                    "ref_id": len(refs),
                    "ann_id": first + k,
                    "image_id": image_id,
                    "category_id": CATEGORIES[shape],
                    "file_name": name,
                    "split": ref_split,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    detections = {
        str(image_id): detect(rng, scene)
        for image_id, (split, _, scene, rng) in enumerate(each_scene(scenes, seed, "detections"))
        if split != "train"
    }
    categories = [{"id": i, "name": shape} for shape, i in CATEGORIES.items()]
    instances = {"images": images, "annotations": boxes, "categories": categories}
    return train, test, refs, instances, detections
