"""Run the rows of an experiment file side by side, each once, and write its report.

  python -m experiments.run experiments/shapes.yaml
  python -m experiments.run experiments/paper.yaml --rows full hard --dry_run

A row is one command. It has a folder inside the folder that the key `output` of the file names. A
row waits for the rows that it starts from. A complete row is not started again. An interrupted row
continues. If a row fails, the end of its log is shown and the other rows go on.

The keys of a row are listed below. Only `script` is required.
  script   a script of the repository, or a module such as dataset.shapes
  config   a YAML file of configs/
  set      new values of keys of the configuration
  from     the value of --checkpoint: ROW for the file checkpoint_last.pth of that row, ROW/FILE.pth
           for another file, or random
  needs    a list of other rows to wait for. All rows wait for a row with the name `data`
  flags    the rest of the command line. {folder} stands for the row's folder. If {folder} does not
           occur, a script gets the folder as --output_dir
  seeds    a list of seeds. Each gives a run, ROW/seed0, ROW/seed1, ... A script gets the seed as
           --seed, a module does not. If a row without seeds starts from ROW, it starts from the
           first seed
  each     a list of values. Each gives a row, in which {each} stands for the value
  creates  a file that the row creates. If it is missing, the row is not complete
  minutes  expected minutes on one core
  metrics  the metrics in the table of tasks: a mapping from a label to the name in log.txt
"""

import ctypes
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from configs.cli import Parser, at_least
from engine.launch import Interrupted, run_script
from engine.output_dir import make_output_dir
from experiments.rows import (
    Row,
    Rows,
    check_unchanged,
    expand,
    read_experiments,
    select,
    settings,
    without_pretraining,
)
from utils import TrainingStopped, cores

TAIL = 6  # lines of a log that are shown
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Place(NamedTuple):
    """A GPU or core, which runs one row at a time.

    Attributes:
        name: Name of the machine in records.
        env: Environment variables of the run.
        core: Core that the run stays on, None for any.
    """

    name: str
    env: dict[str, str]
    core: int | None


def find_places(jobs: int | None = None) -> list[Place]:
    """Return the GPUs of this machine, or else its cores, at most `jobs` of them."""
    import torch

    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return [
            Place(torch.cuda.get_device_name(i), {"CUDA_VISIBLE_DEVICES": device}, None)
            for i, device in enumerate(visible.split(",")[:count])
        ][:jobs]
    # two runs on a core each are faster than one run after the other on both
    numbers = os.sched_getaffinity(0) if sys.platform == "linux" else [None] * cores()
    name = f"one core of {_processor()}"
    return [Place(name, {"OMP_NUM_THREADS": "1"}, number) for number in numbers][:jobs]


def _processor() -> str:
    """Return the name of the processor."""
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _begin(core: int | None) -> None:
    """Stay on a core, and end when the driver is killed; called in the new process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(row: Row, rows: Rows, place: Place) -> subprocess.Popen:
    """Record the start of a run, and return its process."""
    record = {"seconds": 0, **row.read_record()}
    if "began" in record:  # the driver was killed, and the run has written to its log until its end
        record["seconds"] += max(0, row.log.stat().st_mtime - record["began"])
    began = {"machine": place.name, "complete": False, "began": time.time()}
    row.write_record({**record, "settings": settings(row, rows), **began})
    print(f"{row.name}: running, see {row.log}", flush=True)
    with open(row.log, "a") as log:
        return subprocess.Popen(
            [sys.executable, *row.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **place.env},
            # Ctrl-C reaches the driver only: a second signal would keep a run from saving
            start_new_session=True,
            preexec_fn=lambda: _begin(place.core),
        )


def finish(row: Row, status: int) -> None:
    """Record the end of a run, and show the end of its log."""
    record = row.read_record()
    record["seconds"] += time.time() - record.pop("began")
    row.write_record({**record, "complete": status == 0})
    ended = f"ended with status {status}" if status else "complete"
    print(f"{row.name}: {ended} after {row.minutes:.1f} minutes")
    with open(row.log, errors="replace") as log:
        for line in deque(log, TAIL):
            print(f"    {line.rstrip()}", flush=True)


def run(rows: Rows, places: Iterable[Place]) -> tuple[list[str], list[str]]:
    """Run all rows that are not complete, in their order unless they wait for others.

    Args:
        rows: The rows by name.
        places: GPUs or cores to run on, one run at a time on each.

    Returns:
        The names of the rows that failed, and of those that were not run because of them.

    Raises:
        Interrupted: A signal came. The runs receive it, save their state and end.
    """
    done = {name for name, row in rows.items() if row.complete}
    waiting = [name for name in rows if name not in done]
    running: dict[str, tuple[subprocess.Popen, Place]] = {}
    failed, free = [], list(places)
    try:
        while True:
            ready = [name for name in waiting if done.issuperset(rows[name].needs)]
            for name, place in zip(ready, free[:], strict=False):
                waiting.remove(name)
                free.remove(place)
                running[name] = start(rows[name], rows, place), place
            if not running:
                return failed, waiting
            time.sleep(0.1)
            for name, (process, place) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    free.append(place)
                    finish(rows[name], process.returncode)
                    (failed.append if process.returncode else done.add)(name)
    except Interrupted as error:
        for process, _ in running.values():
            process.terminate()
        for name, (process, _) in running.items():
            finish(rows[name], process.wait())
        raise Interrupted(
            error.signum, "the running rows have saved their state; repeat the command to continue"
        ) from None


def show(rows: Rows, jobs: int) -> None:
    """Print the commands of the rows and the expected minutes."""
    left = 0.0
    for name, row in rows.items():
        complete, expected = row.complete, row.keys.minutes
        left += 0 if complete else max(0, expected - row.minutes)
        state = f"complete, {row.minutes:.1f} min" if complete else f"{expected:g} min"
        print(f"{name} ({state}): python {shlex.join(row.command)}")
    print(
        f"about {left:.0f} minutes are left on one core, or {left / jobs:.0f} with {jobs} runs side"
        " by side"
    )


def main() -> None:
    """Run or show the rows of an experiment file."""
    parser = Parser(__doc__)
    parser.add_argument("file", help="experiment file, such as experiments/shapes.yaml")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="run only these rows and the rows that they need"
    )
    parser.add_argument(
        "--scratch",
        action="store_true",
        help="leave out pre-training, start from random weights, and write to OUTPUT-scratch",
    )
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        help="number of parallel runs (default: number of GPUs, or of cores if there is no GPU)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="show the runs without starting them"
    )
    args = parser.parse_args()
    experiments = read_experiments(args.file)
    chosen = without_pretraining(experiments) if args.scratch else experiments
    rows = expand(chosen)
    if args.rows:
        rows = select(rows, args.rows)
    check_unchanged(rows)
    if args.dry_run:
        show(rows, args.jobs or 2)
        return
    make_output_dir(Path(chosen.output), flag="output")
    failed, left = [], []
    try:
        if not all(row.complete for row in rows.values()):
            failed, left = run(rows, find_places(args.jobs))
    finally:
        from experiments.report import report

        report(experiments)
    if failed:
        skipped = f". Rows that need a failed row were not run: {', '.join(left)}" if left else ""
        raise TrainingStopped(f"rows that failed: {', '.join(failed)}{skipped}")


if __name__ == "__main__":
    run_script(main)
