"""Check and read the inputs of a model: images, texts, features, boxes and numbers."""

import reprlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import Exif, ImageError, decode_pillow, load_image
from dataset.text import is_blank, without_halves
from models.tokenizer import Tokenizer
from utils import InputError


class UnknownWords(UserWarning):
    """Warning: the vocabulary has none of a text's words."""


def is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy or a tensor."""
    return isinstance(value, np.ndarray | Tensor)


def is_features(value: Any) -> bool:
    """Return whether a value is an array of any float type."""
    return is_array(value) and "float" in str(value.dtype)


def check_box(box: Any) -> None:
    """Raise InputError unless a box begins with x, y, width and height in pixels."""
    values = np.asarray(box).ravel()[:4]
    are_numbers = len(values) == 4 and values.dtype.kind in "iuf" and np.isfinite(values).all()
    if not (are_numbers and values[2:].min() > 0):
        raise InputError(
            f"box {reprlib.repr(box)} is not a box; give [x, y, width, height] with a positive"
            " width and height"
        )


def as_list(values: Any, what: str) -> Any:
    """Return values as a list, an array unchanged. Raises InputError if there are none."""
    values = values if is_array(values) else list(values)
    if len(values) == 0:
        raise InputError(f"no {what} given; give one or a list of them")
    return values


def as_images(images: Any) -> tuple[Any, bool]:
    """Return a list of images and whether a single one was given. Raises InputError."""
    if is_array(images):
        one = images.ndim < 4
    else:
        one = not isinstance(images, list | tuple) and not hasattr(images, "__next__")
    return ([images], True) if one else (as_list(images, "images"), False)


def as_texts(
    texts: Any, clean: Callable[[str], str], tokenizer: Tokenizer
) -> tuple[list[str], bool]:
    """Clean up texts, and warn of texts without a word in the vocabulary.

    Args:
        texts: A text or a list of texts.
        clean: Function that cleans up a text.
        tokenizer: Tokenizer of the model.

    Returns:
        The cleaned-up texts, and whether a single one was given.

    Raises:
        InputError: The list is empty, or nothing is left of a text.
    """
    one, cleaned = isinstance(texts, str), []
    for text in [texts] if one else as_list(texts, "texts"):
        if not isinstance(text, str):
            raise InputError(
                f"{reprlib.repr(text)} is not a text; give a string or a list of strings"
            )
        cleaned.append(clean(text))
        if is_blank(cleaned[-1]):
            raise InputError(
                f"text {reprlib.repr(text)}: nothing is left of it after clean-up; give a text with"
                " words"
            )
    if unknown := unknown_texts(cleaned, tokenizer):
        others = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        warnings.warn(
            f"text {reprlib.repr(unknown[0])}{others}: the vocabulary has none of its words, so the"
            " model cannot distinguish it from other unknown texts; use other words",
            UnknownWords,
            stacklevel=2,
        )
    return cleaned, one


def unknown_texts(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """Return the cleaned-up texts without a word in the vocabulary."""
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(list(map(without_halves, texts)))["input_ids"]
    return [text for text, row in zip(texts, ids, strict=True) if special.issuperset(row)]


def read_image(image: Any, name: str = "image", exif: Exif = "stored") -> Tensor:
    """Read an image as in training and testing.

    Args:
        image: A path, a picture of Pillow, an array uint8 [H, W] or [H, W, 3], or a tensor uint8
            [3, H, W].
        name: Name in messages if the image is not a path.
        exif: Effect of the EXIF orientation of a file or a picture, see `decode_image`.

    Returns:
        RGB values, uint8 [3, H, W].

    Raises:
        InputError: The image cannot be read, or has another type or shape.
    """
    grid = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim > 1
    try:
        if grid and image.shape[2:] in ((), (3,)):
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            return decode_pillow(image, name, exif)
        if not is_array(image):
            return load_image(image, exif)
    except ImageError as error:
        raise InputError(str(error)) from None
    # Pillow raises many kinds if the picture is closed or its file is damaged
    except Exception as error:
        raise InputError(f"{name}: cannot be read ({error}); give another image") from None
    tensor = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3
    if tensor and len(image) == 3 and image.numel():
        return image.cpu()
    raise InputError(
        f"{name}: {image.dtype} {list(image.shape)} is not an image; give a uint8 array [H, W, 3]"
        " or [H, W], or a uint8 tensor [3, H, W]"
    )


class Images(Dataset):
    """Images that are read on access and resized for the model: uint8 [3, R, R]."""

    def __init__(
        self, images: list, transform: Callable[[Tensor], Tensor], exif: Exif = "stored"
    ) -> None:
        self.images, self.transform, self.exif = images, transform, exif

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_image(self.images[index], f"image {index}", self.exif))
