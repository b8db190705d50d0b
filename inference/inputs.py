"""Check and read the inputs of a model: images, texts, features, boxes and numbers."""

import os
import reprlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.images import ImageError, decode_pillow, load_image
from dataset.text import is_blank, without_halves
from models.tokenizer import Tokenizer
from utils import InputError

HERE = os.path.dirname(__file__)


class UnknownWords(UserWarning):
    """Warning: the vocabulary has none of a text's words."""


def is_array(value: Any) -> bool:
    """Return whether a value is an array of NumPy or a tensor."""
    return isinstance(value, np.ndarray | Tensor)


def is_features(value: Any) -> bool:
    """Return whether a value is an array of any float type, not on the meta device."""
    return is_array(value) and "float" in str(value.dtype) and not getattr(value, "is_meta", False)


def check_features(values: Any, what: str) -> Any:
    """Return features [N, D], or [D] of a single input. Raises InputError for another value."""
    if not is_features(values) or values.ndim not in (1, 2) or 0 in values.shape:
        kind = f"{values.dtype} {list(values.shape)}" if is_array(values) else reprlib.repr(values)
        raise InputError(
            f"{what}: {kind} are not features: give an array of floats [N, D] from embed_images or"
            " embed_texts"
        )
    return values


def check_number(value: Any, what: str, least: int) -> int:
    """Return a whole number. Raises InputError for another value, or one below `least`."""
    if not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{what}={value!r}, it must be a whole number from {least}")
    return value


def check_box(box: Any) -> None:
    """Raise InputError unless a box begins with x, y, width and height in pixels."""
    try:
        values = np.asarray(box)[:4]
        right = (
            values.shape == (4,)
            and values.dtype.kind in "iuf"
            and np.isfinite(values).all()
            and values[2:].min() > 0
        )
    except (TypeError, ValueError, IndexError):
        right = False
    if not right:
        raise InputError(
            f"box {reprlib.repr(box)} is not [x, y, width, height] of a box with pixels"
        )


def as_list(values: Any, what: str, least: int = 1) -> Any:
    """Return values as a list, an array unchanged.

    Raises InputError for fewer than `least` values, or if the value is not iterable.
    """
    try:
        values = values if is_array(values) else list(values)
        count = len(values)
    except TypeError:
        raise InputError(
            f"{reprlib.repr(values)} are not {what}: give one or a list of them"
        ) from None
    if count < least:
        raise InputError(f"no {what} given: give one or a list of them")
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
                f"{reprlib.repr(text)} is not a text: give a string or a list of strings"
            )
        cleaned.append(clean(text))
        if is_blank(cleaned[-1]):
            raise InputError(
                f"text {reprlib.repr(text)}: nothing is left of it after clean-up, give a text with"
                " words"
            )
    if unknown := unknown_texts(cleaned, tokenizer):
        level = 1
        while sys._getframe(level).f_code.co_filename.startswith(HERE):
            level += 1
        others = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        warnings.warn(
            f"text {reprlib.repr(unknown[0])}{others}: the vocabulary has none of its words, so the"
            " model cannot distinguish it from other unknown texts",
            UnknownWords,
            level + 1,
        )
    return cleaned, one


def unknown_texts(texts: list[str], tokenizer: Tokenizer) -> list[str]:
    """Return the cleaned-up texts without a word in the vocabulary."""
    special = set(tokenizer.all_special_ids)
    # others have a known word
    texts = [
        text for text in texts if special.issuperset(tokenizer.convert_tokens_to_ids(text.split()))
    ]
    ids = tokenizer(list(map(without_halves, texts)))["input_ids"] if texts else []
    return [text for text, row in zip(texts, ids, strict=True) if special.issuperset(row)]


def read_image(image: Any, name: str = "image") -> Tensor:
    """Read an image as in training and testing.

    Args:
        image: A path, a picture of Pillow, an array uint8 [H, W] or [H, W, 3], or a tensor uint8
            [3, H, W].
        name: Name in messages if the image is not a path.

    Returns:
        RGB values, uint8 [3, H, W].

    Raises:
        InputError: The image cannot be read, or has another type or shape.
    """
    try:
        if isinstance(image, Image.Image):
            return decode_pillow(image, name)
        if not is_array(image):
            return load_image(image)
        if (
            isinstance(image, np.ndarray)
            and image.dtype == np.uint8
            and image.ndim > 1
            and image.shape[2:] in ((), (3,))
        ):
            return decode_pillow(Image.fromarray(image), name)
    except ImageError as error:
        raise InputError(str(error)) from None
    # Pillow raises many kinds if the picture is closed or its file is damaged
    except Exception as error:
        raise InputError(f"{name}: cannot be read: {error}") from None
    if (
        isinstance(image, torch.Tensor)
        and image.dtype == torch.uint8
        and image.ndim == 3
        and len(image) == 3
    ):
        if image.numel() and not image.is_meta:
            return image.cpu()
    raise InputError(
        f"{name}: {image.dtype} {list(image.shape)} is not an image: an array is uint8 [H, W, 3] or"
        " [H, W], a tensor uint8 [3, H, W] with values, both from 0 to 255"
    )


class Images(Dataset):
    """Images that are read on access and resized for the model: uint8 [3, R, R]."""

    def __init__(self, images: list, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(read_image(self.images[index], f"image {index}"))
