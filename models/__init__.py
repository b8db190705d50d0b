"""ALBEF models by task."""

from importlib import import_module

from configs.schema import with_defaults
from utils import InputError

# task: module (with a dot: of this package) and class, imported when a model is built: `python -m
# models.tokenizer --help` does not wait for torch. Another class in its place changes the method
# for the whole framework (docs/extend.md)
MODELS = {
    "pretrain": (".pretrain", "Pretrain"),
    "retrieval": (".retrieval", "Retrieval"),
    "grounding": (".retrieval", "Retrieval"),
    "attributes": (".retrieval", "Retrieval"),
    "relevance": (".relevance", "Relevance"),
    "vqa": (".vqa", "VQA"),
    "ve": (".ve", "VE"),
    "nlvr": (".nlvr", "NLVR"),
    "nlvr_pretrain": (".nlvr", "TextAssignment"),
}
# of task_of: whose models have the projections of contrastive learning
ALIGNED = ("pretrain", "retrieval")


def build_model(task, config, tokenizer=None):
    """Return the model of a task with its initial, random weights.

    task: a key of MODELS; config: the task's YAML as a dict, missing keys take their defaults,
    bert_config is a path or a dict; tokenizer: supplies the special token ids, BERT's
    (models.albef.SpecialIds) without one. Raises InputError.
    """
    if task not in MODELS:
        raise InputError(f"task {task!r} is unknown, the tasks are {', '.join(MODELS)}")
    module, name = MODELS[task]
    model = getattr(import_module(module, __name__), name)(with_defaults(config), tokenizer)
    model.task = task
    return model


def task_of(state):
    """Return the task, a key of MODELS, of a checkpoint's tensors by name; for grounding it is
    retrieval.

    Raises InputError if they belong to none.
    """
    if any(name.startswith("text_decoder.") for name in state):
        return "vqa"
    if "ta_head.weight" in state:
        return "nlvr_pretrain"
    if "cls_head.2.weight" in state:
        return "ve" if len(state["cls_head.2.weight"]) == 3 else "nlvr"
    if any(name.startswith("text_encoder.bert.") for name in state):
        return "pretrain"
    if "itm_head.weight" in state:
        return "retrieval" if "vision_proj.weight" in state else "relevance"
    raise InputError(
        "the checkpoint is of none of the tasks: it has neither text_decoder, ta_head, cls_head nor itm_head"
    )
