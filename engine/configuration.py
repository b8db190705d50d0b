"""Choose the configuration and the output folder of a script from its flags."""

from pathlib import Path
from typing import NamedTuple

from configs.schema import load_config, override
from engine.saving import is_run_file, run_files
from models import task_of
from models.weights import find_checkpoint, is_repository, named_tensors, read_checkpoint
from utils import InputError

# what the weights of a checkpoint were made for, whatever the data
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

DEFAULTS = {  # task: the configuration where a checkpoint to load has none
    "pretrain": "configs/Pretrain.yaml",
    "retrieval": "configs/Retrieval_flickr.yaml",
    "grounding": "configs/Grounding.yaml",
    "vqa": "configs/VQA.yaml",
    "ve": "configs/VE.yaml",
    "nlvr": "configs/NLVR.yaml",
    "nlvr_pretrain": "configs/NLVR_pretrain.yaml",
    "relevance": "configs/Relevance.yaml",
}


class Choice(NamedTuple):
    """A configuration, the YAML file or checkpoint that it comes from, and how to say that."""

    config: dict
    source: str
    text: str


def task_in(content, task, path):
    """The task that the content of a checkpoint file says it is of; `task` where the weights,
    grounding's, fit it as well.
    """
    resume = content.get("resume")
    if isinstance(resume, dict) and resume.get("task"):
        return resume["task"]
    found = task_of(named_tensors(content, path))
    return task if (found, task) == ("retrieval", "grounding") else found


def choose_config(task, args, checkpoint, default=None):
    """Return the configuration of --config, else of the checkpoint, else of the file `default`,
    with the overrides of --set.

    checkpoint: "" or a path that does not exist means none. If there is a default, the checkpoint's
    configuration is used only if it is of the task and from this code. The released code (it writes
    schedular) saves the paths of its machine and never reads them. An evaluation of other
    checkpoints uses the default with their MODEL_KEYS. An evaluation with --config takes
    max_answer_tokens from the checkpoint unless it is set. Raises InputError if there is no
    configuration.
    """
    if args.config:
        config = load_config(args.config, args.set)
        if (
            task == "vqa"
            and config["max_answer_tokens"] is None
            and getattr(args, "evaluate", True)
        ):
            length = _saved_config(checkpoint)[1].get("max_answer_tokens")
            config = override(
                config, [f"max_answer_tokens={length}"] if length else [], args.config
            )
        return Choice(config, args.config, args.config)
    content, saved = _saved_config(checkpoint)
    if saved and content.get("tokenizer_json"):
        saved = {**saved, "tokenizer": str(find_checkpoint(checkpoint))}
    if saved and (
        default is None or ("schedular" not in saved and task_in(content, task, checkpoint) == task)
    ):
        config = override(saved, args.set, f"configuration of {checkpoint}")
        return Choice(config, checkpoint, f"that of {checkpoint} (another: --config FILE)")
    if default is None:
        raise InputError(
            f"checkpoint {checkpoint} holds no configuration: name the YAML file of its training by --config"
        )
    if saved and args.evaluate:
        model = {key: saved[key] for key in MODEL_KEYS if saved.get(key) is not None}
        config = override(
            {**load_config(default), **model}, args.set, f"configuration of {checkpoint}"
        )
        return Choice(
            config,
            default,
            f"{default}, with the model and tokenizer of {checkpoint} (another: --config FILE)",
        )
    return Choice(load_config(default, args.set), default, f"{default} (another: --config FILE)")


def _saved_config(checkpoint):
    """Return the content of a checkpoint and its configuration, each {} if it is missing."""
    content = (
        read_checkpoint(checkpoint)
        if checkpoint and (Path(checkpoint).exists() or is_repository(checkpoint))
        else {}
    )
    return content, content.get("config") if isinstance(content.get("config"), dict) else {}


def default_output_dir(task, source, evaluate):
    """Return the folder of a task's results if --output_dir is missing: output/ and the name of the
    configuration.

    source: the YAML file, named by its path after configs, or the checkpoint of the configuration.
    A file of a run has the name of its folder, and evaluations with it are written there.
    """
    path = Path(source)
    of_run = path.name == "config.yaml" or is_run_file(path)
    if evaluate and of_run and run_files(path.parent):
        return path.parent
    name = (path.parent.name if of_run else "") or path.stem
    folders = path.parts[path.parts.index("configs") + 1 : -1] if "configs" in path.parts else ()
    return Path("output", *folders, name if name.lower().startswith(task) else f"{task}_{name}")
