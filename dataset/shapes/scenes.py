"""A built-in data set: pictures of simple shapes with human-like captions, in the released annotation formats.

    python -m dataset.shapes --output data/shapes

A scene holds 1 to 5 objects. Its *combination* is the multiset of the (color, shape) of its objects, and a
checksum of the combination alone decides its split: whatever the seeds and the counts, no combination of val or test
is in train. scenes_{train,val,test}.json describe the scenes in full, so that questions, statements and boxes can be
derived from them.
"""
import argparse
import json
import math
import os
import random
import shutil
import string
import zlib
from itertools import permutations
from multiprocessing import Pool

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

from utils import InputError, atomic_write, run_script

VERSION = 2         # of the generator: data made by another version is made anew
SPLITS = ("train", "val", "test")
MAX_WORDS = 16      # with [CLS] 17 ids: padding to the longest caption is what a text costs
SUPERSAMPLING = 3
ANNOTATIONS = ("pretrain", "retrieval_train", "val", "test", "scenes_train", "scenes_val", "scenes_test")

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
OPENINGS = ("there is", "here is", "a picture of", "an image of", "picture of", "a drawing of", "an image with",
            "a scene with", "this picture shows", "we see", "i can see")
GROUNDS = ("on a {} background", "on {}", "against a {} background", "with a {} background")
NUMBERS = ("", "one", "two", "three", "four", "five")
UNNAMED = {"color": "colored", "shape": "thing"}    # said where a noisy caption misses the fact
JUNK = ("click here for free download", "best price buy online now free shipping", "img {} jpg", "untitled {}",
        "photo {} of {} next page", "free clip art and wallpaper hd {}", "all rights reserved",
        "share this on my page", "top {} shapes for kids you must see")
NOISE_KINDS = ("wrong", "missing", "other", "junk")

RGB = {"red": (222, 36, 36), "orange": (255, 140, 0), "yellow": (245, 208, 10), "green": (28, 155, 60),
       "blue": (45, 85, 235), "cyan": (30, 205, 215), "purple": (135, 45, 175), "pink": (250, 130, 190),
       "white": (248, 248, 248), "beige": (226, 207, 172), "gray": (165, 165, 165), "navy": (16, 22, 66),
       "black": (10, 10, 10)}
COUNT_WEIGHTS = (25, 45, 20, 6, 4)      # of 1 to 5 objects
REPEAT = 0.1                            # probability that an object has an earlier one's color and shape
FILL_WEIGHTS = (70, 15, 15)             # of FILLS
# Objects lie on a grid as wide as the patches of configs/shapes: a small ViT from random weights learns shapes within
# minutes if a patch sees the whole of one, and hardly at all if they lie anywhere across several.
GRID = 4                                # cells a side
EXTENT = {"small": 0.62, "large": 0.92} # longer side of an object, in sides of a cell
SHIFT = 0.04                            # of an object from the middle of its cell at most; leaves large ones apart
TRAIN_DETAIL = (0.5, 0.8, 1.1, 1.4)     # of captions, see describe(): one of them at random
EVAL_DETAIL = (1.6, 1.4, 1.2, 0.6, 0.2)     # for 1 to 5 objects, so that the caption identifies its scene
PARTIAL = 0.08                          # share of train captions that leave objects out


# Scenes

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


# Pictures

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


def render(scene):
    """The scene as an anti-aliased RGB PIL image of scene["image_size"] pixels a side."""
    side = scene["image_size"] * SUPERSAMPLING
    image = Image.new("RGB", (side, side), RGB[scene["background"]])
    for obj in scene["objects"]:
        corner = tuple(SUPERSAMPLING * v for v in obj["box"][:2])
        image.paste(RGB[obj["color"]], corner, object_mask(obj, SUPERSAMPLING))
    return image.reduce(SUPERSAMPLING)


# Captions

def say(rng, words):
    """One of several words for the same thing, mostly the usual one."""
    return words[0] if rng.random() < 0.6 else rng.choice(words)


def plural(noun):
    """The plural of a shape word."""
    return noun + ("es" if noun.endswith("s") else "s")


def noun_phrase(rng, group, detail):
    """Words for the objects of one color and shape: "a big striped red star", "two green hearts"."""
    color, shape = group[0]["color"], group[0]["shape"]
    color, noun = say(rng, COLORS.get(color, (color,))), say(rng, SHAPES.get(shape, (shape,)))
    sizes, fills = ({o[key] for o in group} for key in ("size", "fill"))
    adjectives = []
    if len(sizes) == 1 and rng.random() < detail:
        adjectives.append(say(rng, SIZES[sizes.pop()]))
    if len(fills) == 1 and rng.random() < detail * (0.3 if "solid" in fills else 1):
        adjectives.append(say(rng, FILLS[fills.pop()]))
    if len(group) > 1:
        return " ".join([NUMBERS[len(group)], *adjectives, color, plural(noun)])
    words = [*adjectives, noun, "in", color] if rng.random() < 0.06 else [*adjectives, color, noun]
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([rng.choice(("one", "the", *[article] * 10)), *words])


def describe(rng, scene, detail, partial=False):
    """One caption of a scene, of any length. It names all objects, or only some of them if `partial`.

    An optional fact (an object's size, fill, position or relation, the background) is said with a probability of
    `detail` times a weight from 0.3 to 1.
    """
    objects, groups = scene["objects"], {}
    for i in rng.sample(range(len(objects)), len(objects)):
        groups.setdefault((objects[i]["color"], objects[i]["shape"]), []).append(i)
    groups = list(groups.values())
    if partial:
        groups = groups[:rng.randint(1, max(1, len(groups) - 1))]
    phrases = {g[0]: noun_phrase(rng, [objects[i] for i in g], detail) for g in groups}
    single = {g[0] for g in groups if len(g) == 1}
    related = [r for r in scene["relations"] if r[0] in single and r[2] in single]
    if related and rng.random() < 0.2 + 0.5 * detail:
        i, name, j = rng.choice(related)
        phrases[i] += f" {rng.choice(RELATIONS[name])} {phrases.pop(j)}"
        single -= {i, j}
    for i in single:
        if rng.random() < 0.6 * detail:
            phrases[i] += f" {rng.choice(POSITIONS[objects[i]['position']])}"
    phrases = rng.sample(list(phrases.values()), len(phrases))
    joint = rng.choice((" and ", " with ", ", ")) if len(phrases) == 2 else " and "
    text = joint.join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    if rng.random() < 0.35:
        opening = rng.choice(OPENINGS)
        text = f"{opening.replace(' is', ' are') if text.split()[0] in NUMBERS[2:] else opening} {text}"
    if rng.random() < 0.7 * detail:
        text += " " + rng.choice(GROUNDS).format(say(rng, BACKGROUNDS[scene["background"]]))
    return text


def caption(rng, scene, detail, partial=False):
    """A caption of at most MAX_WORDS words: said again, in less detail, while it is longer."""
    text = describe(rng, scene, detail, partial)
    while len(text.split()) > MAX_WORDS:
        detail *= 0.8
        text = describe(rng, scene, detail, partial)
    return text


def noisy_caption(rng, scene, other, kind):
    """A caption as on the web: with a wrong fact, with no colors or no shapes, of another scene, or with junk."""
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
        rng.choice(objects)[key] = rng.choice([name for name in names if name not in {o[key] for o in objects}])
    return caption(rng, {**scene, "objects": objects}, detail)


def write_captions(rng, scene, split, count, noise, others):
    """`count` different captions as a list of {"caption", "noise"}; noise is None (true) or one of NOISE_KINDS.

    Those of val and test are true, name every object, and say the more of each the fewer there are.
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


def vocabulary():
    """The WordPiece vocabulary: special tokens, characters (so that no text is unknown), all words said here."""
    tables = (SHAPES, COLORS, SIZES, FILLS, BACKGROUNDS, POSITIONS, RELATIONS)
    said = [text for table in tables for texts in table.values() for text in texts]
    nouns = [noun for words in SHAPES.values() for noun in words] + [UNNAMED["shape"]]
    said += [*map(plural, nouns), *UNNAMED.values(), *OPENINGS, *GROUNDS, *NUMBERS, *JUNK, "a an the and with are"]
    words = {word for text in said for word in text.replace("{}", "").split() if len(word) > 1}
    characters = string.digits + string.ascii_lowercase
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *characters,
            *(f"##{c}" for c in characters), *sorted(words)]


# Files

def draw_split(split, count, image_size, captions, noise, seed):
    """The scenes of a split, with image path and captions; combinations repeat in train only."""
    scenes, taken = [], set()
    for i in range(count):
        scene = draw_scene(random.Random(f"{seed}/{split}/{i}"), split, image_size, taken)
        scenes.append({"image": f"images/{split}/{i:06d}.jpg", **scene})
        if split != "train":
            taken.add(combination_of(scene))
    for i, scene in enumerate(scenes):
        rng = random.Random(f"{seed}/{split}/{i}/captions")
        scene["captions"] = write_captions(rng, scene, split, captions, noise, scenes)
    return scenes


def save_image(path_and_scene):
    """Render a scene to a JPEG file."""
    path, scene = path_and_scene
    render(scene).save(path, quality=90)


def save_text(path, text):
    """Write a text file in one step."""
    with atomic_write(path, "w") as file:
        file.write(text)


def prepare(output, arguments):
    """True if the folder holds the finished data set of these arguments; else empty it and mark it unfinished."""
    marker = os.path.join(output, "shapes.json")
    if os.path.exists(marker):
        with open(marker, encoding="utf-8") as f:
            if f.read() == json.dumps({**arguments, "complete": True}):
                return True
    elif os.path.isdir(output) and os.listdir(output):
        raise InputError(f"{output}: holds other files and no shapes.json: choose another --output")
    os.makedirs(output, exist_ok=True)
    save_text(marker, json.dumps({**arguments, "complete": False}))
    for name in ANNOTATIONS:
        path = os.path.join(output, f"{name}.json")
        if os.path.exists(path):
            os.remove(path)
    if os.path.exists(os.path.join(output, "images")):
        shutil.rmtree(os.path.join(output, "images"))
    for split in SPLITS:
        os.makedirs(os.path.join(output, "images", split))
    return False


def annotations(scenes):
    """The contents of the annotation files by name, from the lists of scenes by split."""
    texts = {split: [{"image": s["image"], "caption": [c["caption"] for c in s["captions"]]} for s in scenes[split]]
             for split in SPLITS}
    pairs = [{"image": s["image"], "caption": c["caption"], "image_id": f"train_{i:06d}"}
             for i, s in enumerate(scenes["train"]) for c in s["captions"] if not c["noise"]]
    return {**{f"scenes_{split}": scenes[split] for split in SPLITS},
            "pretrain": texts["train"], "retrieval_train": pairs, "val": texts["val"], "test": texts["test"]}


def write_dataset(output, train=8000, val=500, test=500, noise=0.05, seed=0, image_size=96, captions=4,
                  progress=False):
    """Write the data set to the folder `output`; a finished one, made with the same arguments, is left alone.

    train, val and test are numbers of scenes, noise the share of corrupted captions in pretrain.json, image_size the
    side in pixels, captions the number an image; progress shows a bar. Same arguments, same bytes, on any number of
    processes. Writes images/{split}/*.jpg, vocab.txt, and only then scenes_{split}.json (everything known),
    pretrain.json, retrieval_train.json (without the corrupted captions), val.json, test.json, and shapes.json (the
    arguments). Returns False if all this was already there.
    Raises InputError for arguments out of range and for a folder that has other files or cannot be written.
    """
    counts = dict(zip(SPLITS, (train, val, test)))
    arguments = {**counts, "noise": noise, "image_size": image_size, "captions": captions}
    for (name, value), (low, high) in zip(arguments.items(), [(1, 999_999)] * 3 + [(0, 1), (48, 1024), (1, 20)]):
        if not low <= value <= high:
            raise InputError(f"--{name} {value}: must lie between {low} and {high}")
    arguments.update(seed=seed, version=VERSION)
    try:
        if prepare(output, arguments):
            return False
        scenes = {split: draw_split(split, n, image_size, captions, noise, seed) for split, n in counts.items()}
        jobs = [(os.path.join(output, scene["image"]), scene) for split in SPLITS for scene in scenes[split]]
        with Pool() as pool:
            images = pool.imap_unordered(save_image, jobs, chunksize=32)
            for _ in tqdm(images, total=len(jobs), desc="shapes", unit="image", disable=not progress):
                pass
        save_text(os.path.join(output, "vocab.txt"), "\n".join(vocabulary()) + "\n")
        for name, entries in annotations(scenes).items():
            save_text(os.path.join(output, f"{name}.json"), "[" + ",\n".join(map(json.dumps, entries)) + "]\n")
        save_text(os.path.join(output, "shapes.json"), json.dumps({**arguments, "complete": True}))
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror}: choose another --output") from None
    return True


def main():
    """Makes the data set from the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Make the shapes data set: images, annotation files, vocabulary.")
    parser.add_argument("--output", required=True, help="folder to write to, the image_root of the annotation files")
    parser.add_argument("--train", type=int, default=8000, help="training scenes")
    parser.add_argument("--val", type=int, default=500, help="validation scenes")
    parser.add_argument("--test", type=int, default=500, help="test scenes")
    parser.add_argument("--noise", type=float, default=0.05, help="share of corrupted pre-training captions")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes from the same split")
    parser.add_argument("--image_size", type=int, default=96, help="side of the images in pixels")
    parser.add_argument("--captions", type=int, default=4, help="captions an image")
    args = parser.parse_args()
    made = write_dataset(**vars(args), progress=True)
    print(f"{args.output}: {args.train} train, {args.val} val and {args.test} test scenes, {args.captions} captions "
          f"each, vocabulary of {len(vocabulary())}" + ("" if made else " (already there)"))


if __name__ == "__main__":
    run_script(main)
