"""Scenes of simple shapes: what there is and the words for it, drawing scenes at random, rendering them.

What draws or describes gets a random.Random first: the same generator state, the same result.
"""
import math
import zlib
from itertools import permutations

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from utils import InputError

SPLITS = ("train", "val", "test")
SUPERSAMPLING = 3

# What there is, and the words for it, the usual one first. Object and background colors have no name in common.
SHAPES = {"circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",), "star": ("star",),
          "heart": ("heart",), "cross": ("cross",), "diamond": ("diamond",), "moon": ("moon", "crescent")}
COLORS = {"red": ("red",), "orange": ("orange",), "yellow": ("yellow",), "green": ("green",), "blue": ("blue",),
          "cyan": ("cyan", "turquoise"), "purple": ("purple", "violet"), "pink": ("pink",)}
SIZES = {"small": ("small", "little", "tiny"), "large": ("big", "large")}
FILLS = {"solid": ("solid", "filled"), "outlined": ("outlined", "hollow"), "striped": ("striped",)}
BACKGROUNDS = {"white": ("white",), "beige": ("beige",), "gray": ("gray", "grey"), "navy": ("navy",),
               "black": ("black",)}
POSITIONS = {
    "top left": ("in the top left corner", "at the top left", "in the upper left"),
    "top": ("at the top", "near the top"),
    "top right": ("in the top right corner", "at the top right", "in the upper right"),
    "left": ("on the left", "on the left side"),
    "center": ("in the middle", "in the center"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right")}
RELATIONS = {"left of": ("to the left of", "left of"), "right of": ("to the right of", "right of"),
             "above": ("above", "over"), "below": ("below", "under", "beneath")}
QUADRANTS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}    # x, y halves

RGB = {"red": (222, 36, 36), "orange": (255, 140, 0), "yellow": (245, 208, 10), "green": (28, 155, 60),
       "blue": (45, 85, 235), "cyan": (30, 205, 215), "purple": (135, 45, 175), "pink": (250, 130, 190),
       "white": (248, 248, 248), "beige": (226, 207, 172), "gray": (165, 165, 165), "navy": (16, 22, 66),
       "black": (10, 10, 10)}
CURTAIN = ((118, 74, 42), (92, 54, 28))     # the browns of its stripes; nothing else has them
COUNT_WEIGHTS = (25, 45, 20, 6, 4)      # of 1 to 5 objects
REPEAT = 0.1                            # probability that an object has an earlier one's color and shape
FILL_WEIGHTS = (70, 15, 15)             # of FILLS
# Objects lie on a grid as wide as the patches of configs/shapes: a small ViT from random weights learns shapes within
# minutes if a patch sees the whole of one, and hardly at all if they lie anywhere across several.
GRID = 4                                # cells a side
EXTENT = {"small": 0.62, "large": 0.92} # longer side of an object, in sides of a cell
SHIFT = 0.04                            # of an object from the middle of its cell at most; leaves large ones apart


def draw_combination(rng):
    """One to five (color, shape) pairs, sorted."""
    pairs = []
    for _ in range(rng.choices(range(1, 6), COUNT_WEIGHTS)[0]):
        repeat = pairs and rng.random() < REPEAT
        pairs.append(rng.choice(pairs) if repeat else (rng.choice(list(COLORS)), rng.choice(list(SHAPES))))
    return tuple(sorted(pairs))


def combination_of(scene):
    """The combination of a scene's objects, as draw_combination gives it."""
    return tuple(sorted((o["color"], o["shape"]) for o in scene["objects"]))


def split_of(combination):
    """The split that a combination belongs to: about 70% of all combinations are train, 10% val, 20% test."""
    return ("val", "test", "test", *["train"] * 7)[zlib.crc32(repr(combination).encode()) % 10]


def position_of(x, y, image_size):
    """The key of POSITIONS for a center in pixels; the outer 37% of a side are left, right, top or bottom."""
    def side(v, low, high):
        return low if v < 0.37 * image_size else high if v > 0.63 * image_size else ""

    return f"{side(y, 'top', 'bottom')} {side(x, 'left', 'right')}".strip() or "center"


def relation_of(a, b):
    """What box a is to box b: a key of RELATIONS, along the dominant axis; None where the two lie diagonally."""
    dx, dy = ((a[i] + a[i + 2] / 2) - (b[i] + b[i + 2] / 2) for i in (0, 1))
    if abs(dx) > 1.3 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.3 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def place(rng, combination, image_size):
    """Objects for the pairs of a combination, in random order, each near the middle of a cell of its own."""
    cell, objects = image_size / GRID, []
    cells = rng.sample(range(GRID**2), len(combination))
    for (color, shape), number in zip(rng.sample(combination, len(combination)), cells):
        size = rng.choice(list(SIZES))
        angle = round(rng.uniform(-5, 5), 1)
        w, h = (min(round(EXTENT[size] * cell * max(axis)), math.floor(EXTENT["large"] * cell))
                for axis in zip(*outline(shape, angle)))
        x, y = (math.floor((index + 0.5 + rng.uniform(-SHIFT, SHIFT)) * cell - side / 2)
                for index, side in zip((number % GRID, number // GRID), (w, h)))
        objects.append({"shape": shape, "color": color, "size": size,
                        "fill": rng.choices(list(FILLS), FILL_WEIGHTS)[0],
                        "position": position_of(x + w / 2, y + h / 2, image_size),
                        "box": [x, y, w, h], "angle": angle})
    return objects


def draw_scene(rng, split, image_size, taken=()):
    """A scene of a split as a dict: image_size, background, objects, relations [i, name, j] of objects i and j.

    An object has shape, color, size, fill, position (a key of POSITIONS), box [x, y, w, h] in pixels and angle in
    degrees. Two objects that lie diagonally have no relation. Combinations in `taken` are not drawn; InputError if no
    other is found.
    """
    for _ in range(10_000):
        combination = draw_combination(rng)
        if split_of(combination) == split and combination not in taken:
            break
    else:
        raise InputError(f"--{split}: only {len(taken)} different combinations of objects found; ask for fewer scenes")
    objects = place(rng, combination, image_size)
    relations = [[i, relation_of(objects[i]["box"], objects[j]["box"]), j]
                 for i, j in permutations(range(len(objects)), 2)]
    return {"image_size": image_size, "background": rng.choice(list(BACKGROUNDS)), "objects": objects,
            "relations": [relation for relation in relations if relation[1]]}


def visible_objects(scene, cover):
    """The objects that a curtain over the quadrant `cover` (None: no curtain) leaves in sight."""
    def quadrant(obj):
        return tuple(int(obj["box"][i] + obj["box"][i + 2] / 2 > scene["image_size"] / 2) for i in (0, 1))

    return [o for o in scene["objects"] if not cover or quadrant(o) != QUADRANTS[cover]]


def draw_cover(rng, scene):
    """A quadrant for a curtain that leaves an object in sight; in half of the scenes one that hides something."""
    left = {cover: len(visible_objects(scene, cover)) for cover in QUADRANTS}
    covers = [cover for cover, count in left.items() if count]
    hiding = [cover for cover in covers if left[cover] < len(scene["objects"])]
    return rng.choice(hiding if hiding and rng.random() < 0.5 else covers)



def outline(shape, angle):
    """The shape's polygon, turned by `angle` degrees: points (x, y) in a box from 0 with a longer side of 1."""
    def around(n, radius=1.0, start=90.0, sweep=360.0):
        turns = [math.radians(start + sweep * i / n) for i in range(n)]
        return [(radius * math.cos(t), -radius * math.sin(t)) for t in turns]

    if shape == "circle":
        points = around(48)
    elif shape == "square":
        points = around(4, start=45)
    elif shape == "diamond":
        points = [(0.75 * x, y) for x, y in around(4)]
    elif shape == "triangle":
        points = around(3)
    elif shape == "star":
        points = [p for pair in zip(around(5), around(5, 0.42, 126)) for p in pair]
    elif shape == "cross":
        a = 0.32    # half the width of an arm
        arm = [(-a, -a), (-a, -1), (a, -1)]
        points = arm + [(-y, x) for x, y in arm] + [(-x, -y) for x, y in arm] + [(y, -x) for x, y in arm]
    elif shape == "heart":
        turns = [math.tau * i / 48 for i in range(48)]
        points = [(16 * math.sin(t) ** 3, sum(k * math.cos(i * t) for i, k in enumerate((-13, 5, 2, 1), 1)))
                  for t in turns]
    else:   # moon: most of a circle, closed by the arc of a smaller one whose center lies further right
        points = around(30, start=40, sweep=280) + [(0.45 + x, y) for x, y in around(30, 0.716, 296.2, -232.4)]
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    xs, ys = zip(*((c * x - s * y, s * x + c * y) for x, y in points))
    side = max(max(xs) - min(xs), max(ys) - min(ys))
    return [((x - min(xs)) / side, (y - min(ys)) / side) for x, y in zip(xs, ys)]


def object_mask(obj, scale):
    """The pixels of an object within its box enlarged `scale` times: a PIL image of mode L."""
    w, h = (scale * v for v in obj["box"][2:])
    xs, ys = zip(*outline(obj["shape"], obj["angle"]))
    mask = Image.new("L", (w, h))
    ImageDraw.Draw(mask).polygon([(x / max(xs) * (w - 1), y / max(ys) * (h - 1)) for x, y in zip(xs, ys)], fill=255)
    if obj["fill"] == "solid":
        return mask
    side = max(w, h)
    border = round(side * (0.08 if obj["fill"] == "outlined" else 0.05))
    blurred = ImageOps.expand(mask, border).filter(ImageFilter.BoxBlur(border))     # 255 where all around is inside
    hollow = blurred.crop((border, border, border + w, border + h)).point(lambda v: 255 * (v >= 254))
    if obj["fill"] == "striped":
        draw = ImageDraw.Draw(hollow)
        for start in range(-h, w, side // 4):
            draw.line([(start, h), (start + h, 0)], fill=0, width=side // 9)
    return ImageChops.subtract(mask, hollow)


def render(scene, cover=None):
    """The scene as an anti-aliased RGB PIL image of scene["image_size"] pixels a side.

    A striped curtain hides the quadrant `cover`: two by two cells, thus whole objects.
    """
    side = scene["image_size"] * SUPERSAMPLING
    image = Image.new("RGB", (side, side), RGB[scene["background"]])
    for obj in scene["objects"]:
        corner = tuple(SUPERSAMPLING * v for v in obj["box"][:2])
        image.paste(RGB[obj["color"]], corner, object_mask(obj, SUPERSAMPLING))
    if cover:
        left, top = (half * (side // 2) for half in QUADRANTS[cover])
        draw, half, stripe = ImageDraw.Draw(image), math.ceil(side / 2), side // 32
        for number, x in enumerate(range(0, half, stripe)):
            right = min(x + stripe, half) - 1
            draw.rectangle([left + x, top, left + right, top + half - 1], fill=CURTAIN[number % 2])
    return image.reduce(SUPERSAMPLING)
