"""Image files are decoded to Pillow's pixels, and bad ones raise OSError."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.dataloader import photo
from dataset.images import load_image


@pytest.fixture(scope="module")
def picture():
    return photo(torch.Generator().manual_seed(0))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "mode, name, options",
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.jpg", {"quality": 95, "subsampling": "4:4:4"}),
        ("RGB", "a.jpg", {"progressive": True}),
        ("RGB", "a.jpg", {"keep_rgb": True}),
        ("RGB", "jpeg_called.png", {"format": "JPEG"}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "a.png", {}),
        ("RGBA", "a.png", {}),
        ("LA", "a.png", {}),
        ("P", "a.png", {}),
        ("1", "a.png", {}),
        ("P", "a.gif", {}),
    ],
)
def test_load_image_equals_pillow(tmp_path, picture, mode, name, options):
    path = tmp_path / name
    picture.crop((0, 0, 61, 43)).convert(mode).save(path, **options)
    image = load_image(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 43, 61)
    with Image.open(path) as expected:
        assert torch.equal(image, to_tensor(expected.convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_files_raise(tmp_path, picture, format):
    buffer = io.BytesIO()
    picture.crop((0, 0, 120, 90)).save(buffer, format)
    data = buffer.getvalue()
    path = tmp_path / "truncated"
    for length in (0, 1, 5, 30, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        with pytest.raises(OSError, match=str(path)):
            load_image(path)


def test_damaged_jpeg_raises_but_stray_bytes_do_not(tmp_path, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    data = buffer.getvalue()
    path = tmp_path / "a.jpg"
    path.write_bytes(data[: len(data) // 2] + b"\xff\xd9")  # ends properly, but half of it is missing
    with pytest.raises(OSError, match=f"{path}.*premature end"):
        load_image(path)
    scan = data.index(b"\xff\xda")
    path.write_bytes(data[:scan] + b"stray" + data[scan:] + b"trailing")
    assert torch.equal(load_image(path), to_tensor(Image.open(io.BytesIO(data))))


def test_unreadable_files_raise(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("<html>404 Not Found</html>")
    fake = tmp_path / "fake.jpg"
    fake.write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    for path in (text, fake, tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(OSError, match=str(path)):
            load_image(path)
