"""A run of a task: check all inputs, train, test the best epoch; or evaluate alone."""

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from configs.config import Config
from configs.effects import refuse_unread, unread_keys
from configs.load import require, save_config
from configs.tasks import Task, find, find_task
from dataset.build import build_dataset
from dataset.loading import TrainBatches
from engine.checkpointing import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpointer,
    find_resume_file,
    newest_checkpoint,
    resume,
    run_files,
    saved_pretrained,
)
from engine.configuration import (
    choose_config,
    default_output_dir,
    task_of_checkpoint,
    warn_of_exif,
)
from engine.distributed import check_agreement, init_process_group
from engine.metric_logger import MetricLogger, write_log
from engine.output_dir import make_output_dir, writing
from engine.overview import log_overview
from engine.precision import use_device
from engine.signs import warn_of_texts, warn_without_negatives
from engine.trainer import create_train_state, train
from evaluation.metrics import NotFinite
from evaluation.report import Report
from evaluation.retrieval import better_ranking
from models import build_model
from models.albef import ALBEF
from models.tokenizer import VOCABULARY, Tokenizer, load_tokenizer
from models.weights import (
    checkpoint_epoch,
    find_checkpoint,
    is_repository,
    load_checkpoint,
    read_checkpoint,
)
from utils import InputError, TrainingStopped, atomic_write, is_main, read_log, seed_everything

NEXT = (
    "to try it in a browser: python -m tools.demo %s; to search: python -m tools.search index"
    " FOLDER --checkpoint %s --output INDEX"
)

log = logging.getLogger(__name__)


def run_task(name: str, args: argparse.Namespace, **options: Any) -> None:
    """Run a task script: training and a test of its best epoch, or an evaluation alone.

    Without validation data the last epoch counts as the best. Metrics are logged to log.txt as
    `{split}_{name}`, or as `name` if it starts with the split.

    Args:
        name: Name of the task in the table of tasks.
        args: Flags of `configs.cli.task_parser`.
        options: Options of the task's `evaluate`.

    Raises:
        InputError: An input is wrong. Nothing of a run is written before all inputs are checked.
        TrainingStopped: The run cannot go on.
    """
    task = find_task(name)
    evaluator, train_set, resume_from = set_up(task, args, options)
    if train_set is None:
        evaluator.test_checkpoint(args.checkpoint)
        return
    model, config, output_dir = evaluator.model, evaluator.config, evaluator.output_dir
    device, entries, seed = evaluator.device, len(train_set), args.seed
    data = TrainBatches(train_set, evaluator.tokenizer, config, device=device, seed=seed)
    log_overview(model, train_set, device)
    state = create_train_state(model, data, config, device=device, seed=seed)
    if resume_from:
        resume(resume_from, state, entries)
        where = state.epoch, state.iteration
        log.info("resuming from %s: epoch %d, iteration %d", resume_from, *where)
    if is_main():
        save_settings(model, config, output_dir)
    validate = evaluator.validate if "val" in evaluator.test_sets else None
    with (
        Checkpointer(output_dir, config.save_every, entries) as checkpointer,
        MetricLogger(output_dir, config, device) as logger,
    ):
        best = train(state, data, checkpointer, logger, validate=validate)
    epoch, file, which = state.epoch - 1, output_dir / LAST, "last epoch"
    if best:
        epoch, file = best.epoch, output_dir / BEST
        which = f"best epoch by {evaluator.score} {best.score:.4g}"
        load_checkpoint(model, file, complete=True)
    if "test" in evaluator.test_sets:
        evaluator.test("test", f"epoch {epoch}", epoch)
    if is_main():
        # needed only while the last one may be incomplete
        (output_dir / PREVIOUS).unlink(missing_ok=True)
        print(f"{which}: epoch {epoch}, {file}")
        if "rank" in task.methods:
            log.info(NEXT, output_dir, output_dir)


def set_up(
    task: Task, args: argparse.Namespace, options: Mapping[str, Any]
) -> "tuple[Evaluator, Any, Path | None]":
    """Check all inputs of a run, and build its model and data.

    Returns:
        The model with its test sets, the training set or None with --evaluate, and the checkpoint
        to resume from or None.

    Raises:
        InputError: An input is wrong.
    """
    check_flags(task, args)
    if args.checkpoint not in ("", "random") and not is_repository(args.checkpoint):
        # of a folder, a run continues from the newest checkpoint and else begins with the best
        newest = newest_checkpoint(args.checkpoint) if args.resume else None
        args.checkpoint = str(newest or find_checkpoint(args.checkpoint))
    device = init_process_group(args.device, args.timeout)
    config, output_dir, resume_from = find_run(task, args)
    tokenizer, config = load_tokenizer(config)
    data_sets = build_datasets(task, args, config)
    train_set = data_sets.get("train")
    if task.name == "vqa" and train_set and config.max_answer_tokens is None:
        length = train_set.longest_answer(tokenizer)
        config = msgspec.structs.replace(config, max_answer_tokens=length)
    check_agreement(config, args.seed, tokenizer, data_sets)
    seed_everything(args.seed)
    model = build_model(task.name, config, tokenizer)
    if train_set is not None:
        warn_without_negatives(model)
        warn_of_texts(train_set, tokenizer)
    if task.check:
        find(task.check)(model, **options)
    if resume_from:
        model.pretrained = saved_pretrained(resume_from)
    else:
        model.pretrained = load_initial_weights(task, args, model)
    model.to(device)
    test_sets = {split: data for split, data in data_sets.items() if split != "train"}
    evaluator = Evaluator(task, model, tokenizer, config, test_sets, output_dir, options)
    return evaluator, train_set, resume_from


@dataclass
class Evaluator:
    """Evaluates a model on the splits of its task."""

    task: Task
    model: ALBEF
    tokenizer: Tokenizer
    config: Config
    test_sets: Mapping[str, Any]
    output_dir: Path
    options: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def score(self) -> str:
        """Name in log.txt of the metric that selects the best epoch."""
        return prefixed("val", self.task.score)

    def measure(self, split: str, report: Report | None = None) -> dict[str, float]:
        """Return the metrics of a split by their names in log.txt.

        Raises:
            TrainingStopped: The model's scores are not finite.
        """
        inputs = self.test_sets[split], self.tokenizer, self.config, self.device
        try:
            metrics = find(self.task.evaluate)(self.model, *inputs, report, **self.options)
        except NotFinite as error:
            files = ", ".join(getattr(self.config, self.task.files[split]))
            raise TrainingStopped(
                f"{split} {files}: {error}, so no metric is reported; evaluate another checkpoint"
            ) from None
        return {prefixed(split, name): value for name, value in metrics.items()}

    def validate(self) -> tuple[dict[str, float], str]:
        """Return the metrics of the validation data and the name of the score.

        If they compare ITC with ITM, the model keeps the better ranking.
        """
        metrics = self.measure("val")
        plain = {name.removeprefix("val_"): value for name, value in metrics.items()}
        self.model.ranking = ranking = better_ranking(plain, self.config)
        if ranking:
            log.info("validation: mean recall %.4g by ITC, %.4g by ITM", ranking.itc, ranking.itm)
        return metrics, self.score

    def test_checkpoint(self, checkpoint: str) -> None:
        """Test the weights of --checkpoint on all splits."""
        use_device(self.config, self.device)
        epoch = checkpoint_epoch(checkpoint)
        for split in self.test_sets:
            self.test(split, checkpoint, epoch, checkpoint=checkpoint)

    def test(self, split: str, weights: str, epoch: int, **source: str) -> None:
        """Evaluate a split, print the report and add the metrics to log.txt.

        Args:
            split: The split.
            weights: Name of the weights in the report.
            epoch: Epoch of the weights. Its object in log.txt takes the metrics.
            source: Origin of the weights. It is a separate object in log.txt.
        """
        report = None
        if is_main():
            report = Report(f"{weights}, {split}", split, epoch, self.output_dir / "result")
        metrics = self.measure(split, report)
        write_log(self.output_dir, None if source else epoch, **source, **metrics)


def prefixed(split: str, name: str) -> str:
    """Return a metric's name in log.txt."""
    return name if name.startswith(split) else f"{split}_{name}"


def check_flags(task: Task, args: argparse.Namespace) -> None:
    """Raise InputError if flags contradict each other or the task."""
    if args.evaluate and args.checkpoint in ("", "random"):
        raise InputError("--evaluate needs --checkpoint; name the weights to evaluate")
    if args.resume and args.evaluate:
        raise InputError(
            "--resume continues a training, and --evaluate does not train; leave out one of them"
        )
    if args.split and not args.evaluate:
        raise InputError(f"--split {args.split} has an effect only with --evaluate; add --evaluate")
    if args.evaluate and args.split not in (None, *task.files) or args.evaluate and not task.files:
        raise InputError(
            f"--evaluate{' --split ' * bool(args.split)}{args.split or ''}: this task has nothing"
            " to evaluate; leave out --evaluate"
        )
    refuse_unread(task.name, args.set)


def find_run(task: Task, args: argparse.Namespace) -> tuple[Config, Path, Path | None]:
    """Return the configuration, the folder to write to, and the checkpoint to resume from.

    Raises:
        InputError: The folder cannot be written to or belongs to another run, a file cannot be
            read, or a required key is missing.
    """
    flags = ("text_encoder", "vision_encoder", "tokenizer")
    named = [f"{key}={json.dumps(value)}" for key in flags if (value := getattr(args, key, None))]
    choose = {"file": args.config, "overrides": [*args.set, *named], "evaluate": args.evaluate}
    config, source = choose_config(task.name, args.checkpoint, **choose)
    output_dir = Path(args.output_dir or default_output_dir(task.name, source, args.evaluate))
    if args.evaluate and (run_files(output_dir) or (output_dir / "config.yaml").exists()):
        output_dir /= "evaluation"
        log.warning(
            "%s holds a run, so the results of this evaluation go to %s",
            output_dir.parent,
            output_dir,
        )
    make_output_dir(output_dir, lock=not args.evaluate)
    read_log(output_dir / "log.txt")  # a wrong line would stop the run at the end of an epoch
    resume_from = None
    if not args.evaluate:
        # --resume --checkpoint continues another run only if the task can start without weights
        run = args.checkpoint if task.initialize else ""
        resume_from = find_resume_file(output_dir, run, args.resume)
    if resume_from:
        found = task_of_checkpoint(read_checkpoint(resume_from), task.name, resume_from)
        if found != task.name:
            raise InputError(
                f"--resume: {resume_from} is a checkpoint of task {found}, but this script trains"
                f" task {task.name}; name another --output_dir"
            )
        config, source = choose_config(task.name, str(resume_from), **choose)
    elif not (args.checkpoint or task.initialize):
        raise InputError(
            "--checkpoint is missing; name the pre-trained or fine-tuned weights to start from, or"
            " give --checkpoint random"
        )
    log.info("configuration: %s%s", source, "" if args.config else " (--config FILE names another)")
    if unread := unread_keys(task.name, config):
        log.warning("task %s does not read %s", task.name, ", ".join(unread))
    require(config, "bert_config", "image_res", *([] if args.evaluate else ["batch_size"]))
    return config, output_dir, resume_from


def build_datasets(task: Task, args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Return the data sets by split, without `train` if --evaluate is set.

    Raises:
        InputError: The data is wrong, or there is nothing to evaluate.
    """
    splits = [split for split in task.files if args.split in (None, split)]
    given = [split for split in splits if getattr(config, task.files[split])]
    if args.evaluate and not given:
        keys = " or ".join(dict.fromkeys(task.files[split] for split in splits))
        raise InputError(f"--evaluate has no data; set the key {keys} of the configuration")
    if not args.evaluate:
        given = ["train", *given]
    return {split: build_dataset(task.name, split, config, seed=args.seed) for split in given}


def load_initial_weights(task: Task, args: argparse.Namespace, model: ALBEF) -> list[str]:
    """Load --checkpoint, or the encoders of a task that starts without one; log the reports.

    Returns:
        Names of the loaded tensors.
    """
    if args.checkpoint == "random":
        return []
    if args.checkpoint:
        warn_of_exif(model.config, args.checkpoint)
        options = {"allow_missing": args.allow_missing, "complete": args.evaluate}
        reports = [load_checkpoint(model, args.checkpoint, **options)]
    else:
        reports = find(task.initialize)(model, model.config)
    for report in reports:
        log.info("%s", report)
    return [name for report in reports for name in report.loaded]


def save_settings(model: ALBEF, config: Config, folder: Path) -> None:
    """Write config.yaml and tokenizer.json, so that the run folder is complete in itself.

    Raises:
        TrainingStopped: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.vocabulary:
        config = msgspec.structs.replace(config, tokenizer=VOCABULARY)
        with writing(folder / VOCABULARY), atomic_write(folder / VOCABULARY) as file:
            file.write(model.vocabulary.encode())
    with writing(folder / "config.yaml"):
        save_config(config, folder)
