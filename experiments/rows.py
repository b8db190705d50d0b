"""Experiment files: rows, their commands and order, and the records of their runs."""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from configs.effects import refuse_unread
from configs.load import load_config, parse_yaml
from configs.tasks import TASKS, Task
from utils import InputError, atomic_write, read_regular

LAST_CHECKPOINT = "checkpoint_last.pth"
RECORD = "experiment.json"  # in the folder of a run

AtLeastOne = msgspec.Meta(min_length=1)


class RowKeys(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The keys of a row, as experiments/run.py explains them."""

    script: str
    config: str = ""
    set: dict[str, Any] = {}
    source: str = msgspec.field(name="from", default="")
    needs: list[str] = []
    flags: str = ""
    seeds: Annotated[list[int], AtLeastOne] | None = None
    each: Annotated[list[str | int | float], AtLeastOne] | None = None
    creates: str = ""
    minutes: float = 0
    metrics: dict[str, str] = {}

    @property
    def overrides(self) -> list[str]:
        """The values of --set, without blanks."""
        return [
            f"{key}={value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
            for key, value in self.set.items()
        ]

    @property
    def task(self) -> Task | None:
        """The task that the script is named after, if any."""
        return TASKS.get(PurePosixPath(self.script).stem.lower())

    @property
    def has_source(self) -> bool:
        """Whether a row starts from another row."""
        return self.source not in ("", "random")


class Claim(msgspec.Struct, forbid_unknown_fields=True):
    """A claim of the paper as a test on numbers of rows, written down before the runs.

    The effect of a seed is `times` the difference of two means, of the numbers in `plus` and in
    `minus`. A number is "ROW METRIC": a metric in log.txt of the row's run with this seed.

    Attributes:
        source: Section, table or figure of the paper.
        text: The claim in a sentence.
        plus: Numbers that the claim expects to be higher, or equal within `margin`.
        minus: Numbers that the claim expects to be lower, or equal within `margin`.
        times: Factor of the difference. An interaction of two settings has 2.
        margin: Largest effect in points that counts as none, for a claim of equality.
        paper: The paper's numbers for `plus` and `minus`.
    """

    source: str
    text: str
    plus: Annotated[list[str], AtLeastOne]
    minus: Annotated[list[str], AtLeastOne]
    times: float = 1
    margin: float | None = None
    paper: dict[Literal["plus", "minus"], list[float]] = {}


class Experiments(msgspec.Struct):
    """The content of an experiment file.

    Attributes:
        output: Folder of the results.
        rows: The rows by name, with `each` filled in.
        page: File of the report, "" for a table of tasks on stdout.
        claims: The claims that the page tests, by title.
        left_out: Claims that no row tests, with the reason, by title.
    """

    output: str
    rows: Annotated[dict[str, Any], AtLeastOne]
    page: str = ""
    claims: dict[str, Claim] = {}
    left_out: dict[str, str] = {}


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: Name of the row, and of the seed if there are several.
        group: Name of the row without the seed.
        keys: Keys of the row in the file.
        seed: Random seed, None for the script's default.
        folder: Folder of the result.
        needs: Names of the rows to wait for. The last one is the source of the weights, if any.
        command: Command line without the interpreter.
    """

    name: str
    group: str
    keys: RowKeys
    seed: int | None
    folder: Path
    needs: list[str]
    command: list[str]

    @property
    def log(self) -> Path:
        """The file with the output of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def read_record(self) -> dict[str, Any]:
        """Return the driver's record of the run, {} before the start."""
        path = self.folder / RECORD
        return json.loads(path.read_bytes()) if path.exists() else {}

    def write_record(self, record: dict[str, Any]) -> None:
        """Write the record of the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / RECORD, "w") as file:
            json.dump(record, file, indent=1)

    @property
    def complete(self) -> bool:
        """Whether the run has succeeded and its results still exist."""
        complete = self.read_record().get("complete", False)
        return complete and (not self.keys.creates or Path(self.keys.creates).exists())

    @property
    def minutes(self) -> float:
        """The wall-clock minutes of the run, summed over interruptions."""
        return self.read_record().get("seconds", 0) / 60


Rows = dict[str, Row]


def read_experiments(path: Path | str) -> Experiments:
    """Read an experiment file.

    Raises:
        InputError: The file cannot be read, or has another form.
    """
    try:
        content = parse_yaml(read_regular(path), path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name an experiment file") from None
    return parse_experiments(content, str(path))


def parse_experiments(content: Any, where: str) -> Experiments:
    """Check the content of an experiment file and fill in `each`.

    Args:
        content: The content.
        where: Name of the file, for messages.

    Raises:
        InputError: The content has another form.
    """
    place, rows = where, {}
    try:
        experiments = msgspec.convert(content, Experiments)
        for name, given in experiments.rows.items():
            place = f"{where}: row {name}"
            keys = msgspec.convert(given, RowKeys)
            text = msgspec.json.encode({name: keys}).decode()
            for value in keys.each or [""]:
                filled = text.replace("{each}", str(value))
                rows |= msgspec.json.decode(filled, type=dict[str, RowKeys])
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "'")
        raise InputError(f"{place}: {reason}; experiments/shapes.yaml is an example") from None
    return msgspec.structs.replace(experiments, rows=rows)


def expand(experiments: Experiments) -> Rows:
    """Return the runs of an experiment file by name, first seeds first.

    Raises:
        InputError: The command line of a row is malformed, a row that it needs is missing, or rows
            need each other.
    """
    runs = [
        (number, name, seed)
        for name, keys in experiments.rows.items()
        for number, seed in enumerate(keys.seeds or [None])
    ]
    rows = {}
    for _, name, seed in sorted(runs, key=lambda run: run[0]):
        row = _make_row(experiments, name, seed)
        rows[row.name] = row
    try:
        TopologicalSorter({name: row.needs for name, row in rows.items()}).prepare()
    except CycleError as error:
        raise InputError(
            f"rows wait for each other in a circle ({', '.join(error.args[1])}); change the key"
            " `from` or `needs` of one of these rows"
        ) from None
    return rows


def without_pretraining(experiments: Experiments) -> Experiments:
    """Return the fine-tuning rows, from random weights, with OUTPUT-scratch as their output."""
    pretraining = {name for name, keys in experiments.rows.items() if keys.script == "Pretrain.py"}
    rows = {
        name: msgspec.structs.replace(keys, source="random") if keys.source in pretraining else keys
        for name, keys in experiments.rows.items()
        if name not in pretraining and "--evaluate" not in keys.flags
    }
    output = f"{experiments.output}-scratch"
    return msgspec.structs.replace(experiments, rows=rows, output=output)


def _make_row(experiments: Experiments, name: str, seed: int | None) -> Row:
    """Return a run of a row. Raises InputError."""
    rows, output = experiments.rows, Path(experiments.output)
    keys, run = rows[name], name if seed is None else f"{name}/seed{seed}"
    folder = output / run
    needs = [_find_run(rows, name, other, seed) for other in keys.needs]
    if "data" in rows and name != "data":
        needs.append("data")
    source = keys.source
    if keys.has_source:
        path = PurePosixPath(source)
        path = path if path.suffix == ".pth" else path / LAST_CHECKPOINT
        needs.append(_find_run(rows, name, str(path.parent), seed))
        source = str(output / needs[-1] / path.name)
    try:
        flags = [part.replace("{folder}", str(folder)) for part in shlex.split(keys.flags)]
        if keys.task:
            refuse_unread(keys.task.name, keys.overrides)
    except (InputError, ValueError) as error:  # ValueError: a quote in `flags` is not closed
        raise InputError(f"row {name}: {error}") from None
    module = not keys.script.endswith(".py")
    command = ["-m", keys.script] if module else [keys.script]
    if keys.config:
        command += ["--config", keys.config, *["--resume"] * ("--evaluate" not in flags)]
    if not module and "{folder}" not in keys.flags:
        command += ["--output_dir", str(folder)]
    command += ["--checkpoint", source] * bool(source)
    command += ["--seed", str(seed)] * (seed is not None and not module)
    command += [*flags, *["--set"] * bool(keys.set), *keys.overrides]
    return Row(run, name, keys, seed, folder, needs, command)


def _find_run(rows: dict[str, RowKeys], name: str, other: str, seed: int | None) -> str:
    """Return the run that a run needs from another row: with the same seed, else its first seed."""
    if other not in rows:
        raise InputError(
            f"row {name}: it needs the row {other}, which is not in the file; add this row"
        )
    seeds = rows[other].seeds
    return f"{other}/seed{seed if seed in seeds else seeds[0]}" if seeds else other


def select(rows: Rows, names: Collection[str]) -> Rows:
    """Return the runs of these rows and all runs that they need. Raises InputError."""
    missing = set(names) - {row.group for row in rows.values()}
    if missing:
        raise InputError(f"--rows: there is no row {missing.pop()}; --dry_run lists the rows")
    todo, wanted = [row.name for row in rows.values() if row.group in names], set()
    while todo:
        name = todo.pop()
        wanted.add(name)
        todo += rows[name].needs
    return {name: row for name, row in rows.items() if name in wanted}


def settings(row: Row, rows: Rows) -> dict[str, Any]:
    """Return the settings that the result of a run depends on.

    Returns:
        The command, the keys of the configuration, and the settings of each row that the run needs,
        as "ROW: KEY".

    Raises:
        InputError: The configuration is not accepted.
    """
    output = str(row.folder).removesuffix(row.name)  # results may be moved
    result: dict[str, Any] = {"command": [part.removeprefix(output) for part in row.command]}
    if row.keys.config:
        result |= load_config(row.keys.config, row.keys.overrides).to_dict()
    for name in row.needs:
        result |= {f"{name}: {key}": value for key, value in settings(rows[name], rows).items()}
    return result


def check_unchanged(rows: Rows) -> None:
    """Raise InputError if a run was started with other settings than it has now."""
    for row in rows.values():
        now, then = settings(row, rows), row.read_record().get("settings", {})
        changed = [key for key, value in now.items() if then.get(key, value) != value]
        if changed:
            raise InputError(
                f"row {row.name} has changed since it was run ({changed[0]} was"
                f" {then[changed[0]]}); to run it again, remove {row.folder} and the folders of the"
                " rows that started from it, or rename the changed row to keep the result"
            )
