"""Memory, start-up and speed of image-caption lists: flat shared buffers against a Python list of dicts.

    python benchmarks/annotations.py [--pairs 5000000] [--workers 4]

A process loads a synthetic list and forks workers, which stay alive together and each read random entries. Their memory
is the sum of their proportional set sizes (PSS), which counts a shared page once, minus that of the same processes
without annotations. The code of libraries does not count: how much of it is in memory is up to the kernel.
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
from dataset.batches import EpochBatches

FORK = multiprocessing.get_context("fork")
READS = 1_000_000  # entries that a process reads at most, enough to touch nearly every page of their memory
LIST_PAIRS = 1_000_000  # pairs of the list of dicts at most, of which every worker has a copy in the end
WORKERS = 0, 1, 2, 4, 8  # with 0 the process itself reads, as with num_workers 0


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
    """PSS of a process's own memory and of the annotation caches that it has mapped."""
    totals = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kilobytes = sum(int(value) for name, value, _ in totals if name in ("Pss_Anon:", "Pss_Shmem:"))
    cache = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, value, *_ = line.split()
        if not name.endswith(":"):
            cache = "/annotations-" in line  # the first line of a mapping names its file
        elif cache and name == "Pss:":
            kilobytes += int(value)
    return 1024 * kilobytes


def read_some(read, data, pairs, seed):
    """Read random entries, as many as there are if they are not too many. Returns entries/s."""
    rng = np.random.default_rng(seed)
    reads, block = min(pairs, READS), 10_000  # a block's numbers take no memory to speak of
    start = time.perf_counter()
    for first in range(0, reads, block):
        for i in rng.integers(pairs, size=min(block, reads - first)).tolist():
            read(data, i)
    return reads / (time.perf_counter() - start)


def work(read, data, pairs, seed, rates, release):
    """A worker: read, report entries/s, stay alive until all are measured."""
    rates.put(read_some(read, data, pairs, seed))
    release.wait()


def load_and_read(load, read, path, pairs, workers, results):
    """The process of a rank: load, fork the workers, measure the memory of all when they have read."""
    start = time.perf_counter()
    data = load(path)
    seconds = time.perf_counter() - start
    rates, release = FORK.Queue(), FORK.Event()
    children = [FORK.Process(target=work, args=(read, data, pairs, seed, rates, release)) for seed in range(workers)]
    for child in children:
        child.start()
    lookups = sum(rates.get() for _ in children) if children else read_some(read, data, pairs, 0)
    # this process's parent has a share in most pages of Python and torch, which otherwise would seem to come with the workers
    memory = sum(proportional_bytes(pid) for pid in (os.getppid(), os.getpid(), *(child.pid for child in children)))
    release.set()
    for child in children:
        child.join()
    results.put((seconds, memory, lookups))


def first_batch(path, results):
    """The process of a rank: load a list that has its cache, draw the first batch of an epoch."""
    start = time.perf_counter()
    batches = EpochBatches(len(load_annotations(path)), batch_size=64, seed=0)
    next(iter(batches))
    results.put(time.perf_counter() - start)


def in_own_process(function, *arguments):
    """What the function puts into its last argument, a queue, in a process of its own."""
    results = FORK.Queue()
    process = FORK.Process(target=function, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def measure(*arguments):
    """Seconds to load, bytes of all processes, lookups/s of all workers: `load_and_read` in a process of its own."""
    return in_own_process(load_and_read, *arguments)


def print_memory(pairs, workers, string_bytes, buffer_bytes, baseline, loads, plain):
    """The buffers in memory and on disk, and the list of dicts, `plain`: (its pairs, their UTF-8 bytes, what was measured)."""

    def row(name, size, pairs=pairs, string_bytes=string_bytes, seconds="", lookups=""):
        print(f"| {name:45} | {size / pairs:12.1f} | {size / string_bytes:13.2f} | {seconds:>8} | {lookups:>9} |")

    def measured(name, seconds, memory, lookups, **of):
        row(name, memory - baseline, **of, seconds=f"{seconds:.2f}", lookups=f"{lookups:.0f}")

    list_pairs, list_bytes, found = plain
    print(f"{pairs} pairs, {workers} workers; memory of all processes together\n")
    print(f"| {'':45} | MB/1e6 pairs | x UTF-8 bytes | load (s) | lookups/s |")
    print(f"| {'-' * 45} | -----------: | ------------: | -------: | --------: |")
    row("UTF-8 bytes of paths and captions", string_bytes)
    row("buffers, file", buffer_bytes)
    for name, load in zip(("buffers, memory, first load (writes the file)", "buffers, memory, later loads"), loads):
        measured(name, *load)
    measured("list of dicts, memory", *found, pairs=list_pairs, string_bytes=list_bytes)
    if list_pairs < pairs:
        print(f"\nThe list of dicts has only the first {list_pairs} pairs: every process has a copy of it in the end.")
    ratio = (found[1] - baseline) / list_pairs / ((loads[1][1] - baseline) / pairs)
    print(f"\nlist of dicts / buffers: {ratio:.1f} times the memory of a pair")


def print_start(cold, warm, batch):
    print("\n| start-up | s |\n| --- | ---: |")
    print(f"| first load: checks every entry and writes the file | {cold:.2f} |")
    print(f"| later loads: open it | {warm:.4f} |")
    print(f"| a later load and the first batch of indices of an epoch | {batch:.2f} |")


def print_workers(rows):
    """rows: (number of workers, bytes of all processes, bytes of the same processes without annotations)."""
    print("\n| workers | PSS of all (MB) | each worker adds (MB) | without annotations (MB) | each worker adds (MB) |")
    print("| ------: | --------------: | --------------------: | -----------------------: | --------------------: |")
    for before, (workers, *sizes) in zip([None, *rows], rows):
        adds = ["", ""]
        if before:
            adds = [f"{(size - then) / (workers - before[0]) / 1e6:.1f}" for size, then in zip(sizes, before[1:])]
        print(f"| {workers:7} | {sizes[0] / 1e6:15.1f} | {adds[0]:>21} | {sizes[1] / 1e6:24.1f} | {adds[1]:>21} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5_000_000)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ["ALBEF_CACHE"] = os.path.join(folder, "cache")
        path, list_path = (os.path.join(folder, name) for name in ("pairs.json", "list.json"))
        list_pairs = min(args.pairs, LIST_PAIRS)
        string_bytes, list_bytes = write_pairs(path, args.pairs), write_pairs(list_path, list_pairs)
        _, baseline, _ = measure(load_nothing, read_nothing, path, args.pairs, args.workers)
        loads = [measure(load_annotations, read_flat, path, args.pairs, args.workers) for _ in ("first", "later")]
        buffer_bytes = sum(file.stat().st_size for file in Path(cache).iterdir())
        plain = measure(load_list, read_list, list_path, list_pairs, args.workers)
        print_memory(args.pairs, args.workers, string_bytes, buffer_bytes, baseline, loads, (list_pairs, list_bytes, plain))
        print_start(loads[0][0], loads[1][0], in_own_process(first_batch, path))
        readers = (load_annotations, read_flat), (load_nothing, read_nothing)
        print_workers([(n, *(measure(*reader, path, args.pairs, n)[1] for reader in readers)) for n in WORKERS])


if __name__ == "__main__":
    main()
