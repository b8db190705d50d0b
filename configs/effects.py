"""Find the keys of a configuration that have no effect in a run."""

from collections.abc import Iterator
from functools import reduce

from configs.config import FIELDS, Config
from configs.load import parse_override
from configs.tasks import TASKS
from utils import InputError

# keys of released files that no code reads; notes leave them out
RELEASED = ("coco_file", "eval_ema")


def refuse_unread(task: str, overrides: list[str]) -> None:
    """Raise InputError for a key=value override of a key that a task does not read."""
    for text in overrides:
        shown, values = parse_override(text)
        for key in values:
            readers = FIELDS[key].tasks if key in FIELDS else (task,)
            if task not in readers:
                others = (
                    f"the tasks that read it: {', '.join(readers)}"
                    if readers
                    else "no task reads it"
                )
                raise InputError(
                    f"{shown}: task {task} does not read {key}; leave it out ({others})"
                )


def unread_keys(task: str, config: Config) -> list[str]:
    """Return the keys that a task does not read and whose values are not the default."""
    unread = [
        field for field in FIELDS.values() if task not in field.tasks and field.name not in RELEASED
    ]
    return [
        field.name
        for field in unread
        if reduce(getattr, field.name.split("."), config) != field.default
    ]


def idle_keys(task: str, config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield reasons and the keys that have no effect in a training run because of another key."""
    objectives, row = config.objectives, TASKS[task]
    if not any(name.endswith(".tar") for name in config.train_file or ()):
        yield "train_file names no shards", ["shuffle_buffer"]
    if config.scheduler.warmup_iters is not None:
        yield "warmup_iters is set", ["scheduler.warmup_epochs"]
    if row.score and getattr(config, row.files["val"]):
        yield "only the best and the last epoch are kept", ["keep_checkpoints"]
    else:
        yield "there is no validation", ["patience"]
    if not config.distill:
        yield "distill is false", ["alpha", "warm_up"]
    if "mlm" not in objectives:
        yield "objectives lacks mlm", ["mlm_probability"]
    if "itc" not in objectives:
        contrastive = ["hard_negatives", "queue_size", "temp", "optimizer.temp_lr_scale"]
        yield "objectives lacks itc", contrastive
    if "itm" not in objectives:
        yield "objectives lacks itm", ["hard_negatives"]
    if task == "vqa" and not config.answer_list:
        yield "answers are generated (answer_list is not set)", ["k_test"]
    if task == "vqa" and config.answer_list:
        yield "answers are not generated (answer_list is set)", ["num_beams", "max_answer_tokens"]


def notes(task: str, config: Config, overrides: list[str], evaluate: bool) -> list[str]:
    """Return a line for each reason why keys have no effect.

    Args:
        task: Name of the task.
        config: Complete configuration.
        overrides: Values of --set. Keys that another setting disables are named only if set.
        evaluate: Whether the run evaluates only.
    """
    unread = unread_keys(task, config)
    lines = [f"task {task} does not read {', '.join(unread)}"] * bool(unread)
    given = [key for text in overrides for key in parse_override(text)[1]]
    training = [key for key in given if evaluate and FIELDS[key].training]
    for reason, keys in [("the run only evaluates", training), *idle_keys(task, config)]:
        named = [key for key in keys if key in given and (keys is training or key not in training)]
        if named:
            lines.append(f"{', '.join(named)}: no effect, because {reason}")
    return lines
