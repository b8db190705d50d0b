"""Attributes of objects in boxes, as OVAD has them:

COCO's images and annotations, with a label for every attribute.
"""

import os
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from dataset.annotations import by_id, digest, read_json
from dataset.base import EntryDataset
from dataset.images import ImageError, load_image
from utils import InputError

FREQUENCIES = ("head", "medium", "tail")  # how often an attribute occurs, as the file says
MIN_AREA = 50  # pixels of an object that is evaluated
_WANTED = (
    'a file of attributes is {"images": [...], "attributes": [{id, name: "type:value/synonym", type, parent_type, '
    'freq_set, is_has_att}, ...], "annotations": [{image_id, bbox: [x, y, w, h], area, '
    "att_vec}, ...]}: correct it"
)


class Attribute(msgspec.Struct):
    """An attribute that an object is ("red") or has ("long hair length"); its name is
    "type:value/synonym/...".
    """

    id: int
    name: Annotated[str, Meta(pattern="^[^:]+:[^:]+$")]
    type: str
    parent_type: str
    freq_set: Literal[*FREQUENCIES]
    is_has_att: Literal["is", "has"]

    @property
    def values(self):
        """The value and its synonyms."""
        return self.name.partition(":")[2].split("/")


class _Image(msgspec.Struct):
    id: int
    width: int
    height: int
    file_name: str


class _Annotation(msgspec.Struct):
    image_id: int
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)]
    area: float
    att_vec: list[Literal[-1, 0, 1]]


class _Content(msgspec.Struct):
    images: list[_Image]
    attributes: Annotated[list[Attribute], Meta(min_length=1)]
    annotations: list[_Annotation]


class Box(NamedTuple):
    """A box to evaluate: its image, whole pixels x, y, w, h, and for each attribute 1, 0 or -1 (not
    labeled).
    """

    image: str  # its path
    size: tuple  # (height, width) of the image according to the file
    pixels: tuple
    labels: list
    where: str  # in the file, for messages


def read_boxes(path):
    """Read a file of attributes in boxes: the Attributes, and a Box for every object of at least
    MIN_AREA pixels.

    Attributes and the labels of att_vec are in the order of the attributes' ids. Raises InputError
    for content of another form, a box outside its image, an att_vec whose length is not the number
    of attributes, and an id of two images or attributes. The message names the annotation, counted
    from 0.
    """
    content, boxes = read_json(path, _Content, _WANTED), []
    images = by_id(content.images, path, "image")
    attributes = [
        attribute for _, attribute in sorted(by_id(content.attributes, path, "attribute").items())
    ]
    for number, annotation in enumerate(content.annotations):
        where = f"{path}: annotation {number} (counting from 0)"
        image, labels = images.get(annotation.image_id), annotation.att_vec
        if image is None:
            raise InputError(
                f"{where}: image_id {annotation.image_id} is not among the images: correct it or add the image"
            )
        if len(labels) != len(attributes):
            raise InputError(
                f"{where}: att_vec has {len(labels)} labels for {len(attributes)} attributes: give each "
                "attribute one, -1 where it is not labeled"
            )
        x, y, w, h = pixels = tuple(map(int, annotation.bbox))
        if min(annotation.bbox) < 0 or x + w > image.width or y + h > image.height:
            raise InputError(
                f"{where}: bbox {annotation.bbox} lies outside of its image of {image.width} x {image.height} "
                "pixels: correct it"
            )
        if annotation.area >= MIN_AREA:
            if min(w, h) < 1:
                raise InputError(
                    f"{where}: bbox {annotation.bbox} has no whole pixel: correct it, or area {annotation.area}"
                )
            boxes.append(Box(image.file_name, (image.height, image.width), pixels, labels, where))
    if not boxes:
        raise InputError(
            f"{path}: has no annotation with an area of {MIN_AREA} pixels or more: name another file"
        )
    if not any(1 in box.labels for box in boxes):
        raise InputError(
            f"{path}: no box has an attribute, a 1 in its att_vec, so that there is no average precision: correct "
            "it"
        )
    return attributes, boxes


class AttributeTestSet(EntryDataset):
    """The boxes of files of attributes, all with the same attributes; item i is box i cropped and
    resized, uint8 [3, R, R].

    attributes: the Attributes; entries: the Boxes. Raises InputError as read_boxes does.
    """

    def __init__(self, files, image_root, transform):
        read = [read_boxes(file) for file in files]
        self.attributes = read[0][0]
        for file, (attributes, _) in zip(files, read):
            if attributes != self.attributes:
                raise InputError(
                    f"{file}: has other attributes than {files[0]}: evaluate one after the other"
                )
        super().__init__(
            [box for _, boxes in read for box in boxes], {"image_root": image_root}, transform
        )

    def digest(self) -> str:
        return f"{digest(self.entries):016x}"

    def files(self, index):
        return [os.path.join(self.roots["image_root"], self.entry(index).image)]

    def where(self, index):
        return self.entry(index).where

    def read(self, index):
        (file,), (x, y, w, h) = self.files(index), self.entry(index).pixels
        image, (height, width) = load_image(file), self.entry(index).size
        if image.shape[1:] != (height, width):
            raise ImageError(
                file,
                "wrong size",
                f"{self.where(index)} is in an image of {width} x {height} pixels, this one has "
                f"{image.shape[2]} x {image.shape[1]}: it is another image",
            )
        return self.transform(image[:, y : y + h, x : x + w])
