"""What users hand to a model: images of any kind and texts, one or many."""

import reprlib

import numpy as np
import torch
from PIL import Image

from dataset.images import ImageError, decode_pillow, load_image
from dataset.text import is_blank
from utils import InputError


def is_array(value):
    return isinstance(value, (np.ndarray, torch.Tensor))


def as_list(values, what, is_one):
    """Return (a list of values, whether it was one alone). Raises InputError where there are none."""
    if is_one(values):
        return [values], True
    try:
        values = values if is_array(values) else list(values)
    except TypeError:
        raise InputError(f"{reprlib.repr(values)} are not {what}: give one or a list of them") from None
    if len(values) == 0:
        raise InputError(f"no {what} given: give one or a list of them")
    return values, False


def as_images(images):
    """Return (a list of images, whether it was one alone). Raises InputError for none."""
    def is_one(value):
        return value.ndim < 4 if is_array(value) else not isinstance(value, (list, tuple)) and not hasattr(value, "__next__")

    return as_list(images, "images", is_one)


def as_texts(texts, clean):
    """Return (a list of texts after clean-up, whether it was one alone). Raises InputError for one without words, and none."""
    texts, one = as_list(texts, "texts", lambda value: isinstance(value, str))
    cleaned = []
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{reprlib.repr(text)} is not a text: give a string or a list of strings")
        cleaned.append(clean(text))
        if is_blank(cleaned[-1]):
            raise InputError(f"text {reprlib.repr(text)}: nothing is left of it after clean-up, give a text with words")
    return cleaned, one


def read_image(image, name="image"):
    """Return an image as uint8 [3, H, W], RGB, the pixels that training and testing see. Raises InputError.

    image: a path, a picture of Pillow, an array uint8 [H, W] or [H, W, 3], or a tensor uint8 [3, H, W]. name: of one that is
    not a path, for messages.
    """
    try:
        if isinstance(image, Image.Image):
            return decode_pillow(image, name)
        if not is_array(image):
            return load_image(image)
    except (ImageError, TypeError) as error:
        raise InputError(str(error) if isinstance(error, ImageError) else f"{name}: {error}") from None
    except OSError as error:  # Pillow's, of a file that it reads only now
        raise InputError(f"{name}: broken image: {error}") from None
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] in ((), (3,)):
        return decode_pillow(Image.fromarray(image), name)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        return image.cpu()
    raise InputError(f"{name}: {image.dtype} {list(image.shape)} is not an image: an array is uint8 [H, W, 3] or [H, W], a "
                     "tensor uint8 [3, H, W], both from 0 to 255")  # fmt: skip


class Images:
    """Images as a data set: each is read when it is asked for, and resized as the model takes it, uint8 [3, R, R]."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(read_image(self.images[index], f"image {index}"))
