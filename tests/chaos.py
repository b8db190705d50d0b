"""Kill a run of several processes at random times, and compare it with an undisturbed run.

    python tests/chaos.py [--kills 20] [--processes 2] [--seed 0]

Both runs pre-train on a small set of shapes, with a data worker in each process. There are four
kinds of kills: SIGKILL to all processes at once, SIGKILL to one process (torchrun restarts all),
SIGKILL to a data worker (it is replaced), and SIGTERM to the launcher (the run saves and ends). A
run that has ended is started again with the same command.

In the end weights, optimizer state and log.txt must equal the undisturbed run, bit for bit. The
repeated iterations must be at most the iterations between each kill and the last complete save.
Training goes on during a save, so these can be the iterations of two save intervals.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from conftest import tiny

from dataset.shapes.files import write_dataset

KINDS = ["everything", "process", "data worker", "launcher by SIGTERM"]
# after these there is nothing left that restarts the run
ENDING = ("everything", "launcher by SIGTERM")
SAVE_EVERY = 10


def write_run(folder, epochs):
    """Writes data and the configuration of a small model; returns the path of the latter."""
    write_dataset(
        folder / "data", train=96, val=4, test=8, noise=0.1, seed=0, image_size=48, captions=3
    )
    config = tiny(folder / "data")
    (folder / "bert.json").write_text(json.dumps(config["bert_config"]))
    keys = {
        "bert_config": str(folder / "bert.json"),
        "test_file": None,
        "batch_size": 4,
        "num_workers": 1,
        "save_every": SAVE_EVERY,
        "keep_checkpoints": 1,
        "scheduler": {"lr": 1e-3, "epochs": epochs, "warmup_iters": 5},
    }
    YAML(typ="safe").dump({**config, **keys}, folder / "config.yaml")
    return folder / "config.yaml"


def start(config, output_dir, trace, processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--max-restarts=1000",
        "tests/helpers/troubled.py",
        "--config",
        config,
        "--output_dir",
        output_dir,
        "--device",
        "cpu",
        "--resume",
    ]
    # many a kill comes during a write
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRACE": str(trace), "SLOW": "0.1"}
    with open(output_dir.with_suffix(".out"), "a") as out:
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=out, stderr=out
        )


def children(pid):
    """Process numbers of the living children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def kill(pid, signum=signal.SIGKILL):
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass


def strike(launcher, kind, rng):
    """Kills what kind says, if it is there. Returns whether it was."""
    ranks = children(launcher.pid)
    workers = [child for rank in ranks for child in children(rank)]
    if kind == "everything":
        kill(launcher.pid)
        for pid in ranks + workers:
            kill(pid)
    elif kind == "launcher by SIGTERM":
        kill(launcher.pid, signal.SIGTERM)
    else:
        victims = ranks if kind == "process" else workers
        if not victims:
            return False
        kill(rng.choice(victims))
    return True


def lives(trace):
    """The iterations that each start of the run has begun, in order: [[0, 1, 2], [2, 3], ...]."""
    lines = [line.split() for line in trace.read_text().splitlines()] if trace.exists() else []
    return [
        [int(number) for _, number in group]
        for _, group in itertools.groupby(lines, key=lambda line: line[0])
    ]


def wait(launcher, trace, seconds, begun):
    """Waits for seconds, counted from the first iteration of this start if `begun`.

    Returns whether the run goes on.
    """
    before = len(trace.read_text()) if trace.exists() else 0
    while (
        begun
        and launcher.poll() is None
        and (not trace.exists() or len(trace.read_text()) == before)
    ):
        time.sleep(0.05)
    try:
        launcher.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def disturb(config, output_dir, trace, kinds, rng, longest, processes=2):
    """Runs with a kill of each of kinds at random instants, up to `longest` seconds of training
    apart, until the run ends.
    """
    pending = list(kinds)
    while True:
        launcher, fatal = start(config, output_dir, trace, processes), False
        while pending and not fatal:
            # one kill in four hits the start of the program, where there is nothing to save but
            # something to break
            in_training = rng.random() < 0.75
            if not wait(
                launcher, trace, rng.uniform(0, longest if in_training else 6), in_training
            ):
                break
            if strike(launcher, pending[0], rng):
                kind = pending.pop(0)
                fatal = kind in ENDING
                begun = [len(life) for life in lives(trace)]
                print(f"{kind} killed; iterations begun in each start: {begun}")
        status = launcher.wait()
        if status == 0:
            assert not pending, f"the run ended before {len(pending)} kills; make it longer"
            return
        assert fatal, (
            f"the run ended by itself with status {status}, see {output_dir.with_suffix('.out')}"
        )


def assert_same_run(left, right):
    """Two output folders hold the same weights, optimizer state and losses, bit for bit."""
    states = [
        torch.load(folder / "checkpoint_last.pth", weights_only=True) for folder in (left, right)
    ]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), f"{name} differs"
    for i, moments in states[0]["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][i][key]), (
                f"{key} of the optimizer differs"
            )
    assert (left / "log.txt").read_text() == (right / "log.txt").read_text(), "log.txt differs"


def check(whole, parts, trace, iterations):
    """Raises AssertionError unless two runs are the same and only what kills explain was repeated;
    returns how much was.
    """
    assert_same_run(whole, parts)
    assert not list(parts.glob(".*.tmp")), "half-written files were left"
    done, repeated = -1, 0
    for life in lives(trace):
        assert life == list(range(life[0], life[0] + len(life))), "iterations out of order"
        assert life[0] <= done + 1, "iterations were left out"
        assert done + 1 - life[0] <= 2 * SAVE_EVERY, (
            "more was repeated than since the last save that was complete"
        )
        repeated += done + 1 - life[0]
        done = life[-1]
    assert done == iterations - 1
    return repeated


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument(
        "--longest", type=float, default=6, help="maximum seconds of training between two kills"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = write_run(folder, args.epochs)
        begun = time.monotonic()
        assert (
            start(config, folder / "whole", folder / "whole.trace", args.processes).wait() == 0
        ), (folder / "whole.out").read_text()
        (iterations,) = map(len, lives(folder / "whole.trace"))
        print(f"undisturbed: {iterations} iterations in {time.monotonic() - begun:.0f} s")
        kinds = [kind for _, kind in zip(range(args.kills), itertools.cycle(KINDS))]
        rng.shuffle(kinds)
        disturb(
            config,
            folder / "parts",
            folder / "parts.trace",
            kinds,
            rng,
            args.longest,
            args.processes,
        )
        repeated = check(folder / "whole", folder / "parts", folder / "parts.trace", iterations)
        print(
            f"{args.kills} kills, {len(lives(folder / 'parts.trace'))} starts that trained,"
            f" {repeated} iterations done twice (at most {2 * SAVE_EVERY} a kill): weights,"
            " optimizer state and log.txt are those of the undisturbed run"
        )


if __name__ == "__main__":
    main()
