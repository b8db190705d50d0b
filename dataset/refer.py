"""REFER's data sets RefCOCO, RefCOCO+ and RefCOCOg: refs, their boxes, and detected boxes."""

import os
import pickle
import reprlib
from collections.abc import Mapping, Sequence
from typing import IO, Annotated, Any, NamedTuple, NoReturn

import msgspec
from msgspec import Meta

from configs.config import REFER
from dataset.entries import BBox, ImageInfo, as_form, by_id, read_json
from utils import InputError, open_regular

_NOT_RELEASED = "this is not the released file of REFER; download it again"
_DETECTIONS_ARE = "det_file must be {image_id: [[x, y, w, h, score], ...]}"


class Refer(NamedTuple):
    """A data set of REFER.

    Attributes:
        refs: image_id and split by ref_id.
        boxes: [x, y, w, h] in pixels by ref_id.
        images: height, width and file_name by image_id.
    """

    refs: dict[int, dict[str, Any]]
    boxes: dict[int, list[float]]
    images: dict[int, dict[str, Any]]


# the fields that are read from the files


class _Ref(msgspec.Struct):
    ref_id: int
    ann_id: int
    image_id: int
    split: str


class _Annotation(msgspec.Struct):
    id: int
    image_id: int
    bbox: BBox


class _Instances(msgspec.Struct):
    images: list[ImageInfo]
    annotations: list[_Annotation]


_Refs = Annotated[list[_Ref], Meta(min_length=1)]
_Boxes = list[Annotated[list[float], Meta(min_length=4, max_length=5)]]


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle containers, strings and numbers only. Refuse imports and calls."""

    def __init__(self, file: IO[bytes], path: str) -> None:
        # strings of Python 2 are bytes; latin1 maps each byte to a character
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse every class."""
        wanted = ascii(f"{module}.{name}")
        raise InputError(
            f"{self.path}: refused to load, because it would import and run {wanted};"
            f" {_NOT_RELEASED}"
        )


def load_refer(folder: str, name: str = "refcoco+") -> Refer:
    """Read the refs and instances.json of a data set of REFER.

    The refs are a pickle, which is read without running anything.

    Args:
        folder: Folder of the data sets, the key refcoco_data.
        name: The data set, a key of `configs.config.REFER` and a folder in `folder`.

    Returns:
        The data set.

    Raises:
        InputError: A file is missing, damaged or would run code, or both files disagree on a ref.
    """
    paths = [os.path.join(folder, name, file) for file in (REFER[name], "instances.json")]
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(
                f"{path} does not exist; put REFER's files {REFER[name]} and instances.json into"
                f" {os.path.dirname(path)}, or correct refcoco_data ({folder}) or refer_dataset"
                f" ({name})"
            )
    refs_path, instances_path = paths
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
                    f"{where}: {key} {getattr(ref, key)} is not in {instances_path}; both files"
                    f" must belong to {name}"
                )
        if objects[ref.ann_id].image_id != ref.image_id:
            raise InputError(
                f"{where}: its image_id is {ref.image_id}, but its annotation {ref.ann_id} in"
                f" {instances_path} has image_id {objects[ref.ann_id].image_id}; both files must"
                f" belong to {name}"
            )
        refs[ref.ref_id] = {"image_id": ref.image_id, "split": ref.split}
        boxes[ref.ref_id] = objects[ref.ann_id].bbox
    return Refer(refs, boxes, images)


def is_tested(ref: Mapping[str, Any]) -> bool:
    """Return whether the split of a ref is evaluated: every split except train."""
    return ref["split"] != "train"


def load_detections(det_file: str, refer: Refer) -> dict[int, list[list[float]]]:
    """Read the detected boxes.

    Args:
        det_file: JSON file {image_id: [[x, y, w, h, score], ...]} in pixels; scores may be missing.
        refer: The data set that the images belong to.

    Returns:
        The boxes by image_id.

    Raises:
        InputError: The content has another form, more than half of a box lies outside of its image,
            or an image of a tested ref has no box. The message names the file and the image.
    """
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
                    f"{where}: box {[x, y, w, h]} lies outside of {image['file_name']}, which has"
                    f" {image['width']} x {image['height']} pixels; det_file must hold detections"
                    " for the images of refcoco_data"
                )
    for ref_id, ref in refer.refs.items():
        if is_tested(ref) and not detections.get(ref["image_id"]):
            raise InputError(
                f"{det_file}: no box for image {ref['image_id']} (ref {ref_id}, split"
                f" {ref['split']}); det_file must hold detections for every image that is not in"
                " the split train"
            )
    return detections


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes [x, y, w, h] in pixels.

    As in REFER's evaluation the last pixel of a box is x + w - 1 and areas are w * h. An overlap of
    at most one pixel in width or height counts as none.
    """
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if width <= 1 or height <= 1:
        return 0.0
    intersection = width * height
    return float(intersection / (a[2] * a[3] + b[2] * b[3] - intersection))


def _read_plain_pickle(path: str) -> Any:
    """Read a pickle of containers, strings and numbers. Raises InputError for other content."""
    try:
        with open_regular(path) as file:
            return _PlainUnpickler(file, path).load()
    except InputError:
        raise
    except Exception as error:  # damaged pickles raise almost any exception
        raise InputError(
            f"{path}: cannot be read ({type(error).__name__}: {ascii(str(error))}); {_NOT_RELEASED}"
        ) from None
