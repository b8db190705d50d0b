"""Check all data that a task's configuration names, and report the problems.

A run stops at the first wrong entry of a list, and replaces or refuses unusable samples
(docs/troubleshooting.md). This command reads all entries and decodes every image once. If it finds
no problem, it also builds the data sets as the script of the task does.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import Parser, at_least
from configs.tasks import TASKS
from engine.launch import run_script
from utils import InputError, atomic_write, cores

if TYPE_CHECKING:
    from dataset.report import Check

SHOWN = 20  # problems that are printed

parser = Parser(__doc__.splitlines()[0], "pretrain configs/Pretrain.yaml --output report.json")
parser.add_argument("task", choices=list(TASKS), metavar="TASK", help=f"one of {', '.join(TASKS)}")
parser.add_argument("config", metavar="CONFIG", help="YAML file of the task")
parser.add_set()
parser.add_argument(
    "--workers",
    type=at_least(1),
    metavar="N",
    default=cores(),
    help="number of processes that decode images",
)
parser.add_argument(
    "--images",
    type=at_least(0),
    metavar="N",
    help="decode only N evenly spaced images of every annotation file (default: all)",
)
parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the whole report")
parser.add_argument("--overwrite", action="store_true", help="replace an existing report")


def load_others(check: "Check") -> dict[str, str]:
    """Load the other files that a task reads, and add their problems to the check.

    Returns:
        The description of each file or folder by its key.
    """
    from configs.load import require
    from dataset.refer import load_detections, load_refer
    from dataset.vqa import load_answer_list
    from models.tokenizer import load_tokenizer

    config, task = check.config, check.task.name
    others = {root: folder for root, folder in check.roots.items() if folder}
    for root in check.missing_roots:
        others[root] += ": does not exist"
        check.add(
            f"{root}: folder {check.roots[root]} does not exist; set {root} to another folder"
        )

    load = functools.partial(_load_file, check, others)
    vocabulary = "tokenizer" if config.tokenizer else "text_encoder"
    check.tokenizer = load(vocabulary, "word pieces", lambda: load_tokenizer(config)[0])
    if task == "vqa" and config.answer_list:
        load("answer_list", "answers", load_answer_list, config.answer_list)
    if task == "grounding":
        with check.noting():
            require(config, *(["refcoco_data", "det_file"] if config.test_file else []))
        if folder := config.refcoco_data:
            name = config.refer_dataset
            check.refer = load("refcoco_data", "refs", load_refer, folder, name)
        if check.refer and config.det_file:
            load("det_file", "images", load_detections, config.det_file, check.refer)
    return others


def _load_file(
    check: "Check", others: dict[str, str], key: str, unit: str, function: Callable, *arguments: Any
) -> Any:
    """Return function(*arguments) for the file that `key` names, and describe it in `others`.

    A hub that cannot be reached is a note, because the configuration may be right.
    """
    name = getattr(check.config, key)
    try:
        loaded = function(*arguments)
    except InputError as error:
        # a name with a suffix is a file, not a hub repository
        if error.kind == "network" and not os.path.splitext(name)[1]:
            others[key] = f"{name}: not checked, because the hub cannot be reached"
            check.notes.append(str(error))
        else:
            others[key] = f"{name}: cannot be used"
            check.add(error)
        return None
    others[key] = f"{name}: {len(getattr(loaded, 'refs', loaded))} {unit}"
    return loaded


def print_report(report: dict[str, Any]) -> None:
    """Print the whole report, without values that are 0 or empty, and the first problems."""
    from dataset.report import name_entry

    lines = []
    for of in [report["others"], *report["files"]]:
        lines += ["", *(f"{key}: {shown}" for key, value in of.items() if (shown := _shown(value)))]
    problems = report["problems"]
    lines += ["", *(f"note: {note}" for note in report["notes"])]
    lines.append(
        f"{len(problems)} problems; see docs/troubleshooting.md" if problems else "No problems."
    )
    for of in problems[:SHOWN]:
        where = name_entry(of["file"], of["entry"])
        lines.append(f"{where}: {of['problem']}".removeprefix(": "))
    if len(problems) > SHOWN:
        lines.append(f"... and {len(problems) - SHOWN} more; --output FILE.json lists them all")
    for line in lines:  # some characters are commands to a terminal
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def _shown(value: Any) -> str:
    """Return a value of a report as text, "" if it is 0 or empty."""
    if isinstance(value, dict):
        value = [f"{key} {_shown(inner)}" for key, inner in value.items() if inner]
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value or "")


def main() -> None:
    """Check the data of a configuration. Exits with status 1 if there are problems."""
    args = parser.parse_args()
    from configs.effects import refuse_unread
    from configs.load import load_config, require
    from dataset.pool import in_processes
    from dataset.report import Check, begin

    refuse_unread(args.task, args.set)
    config = load_config(args.config, args.set)
    require(config, "bert_config")
    if args.output and args.output.exists() and not args.overwrite:
        raise InputError(f"--output: {args.output} exists; name another file or add --overwrite")
    with contextlib.ExitStack() as stack:
        if args.output:
            try:
                file = stack.enter_context(atomic_write(args.output, "w"))
            except OSError as error:
                raise InputError(
                    f"--output {args.output}: cannot write there ({error.strerror}); name another"
                    " file"
                ) from None
        jobs = stack.enter_context(in_processes(args.workers, begin))
        check = Check(args.task, config, args.images, jobs)
        keys = dict.fromkeys(check.files.values())
        if not any(getattr(config, key) for key in keys):
            raise InputError(
                f"{args.config} names no file that task {args.task} reads; set one of the keys"
                f" {', '.join(keys)}"
            )
        report = {"task": args.task, "config": args.config, "others": load_others(check)}
        report["files"] = check.report_files()
        report |= {"notes": check.notes, "problems": check.problems, "count": len(check.problems)}
        if args.output:
            json.dump(report, file, indent=1)
    print_report(report)
    sys.exit(bool(check.problems))


if __name__ == "__main__":
    run_script(main)
