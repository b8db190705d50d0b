"""Decode image files for training and testing."""

import io
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils import read_regular

# only these plug-ins of Pillow may read files from the web; the plug-in of EPS, for example, would
# start Ghostscript
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# suffixes, with their dots
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
# A JPEG scan of a dozen bytes still takes 0.4 ms per megapixel, so a small file can keep a decoder
# busy for minutes. Counting scans first costs about 1% of decoding an ordinary image. Unlike a
# signal, it limits the time in every thread and process. Encoders write 10 scans; libtiff stops at
# 100 too.
MAX_SCANS = 100
# effect of the EXIF orientation: none, the image is turned, or the image is refused
Exif = Literal["stored", "upright", "refused"]
APP1, SOS = 0xE1, 0xDA  # markers of a JPEG: EXIF or XMP data, and the first scan


class ImageError(OSError):
    """An image cannot be used.

    Attributes:
        kind: The reason in a few words, for counts.
        problem: The reason in full and the remedy, by default "kind (detail); remedy".
    """

    def __init__(
        self,
        name: Path | str,
        kind: str,
        detail: str | None = "",
        remedy: str = "",
        *,
        problem: str = "",
    ) -> None:
        full = f"{kind} ({detail})" if detail else kind
        self.kind, self.problem = kind, problem or "; ".join(filter(None, (full, remedy)))
        super().__init__(f"{name}: {self.problem}")


def load_image(path: Path | str, exif: Exif = "stored") -> Tensor:
    """Read and decode an image file.

    Args:
        path: The file.
        exif: As in `decode_image`.

    Returns:
        uint8 [3, H, W], as from `decode_image`.

    Raises:
        ImageError: The file is missing or unreadable, or `decode_image` refuses it.
    """
    return decode_image(read_image(path), path, exif)


def read_image(path: Path | str) -> bytes:
    """Return the bytes of an image file. Raises ImageError."""
    try:
        return read_regular(path)
    except (FileNotFoundError, IsADirectoryError):
        raise ImageError(path, "missing", problem=no_file(path)) from None
    except OSError as error:
        raise ImageError(path, "unreadable", error.strerror) from None
    except ValueError as error:  # not a possible name of a file, such as one with a NUL
        raise ImageError(repr(path), "unreadable", str(error)) from None


def absolute(root: str | None, image: str) -> str:
    """Return the absolute path of a list's image, equal for all spellings of the path."""
    return os.path.abspath(os.path.join(root or "", image))


def no_file(path: Path | str) -> str:
    """Return the problem of a path that is not a file, and the remedy."""
    if "://" in str(path):
        return "is a URL; download the image and name its local path"
    if os.path.isdir(path):
        return "is a folder; name an image file in it"
    exists = os.path.exists(path)
    return "is not a regular file; name one" if exists else "does not exist; check its path"


def decode_image(data: bytes, name: Path | str, exif: Exif = "stored") -> Tensor:
    """Decode an image of any mode that Pillow supports.

    Pixels equal Pillow's convert("RGB"), as in the released code: transparency is ignored, and an
    animation gives its first frame. Unlike in Pillow, 16-bit gray is scaled to 8 bits instead of
    clipped.

    Args:
        data: Content of the file.
        name: Name of the image, for messages.
        exif: "stored" ignores the EXIF orientation, except in TIFF files, which Pillow itself
            turns. "upright" turns the image as `turn_upright` does. "refused" refuses an image that
            "upright" would turn.

    Returns:
        RGB, uint8 [3, H, W], channels last in memory.

    Raises:
        ImageError: The image is empty, corrupt or truncated, has another format than FORMATS,
            32-bit values of unknown range or a refused orientation. Before decoding: it has more
            than Image.MAX_IMAGE_PIXELS pixels or MAX_SCANS scans.
    """
    if not data:
        raise ImageError(name, "empty file")
    try:
        image = None
        if data.startswith(b"\xff\xd8\xff"):
            _check_scans(data, name)
            image = _decode_jpeg(data, name, exif)
        if image is not None:
            return image
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return decode_pillow(picture, name, exif)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(
            name, "not an image", f"its format is none of {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, "too large", str(error)) from None
    # on a broken file Pillow raises SyntaxError, ValueError, EOFError and more
    except Exception as error:
        raise ImageError(name, "broken image", str(error)) from error


def _decode_jpeg(data: bytes, name: Path | str, exif: Exif) -> Tensor | None:
    """Decode like Pillow, but faster. Return None for uncommon encodings such as CMYK."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        # simplejpeg types these int as SupportsInt
        _check_size(width, height, name)  # ty: ignore[invalid-argument-type]
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError as error:
        if re.search("premature end|bad huffman code", str(error), re.IGNORECASE):
            raise  # Pillow may accept such a file and fill the missing part with gray
        return None
    orientation = _orientation_to_apply(data, name, exif) if _has_metadata(data) else 1
    if orientation != 1:
        return from_pillow(_turn(Image.fromarray(pixels), orientation))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _has_metadata(data: bytes) -> bool:
    """Return whether a JPEG may have EXIF or XMP data, much faster than Pillow reads it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != APP1:
        if data[at + 1] == SOS:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return True  # or other bytes between the segments, which Pillow skips


def decode_pillow(image: Image.Image, name: Path | str, exif: Exif = "stored") -> Tensor:
    """Convert a picture of Pillow to uint8 [3, H, W] with the pixels of `decode_image`.

    Raises ImageError, and what Pillow raises.
    """
    _check_size(*image.size, name)
    copy = image.copy()
    # this key does not affect pixels of an RGB image, but Pillow warns about it
    copy.info.pop("transparency", None)
    orientation = _orientation_to_apply(image, name, exif)  # the copy has loaded the picture
    return from_pillow(_turn(_to_8_bits(copy, name).convert("RGB"), orientation))


def turn_upright(image: Image.Image) -> Image.Image:
    """Turn or mirror a picture by its EXIF orientation, as Pillow's ImageOps.exif_transpose does.

    Damaged EXIF data is ignored.
    """
    image.load()  # the orientation may follow the pixels
    return _turn(image, _orientation(image))


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    image = image.copy()
    image.info.clear()  # Pillow would encode other EXIF data again, which may fail
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)


def _orientation(source: Image.Image | bytes) -> int:
    """Return the EXIF orientation of a loaded picture or of a JPEG's data, 1 if it has none."""
    try:
        if isinstance(source, bytes):
            source = Image.open(io.BytesIO(source), formats=("JPEG",))  # reads the header only
        found: Any = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # on damaged data Pillow raises SyntaxError, struct.error and more
        return 1
    return found if found in range(2, 9) else 1


def has_orientation(data: bytes) -> bool:
    """Return whether `upright` turns or mirrors an image file, which `decode_image` has decoded."""
    if data.startswith(b"\xff\xd8\xff"):
        return _has_metadata(data) and _orientation(data) != 1
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()  # the orientation may follow the pixels
        return _orientation(image) != 1


def _orientation_to_apply(source: Image.Image | bytes, name: Path | str, exif: Exif) -> int:
    """Return the orientation to turn by. Raises ImageError if that is refused."""
    orientation = 1 if exif == "stored" else _orientation(source)
    if exif == "refused" and orientation != 1:
        raise ImageError(
            name,
            "turned by EXIF",
            "its boxes may refer to the stored or to the turned pixels",
            "save the image without an EXIF orientation, or set exif: stored",
        )
    return orientation


def exif_of_boxes(exif: Exif) -> Exif:
    """Return how to read images that have boxes in pixels: refuse to turn them."""
    return "refused" if exif == "upright" else exif


def _check_scans(data: bytes, name: Path | str) -> None:
    values = np.frombuffer(data, np.uint8)
    # the marker and the first byte of its length; chance matches in other data are far below the
    # limit
    scans = np.count_nonzero((values[:-2] == 0xFF) & (values[1:-1] == 0xDA) & (values[2:] == 0))
    if scans > MAX_SCANS:
        raise ImageError(
            name,
            "too slow to decode",
            f"{scans} scans exceed the limit of {MAX_SCANS}",
            "save the image again",
        )


def _check_size(width: int, height: int, name: Path | str) -> None:
    if not width * height:
        raise ImageError(name, "no pixels", f"{width} x {height}")
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(
            name,
            "too large",
            f"{width} x {height} pixels exceed the limit PIL.Image.MAX_IMAGE_PIXELS, {limit}",
        )


def _to_8_bits(image: Image.Image, name: Path | str) -> Image.Image:
    """Convert a gray image of more than 8 bits to 8 bits.

    Other images stay as they are. Pillow scales 16-bit colors the same way.
    """
    if image.mode == "F":
        raise ImageError(
            name,
            "unknown range of gray",
            "the value of white in a 32-bit float image is unknown",
            "save the image with 8 bits",
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if image.mode == "I" and (low < 0 or high > 65535):
            raise ImageError(
                name,
                "unknown range of gray",
                f"32-bit values range from {low} to {high}",
                "save the image with 8 bits",
            )
        # mode I holds 16-bit values (PGM) or 8-bit values (TIFF)
        if image.mode != "I" or high > 255:
            return Image.fromarray((values >> 8).astype(np.uint8))
    return image


def from_pillow(image: Image.Image) -> Tensor:
    """Convert an RGB picture of Pillow to uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
