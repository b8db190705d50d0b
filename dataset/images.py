"""Decoding of image files, the way training and testing see them."""

import io
import re
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError


def load_image(path):
    """Decode an image file as `decode_image` does. Raises OSError also for a file that is missing or unreadable."""
    return decode_image(Path(path).read_bytes(), path)


def decode_image(data, name):
    """Decode the bytes of an image of any mode Pillow knows -> uint8 [3, H, W], RGB, channels last in memory.

    Raises OSError, with name in the message, for one that is corrupt or truncated.
    """
    try:
        image = _decode_jpeg(data) if data.startswith(b"\xff\xd8\xff") else None
        return _decode_with_pillow(data) if image is None else image
    except UnidentifiedImageError:
        raise OSError(f"{name}: not an image that Pillow can read") from None
    except Exception as error:  # on a broken file Pillow raises SyntaxError, ValueError, EOFError and more
        raise OSError(f"{name}: broken image: {error}") from error


def _decode_jpeg(data):
    """Pillow's pixels, faster; None for the uncommon encodings that are left to Pillow, CMYK for one."""
    try:
        _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError as error:
        if re.search("premature end|bad huffman code", str(error), re.IGNORECASE):
            raise  # Pillow may accept such a file and fill what is missing with gray
        return None


def _decode_with_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return from_pillow(image.convert("RGB"))


def from_pillow(image):
    """An RGB picture of Pillow -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
