"""An index of images (inference/index.py): images indexed per second of a core, and the time and
memory of a query.

The first table embeds photos of 500 x 375 with the full-size ViT at 384 px and with that of the
shapes at 64 px, random weights: first batches that lie ready in memory go through the ViT alone,
then update_index reads, resizes, embeds and saves. Times are CPU seconds, which on a shared machine
are steadier than the clock, of all processes together.

The second table searches indexes of random features, as float16 [N, 256] in a file of their own,
for the 128 images most similar to one query. The plain path makes all features float32 and sorts
all similarities. Memory is what a process takes beside the mapping of the file, at its highest. The
last column is near_copies, which compares all pairs, up to 100,000 images.

    python benchmarks/search.py [--photos 32] [--sizes 10000 100000 1000000]
"""

import argparse
import itertools
import multiprocessing
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from bench import DEVICE, MACHINE, ROOT, full_size_config
from dataloader import cpu_seconds, photo

from configs.schema import load_config
from dataset.images import load_image
from dataset.transforms import normalize, test_transform
from engine.device import autocast
from inference.index import (
    Index,
    find_images,
    near_copies,
    open_index,
    read_index,
    update_index,
    write_index,
)
from inference.model import most_similar
from models import build_model

DIM, K, REPEATS = 256, 128, 5
COPIES = 100_000  # images up to which all pairs are compared


def configurations():
    """Yield (name, configuration, how many times to index each photo) of the models that index."""
    bert = f"bert_config={ROOT / 'configs/shapes/config_bert.json'}"
    for precision in ("fp32", "bf16"):
        yield (
            "ViT-B/16, 384 px",
            full_size_config("Retrieval_flickr", f"precision={precision}", "batch_size_test=8"),
            1,
        )
    yield (
        "shapes, 64 px",
        load_config(ROOT / "configs/shapes/Pretrain.yaml", [bert, "batch_size_test=32"]),
        16,
    )


def measure_indexing(folder, config):
    """Return CPU seconds per image of the ViT alone and of update_index."""
    network = build_model("retrieval", {**config, "num_workers": 1}).to(DEVICE).eval()
    model = SimpleNamespace(
        model=network,
        config=network.config,
        device=DEVICE,
        task="retrieval",
        source="random",
        transform=test_transform(config["image_res"]),
    )
    images, problems, _ = find_images([folder])
    pixels = torch.stack([model.transform(load_image(path)) for path in images]).split(
        config["batch_size_test"]
    )
    with torch.no_grad(), autocast(config, DEVICE):
        network.encode_image(normalize(pixels[0].to(DEVICE)))  # a first call takes longer
        start = cpu_seconds()
        for batch in pixels:
            network.encode_image(normalize(batch.to(DEVICE)))
        alone = cpu_seconds() - start
    with tempfile.TemporaryDirectory() as to:
        start = cpu_seconds()
        update_index(to, open_index(to), model, images, problems)
        return alone / len(images), (cpu_seconds() - start) / len(images)


def print_indexing(count):
    print(f"indexing JPEG files of 500 x 375, images per CPU second of all processes, {MACHINE}")
    print(f"{'model':18}{'precision':>10}{'images':>8}{'ViT alone':>11}{'index':>8}{'ratio':>7}")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            photo(generator).save(Path(folder, f"{number:05d}.jpg"), quality=90)
        for name, config, copies in configurations():
            for number, copy in itertools.product(range(count), range(1, copies)):
                shutil.copy(
                    Path(folder, f"{number:05d}.jpg"), Path(folder, f"{number:05d}-{copy}.jpg")
                )
            alone, whole = measure_indexing(folder, config)
            print(
                f"{name:18}{config['precision']:>10}{count * copies:8}{1 / alone:11.2f}{1 / whole:8.2f}{alone / whole:7.2f}",
                flush=True,
            )


def synthetic_index(count):
    """Return an Index of random features."""
    generator, features = (
        torch.Generator().manual_seed(0),
        torch.empty(count, DIM, dtype=torch.float16),
    )
    for part in features.split(100_000):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
    paths, numbers = (
        [f"/photos/{i // 1000:04d}/IMG_{i:08d}.jpg" for i in range(count)],
        torch.arange(count),
    )
    return Index(paths, features, numbers, numbers, "", "", "", {}, 0)


def plain(query, features):
    """Return the K most similar the obvious way."""
    return (features.float() @ query).sort(descending=True).indices[:K]


def blocks(query, features):
    """Return the K most similar as a query finds them."""
    return most_similar(query[None], features, K)[1][0]


def cpu_milliseconds(function, repeats):
    """Return the median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def peak_memory(path, folder):
    """Return by how many MB the memory of a process grows while it searches an index whose file is
    mapped, at its highest.
    """

    def megabytes(name):
        return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1e3

    features, query = read_index(folder).features, torch.ones(DIM)
    features.view(torch.uint8).max()  # reads the file
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    before = megabytes("VmRSS")
    path(query, features)
    return megabytes("VmHWM") - before


def in_new_process(function, *args):
    """Return what a function gives in a process that has not computed anything before, and holds no
    freed memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def print_queries(sizes):
    print(f"\none query, {K} candidates of {DIM} dimensions, median of {REPEATS}; CPU milliseconds")
    print(
        f"{'images':>10}{'file MB':>9}{'open':>9}{'plain':>9}{'blocks':>9}{'ratio':>7}{'plain: MB':>11}{'blocks: MB':>12}"
        f"{'all pairs':>12}"
    )
    query = F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(1)), dim=0)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_index(folder, synthetic_index(size), [])
            megabytes = Path(folder, "index.pt").stat().st_size / 1e6
            opening, index = cpu_milliseconds(lambda: read_index(folder), 1), read_index(folder)
            assert torch.equal(plain(query, index.features), blocks(query, index.features))
            slow, fast = (
                cpu_milliseconds(lambda: path(query, index.features), REPEATS)
                for path in (plain, blocks)
            )
            memory = [in_new_process(peak_memory, path, folder) for path in (plain, blocks)]
            pairs = (
                f"{cpu_milliseconds(lambda: near_copies(index, 0.9, 'cpu'), 1):.0f}"
                if size <= COPIES
                else "-"
            )
            print(
                f"{size:10,}{megabytes:9.1f}{opening:9.1f}{slow:9.1f}{fast:9.1f}{slow / fast:7.1f}{memory[0]:11.1f}"
                f"{memory[1]:12.1f}{pairs:>12}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    print_indexing(args.photos)
    print_queries(args.sizes)


if __name__ == "__main__":
    main()
