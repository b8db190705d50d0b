"""Images a second: the transform on one CPU core, and the loader of pre-training from image files and from shards.

    python benchmarks/dataloader.py                   # decode, pre-training transform, normalization
    python benchmarks/dataloader.py --workers 0 1 2   # also the loader with these numbers of data workers

The first table compares the obvious Pillow and torchvision path with dataset/transforms.py. The paths take turns, a pass over
the images each, with the same random draws: the same work under the same load. Times are CPU times: what another process takes
of the core does not count.

The second reads the same pairs as a JSON list with image files in folders of 1,000, and as shards that dataset.to_shards made
of them: the same few photos under many names. "bytes alone" is one process that fetches the image bytes and captions of each
pair once, the files in random order, the shards from start to end; nothing is decoded. The other rows are a whole epoch of
Pretrain.py's batches (build_dataset, TrainBatches): start of the workers, reading, decoding, transform, tokenization and the
way to the training process, but not normalization, which is the GPU's. Files and shards take turns. Images a second are by the
clock, which on a shared machine is noise of tens of percent; CPU times, of all processes together, show small differences.
With a cold page cache, the kernel gave up the pages of the files before every pass (posix_fadvise, which needs no root), but
not the directories and inodes, nor the disk, or the host of a virtual one, what it caches itself: the first read of millions
of files is slower than that.
"""

import argparse
import contextlib
import itertools
import json
import math
import operator
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
from dataset import build_dataset, transforms as fast
from dataset.annotations import load_annotations
from dataset.batches import TrainBatches
from dataset.images import load_image
from dataset.shards import Shards, expand, image_and_captions
from dataset.to_shards import convert
from models.tokenizer import build_tokenizer, captions_of, train_vocab
from configs.schema import with_defaults

WIDTH, HEIGHT = 500, 375
FOLDER = 1000  # image files in a folder, and pairs in a shard
PAIRS, BATCH_SIZE = 2000, 64
SOURCES = "files", "shards"  # of pairs: a JSON list and image files, or shards
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


def write_pairs(folder, photos):
    """PAIRS pairs, their images the photos in turn: {"files": train_file, "shards": train_file of the same pairs}."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(1000)]
    contents, pairs = [path.read_bytes() for path in photos], []
    for i in range(PAIRS):
        image = folder / f"images/{i // FOLDER:05d}/{i:09d}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(contents[i % len(contents)])
        pairs.append({"image": str(image), "caption": " ".join(draw.choices(words, k=draw.randint(4, 16)))})
    (folder / "train.json").write_text(json.dumps(pairs))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        convert([str(folder / "train.json")], "", folder / "shards", FOLDER)
    return {"files": str(folder / "train.json"), "shards": str(folder / "shards/*.tar")}


def reader_of_files(train_file):
    """A function that fetches the captions and image bytes of every pair of a JSON list once, and the paths of the files."""
    annotations = load_annotations([train_file])
    paths = [annotations.image(i) for i in range(len(annotations))]

    def read():
        for i in torch.randperm(len(paths)).tolist():
            assert annotations.captions(i) and Path(annotations.image(i)).read_bytes()

    return read, paths


def reader_of_shards(train_file):
    """The same of shards."""
    shards = Shards(expand([train_file])[1])

    def read():
        for i in range(len(shards)):
            assert all(image_and_captions(shards[i], ""))

    return read, shards.paths


def reader_of_epoch(config, tokenizer):
    """A function that goes through an epoch of pre-training batches, and the number of their samples."""
    batches = TrainBatches(build_dataset("pretrain", config), tokenizer, config, torch.device("cpu"), seed=0)
    batches.begin(0)

    def read():
        batches.begin(0)
        for _ in batches:
            pass

    return read, len(batches) * BATCH_SIZE


def make_warm(paths):
    """Has the page cache hold files."""
    for path in paths:
        Path(path).read_bytes()


def make_cold(paths):
    """Has the page cache give up files."""
    for path in paths:
        with open(path, "rb") as file:
            os.fdatasync(file)  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def can_be_cold(path):
    """Whether make_cold works on a file; in a file system that is in memory it does not."""
    make_cold([path])
    with open(path, "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:  # there is a disk to wait for
            return True
        except OSError:  # such a file system need not know the question
            pass
    return False


def clocks():
    """Seconds that have passed, and CPU seconds that this process and the workers that have ended have taken."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_loaders(folder, photos, workers, image_res, min_scale, rounds):
    """Read pairs from files and from shards in turn -> {(cache, what): {source: [[seconds, CPU seconds], ...]}}.

    Both are per image; there is a pair for each round.
    """
    train_files = write_pairs(folder, photos)
    (folder / "vocab.txt").write_text("\n".join(train_vocab(captions_of([train_files["files"]]), 2000)))
    tokenizer = build_tokenizer(folder / "vocab.txt")
    paths, readers = {}, {"bytes alone": {}}
    for source, reader in zip(SOURCES, (reader_of_files, reader_of_shards)):
        read, paths[source] = reader(train_files[source])
        readers["bytes alone"][source] = read, PAIRS
        for number in workers:
            config = {"train_file": train_files[source], "image_res": image_res, "min_scale": min_scale,
                      "batch_size": BATCH_SIZE, "num_workers": number}  # fmt: skip
            name = f"{number} worker{'s' * (number != 1)}"
            readers.setdefault(name, {})[source] = reader_of_epoch(with_defaults(config), tokenizer)
    caches = {"warm": make_warm, "cold": make_cold}
    if not can_be_cold(paths["shards"][0]):
        print(f"no cold page cache: {folder} seems to be in memory, set TMPDIR to a folder on a disk")
        del caches["cold"]
    timings = {}
    for turn, cache, name in itertools.product(range(rounds), caches, readers):
        for source in SOURCES[:: -1 if turn % 2 else 1]:
            caches[cache](paths[source])
            read, count = readers[name][source]
            start = clocks()
            read()
            seconds = [(after - before) / count for before, after in zip(start, clocks())]
            timings.setdefault((cache, name), {}).setdefault(source, []).append(seconds)
    return timings


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


def print_loaders(timings):
    """Medians over the rounds of what measure_loaders returns."""
    for cache, rows in itertools.groupby(timings, key=operator.itemgetter(0)):
        print(f"\n{cache + ' page cache':<16}{'images/s: files':>17}{'shards':>8}{'ratio':>7}", end="")
        print(f"{'CPU ms an image: files':>26}{'shards':>8}{'ratio':>7}")
        for row in rows:
            files, shards = ([statistics.median(column) for column in zip(*timings[row][source])] for source in SOURCES)
            print(f"{row[1]:<16}{1 / files[0]:>17.0f}{1 / shards[0]:>8.0f}{files[0] / shards[0]:>7.2f}", end="")
            print(f"{files[1] * 1e3:>26.3f}{shards[1] * 1e3:>8.3f}{files[1] / shards[1]:>7.2f}")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--image_res", type=int, default=256)
    parser.add_argument("--min_scale", type=float, default=0.2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="+", help="also measure the loader with these numbers of data workers")
    parser.add_argument("--loader_rounds", type=int, default=3)
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
            os.environ["ALBEF_CACHE"] = f"{folder}/cache"
            print(f"\n{PAIRS} pairs, {FOLDER} a folder or shard, batches of {BATCH_SIZE}, {args.loader_rounds} rounds")
            options = args.workers, args.image_res, args.min_scale, args.loader_rounds
            print_loaders(measure_loaders(Path(folder), paths, *options))


if __name__ == "__main__":
    main()
