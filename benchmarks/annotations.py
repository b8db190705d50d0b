"""Time and memory of a list of image-caption pairs: the mapped store against a Python list of
dicts.

    python benchmarks/annotations.py [--pairs 5000000]

A process loads a synthetic list and forks data workers, which stay alive together and each read
random entries. Their memory is the sum of their proportional set sizes (PSS), which counts a shared
page once, minus that of the same processes without a list. The code of libraries does not count:
how much of it is in memory is up to the kernel.
"""

import argparse
import json
import multiprocessing
import operator
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dataset.caption import Pair
from dataset.store import Entries

FORK = multiprocessing.get_context("fork")
# entries that a process reads at most, enough to touch nearly every page of their memory
READS = 1_000_000
# pairs of the list of dicts at most, of which every worker has a copy in the end
LISTED = 1_000_000
WORKERS = 0, 4, 8


def write_pairs(path, pairs):
    """Write a list with paths and captions of usual length (10 words).

    Returns the UTF-8 bytes of its strings.
    """
    rng, total = random.Random(0), 0
    lengths = (1, 2, 3, 3, 4, 4, 5, 6, 7, 8, 9)
    words = [
        "".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.choice(lengths))) for _ in range(5000)
    ]
    with open(path, "w") as file:
        for i in range(pairs):
            image, caption = (
                f"cc12m/{i // 10000:05d}/{i:09d}.jpg",
                " ".join(rng.choices(words, k=rng.randint(4, 16))),
            )
            total += len(image + caption)
            file.write(("[" if i == 0 else ", ") + json.dumps({"image": image, "caption": caption}))
        file.write("]")
    return total


def proportional_bytes(pid):
    """PSS of a process's own memory and of the files of the cache that it has mapped."""
    totals = (
        line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    )
    kilobytes = sum(int(value) for name, value, _ in totals if name in ("Pss_Anon:", "Pss_Shmem:"))
    cached = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, value, *_ = line.split()
        if not name.endswith(":"):
            cached = os.environ["ALBEF_CACHE"] in line  # the first line of a mapping names its file
        elif cached and name == "Pss:":
            kilobytes += int(value)
    return 1024 * kilobytes


def work(data, read, seed, rates, release):
    """Read random entries, report entries per second of CPU time, stay alive until all are
    measured.
    """
    numbers = np.random.default_rng(seed).integers(len(data), size=min(len(data), READS))
    start = time.process_time()
    for i in map(int, numbers):
        read(data[i])
    rates.put(len(numbers) / (time.process_time() - start))
    release.wait()


def load_and_read(load, read, path, workers, results):
    """Load, fork the workers, measure the memory of all when they have read."""
    start = time.process_time()
    data = load(path)
    seconds, rates, release = time.process_time() - start, FORK.Queue(), FORK.Event()
    children = [
        FORK.Process(target=work, args=(data, read, seed, rates, release))
        for seed in range(workers)
    ]
    for child in children:
        child.start()
    if not children:
        release.set()
        work(data, read, 0, rates, release)
    lookups = min(rates.get() for _ in range(max(1, workers)))
    # this process's parent has a share in most pages of Python and torch, which otherwise would
    # seem to come with the workers
    memory = sum(
        proportional_bytes(pid)
        for pid in (os.getppid(), os.getpid(), *(child.pid for child in children))
    )
    release.set()
    results.put((seconds, memory, lookups))


def measure(*arguments):
    """CPU seconds to load, bytes of all processes, lookups per CPU second of one, measured in a
    process of its own.
    """
    results = FORK.Queue()
    process = FORK.Process(target=load_and_read, args=(*arguments, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5_000_000)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ["ALBEF_CACHE"] = os.path.join(folder, "cache")
        path, listed_path = (os.path.join(folder, name) for name in ("pairs.json", "listed.json"))
        listed = min(pairs, LISTED)
        size, _ = write_pairs(path, pairs), write_pairs(listed_path, listed)
        store = (
            (lambda path: Entries([path], Pair)),
            operator.attrgetter("image", "texts"),
            path,
            pairs,
        )
        dicts = (
            (lambda path: json.loads(Path(path).read_text())),
            operator.itemgetter("image", "caption"),
            listed_path,
            listed,
        )
        loaders = {
            "store, first load": store,
            "store": store,
            f"list of dicts, {listed} pairs": dicts,
        }
        print(f"{pairs} pairs; CPU time of one process, memory of all together\n")

        def row(name, workers, seconds, size, count, lookups):
            print(
                f"| {name:30} | {workers:>7} | {seconds:>8} | {size / 1e6:5.0f} | {size / count:10.1f} | {lookups:>9} |"
            )

        print(
            "|                                | workers |  load, s |    MB | MB/million | lookups/s |"
        )
        print(
            "| ------------------------------ | ------: | -------: | ----: | ---------: | --------: |"
        )
        row("UTF-8 of paths and captions", "", "", size, pairs, "")
        for name, (load, read, path, count) in loaders.items():
            for workers in WORKERS[:1] if "first" in name else WORKERS:
                _, empty, _ = measure(lambda _: range(count), lambda i: i, path, workers)
                seconds, memory, lookups = measure(load, read, path, workers)
                row(name, workers, f"{seconds:.3f}", memory - empty, count, f"{lookups:.0f}")
        row(
            "files of the store",
            "",
            "",
            sum(file.stat().st_size for file in os.scandir(cache)),
            pairs,
            "",
        )


if __name__ == "__main__":
    main()
