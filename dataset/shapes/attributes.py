"""Zero-shot attributes in the form of OVAD: sheets of four pictures, a box around each picture.

A box surrounds a picture, not only its object, because size and position of an object show only in
its surroundings. Attributes are, for example, red, big, striped, in the middle, white background.
"""

from random import Random

from PIL import Image

from .scenes import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Scenes,
    place_objects,
    render,
    split_of,
)
from .words import WORDS

FILES = ("attributes.json",)
TEXTS = ()
FOLDER = "attributes"  # folder of the sheets
PER_SIDE = 2  # pictures of a sheet
UNLABELED = 0.1  # share of missing labels
TYPES = {  # type in the file: key of an object or scene, its values, parent type, is or has
    "color": ("color", COLORS, "appearance", "is"),
    "background": ("background", BACKGROUNDS, "appearance", "has"),
    "pattern": ("fill", FILLS, "appearance", "is"),
    "size": ("size", SIZES, "layout", "is"),
    "position": ("position", POSITIONS, "layout", "is"),
}
# smallest share of the boxes that have an attribute of the set
COMMON = {"head": 0.3, "medium": 0.1, "tail": 0}


def draw_sheets(scenes: Scenes, seed: int) -> dict[str, list[Scene]]:
    """Draw a picture for each test scene and return the four scenes of each sheet by image path.

    A picture has one object, whose color and shape occur together in the test split only.
    """
    count, side = len(scenes["test"]), scenes["test"][0]["image_size"]
    shapes = {
        color: [shape for shape in SHAPES if split_of(((color, shape),)) == "test"]
        for color in COLORS
    }
    pictures = []
    for i in range(count):
        rng = Random(f"{seed}/test/{i}/{FOLDER}")
        color = rng.choice(list(COLORS))
        objects = place_objects(rng, ((color, rng.choice(shapes[color])),), side)
        # equally likely, unlike in the other pictures
        objects[0]["fill"] = rng.choice(list(FILLS))
        pictures.append(
            {"image_size": side, "background": rng.choice(list(BACKGROUNDS)), "objects": objects}
        )
    sheets = [pictures[i : i + PER_SIDE**2] for i in range(0, count, PER_SIDE**2)]
    return {f"images/{FOLDER}/{i:06d}.jpg": sheet for i, sheet in enumerate(sheets)}


def corner(number: int, side: int) -> tuple[int, int]:
    """Return x, y of a picture on its sheet."""
    return number % PER_SIDE * side, number // PER_SIDE * side


def render_sheet(*pictures: Scene) -> Image.Image:
    """Render up to four scenes of one size on a sheet."""
    side = pictures[0]["image_size"]
    sheet = Image.new("RGB", (PER_SIDE * side, PER_SIDE * side))
    for number, picture in enumerate(pictures):
        sheet.paste(render(picture), corner(number, side))
    return sheet


def annotations(scenes: Scenes, seed: int) -> tuple:
    """Return the contents of FILES."""
    values = [(kind, value) for kind, (_, table, *_) in TYPES.items() for value in table]
    images, boxes = [], []
    for image_id, (name, sheet) in enumerate(draw_sheets(scenes, seed).items()):
        side = sheet[0]["image_size"]
        images.append(
            {"id": image_id, "file_name": name, "width": PER_SIDE * side, "height": PER_SIDE * side}
        )
        for number, picture in enumerate(sheet):
            rng, facts = Random(f"{seed}/{name}/{number}"), picture | picture["objects"][0]
            labels = [
                int(facts[TYPES[kind][0]] == value) if rng.random() >= UNLABELED else -1
                for kind, value in values
            ]
            boxes.append(
                {
                    "id": len(boxes),
                    "image_id": image_id,
                    "bbox": [*corner(number, side), side, side],
                    "area": side**2,
                    "att_vec": labels,
                }
            )
    shares = [sum(box["att_vec"][i] == 1 for box in boxes) / len(boxes) for i in range(len(values))]
    attributes = [
        {
            "id": i,
            "name": f"{kind}:{'/'.join(WORDS.get(value, (value,)))}",
            "type": kind,
            "parent_type": TYPES[kind][2],
            "freq_set": next(name for name, least in COMMON.items() if share >= least),
            "is_has_att": TYPES[kind][3],
        }
        for i, ((kind, value), share) in enumerate(zip(values, shares, strict=True))
    ]
    return ({"images": images, "attributes": attributes, "annotations": boxes},)
