"""RefCOCO+ in the format of REFER: referring expressions, the boxes they refer to, and detected boxes to choose from."""

import copyreg
import json
import math
import os
import pickle
import reprlib
from typing import NamedTuple

from utils import InputError

GROUNDING_SPLITS = ("val", "testA", "testB")  # the splits of RefCOCO+ that are evaluated
_NOT_RELEASED = "this is not the released RefCOCO+ file, download it again"


class Refer(NamedTuple):
    """refs: {ref_id: {image_id, split}}; boxes: {ref_id: [x, y, w, h]}; images: {image_id: {height, width, file_name}}."""

    refs: dict
    boxes: dict
    images: dict


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, strings and numbers only; whatever a pickle wants to import or run is refused."""

    def __init__(self, file, path):
        # strings of Python 2 are bytes; latin1 has a character for each
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module, name):
        wanted = ascii(f"{module}.{name}")
        raise InputError(f"{self.path}: refused to load, it wants to import and run {wanted}; {_NOT_RELEASED}")

    def persistent_load(self, pid):
        raise InputError(f"{self.path}: refused to load, it wants the persistent object {reprlib.repr(pid)}; {_NOT_RELEASED}")


def load_refer(folder):
    """Reads refcoco+/refs(unc).p and refcoco+/instances.json under `folder`, the config key refcoco_data -> Refer.

    The first is a pickle; it is read without importing or running anything. Raises InputError, naming the file and, where it
    is one, the ref, if a file is missing, damaged, not of this format, or wants to run something.
    """
    refs_path = os.path.join(folder, "refcoco+", "refs(unc).p")
    instances_path = os.path.join(folder, "refcoco+", "instances.json")
    for path in refs_path, instances_path:
        if not os.path.isfile(path):
            raise InputError(f"{path} does not exist; put REFER's RefCOCO+ files refs(unc).p and instances.json into "
                             f"{os.path.dirname(path)}, or correct refcoco_data ({folder})")
    images, objects = _instances(_read_json(instances_path, _NOT_RELEASED), instances_path)
    refs, boxes = {}, {}
    for ref_id, ref in _refs(_read_plain_pickle(refs_path), refs_path):
        where = f"{refs_path}: ref {ref_id}"
        if ref_id in refs:
            raise InputError(f"{where} occurs twice; {_NOT_RELEASED}")
        if ref["image_id"] not in images:
            raise InputError(f"{where}: image_id {ref['image_id']} is not in {instances_path}; both must be of RefCOCO+")
        if ref["ann_id"] not in objects:
            raise InputError(f"{where}: ann_id {ref['ann_id']} is not in {instances_path}; both must be of RefCOCO+")
        refs[ref_id] = {"image_id": ref["image_id"], "split": ref["split"]}
        boxes[ref_id] = objects[ref["ann_id"]]
    return Refer(refs, boxes, images)


def load_detections(det_file, refer):
    """Reads det_file, JSON {image_id: [[x, y, w, h, score], ...]} -> {image_id (int): the list}; boxes in pixels.

    A box may come without its score. Raises InputError, naming the file and the image, for anything else and unless every
    image that a ref of val, testA or testB needs has a box.
    """
    if not os.path.isfile(det_file):
        raise InputError(f"det_file {det_file} does not exist; correct the config key det_file")
    format_is = "det_file must be {image_id: [[x, y, w, h, score], ...]}"
    detections = {}
    content = _read_json(det_file, format_is)
    if not isinstance(content, dict):
        raise InputError(f"{det_file}: holds no JSON object; {format_is}")
    for image_id, boxes in content.items():
        if not image_id.isdecimal():
            raise InputError(f"{det_file}: {reprlib.repr(image_id)} is no image id; {format_is}")
        for box in boxes if isinstance(boxes, list) else [boxes]:
            if not isinstance(box, list) or len(box) not in (4, 5) or not all(map(_is_number, box)):
                raise InputError(f"{det_file}: image {image_id}: {reprlib.repr(box)} is no box of 4 or 5 numbers; "
                                 f"{format_is}")
        detections[int(image_id)] = boxes
    for ref_id, ref in refer.refs.items():
        if ref["split"] in GROUNDING_SPLITS and not detections.get(ref["image_id"]):
            raise InputError(f"{det_file}: no box for image {ref['image_id']} (ref {ref_id}, split {ref['split']}); "
                             f"det_file must hold detections for every image of {', '.join(GROUNDING_SPLITS)}")
    return detections


def box_iou(a, b):
    """Return the intersection over union of two boxes [x, y, w, h] in pixels.

    As in REFER's evaluation the last pixel of a box is x + w - 1, and boxes meet only if the first pixel of the
    overlap comes before its last one: areas are the plain w * h, but an overlap at most one pixel wide or high is none.
    """
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    intersection = width * height
    return float(intersection / (a[2] * a[3] + b[2] * b[3] - intersection))


def _read_plain_pickle(path):
    # The opcodes EXT* take classes from this cache without asking find_class.
    copyreg.clear_extension_cache()
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {ascii(str(error))}), damaged or cut short; "
                         f"{_NOT_RELEASED}") from None


def _read_json(path, remedy):
    try:
        with open(path, "rb") as file:
            return json.loads(file.read())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({ascii(str(error))}), damaged or cut short; {remedy}") from None


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _instances(content, path):
    """({image_id: {height, width, file_name}}, {ann_id: [x, y, w, h]}) of a COCO annotation file, checked."""
    try:
        images = {image["id"]: {key: image[key] for key in ("height", "width", "file_name")} for image in content["images"]}
        objects = {item["id"]: item["bbox"] for item in content["annotations"]}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not a COCO annotation file with images and annotations ({type(error).__name__}: {error}); "
                         f"{_NOT_RELEASED}") from None
    for image_id, image in images.items():
        if not all(type(image[key]) is int and image[key] > 0 for key in ("height", "width")):
            raise InputError(f"{path}: image {image_id} has no size in pixels; {_NOT_RELEASED}")
    for ann_id, box in objects.items():
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise InputError(f"{path}: bbox of annotation {ann_id} is {reprlib.repr(box)}, not 4 numbers; {_NOT_RELEASED}")
    return images, objects


def _refs(content, path):
    """Yield (ref_id, ref) for the refs of a list, checked to have the keys that are used."""
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: holds no list of refs; {_NOT_RELEASED}")
    keys = {"ref_id": int, "ann_id": int, "image_id": int, "split": str}
    for number, ref in enumerate(content):
        given = ref if isinstance(ref, dict) else {}
        for key, kind in keys.items():
            if type(given.get(key)) is not kind:
                named = f"ref {reprlib.repr(given['ref_id'])}" if "ref_id" in given else f"entry {number} (counting from 0)"
                raise InputError(f"{path}: {named} has no {key} ({kind.__name__}); {_NOT_RELEASED}")
        yield ref["ref_id"], ref
