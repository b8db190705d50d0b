"""Choose the configuration and the output folder of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from configs.config import Config
from configs.load import load_config, override
from configs.tasks import detect_task, find_task
from engine.checkpointing import run_files
from models.weights import find_checkpoint, is_repository, named_tensors, read_checkpoint

# keys that the weights of a checkpoint depend on
MODEL_KEYS = (
    "bert_config",
    "text_encoder",
    "tokenizer",
    "image_res",
    "patch_size",
    "vision_width",
    "vision_depth",
    "vision_heads",
    "embed_dim",
    "max_answer_tokens",
)

log = logging.getLogger(__name__)


def task_of_checkpoint(content: dict[str, Any], task: str, path: Path | str) -> str:
    """Return the task of a checkpoint's content.

    Args:
        content: What `read_checkpoint` returned.
        task: Task that it is loaded for, returned if its models have these weights.
        path: Path of the checkpoint, for messages.

    Raises:
        InputError: The weights belong to no task.
    """
    resume = content.get("resume")
    if isinstance(resume, dict) and resume.get("task"):
        return resume["task"]
    detected = detect_task(named_tensors(content, path))
    return task if find_task(task).model == find_task(detected).model else detected


def choose_config(
    task: str,
    checkpoint: str,
    *,
    file: Path | str | None = None,
    overrides: Sequence[str] = (),
    evaluate: bool = True,
) -> tuple[Config, str]:
    """Return the configuration of a run and the file that it comes from.

    It comes from `file`, else from a checkpoint of the task, else it is the task's default. An
    evaluation with the default takes MODEL_KEYS from the checkpoint. An evaluation with `file`
    takes max_answer_tokens from the checkpoint if `file` does not set it.

    Args:
        task: Name of the task.
        checkpoint: Path of a checkpoint, or "".
        file: A YAML file, the flag --config.
        overrides: KEY=VALUE, the flag --set.
        evaluate: Whether the run only evaluates.

    Raises:
        InputError: A file cannot be read or has a wrong key or value.
    """
    content, saved = _saved_config(checkpoint)
    if file:
        config = load_config(file, overrides)
        if task == "vqa" and config.max_answer_tokens is None and evaluate:
            config = msgspec.structs.replace(
                config, max_answer_tokens=saved.get("max_answer_tokens")
            )
        return config, str(file)
    where = f"configuration of {checkpoint}"
    # the key schedular marks released code, which saves the paths of its own machine
    if saved and "schedular" not in saved and task_of_checkpoint(content, task, checkpoint) == task:
        return override(saved, overrides, where), checkpoint
    default = find_task(task).config
    if not (saved and evaluate):
        return load_config(default, overrides), default
    model = {key: saved[key] for key in MODEL_KEYS if saved.get(key) is not None}
    log.info("model and tokenizer: configured as in %s", checkpoint)
    return override({**load_config(default).to_dict(), **model}, overrides, where), default


def warn_of_exif(config: Config, checkpoint: str) -> None:
    """Log a note if the images of the checkpoint's training were turned by another `exif`."""
    exif = _saved_config(checkpoint)[1].get("exif", config.exif)
    if exif != config.exif:
        log.warning(
            "exif is %s, but %s was trained with exif %s; add --set exif=%s to turn images as in"
            " that training",
            config.exif,
            checkpoint,
            exif,
            exif,
        )


def _saved_config(checkpoint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a checkpoint and its configuration, each {} if it is missing."""
    if not (checkpoint and (Path(checkpoint).exists() or is_repository(checkpoint))):
        return {}, {}
    content = read_checkpoint(checkpoint)
    saved = content.get("config")
    if not isinstance(saved, dict):
        return content, {}
    if content.get("tokenizer_json"):
        saved = {**saved, "tokenizer": str(find_checkpoint(checkpoint))}
    return content, saved


def default_output_dir(task: str, source: str, evaluate: bool) -> Path:
    """Return the folder of results if --output_dir is missing: output/ and a name.

    Args:
        task: Name of the task.
        source: File of the configuration, which gives the name: a YAML file's, or that of a run's
            folder.
        evaluate: Whether the run only evaluates. With a file of a run it writes to the run's
            folder.
    """
    path = Path(source)
    in_run = path.name == "config.yaml" or path.name.startswith("checkpoint_")
    if evaluate and in_run and run_files(path.parent):
        return path.parent
    name = (path.parent.name if in_run else "") or path.stem
    folders = path.parts[path.parts.index("configs") + 1 : -1] if "configs" in path.parts else ()
    return Path("output", *folders, name if name.lower().startswith(task) else f"{task}_{name}")
