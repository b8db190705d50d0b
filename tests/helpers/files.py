"""Files that tests make: images and tar files."""

import io
import struct
import tarfile
import zlib

import numpy as np
import torch
from PIL import Image


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encoded(picture, format, **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg_of_scans(picture, count):
    """A progressive JPEG whose last scan, which refines coefficients that are 0, stands there again
    and again.
    """
    data = encoded(picture, "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def declares(width, height, format):
    """Bytes of an image whose header declares a size that its data do not have."""
    data = bytearray(encoded(Image.new("RGB", (16, 16)), format))
    if format == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    else:
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar file of (name, bytes), or of TarInfos without data."""
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return str(path)
