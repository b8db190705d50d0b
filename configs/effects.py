"""Find the keys of a configuration that a task does not read."""

from functools import reduce

from configs.config import FIELDS, Config
from configs.load import parse_override
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
                others = f"tasks {', '.join(readers)} do" if readers else "no task does"
                raise InputError(
                    f"{shown}: task {task} does not read {key} ({others}); leave it out"
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
