"""ALBEF models: networks, losses and one model a task (configs/tasks.py)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.config import Config, as_config
from configs.tasks import find, find_task

if TYPE_CHECKING:  # importing this package does not import torch
    from models.albef import ALBEF
    from models.tokenizer import Tokenizer


def build_model(
    task: str, config: Config | Mapping[str, Any], tokenizer: "Tokenizer | None" = None
) -> "ALBEF":
    """Build the model of a task with random weights.

    Args:
        task: A key of `configs.tasks.TASKS`.
        config: Configuration, or a dict of the task's YAML.
        tokenizer: Source of the special token ids, by default BERT's 0, 101, 103.

    Returns:
        The model, with the attribute `task`.

    Raises:
        InputError: The task is unknown or the configuration does not fit.
    """
    model = find(find_task(task).model)(as_config(config), tokenizer)
    model.task = task
    return model
