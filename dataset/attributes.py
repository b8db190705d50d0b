"""Attributes of objects in boxes: OVAD's labels on COCO's images and annotations."""

import os
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta
from PIL import Image
from torch import Tensor

from configs.config import Config
from dataset.base import EntryDataset, test_options
from dataset.entries import BBox, ImageInfo, by_id, digest, read_json
from dataset.images import ImageError, exif_of_boxes
from dataset.transforms import test_transform
from utils import InputError

Frequency = Literal["head", "medium", "tail"]  # of an attribute, as named in the file
FREQUENCIES = get_args(Frequency)
MIN_AREA = 50  # smallest area of an evaluated object, in pixels
FORMS = {}  # the files are not lists of entries
_WANTED = (
    'the file must have the form {"images": [...], "attributes": [{id, name: "type:value/synonym",'
    ' type, parent_type, freq_set, is_has_att}, ...], "annotations": [{image_id,'
    " bbox: [x, y, w, h], area, att_vec}, ...]}"
)


class Attribute(msgspec.Struct):
    """An attribute that an object is ("red") or has ("long hair length").

    The name is "type:value/synonym/...".
    """

    id: int
    name: Annotated[str, Meta(pattern="^[^:]+:[^:]+$")]
    type: str
    parent_type: str
    freq_set: Frequency
    is_has_att: Literal["is", "has"]

    @property
    def values(self) -> list[str]:
        """The value and its synonyms."""
        return self.name.partition(":")[2].split("/")


class _Annotation(msgspec.Struct):
    image_id: int
    bbox: BBox
    area: float
    att_vec: list[Literal[-1, 0, 1]]


class _Content(msgspec.Struct):
    images: list[ImageInfo]
    attributes: Annotated[list[Attribute], Meta(min_length=1)]
    annotations: list[_Annotation]


class Box(NamedTuple):
    """A box to evaluate."""

    image: str  # path of the image
    size: tuple[int, int]  # height and width of the image according to the file
    pixels: tuple[int, int, int, int]  # x, y, width and height of the box
    labels: Sequence[int]  # for each attribute 1, 0, or -1 (not labeled)
    where: str  # file and number of the annotation, for messages


def read_boxes(path: str) -> tuple[list[Attribute], list[Box]]:
    """Read a file of attributes in boxes.

    Args:
        path: JSON file in the form of OVAD.

    Returns:
        The attributes in the order of their ids, and the boxes of at least MIN_AREA pixels, whose
        labels are in the same order.

    Raises:
        InputError: The content has the wrong form, a box lies outside its image, an att_vec has the
            wrong length, or two images or attributes have the same id. The message names the
            annotation, counted from 0.
    """
    content = read_json(path, _Content, _WANTED)
    images = by_id(content.images, path, "image")
    attributes = by_id(content.attributes, path, "attribute")
    attributes = [attributes[key] for key in sorted(attributes)]
    boxes = []
    for number, annotation in enumerate(content.annotations):
        where = f"{path}: annotation {number} (counting from 0)"
        pixels = _check_annotation(annotation, images, len(attributes), where)
        if annotation.area < MIN_AREA:
            continue
        if min(pixels[2:]) < 1:
            raise InputError(
                f"{where}: bbox {annotation.bbox} is narrower or lower than one pixel, but area is"
                f" {annotation.area}; correct bbox or area"
            )
        image = images[annotation.image_id]
        size = image.height, image.width
        boxes.append(Box(image.file_name, size, pixels, annotation.att_vec, where))
    if not boxes:
        raise InputError(
            f"{path} has no annotation with an area of {MIN_AREA} pixels or more; name another file"
        )
    if not any(1 in box.labels for box in boxes):
        raise InputError(
            f"{path}: no att_vec has a 1, so average precision is undefined; correct the labels"
        )
    return attributes, boxes


def _check_annotation(
    annotation: _Annotation, images: dict[int, ImageInfo], attributes: int, where: str
) -> tuple[int, int, int, int]:
    """Check an annotation and return its box in whole pixels. Raises InputError."""
    image, labels = images.get(annotation.image_id), len(annotation.att_vec)
    if image is None:
        raise InputError(
            f"{where}: no image has the id {annotation.image_id}; correct image_id or add the image"
        )
    if labels != attributes:
        raise InputError(
            f"{where}: att_vec has {labels} labels for {attributes} attributes; write one label for"
            " each attribute (-1: not labeled)"
        )
    x, y, w, h = map(int, annotation.bbox)
    if min(annotation.bbox) < 0 or x + w > image.width or y + h > image.height:
        raise InputError(
            f"{where}: bbox {annotation.bbox} lies outside of its image of {image.width} x"
            f" {image.height} pixels; correct bbox"
        )
    return x, y, w, h


class AttributeTestSet(EntryDataset):
    """Boxes of files of attributes; item i is box i cropped and resized, uint8 [3, R, R].

    Args:
        files: Files of attributes, all with the same attributes.
        **options: Further arguments of `EntryDataset`, with the root image_root.

    Attributes:
        attributes: The attributes.
        entries: The boxes.

    Raises:
        InputError: `read_boxes` refuses a file, or two files have different attributes.
    """

    def __init__(self, files: Sequence[str], **options: Any) -> None:
        read = [read_boxes(file) for file in files]
        self.attributes = read[0][0]
        for file, (attributes, _) in zip(files, read, strict=True):
            if attributes != self.attributes:
                raise InputError(
                    f"{file} and {files[0]} have different attributes; evaluate one after the other"
                )
        super().__init__([box for _, boxes in read for box in boxes], **options)

    def digest(self) -> str:
        """Return a digest of the boxes in hexadecimal digits."""
        return f"{digest(self.entries):016x}"

    def files(self, index: int) -> list[str]:
        """Return the path of a box's image."""
        return [os.path.join(self.roots["image_root"] or "", self.entry(index).image)]

    def where(self, index: int) -> str:
        """Return the file and number of a box's annotation for error messages."""
        return self.entry(index).where

    def read(self, index: int) -> Tensor:
        """Read a box, uint8 [3, R, R]. Raises ImageError if the image has another size."""
        (file,), (x, y, w, h) = self.files(index), self.entry(index).pixels
        image, (height, width) = self.load(file), self.entry(index).size
        if image.shape[1:] != (height, width):
            raise ImageError(
                file,
                "wrong size",
                f"{self.where(index)} belongs to an image of {width} x {height} pixels, but this "
                f"image has {image.shape[2]} x {image.shape[1]}",
                "correct the path of the image",
            )
        return self.transform(image[:, y : y + h, x : x + w])


def test_set(config: Config, split: str) -> AttributeTestSet:
    """Build a test set of attributes, with bilinear resizing as in the published evaluation."""
    transform = test_transform(config.resolution, Image.Resampling.BILINEAR)
    exif = exif_of_boxes(config.exif)
    options = {**test_options(config), "transform": transform, "exif": exif}
    return AttributeTestSet(config.files(split), **options)
