"""Measure images per second of the pre-training transform on one core, and of the loader.

    python benchmarks/dataloader.py                     # the transform
    python benchmarks/dataloader.py --workers 0 1 2     # also the loader with so many data workers

The first table compares the obvious path by Pillow and torchvision with dataset/transforms.py. The
second table compares a JSON list, whose images are files in folders of 1,000, with shards of the
same pairs. Each row measures whole epochs of the batches of Pretrain.py. The time includes the
start of the workers and excludes normalization, which runs on the GPU. Epochs of files and of
shards alternate. CPU times are the sum over all processes. On a shared machine they vary less than
elapsed times. For a cold page cache, the kernel drops the pages of the files before every epoch
(posix_fadvise). Cached directories and the cache of the disk, or of a virtual disk's host, are not
dropped.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as tv
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs.config import as_config
from dataset import transforms as fast
from dataset.build import build_dataset
from dataset.images import load_image
from dataset.loading import TrainBatches
from models.tokenizer import build_tokenizer
from tools.to_shards import convert
from tools.vocabulary import train_vocab

PHOTOS, WIDTH, HEIGHT = 64, 500, 375
IMAGE_RES, MIN_SCALE = 256, 0.2  # of pre-training
FOLDER = 1000  # image files in a folder, and pairs in a shard
PAIRS, BATCH_SIZE, LOADER_ROUNDS = 2000, 64, 3
STAGES = ("decode", "crop, resize, flip", "RandAugment", "normalize")


def pillow_affine(matrix):
    """Return the warp out(x, y) = image(matrix @ (x, y, 1)) in indices of pixels."""
    (a, b, c), (d, e, f) = matrix
    # Pillow counts from corners of pixels, which are half a pixel off
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
        "Rotate": pillow_affine(
            ((cos, sin, r - r * cos - r * sin), (-sin, cos, r + r * sin - r * cos))
        ),
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

    crop = tv.RandomResizedCrop(
        image_res, scale=(min_scale, 1.0), interpolation=tv.InterpolationMode.BICUBIC
    )
    normalize = tv.Compose([tv.ToTensor(), tv.Normalize(fast.MEAN, fast.STD)])
    return decode, tv.Compose([crop, tv.RandomHorizontalFlip()]), randaugment, normalize


def fast_stages(image_res, min_scale):
    """load_image, train_transform and normalize, cut into STAGES."""

    def crop_and_flip(image):
        return fast.random_hflip(fast.random_resized_crop(image, image_res, min_scale))

    return load_image, crop_and_flip, fast.randaugment, fast.normalize


def photo(generator):
    """A picture with a photo's statistics: smooth fields over many scales, hard edges, fine
    texture.
    """
    image = torch.zeros(1, 3, HEIGHT, WIDTH)
    for cells, contrast in ((4, 1.0), (8, 0.7), (16, 0.5), (32, 0.3), (64, 0.2), (128, 0.13)):
        field = torch.randn(1, 3, cells * 3 // 4, cells, generator=generator)
        # mostly gray: the channels of photos go together
        field = 0.3 * field + field.mean(1, keepdim=True)
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


def measure_transform(paths, rounds):
    """CPU milliseconds per image of each of STAGES, a row for each path: medians of rounds in turn,
    with equal draws.
    """
    chains, timings = (
        [stages(IMAGE_RES, MIN_SCALE) for stages in (obvious_stages, fast_stages)],
        [[], []],
    )
    for seed in range(rounds + 1):
        for stages, rows in zip(chains, timings, strict=True):
            rows.append([0.0] * len(STAGES))
            for i, value in enumerate(paths):
                torch.manual_seed(seed * len(paths) + i)
                for number, stage in enumerate(stages):
                    start = time.process_time()
                    value = stage(value)
                    rows[-1][number] += (time.process_time() - start) / len(paths) * 1e3
    # the first round warmed up
    return [list(map(statistics.median, zip(*rows[1:], strict=True))) for rows in timings]


def print_transform(paths, rounds):
    size = statistics.mean(path.stat().st_size for path in paths) / 1000
    print(
        f"{len(paths)} JPEG files of {WIDTH}x{HEIGHT}, {size:.0f} kB on average; {IMAGE_RES} px, "
        f"min_scale {MIN_SCALE}, one core, median of {rounds} rounds\n"
    )
    rows = measure_transform(paths, rounds)
    print(f"{'milliseconds per image':<24}{'obvious':>10}{'this code':>11}{'ratio':>8}")
    columns = ([*row, sum(row)] for row in rows)
    for stage, obvious, ours in zip([*STAGES, "total"], *columns, strict=True):
        print(f"{stage:<24}{obvious:>10.3f}{ours:>11.3f}{obvious / ours:>8.2f}")
    obvious, ours = (1e3 / sum(row) for row in rows)
    print(f"{'images/s':<24}{obvious:>10.0f}{ours:>11.0f}{ours / obvious:>8.2f}")


def write_pairs(folder, photos):
    """PAIRS pairs, their images the photos in turn -> ({"files": train_file, "shards": train_file},
    captions).
    """
    draw, pairs = random.Random(0), []
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(1000)]
    contents = itertools.cycle([path.read_bytes() for path in photos])
    for i, photo in zip(range(PAIRS), contents, strict=False):
        image = folder / f"images/{i // FOLDER:05d}/{i:09d}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(photo)
        pairs.append(
            {"image": str(image), "caption": " ".join(draw.choices(words, k=draw.randint(4, 16)))}
        )
    (folder / "train.json").write_text(json.dumps(pairs))
    with contextlib.redirect_stdout(io.StringIO()):
        convert([str(folder / "train.json")], "", folder / "shards", samples=FOLDER)
    train_files = {"files": str(folder / "train.json"), "shards": str(folder / "shards/*.tar")}
    return train_files, [pair["caption"] for pair in pairs]


def make_warm(paths):
    for path in paths:
        path.read_bytes()


def make_cold(paths):
    for path in paths:
        with open(path, "rb") as file:
            os.fdatasync(file)  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_be_cold(path):
    """Whether the page cache gives a file up: a file system in memory does not."""
    make_cold([path])
    # there is a disk to wait for
    with open(path, "rb") as file, contextlib.suppress(BlockingIOError):
        os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        return False
    return True


def cpu_seconds():
    """What this process and those that it has waited for have taken."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_loaders(folder, photos, workers):
    """Epochs from files and from shards in turn: medians of LOADER_ROUNDS."""
    train_files, captions = write_pairs(folder, photos)
    (folder / "vocab.txt").write_text("\n".join(train_vocab(captions, 2000)))
    tokenizer = build_tokenizer(folder / "vocab.txt")
    images = {"files": list(folder.glob("images/*/*")), "shards": list(folder.glob("shards/*.tar"))}
    timings, caches = {}, {"warm": make_warm, "cold": make_cold}
    if not can_be_cold(images["shards"][0]):
        print(
            f"\na cold cache is not measured, because {folder} is in memory: set TMPDIR to a disk"
        )
        del caches["cold"]
    for turn, cache, number, source in itertools.product(
        range(LOADER_ROUNDS), caches, workers, train_files
    ):
        caches[cache](images[source])
        config = as_config(
            {
                "train_file": train_files[source],
                "image_res": IMAGE_RES,
                "min_scale": MIN_SCALE,
                "batch_size": BATCH_SIZE,
                "num_workers": number,
            }
        )
        batches = TrainBatches(
            build_dataset("pretrain", "train", config),
            tokenizer,
            config,
            device=torch.device("cpu"),
            seed=turn,
        )
        start, cpu = time.perf_counter(), cpu_seconds()
        count = sum(len(batch.files) for batch in batches)
        seconds = (time.perf_counter() - start) / count, (cpu_seconds() - cpu) / count
        timings.setdefault((cache, number), {}).setdefault(source, []).append(seconds)
    print(f"\n{PAIRS} pairs, {FOLDER} in each folder or shard", end=", ")
    print(f"batches of {BATCH_SIZE}, {LOADER_ROUNDS} rounds")
    print(
        f"{'page cache':<12}{'workers':<9}{'images/s: files':>15}{'shards':>8}{'ratio':>7}"
        f"{'CPU ms/image: files':>22}{'shards':>8}{'ratio':>7}"
    )
    for (cache, number), rows in timings.items():
        (files, files_cpu), (shards, shards_cpu) = (
            map(statistics.median, zip(*rows[source], strict=True)) for source in train_files
        )
        print(
            f"{cache:<12}{number:<9}{1 / files:>15.0f}{1 / shards:>8.0f}{files / shards:>7.2f}"
            f"{files_cpu * 1e3:>22.3f}{shards_cpu * 1e3:>8.3f}{files_cpu / shards_cpu:>7.2f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        help="also measure the loader with these numbers of data workers",
    )
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds of the transform")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as data workers do
    with tempfile.TemporaryDirectory() as name:
        generator, folder = torch.Generator().manual_seed(0), Path(name)
        paths = [folder / f"{i}.jpg" for i in range(PHOTOS)]
        for path in paths:
            photo(generator).save(path, quality=90)
        print_transform(paths, args.rounds)
        if args.workers:
            os.environ["ALBEF_CACHE"] = str(folder / "cache")
            print_loaders(folder, paths, args.workers)


if __name__ == "__main__":
    main()
