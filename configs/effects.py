"""Find the keys of a configuration that have no effect in a run, to refuse them in --set or name
them in a note.
"""

from collections.abc import Iterator

from configs.config import FIELDS as KEYS
from configs.config import as_config
from configs.load import parse_override
from configs.tasks import TASKS
from utils import InputError

# keys of released files that no code reads: no note names them
RELEASED = ("coco_file", "eval_ema")


def refuse_unread(task: str, overrides: list[str]) -> None:
    """Raise InputError for a key=value override of a key that a task does not read."""
    for text in overrides:
        shown, values = parse_override(text)
        for key in values:
            if key in KEYS and task not in KEYS[key].tasks:
                readers = (
                    f"only {', '.join(KEYS[key].tasks)}"
                    if KEYS[key].tasks
                    else "nor does any other task"
                )
                raise InputError(f"{shown}: {task} does not read {key}, {readers}: leave it out")


def unread_keys(task: str, config: dict) -> list[str]:
    """Return the keys of a complete configuration that the task does not read and that differ from
    their default.
    """
    config = as_config(config)
    return [
        name
        for name, key in KEYS.items()
        if task not in key.tasks and name not in RELEASED and _value(config, name) != key.default
    ]


def idle_keys(
    task: str, config: dict, overrides: list[str], evaluate: bool
) -> Iterator[tuple[list[str], str]]:
    """Yield (keys, reason) for keys in --set that another setting, or --evaluate, leaves without
    effect.

    config: the complete configuration; evaluate: whether the run only evaluates.
    """
    given = [key for text in overrides for key in parse_override(text)[1]]
    if evaluate:
        yield [key for key in given if KEYS[key].training], "nothing is trained"
        given = [key for key in given if not KEYS[key].training]
    objectives, answers = config["objectives"], config["answer_list"]
    shards = any(name.endswith(".tar") for name in config["train_file"] or [])
    validates = ("validates" in TASKS[task].traits and config["val_file"]) or (
        task == "grounding" and config["test_file"]
    )
    for idle, reason, keys in (
        (not shards, "train_file names no shards", ["shuffle_buffer"]),
        (
            config["scheduler"]["warmup_iters"] is not None,
            "warmup_iters is set",
            ["scheduler.warmup_epochs"],
        ),
        (validates, "the best epoch by validation and the last one are kept", ["keep_checkpoints"]),
        (not config["distill"], "distill is false", ["alpha", "warm_up"]),
        ("mlm" not in objectives, "objectives lacks mlm", ["mlm_probability"]),
        (
            "itc" not in objectives,
            "objectives lacks itc",
            ["hard_negatives", "queue_size", "temp", "optimizer.temp_lr_scale"],
        ),
        ("itm" not in objectives, "objectives lacks itm", ["hard_negatives"]),
        (task == "vqa" and not answers, "answers are generated without answer_list", ["k_test"]),
        (
            task == "vqa" and answers,
            "answers are chosen from answer_list",
            ["num_beams", "max_answer_tokens"],
        ),
    ):
        if idle:
            yield [key for key in keys if key in given], reason


def notes(task: str, config: dict, overrides: list[str], evaluate: bool) -> list[str]:
    """Return a line for each reason why keys of a run have no effect."""
    unread, idle = unread_keys(task, config), idle_keys(task, config, overrides, evaluate)
    lines = [f"note: {task} does not read {', '.join(unread)}"] * bool(unread)
    return lines + [
        f"note: {', '.join(keys)}: no effect, {reason}" for keys, reason in idle if keys
    ]


def _value(config, name):
    section, _, name = name.rpartition(".")
    return (config[section] if section else config)[name]
