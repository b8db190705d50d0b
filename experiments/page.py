"""Write the page of an experiment file in Markdown.

The keys of a table, of which only title is required:
  title     heading
  about     first paragraph
  columns   label, row and metric in log.txt; {key} in them stands for the value of a line's key
  rows      lines by label: values for the columns, and `paper`, the paper's numbers by column
  trends    pairs: from a line to another line, or from a column to another within the line `row`
  history   a metric of training to list by epoch, of the run that each line names
  picture   curve of a history: metric and file
  pictures  figures of rows to show: row and about
"""

import itertools
import shlex
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from scipy import stats

from engine.metric_logger import read_curves
from experiments.report import MISSING, Numbers, chance, read_log, runs_of, shown, values
from experiments.rows import Experiments, Row, Rows, Table, expand, rows_of_table, with_needs
from utils import atomic_write
from visualize.draw import draw_lines

PICTURE_WIDTH = 1100  # pixels of the pictures beside the page
NO_DIFFERENCE = 0.1  # percent; the paper has no trend if its numbers differ by less
NOT_RUN = "not run yet"

Line = dict[str, Any]  # a line of a table: values for its columns


def difference_interval(before: Numbers, after: Numbers) -> tuple[float, float]:
    """Return the 95% t interval of the mean difference of numbers, two or more each.

    If the seeds are the same, the differences are taken seed by seed. Otherwise the interval is
    Welch's.
    """
    if before.keys() == after.keys():
        test = stats.ttest_rel([after[seed] for seed in before], list(before.values()))
    else:
        test = stats.ttest_ind(list(after.values()), list(before.values()), equal_var=False)
    low, high = test.confidence_interval(0.95)
    return float(low), float(high)


def compare(before: Numbers, after: Numbers, paper: float | None) -> str:
    """Return the difference of numbers, its 95% interval, the paper's difference and the verdict.

    Single runs have neither interval nor verdict.

    Args:
        before: Numbers by seed.
        after: Numbers by seed.
        paper: The paper's difference, None if it has no numbers and claims a rise.
    """
    if not before or not after:
        return NOT_RUN
    notes, verdict = [], ""
    if min(len(before), len(after)) > 1:
        low, high = difference_interval(before, after)
        notes.append(f"95% {low:+.1f} to {high:+.1f}")
        rises = paper is None or paper > 0
        if paper is not None and abs(paper) < NO_DIFFERENCE:
            verdict = ", no trend in the paper"
        elif low <= 0 <= high:
            verdict = ", inconclusive"
        else:
            verdict = ", supported" if (low > 0) == rises else ", contradicted"
    if paper is not None:
        notes.append(f"the paper {paper:+.2f}")
    difference = statistics.fmean(after.values()) - statistics.fmean(before.values())
    return f"{difference:+.1f}" + f" ({'; '.join(notes)})" * bool(notes) + verdict


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with these cells."""
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    yield from (f"| {' | '.join(line)} |" for line in lines)


def trend_lines(table: Table, rows: Rows) -> Iterator[str]:
    """Yield a line for each trend of a table."""
    columns, lines = {column["label"]: column for column in table["columns"]}, table["rows"]
    for label, trend in table.get("trends", {}).items():
        first, last = (lines[trend.get(key, trend.get("row"))] for key in ("from", "to"))
        parts = []
        for one, other in trend.get("pairs", {name: name for name in columns}).items():
            cells = [(columns[one], first), (columns[other], last)]
            if not all(runs_of(column["row"].format_map(line), rows) for column, line in cells):
                continue  # the file has no such row
            papers = [line.get("paper", {}).get(column["label"]) for column, line in cells]
            difference = None if None in papers else papers[1] - papers[0]
            name = one.partition(",")[0] if one != other else one
            result = compare(*(_cell(*cell, rows) for cell in cells), difference)
            parts.append((name, result))
        told = "; ".join(f"{name} {result}" for name, result in parts)
        missing = all(result == NOT_RUN for _, result in parts)
        yield f"- **{label}**: {NOT_RUN if missing else told}"


def _cell(column: Line, line: Line, rows: Rows) -> Numbers:
    """Return the numbers of a column in a line."""
    return values(column["row"].format_map(line), column["metric"].format_map(line), rows)


def _column_chance(column: Line, lines: Iterable[Line], rows: Rows) -> str:
    """Return the chance of a column's runs, a range if the runs differ."""
    guesses = {
        chance(run, column["metric"].format_map(line), rows)
        for line in lines
        for run in runs_of(column["row"].format_map(line), rows)
    }
    known = sorted(guess for guess in guesses if guess is not None)
    return " to ".join(dict.fromkeys(f"{guess:.1f}" for guess in known[:1] + known[-1:])) or MISSING


def number_table(table: Table, rows: Rows) -> Iterator[str]:
    """Yield the numbers of a table, the paper's in brackets, and its trends."""
    columns, lines = table["columns"], []
    for label, line in table["rows"].items():
        paper = {name: f" [{number:.2f}]" for name, number in line.get("paper", {}).items()}
        cells = [shown(_cell(c, line, rows)) + paper.get(c["label"], "") for c in columns]
        lines.append([label, *cells])
    guesses = [_column_chance(column, table["rows"].values(), rows) for column in columns]
    labels = [column["label"] for column in columns]
    yield from markdown(["", *labels], [*lines, ["chance", *guesses]])
    yield from ["", *trend_lines(table, rows)]


def history_table(table: Table, rows: Rows, folder: Path) -> Iterator[str]:
    """Yield a metric of training by epoch, and draw its curve."""
    runs = {label: runs_of(name, rows)[0] for label, name in table["rows"].items()}
    histories = [
        [f"{entry[table['history']]:.2f}" for entry in read_log(run) if table["history"] in entry]
        for run in runs.values()
    ]
    epochs = list(itertools.zip_longest(*histories, fillvalue=MISSING))
    lines = zip(runs, *epochs, strict=True)
    yield from markdown(["epoch", *map(str, range(len(epochs)))], lines)
    metric, file = table["picture"]["metric"], table["picture"]["file"]
    logs = {label: run.folder / "tensorboard" for label, run in runs.items()}
    found = {label: read_curves(log) for label, log in logs.items() if log.is_dir()}
    curves = {label: curve[metric] for label, curve in found.items() if metric in curve}
    if curves:
        draw_lines(curves, metric, folder / file)
        yield from ["", f"![{table['title']}]({folder.name}/{file})"]


def pictures(table: Table, rows: Rows, folder: Path) -> Iterator[str]:
    """Yield the pictures of a table, and copy them beside the page."""
    for picture in table["pictures"]:
        about, source = picture["about"], rows[picture["row"]].folder / "figure.png"
        yield from [about, ""]
        if source.exists():
            target = folder / f"{picture['row']}.png"
            with Image.open(source) as image:
                copy = image.convert("RGB")
            copy.thumbnail((PICTURE_WIDTH, copy.height))
            copy.save(target, optimize=True)
            yield from [f"![{about}]({folder.name}/{target.name})", ""]
        else:
            yield from [f"({NOT_RUN})", ""]


def _minutes(runs: Iterable[Row]) -> str:
    return f"{sum(row.minutes for row in runs):.0f}"


def section(name: str, experiments: Experiments, rows: Rows, folder: Path) -> Iterator[str]:
    """Yield the lines of a table, with the number and the minutes of its runs."""
    table = experiments.tables[name]
    yield from [f"## {table['title']}", ""]
    if "about" in table:
        yield from [table["about"], ""]
    if "history" in table:
        yield from history_table(table, rows, folder)
    elif "pictures" in table:
        yield from pictures(table, rows, folder)
    else:
        yield from number_table(table, rows)
    runs = with_needs(rows, rows_of_table(experiments, name, rows)).values()
    missing = [row.name for row in runs if not row.complete]
    yield from [
        "",
        f"{len(runs)} runs, including runs of other tables, {_minutes(runs)} minutes."
        + f" Not complete yet: {', '.join(missing)}." * bool(missing),
        "",
    ]


def run_table(rows: Rows) -> Iterator[str]:
    """Yield a line for each run with its command and minutes."""
    lines = [
        [row.name, f"`{shlex.join(row.command)}`", spent if row.complete else MISSING]
        for row, spent in ((row, f"{row.minutes:.1f}") for row in rows.values())
    ]
    yield from markdown(["run", "python", "minutes"], lines)


def write_page(experiments: Experiments, output: Path, path: Path) -> None:
    """Write the page of an experiment file.

    Args:
        experiments: Content of the file.
        output: Folder of the results.
        path: File of the page. Its pictures go to the folder of the same name beside it.
    """
    rows = expand(experiments, output)
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    complete = [row for row in rows.values() if row.complete]
    machines = sorted({row.read_record()["machine"] for row in complete})
    lines = [
        f"# {experiments.title}",
        "",
        experiments.about,
        "",
        f"{len(complete)} of {len(rows)} runs are complete, {_minutes(complete)} minutes together,"
        f" each on {' or '.join(machines) or 'no machine yet'}.",
        "",
    ]
    for name in experiments.tables:
        lines += section(name, experiments, rows, folder)
    lines += ["## Runs", "", *run_table(rows)]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    print(f"wrote {path}")
