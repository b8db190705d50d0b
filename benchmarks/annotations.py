"""Memory and speed of image-caption lists: flat shared buffers against a Python list of dicts.

    python benchmarks/annotations.py [--pairs 1000000] [--workers 4]

A process loads a synthetic list and forks workers, which stay alive together and each read every entry in random
order. Their memory is the sum of their proportional set sizes (PSS), which counts a shared page once, minus that of
the same processes without annotations.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.annotations import load_annotations

FORK = multiprocessing.get_context("fork")


def write_pairs(path, pairs):
    """Write a list with paths and captions of usual length (10 words). Returns the UTF-8 bytes of its strings."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.choice((1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9))))
             for _ in range(5000)]
    string_bytes = 0
    with open(path, "w") as file:
        for i in range(pairs):
            image = f"cc12m/{i // 10000:05d}/{i:09d}.jpg"
            caption = " ".join(rng.choices(words, k=rng.randint(4, 16)))
            string_bytes += len(image) + len(caption)
            file.write(("[" if i == 0 else ", ") + json.dumps({"image": image, "caption": caption}))
        file.write("]")
    return string_bytes


def load_nothing(path):
    return None


def load_list(path):
    with open(path) as file:
        return json.load(file)


def read_nothing(data, i):
    return i


def read_list(data, i):
    return data[i]["image"], data[i]["caption"]


def read_flat(data, i):
    return data.image(i), data.captions(i)


def proportional_bytes(pid):
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def read_all(read, data, pairs, seed, rates, release):
    """A worker: read every entry once, report entries/s, stay alive until all are measured."""
    order = np.random.default_rng(seed).permutation(pairs)
    start = time.perf_counter()
    for block in np.array_split(order, 1 + pairs // 10000):
        for i in block.tolist():
            read(data, i)
    rates.put(pairs / (time.perf_counter() - start))
    release.wait()


def load_and_read(load, read, path, pairs, workers, results):
    """The process of a rank: load, fork the workers, measure the memory of all when they have read everything."""
    start = time.perf_counter()
    data = load(path)
    seconds = time.perf_counter() - start
    rates, release = FORK.Queue(), FORK.Event()
    children = [FORK.Process(target=read_all, args=(read, data, pairs, seed, rates, release))
                for seed in range(workers)]
    for child in children:
        child.start()
    lookups = sum(rates.get() for _ in children)
    memory = sum(proportional_bytes(pid) for pid in (os.getpid(), *(child.pid for child in children)))
    release.set()
    for child in children:
        child.join()
    results.put((seconds, memory, lookups))


def measure(*arguments):
    """Seconds to load, bytes of all processes, lookups/s of all workers: `load_and_read` in a process of its own."""
    results = FORK.Queue()
    process = FORK.Process(target=load_and_read, args=(*arguments, results))
    process.start()
    measured = results.get()
    process.join()
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ["ALBEF_CACHE"] = os.path.join(folder, "cache")
        path = os.path.join(folder, "pairs.json")
        string_bytes = write_pairs(path, args.pairs)
        common = path, args.pairs, args.workers
        _, baseline, _ = measure(load_nothing, read_nothing, *common)
        cold = measure(load_annotations, read_flat, *common)
        warm = measure(load_annotations, read_flat, *common)
        plain = measure(load_list, read_list, *common)
        buffer_bytes = sum(file.stat().st_size for file in Path(cache).iterdir())

    def row(name, size, seconds="", lookups=""):
        print(f"| {name:45} | {size / args.pairs:12.1f} | {size / string_bytes:13.2f} | {seconds:>8} | {lookups:>9} |")

    print(f"{args.pairs} pairs, {args.workers} workers; memory of all processes together\n")
    print(f"| {'':45} | MB/1e6 pairs | x UTF-8 bytes | load (s) | lookups/s |")
    print(f"| {'-' * 45} | -----------: | ------------: | -------: | --------: |")
    row("UTF-8 bytes of paths and captions", string_bytes)
    row("buffers, file", buffer_bytes)
    for name, (seconds, memory, lookups) in (("buffers, memory, first load (writes the file)", cold),
                                             ("buffers, memory, later loads", warm),
                                             ("list of dicts, memory", plain)):
        row(name, memory - baseline, f"{seconds:.2f}", f"{lookups:.0f}")
    print(f"\nlist of dicts / buffers: {(plain[1] - baseline) / (warm[1] - baseline):.1f} times the memory")


if __name__ == "__main__":
    main()
