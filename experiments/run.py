"""Runs the rows of an experiment file side by side, each once, and writes its report.

  python -m experiments.run experiments/shapes.yaml
  python -m experiments.run experiments/paper.yaml --table table1 --dry-run

A row is one command, its result a folder under the file's `output`. Rows wait for those that they
start from. A complete row is not started again, an interrupted one continues, a failed one is
reported with the end of its log while the others go on.

The keys of a row (all but script are optional):
  script   a script of the repository, or a module such as dataset.shapes
  config   a YAML file of configs/;  set: keys of it to change
  from     the row whose checkpoint_last.pth is --checkpoint, ROW/checkpoint_best.pth for another file, or random
  needs    other rows that it waits for; `data`, if the file has it, is needed by all
  flags    the rest of the command line; {folder} is the row's folder, which without it becomes --output_dir
  seeds    a run for each, ROW/seed0, ...; a row without seeds that starts from ROW takes the first
  each     values, each of which takes the place of {each} in the row's name and values
  creates  a file without which the row is not complete
  minutes  to expect on one core
"""

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, NamedTuple, Required, TypedDict

import msgspec

from configs.cli import Parser, at_least
from configs.config import as_config
from configs.load import load_config, override, parse_yaml
from engine.launch import Interrupted, run_script
from engine.output_dir import make_output_dir
from utils import InputError, atomic_write, cores, read_regular

# in a row's folder: its settings, seconds and machine, and whether it is complete
RECORD = "experiment.json"
TAIL = 6  # lines of a log that are shown
PR_SET_PDEATHSIG = 1  # of Linux' prctl


SOME = msgspec.Meta(min_length=1)
# what a row may hold: see the head of this file; metrics: of experiments/report.py
Keys = TypedDict(
    "Keys",
    {
        "script": Required[str],
        "config": str,
        "set": dict[str, object],
        "from": str,
        "needs": list[str],
        "flags": str,
        "seeds": Annotated[list[int], SOME],
        "each": Annotated[list[str | int | float], SOME],
        "creates": str,
        "minutes": float,
        "metrics": object,
    },
    total=False,
)


class Content(TypedDict):
    """What an experiment file holds beside its tables."""

    output: str
    rows: Annotated[dict[str, object], SOME]


class Row(NamedTuple):
    """A run: what the file says of it, with `each` and `seeds` filled in."""

    name: str  # also its folder under `output`
    keys: dict
    seed: int | None
    folder: Path
    needs: list  # names of rows; this row starts from the last one
    command: list  # without the interpreter

    @property
    def log(self):
        return self.folder.with_name(f"{self.folder.name}.log")


# --------------------------------------------------------------------------------------------------
# rows


def read_experiments(path):
    """Read an experiment file. Raises InputError."""
    try:
        content = parse_yaml(read_regular(path), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    where = path
    try:
        msgspec.convert(content, Content)
        for name, keys in content["rows"].items():
            where = f"{path}: row {name}"
            msgspec.convert(keys, Keys)
            if unknown := keys.keys() - Keys.__annotations__:
                raise InputError(
                    f"{where} has the unknown key {unknown.pop()}, there are {', '.join(Keys.__annotations__)}"
                )
    except msgspec.ValidationError as error:
        said = str(error).replace("`", "'")  # names stand as in Python's messages
        raise InputError(f"{where}: {said}; experiments/shapes.yaml is an example") from None
    return content


def expand(content, output, scratch=False):
    """Return the rows of an experiment file by name, first seeds first. Raises InputError.

    output: the folder of all results. scratch: what is trained from a pre-training row starts from
    random weights instead.
    """
    given = {}
    for name, keys in content["rows"].items():
        for each in keys.get("each", [""]):
            given |= json.loads(json.dumps({name: keys}).replace("{each}", str(each)))
    if scratch:
        pretraining = {name for name, keys in given.items() if keys["script"] == "Pretrain.py"}
        given = {
            name: {**keys, "from": "random"} if keys.get("from") in pretraining else keys
            for name, keys in given.items()
            if name not in pretraining and "--evaluate" not in keys.get("flags", "")
        }
    first = {
        name: f"{name}/seed{keys['seeds'][0]}" if "seeds" in keys else name
        for name, keys in given.items()
    }
    rows = {}
    for number in range(max(len(keys.get("seeds", [""])) for keys in given.values())):
        for name, keys in given.items():
            seeds = keys.get("seeds", [None])
            if number < len(seeds):
                row = _make_row(name, keys, seeds[number], given, first, Path(output))
                rows[row.name] = row
    try:
        TopologicalSorter({name: row.needs for name, row in rows.items()}).prepare()
    except CycleError as error:
        raise InputError(
            f"rows wait for each other in a circle ({', '.join(error.args[1])}): correct what one of them starts "
            "from or needs"
        ) from None
    return rows


def _make_row(name, keys, seed, given, first, output):
    """Return the Row of a row's keys. given: the keys of all rows; first: the run that stands for
    each. Raises InputError.
    """

    def run_of(other):
        if other not in given:
            raise InputError(f"row {name}: there is no row {other} that it could start from")
        return f"{other}/seed{seed}" if seed in given[other].get("seeds", []) else first[other]

    folder = output / (name if seed is None else f"{name}/seed{seed}")
    source = keys.get("from")
    needs = [run_of(other) for other in keys.get("needs", [])]
    if "data" in given and name != "data":
        needs.append("data")
    module = not keys["script"].endswith(".py")
    command = ["-m", keys["script"]] if module else [keys["script"]]
    flags = keys.get("flags", "")
    if "config" in keys:
        command += ["--config", keys["config"], *["--resume"] * ("--evaluate" not in flags)]
    if not module and "{folder}" not in flags:
        command += ["--output_dir", str(folder)]
    if source == "random":
        command += ["--checkpoint", source]
    elif source:
        other, _, file = (
            source.rpartition("/")
            if source.endswith(".pth")
            else (source, "", "checkpoint_last.pth")
        )
        needs.append(run_of(other))
        command += ["--checkpoint", str(output / run_of(other) / file)]
    if seed is not None:
        command += ["--seed", str(seed)]
    try:
        command += [part.replace("{folder}", str(folder)) for part in shlex.split(flags)]
    except ValueError as error:
        raise InputError(f"row {name}: flags {flags!r} are not a command line: {error}") from None
    if keys.get("set"):
        command += ["--set", *(f"{key}={_yaml(value)}" for key, value in keys["set"].items())]
    return Row(str(folder.relative_to(output)), keys, seed, folder, needs, command)


def _yaml(value):
    """Return a value as --set takes it, without blanks."""
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value


def with_needs(rows, names):
    """Return the rows of these names and all that they start from, in the order of `rows`.

    Raises InputError.
    """
    wanted, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in rows:
            raise InputError(f"there is no row {name}")
        if name not in wanted:
            wanted.add(name)
            todo += rows[name].needs
    return {name: row for name, row in rows.items() if name in wanted}


def rows_of(content, table, rows):
    """Return the names of the rows that a table of an experiment file shows. Raises InputError."""
    if table not in content.get("tables", {}):
        raise InputError(
            f"--table {table}: there is no such table, there are {', '.join(content.get('tables', {}))}"
        )
    lines = content["tables"][table].get("rows", {}).values()
    columns = content["tables"][table].get("columns", [])
    names = {column["row"].format_map(line) for column in columns for line in lines}
    names |= {line for line in lines if isinstance(line, str)}
    names |= {picture["row"] for picture in content["tables"][table].get("pictures", [])}
    return [name for name in rows if name in names or name.rpartition("/seed")[0] in names]


# --------------------------------------------------------------------------------------------------
# records


def overrides(row: Row) -> list[str]:
    """Return the values of --set on a row's command line, of the row's key `set` and of its flags."""
    parser = Parser("")
    parser.add_set()
    return parser.parse_known_args(row.command)[0].set


def effective_config(row: Row, rows: dict) -> dict:
    """Return the configuration of a row's command, {} if it is the default of its script.

    If a row has no configuration and starts from a run of the same script, it has the configuration
    of that run. Raises InputError.
    """
    if "config" in row.keys:
        return load_config(row.keys["config"], overrides(row))
    if row.keys.get("from", "random") != "random":
        source = rows[row.needs[-1]]
        config = (
            effective_config(source, rows) if source.keys["script"] == row.keys["script"] else {}
        )
        return override(config, overrides(row), f"row {row.name}") if config else {}
    return {}


def settings(row, rows):
    """Return what a row's result depends on: its command, its whole configuration, and the same of
    what it starts from.

    Raises InputError where the configuration is not valid.
    """
    output = str(row.folder).removesuffix(row.name)
    config = (
        load_config(row.keys["config"], overrides(row)).to_dict() if "config" in row.keys else {}
    )
    return {
        "command": [part.removeprefix(output) for part in row.command],  # results may be moved
        "config": config,
        "needs": {name: settings(rows[name], rows) for name in row.needs},
    }


def read_record(row):
    """Return what the driver has recorded of a row, {} of one that was never started."""
    path = row.folder / RECORD
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({error}): remove {row.folder} to run the row anew"
        ) from None


def write_record(row, record):
    row.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(row.folder / RECORD, "w") as file:
        json.dump(record, file, indent=1)


def is_complete(row):
    created = row.keys.get("creates")
    return read_record(row).get("complete", False) and (created is None or Path(created).exists())


def changes(now, then):
    """Yield what differs between the settings of a row and those that it was started with."""
    if now["command"] != then["command"]:
        yield f"its command was: {shlex.join(then['command'])}"
    # a key that has come since then has its default
    before = as_config(then["config"]).to_dict() if then["config"] else {}
    yield from (
        f"{key} was {before.get(key)}"
        for key, value in now["config"].items()
        if before.get(key) != value
    )
    if now["needs"].keys() != then["needs"].keys():
        yield f"it started from {', '.join(then['needs'])}"
    for name in now["needs"].keys() & then["needs"].keys():
        yield from (
            f"of {name}, {change}" for change in changes(now["needs"][name], then["needs"][name])
        )


def check_unchanged(rows):
    """Raise InputError for a row that was run, or begun, with other settings than it has now."""
    for row in rows.values():
        now, record = settings(row, rows), read_record(row)
        if record and (change := next(changes(now, record["settings"]), None)):
            raise InputError(
                f"row {row.name} has changed since it was run, {change}: remove {row.folder} (and what started "
                "from it) to run it anew, or give the changed row another name"
            )


def minutes(row):
    """Return the wall-clock minutes that a row has run so far, all its parts together."""
    return read_record(row).get("seconds", 0) / 60


# --------------------------------------------------------------------------------------------------
# running


class Place(NamedTuple):
    """Where one run at a time goes: a GPU, or a core."""

    name: str
    env: dict
    core: int | None


def places(jobs=None):
    """Return the Places of this machine: its GPUs, one run each, else its cores, or `jobs` of them."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return [
            Place(torch.cuda.get_device_name(i), {"CUDA_VISIBLE_DEVICES": visible[i]}, None)
            for i in range(gpus)
        ][:jobs]
    usable = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None] * cores()
    )
    # two runs on a core each make more of two cores than one run after the other on both
    one = {"OMP_NUM_THREADS": "1"}
    return [Place(f"one core of {_processor()}", one, core) for core in usable][:jobs]


def _processor():
    """Return the name of the processor."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    return "an unnamed processor"


def _begin(place):
    """In the new process: stay on the place's core, and end when the driver is killed."""
    if place.core is not None:
        os.sched_setaffinity(0, {place.core})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(row, rows, place):
    """Start a row. Return its process."""
    record = {"seconds": 0, **read_record(row)}
    if "began" in record:  # the driver was killed; the log tells until when the run went on
        record["seconds"] += max(0, row.log.stat().st_mtime - record["began"])
    record |= {
        "settings": settings(row, rows),
        "machine": place.name,
        "complete": False,
        "began": time.time(),
    }
    write_record(row, record)
    print(f"{row.name}: running, see {row.log}", flush=True)
    with open(row.log, "a") as log:
        # a session of its own: Ctrl-C is for the driver, which tells the runs once; a second signal
        # keeps them from saving
        return subprocess.Popen(
            [sys.executable, *row.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **place.env},
            start_new_session=True,
            preexec_fn=lambda: _begin(place),
        )


def finish(row, status):
    """Record how a run has ended, and show the end of its log."""
    record = read_record(row)
    record["seconds"] += time.time() - record.pop("began")
    record["complete"] = status == 0
    write_record(row, record)
    print(
        f"{row.name}: {'complete' if status == 0 else f'ended with status {status}'}, {minutes(row):.1f} minutes"
    )
    for line in row.log.read_text(errors="replace").replace("\r", "\n").splitlines()[-TAIL:]:
        print(f"    {line}", flush=True)


def run(rows, free):
    """Run all rows that are not complete on the Places `free`, in their order as far as they need
    not wait.

    Return the names of those that failed, and of those that were left out because of them.
    """
    done = {name for name, row in rows.items() if is_complete(row)}
    waiting = [name for name in rows if name not in done]
    running, failed, free = {}, [], list(free)
    try:
        while waiting or running:
            ready = [name for name in waiting if done.issuperset(rows[name].needs)]
            while free and ready:
                name, place = ready.pop(0), free.pop(0)
                waiting.remove(name)
                running[name] = start(rows[name], rows, place), place
            if not running:
                break
            ended = [name for name, (process, _) in running.items() if process.poll() is not None]
            for name in ended:
                process, place = running.pop(name)
                free.append(place)
                finish(rows[name], process.returncode)
                (failed.append if process.returncode else done.add)(name)
            if not ended:
                time.sleep(0.2)
    except Interrupted as error:
        for process, _ in running.values():
            process.terminate()
        for name, (process, _) in running.items():
            finish(rows[name], process.wait())
        raise Interrupted(
            error.signum, "what was running has saved its state, the same command goes on"
        ) from None
    return failed, waiting


def show(rows, jobs):
    """Print the commands of a call, with the expected minutes if they are known."""
    total = 0
    for name, row in rows.items():
        known = row.keys.get("minutes")
        state = (
            f"complete, {minutes(row):.1f} min"
            if is_complete(row)
            else f"{known} min"
            if known
            else "minutes not known"
        )
        total += 0 if is_complete(row) else max(0, (known or 0) - minutes(row))
        print(f"{name} ({state}): python {shlex.join(row.command)}")
    print(
        f"about {total:.0f} minutes on one core are left, {total / jobs:.0f} with {jobs} runs side by side"
    )


def main():
    flags = Parser(__doc__)
    flags.add_argument("file", help="the experiment file, such as experiments/shapes.yaml")
    flags.add_argument("--table", help="only the rows of this table of the file")
    flags.add_argument(
        "--scratch",
        action="store_true",
        help="from random weights, without the pre-training rows; to OUTPUT-scratch",
    )
    flags.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: the folder that the file names)",
    )
    flags.add_argument(
        "--jobs",
        type=at_least(1),
        help="runs side by side (default: one for each GPU, else for each core)",
    )
    flags.add_argument("--dry-run", action="store_true", help="only show the runs")
    args = flags.parse_args()
    content = read_experiments(args.file)
    output = args.output or Path(content["output"] + "-scratch" * args.scratch)
    rows = expand(content, output, args.scratch)
    if args.table:
        rows = with_needs(rows, rows_of(content, args.table, rows))
    check_unchanged(rows)
    if args.dry_run:
        show(rows, args.jobs or 2)
        return
    make_output_dir(output, flag="output")
    failed, left = [], []
    try:
        if not all(map(is_complete, rows.values())):
            failed, left = run(rows, places(args.jobs))
    finally:
        from experiments.report import report

        report(content, output)
    if failed:
        sys.exit(
            f"error: failed: {', '.join(failed)}"
            + (f"; not run because of them: {', '.join(left)}" if left else "")
        )


if __name__ == "__main__":
    run_script(main)
