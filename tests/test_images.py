"""Image files are decoded to Pillow's pixels, and bad ones raise OSError."""

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.files import declares, encoded, jpeg_of_scans, to_tensor
from PIL import ExifTags, Image

from dataset.images import decode_image, load_image


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
        ("RGB", "a.webp", {}),
        ("RGB", "a.bmp", {}),
        ("RGB", "a.tiff", {"compression": "jpeg"}),
        ("RGB", "a.ppm", {}),
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
    data, path = encoded(picture.crop((0, 0, 120, 90)), format), tmp_path / "truncated"
    for length in (0, 1, 5, 30, len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        with pytest.raises(OSError, match=str(path)):
            load_image(path)


def test_damaged_jpeg_raises_but_stray_bytes_do_not(tmp_path, picture):
    data, path = encoded(picture, "JPEG"), tmp_path / "a.jpg"
    # ends properly, but half of it is missing
    path.write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    with pytest.raises(OSError, match=f"{path}.*premature end"):
        load_image(path)
    scan = data.index(b"\xff\xda")
    path.write_bytes(data[:scan] + b"stray" + data[scan:] + b"trailing")
    assert torch.equal(load_image(path), to_tensor(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("format", ["EPS", "ICO", "TGA", "PDF", "JPEG2000"])
def test_other_plug_ins_are_not_asked(monkeypatch, picture, format):
    def ghostscript(*_, **__):
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    with pytest.raises(OSError, match="^photo.jpg: not an image .*none of JPEG, PNG"):
        decode_image(encoded(picture.crop((0, 0, 61, 43)), format), "photo.jpg")


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(monkeypatch, mode):
    def decode(*_):
        raise AssertionError("decoded")

    black = Image.new(mode, (64, 48))
    usual, hostile = encoded(black, "JPEG", progressive=True), jpeg_of_scans(black, 3000)
    assert usual.count(b"\xff\xda") >= 10 and len(hostile) < 50_000
    assert torch.equal(
        decode_image(usual, "a"), to_tensor(Image.open(io.BytesIO(usual)).convert("RGB"))
    )
    # as phones append to a photo
    video = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    assert torch.equal(decode_image(usual + video, "a"), decode_image(usual, "a"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(OSError, match="^slow.jpg: too slow to decode .3000 scans"):
        decode_image(hostile, "slow.jpg")


def image_of(image, tmp_path, name, **options):
    image.save(tmp_path / name, **options)
    return load_image(tmp_path / name)


def test_gray_of_16_bits_keeps_its_upper_8(tmp_path):
    values = np.arange(0, 65536, 37, dtype=np.uint16)[:1750].reshape(35, 50)
    gray = torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(image_of(Image.fromarray(values), tmp_path, "a.png"), gray)
    assert torch.equal(
        image_of(Image.fromarray(values.astype(">u2")), tmp_path, "big_endian.tiff"), gray
    )
    (tmp_path / "a.pgm").write_bytes(b"P5 50 35 65535\n" + values.astype(">u2").tobytes())
    assert torch.equal(load_image(tmp_path / "a.pgm"), gray)
    dark = Image.fromarray(values >> 8)
    # the file says 16 bits, whatever its values are
    assert image_of(dark, tmp_path, "dark.png").max() == 0


def test_32_bits(tmp_path):
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    small = Image.fromarray(values)
    assert torch.equal(image_of(small, tmp_path, "small.tiff"), to_tensor(small.convert("RGB")))
    for name, wide in (
        ("wide", values * 1000),
        ("negative", values - 1),
        ("float", values / np.float32(255)),
    ):
        with pytest.raises(OSError, match=f"{name}.tiff: unknown range of gray.*8 bits"):
            image_of(Image.fromarray(wide), tmp_path, f"{name}.tiff")


def png_of_16_bits(color_type, pixels):
    """A PNG of one row of pixels, tuples of 16-bit values, which Pillow does not write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = b"\0" + b"".join(struct.pack(">H", value) for pixel in pixels for value in pixel)
    header = struct.pack(">IIBBBBB", len(pixels), 1, 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_colors_of_16_bits_are_scaled_as_gray_is():
    colors = decode_image(png_of_16_bits(2, [(0x1234, 0x80FF, 0xFFFF), (0, 0x00FF, 0x0100)]), "a")
    assert colors[:, 0].T.tolist() == [[0x12, 0x80, 0xFF], [0, 0, 1]]
    assert decode_image(png_of_16_bits(4, [(0x12FF, 0x8000)]), "a").flatten().tolist() == [0x12] * 3
    assert decode_image(png_of_16_bits(0, [(0x12FF,)]), "a").flatten().tolist() == [0x12] * 3


@pytest.mark.parametrize(
    "name, options", [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})]
)
def test_of_an_animation_the_first_frame_is_used(tmp_path, picture, name, options):
    frames = [picture.crop((i, i, i + 40, i + 30)).quantize(16).convert("RGB") for i in (0, 20, 50)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert image.is_animated
    assert torch.equal(load_image(tmp_path / name), to_tensor(frames[0]))


@pytest.mark.filterwarnings("error")
def test_transparency_leaves_the_color_beneath_and_no_warning(tmp_path, picture):
    small = picture.crop((0, 0, 40, 30))
    palette = small.quantize(8)
    colors = to_tensor(palette.convert("RGB"))
    for name, transparency in (("bytes.png", bytes(range(8))), ("index.png", 3), ("index.gif", 3)):
        assert torch.equal(image_of(palette, tmp_path, name, transparency=transparency), colors)
    faded = small.copy()
    faded.putalpha(small.convert("L"))
    assert torch.equal(image_of(faded, tmp_path, "rgba.png"), to_tensor(small))


def test_exif_does_not_turn_an_image(tmp_path, picture):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    small = picture.crop((0, 0, 40, 30))
    for name in ("a.jpg", "a.png"):
        assert torch.equal(
            image_of(small, tmp_path, name, exif=exif), image_of(small, tmp_path, f"plain_{name}")
        )


@pytest.mark.parametrize(
    "format, side", [("JPEG", 9500), ("JPEG", 60000), ("PNG", 9500), ("PNG", 60000)]
)
@pytest.mark.filterwarnings("error")  # a user may turn warnings of Pillow into errors
def test_too_many_pixels_are_refused_by_the_header(monkeypatch, format, side):
    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("simplejpeg.decode_jpeg", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(OSError, match="bomb: too large .* pixels"):
        decode_image(declares(side, side, format), "bomb")


def test_unreadable_files_raise(tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("<html>404 Not Found</html>")
    fake = tmp_path / "fake.jpg"
    fake.write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    reasons = {
        text: "not an image",
        fake: "not an image",
        tmp_path / "missing.jpg": "does not exist",
        tmp_path: "is a folder",
        "https://host/a.jpg": "is a URL",
        "/dev/null": r"unreadable \(not a regular file",
    }
    fifo = tmp_path / "fifo.jpg"  # open() would wait for a writer
    os.mkfifo(fifo)
    reasons[fifo] = r"unreadable \(not a regular file"
    for path, reason in reasons.items():
        with pytest.raises(OSError, match=f"^{path}: {reason}"):
            load_image(path)
    for name in ("a\0.jpg", "\ud83d.jpg"):
        with pytest.raises(OSError, match=re.escape(repr(name))):
            load_image(name)
