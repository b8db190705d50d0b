"""Image transforms on uint8 tensors, tuned for one CPU core.

The pixels equal the usual Pillow and torchvision chain within rounding (benchmarks/dataloader.py
has both). Only the edges of sheared and turned images differ. They blend into the surrounding gray,
as in the released code. Images stay uint8, a quarter of the bytes of float32, until `normalize`
runs on the device. All randomness comes from torch's default CPU generator.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from dataset.images import from_pillow

Transform = Callable[[Tensor], Tensor]
Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

ASPECT_RATIO = [3 / 4, 4 / 3]
NUM_OPERATIONS = 2
FILL = 128


def train_transform(
    image_res: int, min_scale: float | None, *, hflip: bool = True, augment: bool = True
) -> Transform:
    """Return the training transform: random crop, horizontal flip and RandAugment.

    Args:
        image_res: Side of the result in pixels.
        min_scale: Smallest share of the area that a crop keeps, None to resize the whole image.
        hflip: Whether to flip half of the images horizontally.
        augment: Whether to apply RandAugment.

    Returns:
        Function uint8 [3, H, W] -> uint8 [3, image_res, image_res].
    """
    return partial(_train, image_res=image_res, min_scale=min_scale, hflip=hflip, augment=augment)


def _train(
    image: Tensor, image_res: int, min_scale: float | None, hflip: bool, augment: bool
) -> Tensor:
    image = (
        _resize_as_pillow(image, image_res)
        if min_scale is None
        else random_resized_crop(image, image_res, min_scale)
    )
    if hflip:
        image = random_hflip(image)
    return randaugment(image) if augment else image.contiguous()


def test_transform(
    image_res: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Transform:
    """Return the test transform: uint8 [3, H, W] resized by Pillow, bit for bit."""
    return partial(_resize_as_pillow, image_res=image_res, resampling=resampling)


def _resize_as_pillow(
    image: Tensor, image_res: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> Tensor:
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    return from_pillow(pixels.resize((image_res, image_res), resampling)).contiguous()


def normalize(images: Tensor) -> Tensor:
    """Normalize images on their device.

    Args:
        images: uint8 [..., 3, H, W].

    Returns:
        (images / 255 - MEAN) / STD, float32 [..., 3, H, W].
    """
    scale, offset = _scale_and_offset(images.device)
    return images.float().mul_(scale).add_(offset)


@lru_cache
def _scale_and_offset(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))
    return 1 / (255 * std), -mean / std


def random_resized_crop(image: Tensor, size: int, min_scale: float) -> Tensor:
    """Crop a random part of an image and resize it, antialiased bicubic.

    The part has a share of `min_scale` to 1 of the area and an aspect ratio of 3/4 to 4/3. Pixels
    are within 2 gray levels of Pillow's, as torch rounds the weights to 16 bits.

    Args:
        image: uint8 [3, H, W].
        size: Side of the result in pixels.
        min_scale: Smallest share of the area.

    Returns:
        uint8 [3, size, size].
    """
    top, left, height, width = RandomResizedCrop.get_params(image, [min_scale, 1.0], ASPECT_RATIO)
    crop = image[None, :, top : top + height, left : left + width]
    # uint8 has a fast kernel for this layout
    crop = crop.contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[0].contiguous()


def random_hflip(image: Tensor) -> Tensor:
    """Mirror left and right with probability 0.5."""
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def randaugment(image: Tensor) -> Tensor:
    """Apply the operations of `draw_operations` to a uint8 [3, R, R] image."""
    for name, direction in draw_operations():
        image = OPERATIONS[name](image, direction)
    return image


def draw_operations() -> list[tuple[str, int]]:
    """Draw operations with replacement, and keep each with probability 0.5.

    Returns:
        Name and direction (1 or -1) of each operation.
    """
    names = [
        list(OPERATIONS)[i] for i in torch.randint(len(OPERATIONS), (NUM_OPERATIONS,)).tolist()
    ]
    draws = (torch.rand(NUM_OPERATIONS, 2) < 0.5).tolist()
    return [
        (name, 1 if forward else -1)
        for name, (keep, forward) in zip(names, draws, strict=True)
        if keep
    ]


def autocontrast(image: Tensor) -> Tensor:
    """Stretch each channel of a uint8 [3, H, W] image to 0..255.

    A channel of one value stays as it is.
    """
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    constant = low == high
    scale = torch.where(constant, 1, 255 / (high - low))
    return _to_uint8(image.float().sub_(low.masked_fill(constant, 0)).mul_(scale))


def equalize(image: Tensor) -> Tensor:
    """Equalize the histograms of a uint8 [3, H, W] image with Pillow's integer rule."""
    pixels = image.flatten(1)
    histogram = torch.stack([channel.bincount(minlength=256) for channel in pixels])
    brightest = histogram.gather(1, pixels.amax(1, keepdim=True).long())
    step = (pixels.shape[1] - brightest) // 255
    table = (step // 2 + histogram.cumsum(1) - histogram) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp_(max=255), torch.arange(256)).byte().numpy()
    # bytes.translate is the fastest table look-up there is for bytes
    channels = [
        channel.tobytes().translate(row.tobytes())
        for channel, row in zip(image.numpy(), table, strict=True)
    ]
    return torch.frombuffer(bytearray().join(channels), dtype=torch.uint8).view_as(image)


def brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply a uint8 [3, H, W] image by factor."""
    return _to_uint8(image.float().mul_(factor).clamp_(max=255))


def sharpness(image: Tensor, factor: float) -> Tensor:
    """Extrapolate a uint8 [3, H, W] image from its 3x3 smoothing (center weight 5 of 13).

    The border stays as it is.
    """
    wide = image.to(torch.int16)
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    center = wide[:, 1:-1, 1:-1]
    smooth = (box + 4 * center).float().mul_(1 / 13).round_()
    image = image.clone()
    image[:, 1:-1, 1:-1] = _to_uint8(smooth.lerp_(center.float(), factor).clamp_(0, 255))
    return image


def translate(image: Tensor, x: int, y: int) -> Tensor:
    """Shift a uint8 [3, H, W] image right by x and down by y pixels, filled with gray."""
    return F.pad(image, (x, -x, y, -y), value=FILL)


def shear(image: Tensor, x: float, y: float) -> Tensor:
    """Shear a square uint8 image about the origin, as in the released code.

    out(i, j) = image(i + x j, j + y i).
    """
    return _affine(image, ((1, x, 0), (y, 1, 0)))


def rotate(image: Tensor, degrees: float) -> Tensor:
    """Turn a square uint8 [3, R, R] image about the pixel (R / 2, R / 2)."""
    cos, sin, center = (
        math.cos(math.radians(degrees)),
        math.sin(math.radians(degrees)),
        image.shape[-1] / 2,
    )
    shift_x, shift_y = center - cos * center - sin * center, center + sin * center - cos * center
    return _affine(image, ((cos, sin, shift_x), (-sin, cos, shift_y)))


def _affine(image: Tensor, matrix: Matrix) -> Tensor:
    """Return out(x, y) = image(matrix @ (x, y, 1)) in pixel indices, for square uint8 images.

    Pixels are interpolated linearly, gray outside.
    """
    grid = _sampling_grid(image.shape[-1], matrix)
    values = F.grid_sample(image.float().sub_(FILL)[None], grid, align_corners=False)[0]
    return _to_uint8(values.add_(FILL + 0.5))


@lru_cache(maxsize=16)
def _sampling_grid(size: int, matrix: Matrix) -> Tensor:
    """Return the grid of grid_sample. RandAugment has 6 such matrices."""
    pixels = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    source = (
        torch.stack([x, y, torch.ones_like(x)], -1) @ torch.tensor(matrix, dtype=torch.float64).T
    )
    return ((2 * source + 1) / size - 1).float()[None]


def _to_uint8(values: Tensor) -> Tensor:
    return values.to(torch.int16).to(torch.uint8)  # torch has no vectorized float -> uint8


# Magnitude 7 of 10. No operation changes colors, because the caption may name them.
OPERATIONS = {
    "Identity": lambda image, direction: image,
    "AutoContrast": lambda image, direction: autocontrast(image),
    "Equalize": lambda image, direction: equalize(image),
    "Brightness": lambda image, direction: brightness(image, 1.36),
    "Sharpness": lambda image, direction: sharpness(image, 1.36),
    "ShearX": lambda image, direction: shear(image, 0.21 * direction, 0),
    "ShearY": lambda image, direction: shear(image, 0, 0.21 * direction),
    "TranslateX": lambda image, direction: translate(image, 7 * direction, 0),
    "TranslateY": lambda image, direction: translate(image, 0, 7 * direction),
    "Rotate": lambda image, direction: rotate(image, 21 * direction),
}
