"""RefCOCO, RefCOCO+ and RefCOCOg as REFER has them: refs, the boxes they refer to, and detected
boxes to choose from.
"""

import copyreg
import os
import pickle
import reprlib
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from configs.config import REFER
from dataset.entries import as_form, by_id, read_json
from utils import InputError, open_regular

_NOT_RELEASED = "this is not the released file of REFER, download it again"
_DETECTIONS_ARE = "det_file must be {image_id: [[x, y, w, h, score], ...]}"


class Refer(NamedTuple):
    """refs: {ref_id: {image_id, split}}; boxes: {ref_id: [x, y, w, h]}; images: {image_id: {height,
    width, file_name}}.
    """

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
    image_id: int
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)]


class _Instances(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]


_Refs = Annotated[list[_Ref], Meta(min_length=1)]
_Boxes = list[Annotated[list[float], Meta(min_length=4, max_length=5)]]


class _PlainUnpickler(pickle.Unpickler):
    """Build containers, strings and numbers only; refuse what a pickle wants to import or run."""

    def __init__(self, file, path) -> None:
        # strings of Python 2 are bytes; latin1 has a character for each
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module, name):
        wanted = ascii(f"{module}.{name}")
        raise InputError(
            f"{self.path}: refused to load, it wants to import and run {wanted}; {_NOT_RELEASED}"
        )

    def persistent_load(self, pid):
        raise InputError(
            f"{self.path}: refused to load, it wants the persistent object {reprlib.repr(pid)}; {_NOT_RELEASED}"
        )


def load_refer(folder, name="refcoco+"):
    """Read the refs and instances.json of a data set of REFER, a key of configs.config.REFER ->
    Refer.

    folder: the config key refcoco_data; both files are in its folder `name`. The refs are a pickle,
    which is read without importing or running anything. Raises InputError if a file is missing,
    damaged, of another format or would run code, and if the two files disagree on the image of a
    ref. The message names the file, and the ref if one is wrong.
    """
    refs_path = os.path.join(folder, name, REFER[name])
    instances_path = os.path.join(folder, name, "instances.json")
    for path in refs_path, instances_path:
        if not os.path.isfile(path):
            raise InputError(
                f"{path} does not exist; put REFER's files {REFER[name]} and instances.json into "
                f"{os.path.dirname(path)}, or correct refcoco_data ({folder}) or refer_dataset ({name})"
            )
    instances = read_json(instances_path, _Instances, _NOT_RELEASED)
    images = {
        image.id: {"height": image.height, "width": image.width, "file_name": image.file_name}
        for image in by_id(instances.images, instances_path, "image").values()
    }
    objects = by_id(instances.annotations, instances_path, "annotation")
    refs, boxes = {}, {}
    for ref in as_form(_read_plain_pickle(refs_path), _Refs, refs_path, _NOT_RELEASED):
        where = f"{refs_path}: ref {ref.ref_id}"
        if ref.ref_id in refs:
            raise InputError(f"{where} occurs twice; {_NOT_RELEASED}")
        for key, known in (("image_id", images), ("ann_id", objects)):
            if getattr(ref, key) not in known:
                raise InputError(
                    f"{where}: {key} {getattr(ref, key)} is not in {instances_path}; both must be of {name}"
                )
        if objects[ref.ann_id].image_id != ref.image_id:
            raise InputError(
                f"{where}: its image is {ref.image_id}, that of its annotation {ref.ann_id} in {instances_path} is "
                f"{objects[ref.ann_id].image_id}; both must be of {name}"
            )
        refs[ref.ref_id] = {"image_id": ref.image_id, "split": ref.split}
        boxes[ref.ref_id] = objects[ref.ann_id].bbox
    return Refer(refs, boxes, images)


def is_tested(ref):
    """Return whether a ref belongs to a split that is evaluated, i.e. is not in train."""
    return ref["split"] != "train"


def load_detections(det_file, refer):
    """Read det_file, JSON {image_id: [[x, y, w, h, score], ...]} -> {image_id (int): the list};
    boxes in pixels.

    A box may come without its score. Raises InputError that names the file and the image if the
    content has another form, if more than half of a box lies outside of its image, or if an image
    of a tested ref has no box.
    """
    if not os.path.isfile(det_file):
        raise InputError(f"det_file {det_file} does not exist; correct the config key det_file")
    detections = {}
    for image_id, boxes in read_json(det_file, dict[str, object], _DETECTIONS_ARE).items():
        if not image_id.isdecimal():
            raise InputError(
                f"{det_file}: {reprlib.repr(image_id)} is not an image id; {_DETECTIONS_ARE}"
            )
        where, image = f"{det_file}: image {image_id}", refer.images.get(int(image_id))
        detections[int(image_id)] = boxes = as_form(boxes, _Boxes, where, _DETECTIONS_ARE)
        # images of other data sets may have boxes, too
        for x, y, w, h in (box[:4] for box in boxes if image):
            inside = (
                min(x + w, image["width"]) - max(x, 0),
                min(y + h, image["height"]) - max(y, 0),
            )
            if max(inside[0], 0) * max(inside[1], 0) < w * h / 2:
                raise InputError(
                    f"{where}: box {[x, y, w, h]} lies outside of {image['file_name']} of {image['width']} x "
                    f"{image['height']} pixels: det_file must be of the images of refcoco_data"
                )
    for ref_id, ref in refer.refs.items():
        if is_tested(ref) and not detections.get(ref["image_id"]):
            raise InputError(
                f"{det_file}: no box for image {ref['image_id']} (ref {ref_id}, split {ref['split']}); "
                "det_file must hold detections for every image outside of the split train"
            )
    return detections


def box_iou(a, b):
    """Return the intersection over union of two boxes [x, y, w, h] in pixels.

    As in REFER's evaluation the last pixel of a box is x + w - 1, and boxes meet only if the first
    pixel of the overlap comes before its last one: areas are the plain w * h, but an overlap at
    most one pixel wide or high is none.
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
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {ascii(str(error))}), damaged or cut short; "
            f"{_NOT_RELEASED}"
        ) from None
