"""The fast image transforms give the pixels of Pillow and torchvision."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import to_tensor
from PIL import Image

from benchmarks.dataloader import obvious_stages, pillow_operation
from dataset import transforms as T
from dataset.images import load_image

GOLDEN = Path(__file__).parent / "golden"
AFFINE = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def difference(a, b):
    return (a.int() - b.int()).abs()


def test_test_transform_matches_released_values():
    golden = torch.load(GOLDEN / "transform.pt", weights_only=True)["tensor"]
    image = T.test_transform(48)(load_image(GOLDEN / "photo.png"))
    assert image.dtype == torch.uint8 and image.is_contiguous()
    torch.testing.assert_close(
        T.normalize(image), golden, rtol=0, atol=1e-4 * golden.abs().max().item()
    )


def test_normalize_batch():
    images = torch.randint(256, (2, 3, 5, 5), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (T.MEAN, T.STD))
    torch.testing.assert_close(T.normalize(images), (images / 255 - mean) / std)


def test_crop_and_resize_equals_pillow(tmp_path, picture):
    path = tmp_path / "a.jpg"
    picture.save(path, quality=90)
    decode, crop_and_flip, _, _ = obvious_stages(96, 0.2)
    for seed in range(8):
        torch.manual_seed(seed)
        expected = to_tensor(crop_and_flip(decode(path)))
        torch.manual_seed(seed)
        image = T.random_hflip(T.random_resized_crop(load_image(path), 96, 0.2))
        assert image.is_contiguous()
        # torch keeps its bicubic weights in 16 bits: each of the two passes may round the other way
        assert difference(image, expected).max() <= 2
        assert (difference(image, expected) > 0).float().mean() < 0.08


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("name", T.OPERATIONS)
def test_operation_equals_pillow(picture, name, direction):
    size = 64
    colorful = T.test_transform(size)(to_tensor(picture))
    dull = (colorful * 0.5 + 40).to(torch.uint8)
    one_color_channel = dull.clone()
    one_color_channel[1] = 77
    blended = torch.zeros(size, size, dtype=torch.bool)
    if name in AFFINE:  # edges blend into the gray around, as in OpenCV; Pillow's do not
        white = T.OPERATIONS[name](torch.full((3, size, size), 255, dtype=torch.uint8), direction)[
            0
        ]
        blended = (white != 255) & (white != T.FILL)
        assert blended.float().mean() < 0.06 and (white == T.FILL).float().mean() > 0.02
    for image in (colorful, dull, one_color_channel):
        before = image.clone()
        result = T.OPERATIONS[name](image, direction)
        expected = to_tensor(pillow_operation(name, direction, size)(to_pillow(image)))
        assert result.dtype == torch.uint8 and torch.equal(image, before)
        assert difference(result, expected)[:, ~blended].max() <= 1
        if name not in ("Identity", "AutoContrast"):
            assert difference(result, image).float().mean() > 0.5


def test_autocontrast_of_every_range():
    for low, high in [
        (0, 255),
        (0, 1),
        (3, 3),
        (254, 255),
        (10, 17),
        (5, 248),
        (100, 199),
        (0, 0),
        (255, 255),
    ]:
        image = torch.arange(low, high + 1, dtype=torch.uint8).expand(3, 1, -1)
        expected = to_tensor(pillow_operation("AutoContrast", 1, 1)(to_pillow(image)))
        assert difference(T.autocontrast(image), expected).max() <= 1


def test_whole_chain_equals_pillow(tmp_path, picture):
    path = tmp_path / "a.jpg"
    picture.save(path, quality=90)
    transform = T.train_transform(64, 0.2)
    stages = obvious_stages(64, 0.2)
    errors = []
    for seed in range(60):
        torch.manual_seed(seed)
        expected = path
        for stage in stages:
            expected = stage(expected)
        torch.manual_seed(seed)
        errors.append((T.normalize(transform(load_image(path))) - expected).abs().mean().item())
    # in units of the normalized image: one gray level is 0.015. Edge blending and Pillow's
    # truncation remain
    assert np.mean(errors) < 0.015 and max(errors) < 0.08


@pytest.mark.parametrize("hflip, low, high", [(True, 0.3, 0.7), (False, 0, 0)])
def test_share_of_flipped_images(hflip, low, high):
    torch.manual_seed(0)
    left_to_right = torch.linspace(0, 255, 64).to(torch.uint8).expand(3, 64, 64)
    transform = T.train_transform(32, 0.5, hflip=hflip)
    images = [transform(left_to_right).float() for _ in range(100)]
    flipped = np.mean(
        [bool(image[..., 8:16].mean() > image[..., 16:24].mean()) for image in images]
    )
    assert low <= flipped <= high


def test_operations_are_drawn_uniformly_and_kept_half_the_time():
    torch.manual_seed(0)
    rounds = 4000
    draws = [draw for _ in range(rounds) for draw in T.draw_operations()]
    assert abs(len(draws) / (2 * rounds) - 0.5) < 0.02
    for name in T.OPERATIONS:
        directions = [direction for drawn, direction in draws if drawn == name]
        assert abs(len(directions) / len(draws) - 0.1) < 0.02
        assert abs(np.mean(directions)) < 0.2
