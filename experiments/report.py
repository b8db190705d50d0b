"""Reports on the runs of an experiment file, complete or not: a table of tasks, or the page that
the file names.

  python -m experiments.report experiments/shapes.yaml
  python -m experiments.report experiments/paper.yaml

Numbers come from log.txt of the runs, minutes from what the driver has recorded, chance from the data. The keys of a table:
  columns   label, row and metric (its name in log.txt), in which {key} is replaced by the value of a line's key
  rows      by label the lines: the values for the columns, and `paper`, the paper's numbers by column
  trends    from one line to another, or within a `row` from one column to another (pairs)
  history   a metric of training to give by epoch, of the run that each line names; picture: its curve
  pictures  files of runs to show
"""

import functools
import json
import shlex
import statistics
from pathlib import Path

from PIL import Image
from scipy import stats

from configs.cli import Parser
from dataset.build import build_dataset
from engine.launch import run_script
from engine.metric_logger import read_curves
from evaluation.attributes import chance_precisions, mean_precisions
from evaluation.metrics import chance_grounding, chance_recall, vqa_accuracy
from experiments.run import (
    effective_config,
    expand,
    is_complete,
    minutes,
    read_experiments,
    read_record,
    rows_of,
    with_needs,
)
from utils import InputError, atomic_write
from visualize.draw import draw_lines

PICTURE_WIDTH = 1100  # pixels of the pictures beside the page
NO_DIFFERENCE = 0.1  # percent; if the paper's numbers differ by less, the paper has no trend

# --------------------------------------------------------------------------------------------------
# numbers


def read_log(row):
    log = row.folder / "log.txt"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def value(row, metric):
    """Return a metric of a complete run, of the epoch that was tested or of the last one that has
    it; else None.
    """
    found = [entry for entry in read_log(row) if metric in entry] if is_complete(row) else []
    tested = [entry for entry in found if any(name.startswith("test") for name in entry)]
    return (tested or found)[-1][metric] if found else None


def runs_of(name, rows):
    """Return the Rows of a row of the file, one for each of its seeds."""
    return [
        row for row in rows.values() if row.name == name or row.name.rpartition("/seed")[0] == name
    ]


def values(name, metric, rows):
    """Return a metric of all complete runs of a row by seed; the seed is None if the row has no
    seeds.
    """
    found = {row.seed: value(row, metric) for row in runs_of(name, rows)}
    return {seed: number for seed, number in found.items() if number is not None}


def shown(numbers):
    """Return the mean ± standard deviation of numbers by seed, "–" without a number."""
    if not numbers:
        return "–"
    deviation = f" ± {statistics.stdev(numbers.values()):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers.values()):.1f}{deviation}"


# --------------------------------------------------------------------------------------------------
# chance: a random ranking, class or box, for VQA the best answer of the list given to every
# question


def _chance_retrieval(config, split):
    test_set = build_dataset("retrieval", split, config)
    recalls = chance_recall(len(test_set.images), len(test_set.texts), test_set.img2txt)
    means = {
        f"{side}_r_mean": statistics.fmean(recalls[f"{side}_r{k}"] for k in (1, 5, 10))
        for side in ("txt", "img")
    }
    return recalls | means


def _chance_vqa(config, split):
    questions = build_dataset("vqa", split, config)
    annotations = questions.annotations()
    if not (questions.answer_list and annotations):
        return {}
    predictions = [
        [{"question_id": entry["question_id"], "answer": answer} for entry in annotations]
        for answer in questions.answer_list
    ]
    return {"acc": max(vqa_accuracy(constant, annotations)["overall"] for constant in predictions)}


def _chance_grounding(config, split):
    expressions = build_dataset("grounding", split, config)
    refer, ref_ids = expressions.refer, [entry.ref_id for entry in expressions.entries]
    chances = chance_grounding(refer.refs, refer.boxes, expressions.detections, ref_ids)
    return {name: 100 * share for name, share in chances.items()}


def _chance_attributes(config, split):
    means = mean_precisions(*chance_precisions(build_dataset("attributes", split, config)))
    return {"map" if name == "all" else f"map_{name}": share for name, share in means.items()}


# by script: function (configuration, val or test) -> percent by metric, named without its prefix in
# log.txt
CHANCE = {
    "Pretrain.py": _chance_retrieval,
    "Retrieval.py": _chance_retrieval,
    "VQA.py": _chance_vqa,
    "VE.py": lambda config, split: {"acc": 100 / 3},
    "NLVR.py": lambda config, split: {"acc": 100 / 2},
    "Grounding.py": _chance_grounding,
    "Attributes.py": _chance_attributes,
    "Relevance.py": lambda config, split: dict.fromkeys(
        ("auc", "auc_other_image", "auc_other_words"), 50
    ),
}


@functools.cache
def _chances(script, config, split):
    return CHANCE[script](json.loads(config), split)


def chance(row, metric, rows):
    """Return the metric of chance in percent with the run's settings, None if it is unknown."""
    script, split = row.keys["script"], "val" if metric.startswith("val") else "test"
    try:
        config = effective_config(row, rows)
        chances = _chances(script, json.dumps(config), split) if config and script in CHANCE else {}
    except InputError:  # the data is not there yet
        return None
    return next((number for name, number in chances.items() if metric.endswith(name)), None)


# --------------------------------------------------------------------------------------------------
# a table of tasks


def print_tasks(content, output):
    """Print a line for each metric of the rows that have some: chance, from random weights,
    pre-trained, minutes.

    A row's minutes have those of text assignment and the like, rows without metrics that it starts
    from.
    """
    rows, scratch = expand(content, output), expand(content, f"{output}-scratch", scratch=True)
    tasks = {name: row for name, row in rows.items() if "metrics" in row.keys}
    spent = {
        name: minutes(row)
        + sum(minutes(rows[other]) for other in row.needs if other not in {"data", *tasks})
        for name, row in tasks.items()
    }
    print(
        f"{'task':11}{'metric':20}{'chance':>8}{'from scratch':>14}{'pre-trained':>13}{'minutes':>9}"
    )
    for name, row in tasks.items():
        for number, (label, metric) in enumerate(row.keys["metrics"].items()):
            untrained, trained = (shown(values(name, metric, some)) for some in (scratch, rows))
            guess, time = chance(row, metric, rows), f"{spent[name]:.1f}" if number == 0 else ""
            guessed = "–" if guess is None else f"{guess:.1f}"
            print(
                f"{'' if number else name:11}{label:20}{guessed:>8}{untrained:>14}{trained:>13}{time:>9}"
            )
    fine_tuning = sum(
        spent[name] for name, row in tasks.items() if row.keys["script"] != "Pretrain.py"
    )
    print(f"minutes of the fine-tuning runs together: {fine_tuning:.1f}, one core each")


# --------------------------------------------------------------------------------------------------
# a page


def difference_interval(before: dict, after: dict) -> tuple[float, float]:
    """Return the 95% t interval of the mean difference of numbers by seed, two or more each.

    If the seeds are the same, the differences are taken seed by seed; otherwise the interval is
    Welch's.
    """
    if before.keys() == after.keys():
        test = stats.ttest_rel([after[seed] for seed in before], list(before.values()))
    else:
        test = stats.ttest_ind(list(after.values()), list(before.values()), equal_var=False)
    return tuple(map(float, test.confidence_interval(0.95)))


def compare(before: dict, after: dict, paper: float | None) -> str:
    """Return the difference of numbers by seed, its 95% interval, the paper's difference and the
    verdict on the trend.

    paper: the paper's difference; None if it has no numbers and claims a rise. Single runs have
    neither interval nor verdict.
    """
    if not before or not after:
        return "not run yet"
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


def _runs(column, line, rows):
    """Return the Rows of a column's run in a line, an empty result if the file has no such row."""
    return runs_of(column["row"].format_map(line), rows)


def _cell(column, line, rows):
    """Return the numbers of a column in a line by seed."""
    return values(column["row"].format_map(line), column["metric"].format_map(line), rows)


def trend_lines(table, rows):
    """Yield a line for each trend of a table."""
    columns, lines = {column["label"]: column for column in table["columns"]}, table["rows"]
    for label, trend in table.get("trends", {}).items():
        first, last = (
            lines[trend.get("from", trend.get("row"))],
            lines[trend.get("to", trend.get("row"))],
        )
        parts, missing = [], 0
        for one, other in trend.get("pairs", {label: label for label in columns}).items():
            if not (_runs(columns[one], first, rows) and _runs(columns[other], last, rows)):
                continue  # a line lacks this column
            papers = first.get("paper", {}).get(one), last.get("paper", {}).get(other)
            difference = None if None in papers else papers[1] - papers[0]
            before, after = _cell(columns[one], first, rows), _cell(columns[other], last, rows)
            missing += not before or not after
            shown_as = one.partition(",")[0] if one != other else one
            parts.append(f"{shown_as} {compare(before, after, difference)}")
        parts = ["not run yet"] if missing == len(parts) else parts
        yield f"- **{label}**: {'; '.join(parts)}"


def markdown(header, lines):
    """Yield a table: the cells of its header and of its lines."""
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    yield from (f"| {' | '.join(line)} |" for line in lines)


def number_table(table, rows):
    """Yield the numbers of a table, the paper's in brackets, and its trends."""
    columns, lines = table["columns"], []
    for label, line in table["rows"].items():
        paper = line.get("paper", {})
        lines.append(
            [label]
            + [
                shown(_cell(column, line, rows))
                + (f" [{paper[column['label']]:.2f}]" if column["label"] in paper else "")
                for column in columns
            ]
        )
    lines.append(
        ["chance", *(_column_chance(column, table["rows"].values(), rows) for column in columns)]
    )
    yield from markdown(["", *(column["label"] for column in columns)], lines)
    yield ""
    yield from trend_lines(table, rows)


def _column_chance(column, lines, rows):
    """Return the chance of a column's runs, its range if the runs differ, "–" if it is unknown."""
    found = [
        chance(run, column["metric"].format_map(line), rows)
        for line in lines
        for run in _runs(column, line, rows)
    ]
    known = sorted(guess for guess in found if guess is not None)
    return " to ".join(dict.fromkeys(f"{guess:.1f}" for guess in known[:1] + known[-1:])) or "–"


def history_table(table, rows, folder):
    """Yield a metric of training by epoch, and draw its curve."""
    histories = {
        label: [
            entry[table["history"]]
            for entry in read_log(runs_of(name, rows)[0])
            if table["history"] in entry
        ]
        for label, name in table["rows"].items()
    }
    epochs = range(max(map(len, histories.values())))
    lines = [
        [label, *(f"{numbers[epoch]:.2f}" if epoch < len(numbers) else "–" for epoch in epochs)]
        for label, numbers in histories.items()
    ]
    yield from markdown(["epoch", *map(str, epochs)], lines)
    picture, curves = table["picture"], {}
    for label, name in table["rows"].items():
        logs = runs_of(name, rows)[0].folder / "tensorboard"
        found = read_curves(logs) if logs.is_dir() else {}
        if picture["metric"] in found:
            curves[label] = found[picture["metric"]]
    if curves:
        draw_lines(curves, picture["metric"], folder / picture["file"])
        yield from ["", f"![{table['title']}]({folder.name}/{picture['file']})"]


def pictures(table, rows, folder):
    """Yield the pictures of a table, and copy them beside the page."""
    for picture in table["pictures"]:
        (run,) = runs_of(picture["row"], rows)
        source, target = run.folder / "figure.png", folder / f"{picture['row']}.png"
        yield from [picture["about"], ""]
        if source.exists():
            with Image.open(source) as image:
                image = image.convert("RGB")
                image.thumbnail((PICTURE_WIDTH, image.height))
                image.save(target, optimize=True)
            yield from [f"![{picture['about']}]({folder.name}/{target.name})", ""]
        else:
            yield from ["(not run yet)", ""]


def section(name, table, content, rows, folder):
    """Yield the lines of a table with what it says of its runs."""
    yield from [f"## {table['title']}", ""]
    if "about" in table:
        yield from [table["about"], ""]
    if "history" in table:
        yield from history_table(table, rows, folder)
    elif "pictures" in table:
        yield from pictures(table, rows, folder)
    else:
        yield from number_table(table, rows)
    runs = with_needs(rows, rows_of(content, name, rows)).values()
    missing = [row.name for row in runs if not is_complete(row)]
    yield from [
        "",
        f"{len(runs)} runs, those that other tables share included, {sum(map(minutes, runs)):.0f} minutes."
        + f" Not complete yet: {', '.join(missing)}." * bool(missing),
        "",
    ]


def run_table(rows):
    """Yield a line for each run: what it changes, its minutes."""
    lines = []
    for row in rows.values():
        state = f"{minutes(row):.1f}" if is_complete(row) else "–"
        lines.append([row.name, f"`{shlex.join(row.command)}`", state])
    yield from markdown(["run", "python", "minutes"], lines)


def write_page(content, output, path):
    """Write the page of an experiment file to `path`, its pictures to the folder of the same name
    beside it.
    """
    rows = expand(content, output)
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    complete = [row for row in rows.values() if is_complete(row)]
    machines = sorted({read_record(row)["machine"] for row in complete})
    lines = [
        f"# {content['title']}",
        "",
        content["about"],
        "",
        f"{len(complete)} of {len(rows)} runs are complete, {sum(map(minutes, complete)):.0f} minutes together, each on "
        f"{' or '.join(machines) or 'no machine yet'}.",
        "",
    ]
    for name, table in content["tables"].items():
        lines += section(name, table, content, rows, folder)
    lines += ["## Runs", "", *run_table(rows)]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    print(f"wrote {path}")


def report(content, output):
    """Print the table of an experiment file's tasks, or write its page, from the rows that have
    been run.
    """
    if "page" in content:
        write_page(content, output, Path(content["page"]))
    else:
        print_tasks(content, output)


def main():
    flags = Parser(__doc__)
    flags.add_argument("file", help="the experiment file, such as experiments/paper.yaml")
    flags.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: the folder that the file names)",
    )
    args = flags.parse_args()
    content = read_experiments(args.file)
    report(content, args.output or Path(content["output"]))


if __name__ == "__main__":
    run_script(main)
