"""Decoding of image files, the way training and testing see them."""

import io
import re
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError


# _check_size refuses what Pillow only warns of
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class _Refused(Exception):
    """A file that is not decoded, though it might be; the message is the kind of reason, a colon and the details."""


def load_image(path):
    """Decode an image file as `decode_image` does. Raises OSError also for a file that is missing or unreadable."""
    try:
        data = Path(path).read_bytes()
    except ValueError as error:  # a name that no file can have, with a NUL in it for one
        raise OSError(f"{path!r}: {error}") from None
    return decode_image(data, path)


def decode_image(data, name):
    """Decode the bytes of an image of any mode Pillow knows -> uint8 [3, H, W], RGB, channels last in memory.

    Pixels are those of Pillow's convert("RGB"), as in the released code: EXIF does not turn them, transparency leaves the
    color beneath, of an animation the first frame is used. Gray of 16 bits is scaled to 8, where Pillow clips it.
    Raises OSError, with name in the message, for one that is empty, corrupt or truncated, of 32-bit values whose white is not
    known, or, before it is decoded, of more pixels than Image.MAX_IMAGE_PIXELS.
    """
    if not data:
        raise OSError(f"{name}: empty file")
    try:
        image = _decode_jpeg(data) if data.startswith(b"\xff\xd8\xff") else None
        return _decode_with_pillow(data) if image is None else image
    except UnidentifiedImageError:
        raise OSError(f"{name}: not an image that Pillow can read") from None
    except _Refused as error:
        raise OSError(f"{name}: {error}") from None
    except Image.DecompressionBombError as error:
        raise OSError(f"{name}: too large: {error}") from None
    except Exception as error:  # on a broken file Pillow raises SyntaxError, ValueError, EOFError and more
        raise OSError(f"{name}: broken image: {error}") from error


def _decode_jpeg(data):
    """Pillow's pixels, faster; None for the uncommon encodings that are left to Pillow, CMYK for one."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(width, height)
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError as error:
        if re.search("premature end|bad huffman code", str(error), re.IGNORECASE):
            raise  # Pillow may accept such a file and fill what is missing with gray
        return None


def _decode_with_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        _check_size(*image.size)
        image.load()
        image.info.pop("transparency", None)  # without effect on the pixels of an RGB image, but Pillow warns of it
        return from_pillow(_to_8_bits(image).convert("RGB"))


def _check_size(width, height):
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise _Refused(f"too large: {width} x {height} pixels, the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS)")


def _to_8_bits(image):
    """A gray image of more than 8 bits as one of 8, others as they are. 16-bit colors Pillow has scaled the same way."""
    if image.mode == "F":
        raise _Refused("unknown range of gray: 32-bit float says nothing of which value is white; save the image with 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "I" and (low < 0 or high > 65535):
            raise _Refused(f"unknown range of gray: 32-bit values of {low} to {high}; save the image with 8 bits")
        if image.mode != "I" or high > 255:  # mode I holds 16 bits (PGM), but 8-bit values (TIFF) as well
            return Image.fromarray((values >> 8).astype(np.uint8))
    return image


def from_pillow(image):
    """An RGB picture of Pillow -> uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
