"""Check all data that a task's configuration names, and report the problems.

A run stops at the first wrong entry of a list, and replaces or refuses unusable samples
(docs/troubleshooting.md). This command loads the vocabulary, reads all entries and decodes every
image once. If it finds no problem, it also builds the data sets as the script of the task does.
"""

import json
import sys
from pathlib import Path
from typing import Any

from configs.cli import Parser, at_least
from configs.tasks import TASKS
from engine.launch import run_script
from utils import InputError, cores

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


def print_report(report: dict[str, Any]) -> None:
    """Print the whole report, without values that are 0 or empty, and the first problems."""
    from dataset.report import name_entry

    lines = []
    for of in report["files"]:
        lines += [*(f"{key}: {shown}" for key, value in of.items() if (shown := _shown(value))), ""]
    problems = report["problems"]
    found = f"{len(problems)} problem{'s' * (len(problems) > 1)}; see docs/troubleshooting.md"
    lines.append(found if problems else "No problems.")
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
        return ", ".join(f"{key} {inner}" for key, inner in value.items() if inner)
    return str(value or "")


def main() -> None:
    """Check the data of a configuration. Exits with status 1 if there are problems."""
    args = parser.parse_args()
    from configs.effects import refuse_unread
    from configs.load import load_config, require
    from dataset.pool import in_processes
    from dataset.report import Check, begin
    from engine.output_dir import check_output, write_files
    from models.tokenizer import load_tokenizer

    refuse_unread(args.task, args.set)
    config = load_config(args.config, args.set)
    if args.output:
        check_output(args.output, overwrite=args.overwrite)
    with in_processes(args.workers, begin) as jobs:
        check = Check(args.task, config, args.images, jobs)
        keys = dict.fromkeys(check.files.values())
        if not any(getattr(config, key) for key in keys):
            raise InputError(
                f"{args.config} names no file that task {args.task} reads; set one of the keys"
                f" {', '.join(keys)}"
            )
        with check.noting():
            require(config, "bert_config")
            load_tokenizer(config)
        report = {"task": args.task, "config": args.config, "files": check.report_files()}
    report |= {"problems": check.problems, "count": len(check.problems)}
    if args.output:
        write_files({args.output: json.dumps(report, indent=1).encode()})
    print_report(report)
    sys.exit(bool(check.problems))


if __name__ == "__main__":
    run_script(main)
