"""Report the complete runs of an experiment file as a table of tasks or as a page.

  python -m experiments.report experiments/shapes.yaml
  python -m experiments.report experiments/paper.yaml

If the file has the key `page`, the report is written to this path. If not, a table of tasks is
printed. Metrics come from log.txt of the runs, minutes from the records of experiments.run, and
chance levels from the data. experiments/page.py explains the tables of a page.
"""

import functools
import statistics
from collections.abc import Mapping
from pathlib import Path

from configs.cli import Parser
from configs.config import Config
from configs.load import load_config
from configs.tasks import TASKS, find
from engine.launch import run_script
from experiments.rows import Experiments, Row, Rows, expand, read_experiments, without_pretraining
from utils import InputError, read_log

MISSING = "–"

Numbers = dict[int | None, float]  # by seed, None for a row without seeds


def value(row: Row, metric: str) -> float | None:
    """Return a metric of a complete run, None if it has none.

    It is from the last tested epoch, else from the last epoch with the metric.
    """
    entries = read_log(row.folder / "log.txt") if row.complete else []
    found = [entry for entry in entries if metric in entry]
    tested = [entry for entry in found if any(name.startswith("test") for name in entry)]
    return (tested or found)[-1][metric] if found else None


def runs_of(name: str, rows: Rows) -> list[Row]:
    """Return the runs of a row of the file, one for each of its seeds."""
    return [row for row in rows.values() if name in (row.name, row.group)]


def values(name: str, metric: str, rows: Rows) -> Numbers:
    """Return a metric of the complete runs of a row."""
    found = {row.seed: value(row, metric) for row in runs_of(name, rows)}
    return {seed: number for seed, number in found.items() if number is not None}


def shown(numbers: Numbers) -> str:
    """Return the mean ± standard deviation of numbers as text."""
    if not numbers:
        return MISSING
    deviation = f" ± {statistics.stdev(numbers.values()):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers.values()):.1f}{deviation}"


@functools.cache
def _chances(task: str, config: Config, split: str) -> Mapping[str, float]:
    from dataset.build import build_dataset

    chance = TASKS[task].chance
    return find(chance)(build_dataset(task, split, config)) if isinstance(chance, str) else chance


def chance(row: Row, metric: str) -> float | None:
    """Return the metric of guessing in percent, None if it is unknown.

    The metric depends on the configuration of the row. A row without the key `config` has none.
    """
    task = row.keys.task
    if not task or not row.keys.config:
        return None
    split = "val" if metric.startswith("val") else "test"
    try:
        chances = _chances(task.name, load_config(row.keys.config, row.keys.overrides), split)
    except InputError:  # the data is not there yet
        return None
    return next((number for name, number in chances.items() if metric.endswith(name)), None)


def print_tasks(experiments: Experiments) -> None:
    """Print a line for each metric: chance, from random weights, pre-trained, minutes.

    The minutes include rows without metrics that a row needs, such as text assignment, except data.
    """
    rows, scratch = expand(experiments), expand(without_pretraining(experiments))
    tasks = {name: row for name, row in rows.items() if row.keys.metrics}
    spent = {}
    header = f"{'chance':>8}{'from scratch':>14}{'pre-trained':>13}{'minutes':>9}"
    print(f"{'task':11}{'metric':20}{header}")
    for name, row in tasks.items():
        others = [rows[other] for other in row.needs if other not in {"data", *tasks}]
        spent[name] = sum(row.minutes for row in [row, *others])
        first, time = name, f"{spent[name]:.1f}"
        for label, metric in row.keys.metrics.items():
            guess = chance(row, metric)
            cells = [shown({} if guess is None else {None: guess})]
            cells += [shown(values(name, metric, some)) for some in (scratch, rows)]
            print(f"{first:11}{label:20}{cells[0]:>8}{cells[1]:>14}{cells[2]:>13}{time:>9}")
            first = time = ""
    fine_tuning = sum(spent[name] for name in tasks if rows[name].keys.script != "Pretrain.py")
    print(f"all fine-tuning runs: {fine_tuning:.1f} minutes, each on one core")


def report(experiments: Experiments) -> None:
    """Print the table of tasks of an experiment file, or write its page, from complete rows."""
    if experiments.page:
        from experiments.page import write_page

        write_page(experiments, Path(experiments.page))
    else:
        print_tasks(experiments)


def main() -> None:
    """Report on an experiment file."""
    parser = Parser(__doc__)
    parser.add_argument("file", help="experiment file, such as experiments/paper.yaml")
    report(read_experiments(parser.parse_args().file))


if __name__ == "__main__":
    run_script(main)
