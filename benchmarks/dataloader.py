"""Images a second on one CPU core: decode, pre-training transform, normalization.

    python benchmarks/dataloader.py               # the obvious Pillow and torchvision path, dataset/transforms.py
    python benchmarks/dataloader.py --workers 2   # also a DataLoader with 2 worker processes, end to end

The paths take turns, a pass over the images each, with the same random draws: the same work under the same load.
Times are CPU times: what another process takes of the core does not count. The DataLoader's rate is by the clock.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as tv
from PIL import Image, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset import transforms as fast
from dataset.images import load_image

WIDTH, HEIGHT = 500, 375
STAGES = ("decode", "crop, resize, flip", "RandAugment", "normalize")


def pillow_affine(matrix):
    """out(x, y) = image(matrix @ (x, y, 1)) in pixel indices (Pillow's own are half a pixel off)."""
    (a, b, c), (d, e, f) = matrix
    coefficients = (a, b, c + (1 - a - b) / 2, d, e, f + (1 - d - e) / 2)
    gray = (fast.FILL,) * 3
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=gray
    )


def pillow_operation(name, direction, size):
    """The Pillow counterpart of fast.OPERATIONS[name] for images of size x size pixels."""
    s, t, angle, r = 0.21 * direction, -7 * direction, math.radians(21 * direction), size / 2
    cos, sin = math.cos(angle), math.sin(angle)
    operations = {
        "Identity": lambda image: image,
        "AutoContrast": ImageOps.autocontrast,
        "Equalize": ImageOps.equalize,
        "Brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.36),
        "Sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1.36),
        "ShearX": pillow_affine(((1, s, 0), (0, 1, 0))),
        "ShearY": pillow_affine(((1, 0, 0), (s, 1, 0))),
        "TranslateX": pillow_affine(((1, 0, t), (0, 1, 0))),
        "TranslateY": pillow_affine(((1, 0, 0), (0, 1, t))),
        "Rotate": pillow_affine(((cos, sin, r - r * cos - r * sin), (-sin, cos, r + r * sin - r * cos))),
    }
    return operations[name]


def obvious_stages(image_res, min_scale):
    """The chain as one writes it with Pillow and torchvision, a function for each of STAGES."""

    def decode(path):
        with Image.open(path) as image:
            return image.convert("RGB")

    def randaugment(image):
        for name, direction in fast.draw_operations():
            image = pillow_operation(name, direction, image_res)(image)
        return image

    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(image_res, scale=(min_scale, 1.0), interpolation=bicubic)
    return (
        decode,
        tv.Compose([crop, tv.RandomHorizontalFlip()]),
        randaugment,
        tv.Compose([tv.ToTensor(), tv.Normalize(fast.MEAN, fast.STD)]),
    )


def fast_stages(image_res, min_scale):
    """load_image, train_transform and normalize of dataset/transforms.py, cut into STAGES."""

    def crop_and_flip(image):
        return fast.random_hflip(fast.random_resized_crop(image, image_res, min_scale))

    return load_image, crop_and_flip, fast.randaugment, fast.normalize


def photo(generator):
    """A picture with a photo's statistics: smooth fields over many scales, hard edges, fine texture."""
    image = torch.zeros(1, 3, HEIGHT, WIDTH)
    for cells, contrast in ((4, 1.0), (8, 0.7), (16, 0.5), (32, 0.3), (64, 0.2), (128, 0.13)):
        field = torch.randn(1, 3, cells * 3 // 4, cells, generator=generator)
        field = 0.3 * field + field.mean(1, keepdim=True)  # mostly gray: the channels of photos go together
        image += contrast * F.interpolate(field, size=(HEIGHT, WIDTH), mode="bicubic")
    y, x = torch.meshgrid(torch.linspace(0, 3, HEIGHT), torch.linspace(0, 4, WIDTH), indexing="ij")
    for _ in range(12):
        center_x, center_y, radius, slope = torch.rand(4, generator=generator)
        disk = (x - 4 * center_x) ** 2 + (y - 3 * center_y) ** 2 < radius**2
        half_disk = disk & (y - 3 * center_y > (slope - 0.5) * (x - 4 * center_x))
        image += half_disk * 0.6 * torch.randn(3, 1, 1, generator=generator)
    image += 0.12 * torch.randn(1, 1, HEIGHT, WIDTH, generator=generator)
    image = (image - image.mean()) / image.std() * 55 + 120
    return Image.fromarray(image[0].clamp(0, 255).byte().permute(1, 2, 0).numpy())


def write_photos(folder, count):
    generator = torch.Generator().manual_seed(0)
    paths = [Path(folder) / f"{i}.jpg" for i in range(count)]
    for path in paths:
        photo(generator).save(path, quality=90)
    return paths


def run_stages(stages, path, seed, seconds):
    """Run one image through the stages and add the CPU time of each to the list seconds."""
    torch.manual_seed(seed)
    value = path
    for i, stage in enumerate(stages):
        start = time.process_time()
        value = stage(value)
        seconds[i] += time.process_time() - start
    return value


def measure(chains, paths, rounds):
    """Run the chains over all images in turn, `rounds` times -> [chain][round][stage], CPU seconds an image."""
    timings = [[] for _ in chains]
    for seed in range(rounds + 1):
        for stages, rows in zip(chains, timings):
            seconds = [0.0] * len(STAGES)
            for i, path in enumerate(paths):
                run_stages(stages, path, seed * len(paths) + i, seconds)
            rows.append([s / len(paths) for s in seconds])
    return [rows[1:] for rows in timings]  # the first round warmed up


class Photos(Dataset):
    """The files of paths, `repeats` times over, as pre-training reads them."""

    def __init__(self, paths, repeats, transform):
        self.paths, self.repeats, self.transform = paths, repeats, transform

    def __len__(self):
        return len(self.paths) * self.repeats

    def __getitem__(self, index):
        return self.transform(load_image(self.paths[index % len(self.paths)]))


def measure_loader(paths, image_res, min_scale, workers, batch_size=64, batches=40):
    """Images a second from a DataLoader in its steady state, normalization included."""
    prefetched = 2 * workers  # batches: as many wait in the queue when the clock stops as when it starts
    repeats = math.ceil(batch_size * (batches + 2 * prefetched) / len(paths))
    photos = Photos(paths, repeats, fast.train_transform(image_res, min_scale))
    loader = iter(DataLoader(photos, batch_size, num_workers=workers))
    for _ in range(prefetched):
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        fast.normalize(next(loader))
    return batch_size * batches / (time.perf_counter() - start)


def print_table(obvious, ours):
    """Medians over the rounds; obvious and ours are [rounds][stages] in seconds."""
    print(f"\n{'milliseconds an image':<24}{'obvious':>10}{'this code':>11}{'ratio':>8}")
    for name, a, b in zip(STAGES, zip(*obvious), zip(*ours)):
        a, b = statistics.median(a), statistics.median(b)
        print(f"{name:<24}{a * 1e3:>10.3f}{b * 1e3:>11.3f}{a / b:>8.2f}")
    totals = [[sum(row) for row in rows] for rows in (obvious, ours)]
    for label, pick in (("images/s, median round", statistics.median), ("images/s, best round", min)):
        a, b = (pick(rows) for rows in totals)
        print(f"{label:<24}{1 / a:>10.0f}{1 / b:>11.0f}{a / b:>8.2f}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--image_res", type=int, default=256)
    parser.add_argument("--min_scale", type=float, default=0.2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, default=0, help="also measure a DataLoader with this many processes")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as DataLoader workers do

    with tempfile.TemporaryDirectory() as folder:
        paths = write_photos(folder, args.images)
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        print(f"{args.images} JPEG files of {WIDTH}x{HEIGHT}, {kilobytes:.0f} kB each on average")
        print(f"transform at {args.image_res} px, min_scale {args.min_scale}, one core, {args.rounds} rounds")
        chains = [stages(args.image_res, args.min_scale) for stages in (obvious_stages, fast_stages)]
        print_table(*measure(chains, paths, args.rounds))
        if args.workers:
            rate = measure_loader(paths, args.image_res, args.min_scale, args.workers)
            print(f"\nDataLoader, {args.workers} workers, batches of 64: {rate:.0f} images/s")


if __name__ == "__main__":
    main()
