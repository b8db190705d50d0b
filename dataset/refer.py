"""RefCOCO+ in the format of REFER: referring expressions, the boxes they refer to, and detected boxes to choose from."""

import copyreg
import os
import pickle
import reprlib
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from dataset.annotations import as_form, read_json
from utils import InputError, open_regular

GROUNDING_SPLITS = ("val", "testA", "testB")  # the splits of RefCOCO+ that are evaluated
_NOT_RELEASED = "this is not the released RefCOCO+ file, download it again"
_DETECTIONS_ARE = "det_file must be {image_id: [[x, y, w, h, score], ...]}"


class Refer(NamedTuple):
    """refs: {ref_id: {image_id, split}}; boxes: {ref_id: [x, y, w, h]}; images: {image_id: {height, width, file_name}}."""

    refs: dict
    boxes: dict
    images: dict


# what is used of the files


class _Ref(msgspec.Struct):
    ref_id: int
    ann_id: int
    image_id: int
    split: str


class _Image(msgspec.Struct):
    id: int
    height: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]
    file_name: str


class _Annotation(msgspec.Struct):
    id: int
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)]


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]


_Refs = Annotated[list[_Ref], Meta(min_length=1)]
_Boxes = list[Annotated[list[float], Meta(min_length=4, max_length=5)]]


class _PlainUnpickler(pickle.Unpickler):
    """Build containers, strings and numbers only; refuse what a pickle wants to import or run."""

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
    """Read refcoco+/refs(unc).p and refcoco+/instances.json under `folder`, the config key refcoco_data -> Refer.

    The first is a pickle; it is read without importing or running anything. Raises InputError, naming the file and, where it
    is one, the ref, if a file is missing, damaged, not of this format, or wants to run something.
    """
    refs_path = os.path.join(folder, "refcoco+", "refs(unc).p")
    instances_path = os.path.join(folder, "refcoco+", "instances.json")
    for path in refs_path, instances_path:
        if not os.path.isfile(path):
            raise InputError(f"{path} does not exist; put REFER's RefCOCO+ files refs(unc).p and instances.json into "
                             f"{os.path.dirname(path)}, or correct refcoco_data ({folder})")
    instances = read_json(instances_path, _Instances, _NOT_RELEASED)
    images = {image.id: {"height": image.height, "width": image.width, "file_name": image.file_name}
              for image in instances.images}  # fmt: skip
    objects = {annotation.id: annotation.bbox for annotation in instances.annotations}
    refs, boxes = {}, {}
    for ref in as_form(_read_plain_pickle(refs_path), _Refs, refs_path, _NOT_RELEASED):
        where = f"{refs_path}: ref {ref.ref_id}"
        if ref.ref_id in refs:
            raise InputError(f"{where} occurs twice; {_NOT_RELEASED}")
        for key, known in (("image_id", images), ("ann_id", objects)):
            if getattr(ref, key) not in known:
                raise InputError(f"{where}: {key} {getattr(ref, key)} is not in {instances_path}; both must be of RefCOCO+")
        refs[ref.ref_id] = {"image_id": ref.image_id, "split": ref.split}
        boxes[ref.ref_id] = objects[ref.ann_id]
    return Refer(refs, boxes, images)


def load_detections(det_file, refer):
    """Read det_file, JSON {image_id: [[x, y, w, h, score], ...]} -> {image_id (int): the list}; boxes in pixels.

    A box may come without its score. Raises InputError, naming the file and the image, for anything else and unless every
    image that a ref of val, testA or testB needs has a box.
    """
    if not os.path.isfile(det_file):
        raise InputError(f"det_file {det_file} does not exist; correct the config key det_file")
    detections = {}
    for image_id, boxes in read_json(det_file, dict[str, object], _DETECTIONS_ARE).items():
        if not image_id.isdecimal():
            raise InputError(f"{det_file}: {reprlib.repr(image_id)} is not an image id; {_DETECTIONS_ARE}")
        detections[int(image_id)] = as_form(boxes, _Boxes, f"{det_file}: image {image_id}", _DETECTIONS_ARE)
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
        with open_regular(path) as file:
            return _PlainUnpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {ascii(str(error))}), damaged or cut short; "
                         f"{_NOT_RELEASED}") from None
