"""What every task script does: set up what it is given, train, test the best epoch."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from configs.effects import notes, refuse_unread
from configs.schema import require
from configs.tasks import find_task
from dataset.build import build_dataset
from engine.agreement import check_agreement
from engine.configuration import choose_config, default_output_dir, task_in
from engine.device import use_device
from engine.loop import train
from engine.processes import init_process_group
from engine.recorder import write_log
from engine.saving import BEST, LAST, find_resume_file, run_files
from evaluation import Report
from evaluation.metrics import NotFinite
from models import build_model
from models.tokenizer import tokenizer_of
from models.weights import (
    checkpoint_epoch,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from utils import InputError, TrainingStopped, is_main, make_output_dir, seed_everything


class Setup(NamedTuple):
    """What a script works with."""

    config: dict
    output_dir: Path
    device: torch.device
    tokenizer: object
    model: torch.nn.Module
    train_set: object  # None with --evaluate
    test_sets: dict  # by split, if the configuration names the files of the split
    resume_from: Path | None  # a checkpoint of the run in output_dir


def run_task(task, args, step, evaluate=None, score=None, initialize=None, check=None):
    """Run a task script from its parsed arguments: training and a test of its best epoch, or with
    --evaluate a test alone.

    task: as build_model names it. step(model, batch, alpha, update_momentum) -> the losses of a
    batch by name, as train takes it. evaluate(model, dataset, tokenizer, config, device, report) ->
    metrics by name, on all processes; it prints and writes what it found where report, an
    evaluation.Report, is not None. None for a task that only trains. score: the name of the metric
    that picks the best epoch where there is validation data; without, the last one counts.
    initialize(model, config) -> reports: initial weights without --checkpoint. With --resume
    --checkpoint it is the run of that file that goes on. None: a task that starts from
    --checkpoint. check(model): raises InputError before anything slow if the task's own flags do
    not fit the model.

    Metrics go to log.txt under their names after the split's, which is left out where they begin
    with it. Raises InputError.
    """
    setup = set_up(task, args, evaluate, initialize, check)

    def measure(split, report=None):
        try:
            metrics = evaluate(
                setup.model,
                setup.test_sets[split],
                setup.tokenizer,
                setup.config,
                setup.device,
                report,
            )
        except NotFinite as error:
            files = ", ".join(setup.config[find_task(task).files[split]])
            raise TrainingStopped(
                f"{split} {files}: {error}; no metric is reported, evaluate another checkpoint"
            ) from None
        return {prefixed(split, name): value for name, value in metrics.items()}

    def test(split, weights, epoch, **source):
        report = (
            Report(f"{weights}, {split}", split, epoch, setup.output_dir / "result")
            if is_main()
            else None
        )
        write_log(setup.output_dir, None if source else epoch, **source, **measure(split, report))

    if args.evaluate:
        use_device(setup.config, setup.device)
        for split in setup.test_sets:
            test(
                split,
                args.checkpoint,
                checkpoint_epoch(args.checkpoint),
                checkpoint=args.checkpoint,
            )
        return
    score = score and prefixed("val", score)
    validate = (lambda: (measure("val"), score)) if "val" in setup.test_sets else None
    kept = train(
        setup.model,
        setup.train_set,
        setup.tokenizer,
        step,
        setup.config,
        setup.output_dir,
        setup.device,
        args.seed,
        setup.resume_from,
        validate,
    )
    file, which = setup.output_dir / LAST, "last epoch"
    if "score" in kept:
        file, which = (
            setup.output_dir / BEST,
            f"best epoch by {score.replace('_', ' ', 1)} {kept['score']:.4g}",
        )
        load_checkpoint(setup.model, file)
    if "test" in setup.test_sets:
        test("test", f"epoch {kept['epoch']}", kept["epoch"])
    if is_main():
        use = ", which --checkpoint takes for fine-tuning" if "pretrain" in task else ""
        print(f"{which}: epoch {kept['epoch']}, {file}{use}; next:")
        if setup.test_sets:
            print(f"    {command_line(Path(sys.argv[0]).name, '--evaluate', '--checkpoint', file)}")
        print(f"    python -m tools.visualize --run {shlex.quote(str(setup.output_dir))}")


def prefixed(split, name):
    """Return a metric's name in log.txt."""
    return name if name.startswith(split) else f"{split}_{name}"


def set_up(task, args, evaluates, initialize, check):
    """Accept everything that a script is given.

    Return a Setup. Raises InputError; nothing of a run is written before.
    """
    if args.evaluate and args.checkpoint in ("", "random"):
        raise InputError("an evaluation needs --checkpoint, the weights to evaluate")
    if args.resume and args.evaluate:
        raise InputError(
            "--resume continues a training, and --evaluate does not train: leave one of them out"
        )
    if args.split and not args.evaluate:
        raise InputError(f"--split {args.split} says what --evaluate evaluates: add --evaluate")
    refuse_unread(task, args.set)
    if Path(args.checkpoint).is_dir() and args.checkpoint:
        args.checkpoint = str(find_checkpoint(args.checkpoint))
    device = init_process_group(args.device, args.timeout)
    choice, output_dir, resume_from = find_run(task, args, args.checkpoint if initialize else "")
    if not (resume_from or args.checkpoint or initialize):
        raise InputError(
            "--checkpoint is missing: name the pre-trained or fine-tuned weights to start from, or random"
        )
    config = choice.config
    if is_main():
        print(f"configuration: {choice.text}")
        for line in notes(task, config, args.set, args.evaluate):
            print(line, file=sys.stderr)
    for key in ("text_encoder", "vision_encoder", "tokenizer"):
        if value := getattr(args, key, None):
            config[key] = value
    require(config, "bert_config", "image_res", *([] if args.evaluate else ["batch_size"]))
    tokenizer = tokenizer_of(config)
    train_set, test_sets = load_data(task, args, config, evaluates)
    named = {
        "train_file": train_set,
        **{f"{split}_file": data_set for split, data_set in test_sets.items()},
    }
    check_agreement(
        config,
        args.seed,
        tokenizer,
        {key: data_set for key, data_set in named.items() if data_set is not None},
    )
    if task == "vqa" and train_set and config["max_answer_tokens"] is None:
        config["max_answer_tokens"] = train_set.longest_answer(tokenizer)

    seed_everything(args.seed)
    model = build_model(task, config, tokenizer)
    if train_set and is_main() and not has_negatives(model, train_set, config["batch_size"]):
        what = "text assignment" if task == "nlvr_pretrain" else "matching"
        print(
            f"note: {what} is not trained, no batch has a negative: set batch_size from 2, and train on two images or more",
            file=sys.stderr,
        )
    if check:
        check(model)
    reports = []
    if not (resume_from or args.checkpoint):
        reports = initialize(model, config)
    elif not resume_from and args.checkpoint != "random":
        reports = [
            load_checkpoint(model, args.checkpoint, args.allow_missing, complete=args.evaluate)
        ]
    if is_main() and reports:
        print(*reports, sep="\n")
    return Setup(
        config, output_dir, device, tokenizer, model.to(device), train_set, test_sets, resume_from
    )


def has_negatives(model, train_set, batch_size):
    """Return whether a batch of one process can have a negative for a model that matches images
    with texts.
    """
    if "itm" not in getattr(model, "objectives", ()) and model.task != "nlvr_pretrain":
        return True
    # entries of one image have one group; None: each is its own; shards have no entries
    entries = train_set.entries
    first = entries[0].group if len(entries) else None
    return batch_size > 1 and (
        first is None or any(entries[i].group != first for i in range(len(entries)))
    )


def find_run(task, args, run):
    """Return the Choice of a configuration, the folder to write to, and the checkpoint to continue
    from, None for a new run.

    run: the checkpoint whose run --resume continues, "" for the newest one of the folder. Raises
    InputError.
    """
    choice = None
    # a resumed run has its configuration in its checkpoint
    if not (args.resume and args.output_dir):
        choice = choose_config(task, args, args.checkpoint, args.default_config)
    output_dir = Path(args.output_dir or default_output_dir(task, choice.source, args.evaluate))
    if args.evaluate and (run_files(output_dir) or (output_dir / "config.yaml").exists()):
        output_dir /= "evaluation"
        if is_main():
            print(
                f"note: {output_dir.parent} holds a run, the results of this evaluation go to {output_dir}"
            )
    make_output_dir(output_dir, writes=not args.evaluate)
    resume_from = None if args.evaluate else find_resume_file(output_dir, run, args.resume)
    if resume_from:
        found = task_in(read_checkpoint(resume_from), task, resume_from)
        if found != task:
            raise InputError(
                f"--resume: {resume_from} is of task {found}, this script's is {task}: name another --output_dir"
            )
        choice = choose_config(task, args, resume_from, args.default_config)
    return (
        choice or choose_config(task, args, args.checkpoint, args.default_config),
        output_dir,
        resume_from,
    )


def load_data(task, args, config, evaluates):
    """Return the training set, None with --evaluate, and what to test on by split.

    Raises InputError.
    """
    files = find_task(task).files
    train_set = None if args.evaluate else build_dataset(task, "train", config, seed=args.seed)
    splits = [
        split
        for split in ("val", "test")
        if evaluates and split in files and args.split in (None, split)
    ]
    test_sets = {
        split: build_dataset(task, split, config) for split in splits if config[files[split]]
    }
    if args.evaluate and not test_sets:
        keys = " or ".join(files[split] for split in splits)
        raise InputError(
            f"--evaluate needs the key {keys} of the configuration"
            if keys
            else f"--evaluate{' --split ' * bool(args.split)}{args.split or ''}: this task has nothing to evaluate"
        )
    return train_set, test_sets


def command_line(script, *arguments):
    """Return the command line that runs a script of the repository, or this one, with this
    interpreter.
    """
    python = Path(sys.executable).name
    if shutil.which(python) != sys.executable:  # a virtual environment that is not activated
        python = min(sys.executable, os.path.relpath(sys.executable), key=len)
    module = sys.modules["__main__"].__spec__  # of python -m
    own = module and script == Path(module.origin).name
    program = (
        ["-m", module.name]
        if own
        else [os.path.relpath(Path(__file__).resolve().parents[1] / script)]
    )
    return shlex.join([python, *program, *map(str, arguments)])
