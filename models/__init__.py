"""ALBEF models by task."""

from models.nlvr import NLVR, TextAssignment
from models.pretrain import Pretrain
from models.retrieval import Retrieval
from models.ve import VE
from models.vqa import VQA
from utils import InputError, with_defaults

MODELS = {
    "pretrain": Pretrain, "retrieval": Retrieval, "vqa": VQA, "ve": VE, "nlvr": NLVR, "nlvr_pretrain": TextAssignment,
}  # fmt: skip


def build_model(task, config, tokenizer=None):
    """The model of a task with its initial, random weights.

    task: a key of MODELS; config: the task's YAML as a dict, missing keys take their defaults, bert_config is a path or a
    dict; tokenizer: supplies the special token ids, BERT's 0, 101 and 103 without one. Raises InputError.
    """
    if task not in MODELS:
        raise InputError(f"task {task!r} is unknown, the tasks are {', '.join(MODELS)}")
    return MODELS[task](with_defaults(config), tokenizer)
