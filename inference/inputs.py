"""Check and read a user's inputs to a model: images, texts, features, boxes and numbers, one or
many.
"""

import os
import reprlib
import sys
import warnings

import numpy as np
import torch
from PIL import Image

from dataset.images import ImageError, decode_pillow, load_image
from dataset.text import is_blank, without_halves
from utils import InputError

HERE = os.path.dirname(__file__)


class UnknownWords(UserWarning):
    """The vocabulary has none of a text's words, so the model cannot tell the text from other such
    texts.
    """


def is_array(value):
    return isinstance(value, (np.ndarray, torch.Tensor))


def is_features(value):
    """Return whether a value is an array of any float type, not on the meta device."""
    return is_array(value) and "float" in str(value.dtype) and not getattr(value, "is_meta", False)


def check_features(values, what):
    """Return features [N, D], or [D] for a single input. Raises InputError for another value."""
    if not is_features(values) or values.ndim not in (1, 2) or 0 in values.shape:
        kind = f"{values.dtype} {list(values.shape)}" if is_array(values) else reprlib.repr(values)
        raise InputError(
            f"{what}: {kind} are not features: give an array of floats [N, D], as embed_images and embed_texts do"
        )
    return values


def check_number(value, what, least):
    """Return a whole number. Raises InputError for another value, or one below `least`."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"{what}={value!r}, it is a whole number from {least}")
    return value


def check_box(box):
    """Raise InputError for a box that does not begin with x, y, width, height in pixels."""
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


def as_list(values, what, least=1):
    """Return values as a list, an array unchanged.

    Raises InputError for fewer than `least` values or no iterable.
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


def as_images(images):
    """Return (list of images, whether a single one was given).

    Raises InputError for an empty list.
    """
    if is_array(images):
        one = images.ndim < 4
    else:
        one = not isinstance(images, (list, tuple)) and not hasattr(images, "__next__")
    return ([images], True) if one else (as_list(images, "images"), False)


def as_texts(texts, clean, tokenizer):
    """Return (list of cleaned-up texts, whether a single one was given).

    Warns of texts if the vocabulary has none of their words. Raises InputError for a text without
    words or an empty list.
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
                f"text {reprlib.repr(text)}: nothing is left of it after clean-up, give a text with words"
            )
    if unknown := unknown_texts(cleaned, tokenizer):
        level = 1
        while sys._getframe(level).f_code.co_filename.startswith(HERE):
            level += 1
        others = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        warnings.warn(
            f"text {reprlib.repr(unknown[0])}{others}: the vocabulary has none of its words, so the model cannot tell "
            "it from other such texts",
            UnknownWords,
            level + 1,
        )
    return cleaned, one


def unknown_texts(texts, tokenizer):
    """Return the cleaned-up texts of whose words the vocabulary has none."""
    special = set(tokenizer.all_special_ids)
    # others have a known word
    texts = [
        text for text in texts if special.issuperset(tokenizer.convert_tokens_to_ids(text.split()))
    ]
    ids = tokenizer(list(map(without_halves, texts)))["input_ids"] if texts else []
    return [text for text, row in zip(texts, ids) if special.issuperset(row)]


def read_image(image, name="image"):
    """Return an image as uint8 [3, H, W], RGB, decoded as in training and testing. Raises
    InputError.

    image: a path, a picture of Pillow, an array uint8 [H, W] or [H, W, 3], or a tensor uint8 [3, H,
    W]. name: for messages, if the image is not a path.
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
        f"{name}: {image.dtype} {list(image.shape)} is not an image: an array is uint8 [H, W, 3] or [H, W], a "
        "tensor uint8 [3, H, W] with values, both from 0 to 255"
    )


class Images:
    """Data set of images that are read on access and resized for the model: uint8 [3, R, R]."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(read_image(self.images[index], f"image {index}"))
