"""Scenes of simple shapes: their content, drawing at random, rendering.

Functions that draw at random take a random.Random first: the same generator state gives the same
result.
"""

import math
import zlib
from collections.abc import Collection, Iterator
from itertools import permutations
from random import Random
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from utils import InputError

Object = dict[str, Any]  # see draw_scene
Scene = dict[str, Any]
Scenes = dict[str, list[Scene]]  # by split
Box = list[float]  # x, y, width and height in pixels
Points = list[tuple[float, float]]
Combination = tuple[tuple[str, str], ...]  # sorted colors and shapes of the objects

SPLITS = ("train", "val", "test")
SUPERSAMPLING = 3

# Colors as RGB. Object and background colors have no name in common.
COLORS = {
    "red": (222, 36, 36),
    "orange": (255, 140, 0),
    "yellow": (245, 208, 10),
    "green": (28, 155, 60),
    "blue": (45, 85, 235),
    "cyan": (30, 205, 215),
    "purple": (135, 45, 175),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (248, 248, 248),
    "beige": (226, 207, 172),
    "gray": (165, 165, 165),
    "navy": (16, 22, 66),
    "black": (10, 10, 10),
}
CURTAIN = ((118, 74, 42), (92, 54, 28))  # browns of its stripes, which nothing else has
FILLS = {"solid": 70, "outlined": 15, "striped": 15}  # frequency in percent
COUNT_WEIGHTS = (25, 45, 20, 6, 4)  # frequency of 1 to 5 objects, in percent
REPEAT = 0.1  # probability that an object has the color and shape of an earlier one
# Objects lie on a grid with the patch size of configs/shapes. A small ViT from random weights
# learns shapes within minutes if each lies in one patch, and hardly at all if it crosses several.
GRID = 4  # cells per side
SIZES = {"small": 0.62, "large": 0.92}  # longer side of an object, in sides of a cell
SHIFT = 0.04  # largest offset of an object in its cell; large objects stay separate
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
# x, y halves
QUADRANTS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def arc(n: int, radius: float = 1.0, start: float = 90.0, sweep: float = 360.0) -> Points:
    """Return n points (x, y) on an arc around (0, 0), counterclockwise from `start`.

    Angles are in degrees, y points downwards.
    """
    turns = [math.radians(start + sweep * i / n) for i in range(n)]
    return [(radius * math.cos(t), -radius * math.sin(t)) for t in turns]


ARM = [(-0.32, -0.32), (-0.32, -1), (0.32, -1)]  # of a cross
SHAPES = {  # polygons of any size and place
    "circle": arc(48),
    "square": arc(4, start=45),
    "triangle": arc(3),
    "star": [point for pair in zip(arc(5), arc(5, 0.42, 126), strict=True) for point in pair],
    "heart": [
        (16 * math.sin(t) ** 3, sum(k * math.cos(i * t) for i, k in enumerate((-13, 5, 2, 1), 1)))
        for t in (math.tau * i / 48 for i in range(48))
    ],
    "cross": ARM
    + [(-y, x) for x, y in ARM]
    + [(-x, -y) for x, y in ARM]
    + [(y, -x) for x, y in ARM],
    "diamond": [(0.75 * x, y) for x, y in arc(4)],
    # most of a circle, closed by the arc of a smaller one whose center lies further right
    "moon": arc(30, start=40, sweep=280)
    + [(0.45 + x, y) for x, y in arc(30, 0.716, 296.2, -232.4)],
}


def draw_combination(rng: Random) -> Combination:
    """Draw one to five (color, shape) pairs, sorted."""
    pairs = []
    for _ in range(rng.choices(range(1, 6), COUNT_WEIGHTS)[0]):
        repeat = pairs and rng.random() < REPEAT
        pairs.append(
            rng.choice(pairs) if repeat else (rng.choice(list(COLORS)), rng.choice(list(SHAPES)))
        )
    return tuple(sorted(pairs))


def combination_of(scene: Scene) -> Combination:
    """Return the combination of a scene's objects."""
    return tuple(sorted((o["color"], o["shape"]) for o in scene["objects"]))


def split_of(combination: Combination) -> str:
    """Return the split of a combination: about 70% are train, 10% val, 20% test."""
    return ("val", "test", "test", *["train"] * 7)[zlib.crc32(repr(combination).encode()) % 10]


def center_of(box: Box) -> tuple[float, float]:
    """Return the center (x, y) of a box [x, y, w, h]."""
    x, y, w, h = box
    return x + w / 2, y + h / 2


def position_of(box: Box, image_size: int) -> str:
    """Return the name in POSITIONS of the place of a box.

    The outer 37% of a side are left, right, top or bottom.
    """
    column, row = ((v >= 0.37 * image_size) + (v > 0.63 * image_size) for v in center_of(box))
    return POSITIONS[3 * row + column]


def relation_of(a: Box, b: Box) -> str | None:
    """Return the direction of box a from box b, such as "left of", along the dominant axis.

    Return None if the two lie diagonally.
    """
    dx, dy = (u - v for u, v in zip(center_of(a), center_of(b), strict=True))
    if abs(dx) > 1.3 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def place_objects(rng: Random, combination: Combination, image_size: int) -> list[Object]:
    """Draw objects for the pairs of a combination, in random order.

    Each lies near the middle of a cell of its own.
    """
    cell, objects = image_size / GRID, []
    cells = rng.sample(range(GRID**2), len(combination))
    for (color, shape), index in zip(rng.sample(combination, len(combination)), cells, strict=True):
        size = rng.choice(list(SIZES))
        angle = round(rng.uniform(-5, 5), 1)
        w, h = (
            min(round(SIZES[size] * cell * max(axis)), math.floor(SIZES["large"] * cell))
            for axis in zip(*outline(shape, angle), strict=True)
        )
        x, y = (
            math.floor((i + 0.5 + rng.uniform(-SHIFT, SHIFT)) * cell - side / 2)
            for i, side in ((index % GRID, w), (index // GRID, h))
        )
        box, fill = [x, y, w, h], rng.choices(list(FILLS), list(FILLS.values()))[0]
        objects.append(
            {
                "shape": shape,
                "color": color,
                "size": size,
                "fill": fill,
                "position": position_of(box, image_size),
                "box": box,
                "angle": angle,
            }
        )
    return objects


def draw_scene(rng: Random, split: str, image_size: int, taken: Collection = ()) -> Scene:
    """Draw a scene of a split.

    Args:
        rng: Generator of random numbers.
        split: Split of the scene.
        image_size: Side of the image in pixels.
        taken: Combinations to exclude.

    Returns:
        image_size, background, objects, and relations [i, name, j] of objects i and j that do not
        lie diagonally. An object has shape, color, size, fill, position (one of POSITIONS), box
        [x, y, w, h] in pixels and angle in degrees.

    Raises:
        InputError: No other combination is found.
    """
    for _ in range(10_000):
        combination = draw_combination(rng)
        if split_of(combination) == split and combination not in taken:
            break
    else:
        raise InputError(
            f"--{split}: found only {len(taken)} different combinations of objects; lower --{split}"
        )
    objects = place_objects(rng, combination, image_size)
    boxes = [o["box"] for o in objects]
    relations = [
        [i, relation_of(boxes[i], boxes[j]), j] for i, j in permutations(range(len(boxes)), 2)
    ]
    return {
        "image_size": image_size,
        "background": rng.choice(list(BACKGROUNDS)),
        "objects": objects,
        "relations": [relation for relation in relations if relation[1]],
    }


def each_scene(scenes: Scenes, seed: int, purpose: str) -> Iterator[tuple]:
    """Yield (split, index, scene, rng) of all scenes.

    rng is a generator for the seed, the scene and the purpose.
    """
    for split in scenes:
        for i, scene in enumerate(scenes[split]):
            yield split, i, scene, Random(f"{seed}/{split}/{i}/{purpose}")


def outline(shape: str, angle: float) -> Points:
    """Return the polygon of a shape, turned by `angle` degrees.

    The points (x, y) lie in a box from 0 with a longer side of 1.
    """
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    xs, ys = zip(*((c * x - s * y, s * x + c * y) for x, y in SHAPES[shape]), strict=True)
    side = max(max(xs) - min(xs), max(ys) - min(ys))
    return [((x - min(xs)) / side, (y - min(ys)) / side) for x, y in zip(xs, ys, strict=True)]


def draw_mask(obj: Object, scale: int) -> Image.Image:
    """Draw the pixels of an object in its box, enlarged `scale` times, as mode L."""
    w, h = (scale * v for v in obj["box"][2:])
    xs, ys = zip(*outline(obj["shape"], obj["angle"]), strict=True)
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).polygon(
        [(x / max(xs) * (w - 1), y / max(ys) * (h - 1)) for x, y in zip(xs, ys, strict=True)],
        fill=255,
    )
    if obj["fill"] == "solid":
        return mask
    side = max(w, h)
    border = round(side * (0.08 if obj["fill"] == "outlined" else 0.05))
    # 255 if all pixels around are inside
    blurred = ImageOps.expand(mask, border).filter(ImageFilter.BoxBlur(border))
    hollow = ImageOps.crop(blurred, border).point(lambda v: 255 * (v >= 254))
    if obj["fill"] == "striped":
        draw = ImageDraw.Draw(hollow)
        for start in range(-h, w, side // 4):
            draw.line([(start, h), (start + h, 0)], fill=0, width=side // 9)
    return ImageChops.subtract(mask, hollow)


def render(scene: Scene, cover: str | None = None) -> Image.Image:
    """Render a scene, anti-aliased, in RGB with scene["image_size"] pixels a side.

    A striped curtain hides the quadrant `cover`: two by two cells, thus whole objects.
    """
    side = scene["image_size"] * SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene["background"]])
    for obj in scene["objects"]:
        corner = tuple(SUPERSAMPLING * v for v in obj["box"][:2])
        image.paste(COLORS[obj["color"]], corner, draw_mask(obj, SUPERSAMPLING))
    if cover:
        left, top = (half * (side // 2) for half in QUADRANTS[cover])
        draw, half, stripe = ImageDraw.Draw(image), math.ceil(side / 2), side // 32
        for i, x in enumerate(range(0, half, stripe)):
            right = min(x + stripe, half) - 1
            draw.rectangle([left + x, top, left + right, top + half - 1], fill=CURTAIN[i % 2])
    return image.reduce(SUPERSAMPLING)
