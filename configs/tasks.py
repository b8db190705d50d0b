"""The table of tasks: model, data, evaluation and default configuration of each task.

A new task is a new entry here (docs/extend.md). Classes and functions are named as "module:name"
and imported on first use, so that `--help` does not wait for torch.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from utils import InputError


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the table of tasks.

    Attributes:
        name: Name of the task, as `build_model` and `build_dataset` take it.
        title: Name of the task in tables of results.
        config: Default configuration, a path relative to the repository.
        model: Class of the model, called with (config, tokenizer).
        train_data: Function (config, seed) -> training set, "" if the task does not train.
        test_data: Function (config, split) -> test set, "" if the task has nothing to evaluate.
        files: For each split that can be evaluated, the configuration key of its files.
        evaluate: Function (model, dataset, tokenizer, config, device, report, **options) -> metrics
            in percent by name.
        check: Function (model, **options) that raises InputError if options do not fit the model.
        initialize: Function (model, config) -> load reports, for a run without --checkpoint.
        chance: Metrics of guessing in percent by name, or a function (dataset) that returns them.
        score: Metric that selects the best epoch, "" to keep the last epoch.
        detect: Whether tensors by name are the weights of this task; None if another task has the
            same weights.
        methods: Methods of `inference.Inference` that models of this task have.
        head: Attribute of the model: the head on the multimodal [CLS] that heat maps explain.
        classes: Names of the head's classes.
        traits: Words by which configuration keys select the tasks that read them.
    """

    name: str
    title: str
    config: str
    model: str
    train_data: str = ""
    test_data: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    evaluate: str = ""
    check: str = ""
    initialize: str = ""
    chance: str | Mapping[str, float] = field(default_factory=dict)
    score: str = ""
    detect: Callable[[Mapping[str, Any]], bool] | None = None
    methods: tuple[str, ...] = ()
    head: str = ""
    classes: tuple[str, ...] = ()
    traits: frozenset[str] = frozenset()

    @property
    def trains(self) -> bool:
        """Whether the task has a training set."""
        return bool(self.train_data)


def find(path: str) -> Any:
    """Import and return the object with the path "module:name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _has(*prefixes: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a test that every prefix begins the name of some tensor."""
    return lambda state: all(any(name.startswith(prefix) for name in state) for prefix in prefixes)


def _classes(state: Mapping[str, Any]) -> int:
    return len(state.get("cls_head.2.weight", ()))


VAL_TEST = {"val": "val_file", "test": "test_file"}
EMBEDDING = ("embed_images", "embed_texts", "similarity")
ALIGNED = (*EMBEDDING, "match", "match_logits", "rank", "ground", "heat_map")
MATCHING = ("no match", "match")
CONTRASTIVE = frozenset({"contrastive", "distills", "projects"})

# detect is tried from the first row to the last
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="vqa",
            title="VQA",
            config="configs/VQA.yaml",
            model="models.vqa:VQA",
            train_data="dataset.vqa:train_set",
            test_data="dataset.vqa:test_set",
            files=VAL_TEST,
            evaluate="evaluation.vqa:evaluate",
            chance="evaluation.vqa:chance_metrics",
            score="acc",
            detect=_has("text_decoder."),
            methods=("answer", "heat_map"),
            traits=frozenset({"distills"}),
        ),
        Task(
            name="nlvr_pretrain",
            title="text assignment",
            config="configs/NLVR_pretrain.yaml",
            model="models.nlvr:TextAssignment",
            train_data="dataset.caption:train_set",
            detect=_has("ta_head."),
            methods=("heat_map",),
            head="ta_head",
            classes=("first", "second", "neither"),
            traits=frozenset({"captions", "pairs", "projects"}),
        ),
        Task(
            name="ve",
            title="visual entailment",
            config="configs/VE.yaml",
            model="models.classification:VE",
            train_data="dataset.ve:train_set",
            test_data="dataset.ve:test_set",
            files=VAL_TEST,
            evaluate="evaluation.classification:evaluate",
            chance={"acc": 100 / 3},
            score="acc",
            detect=lambda state: _classes(state) == 3,
            methods=("entails", "heat_map"),
            head="cls_head",
            classes=("contradiction", "neutral", "entailment"),
            traits=frozenset({"distills"}),
        ),
        Task(
            name="nlvr",
            title="NLVR2",
            config="configs/NLVR.yaml",
            model="models.nlvr:NLVR",
            train_data="dataset.nlvr:train_set",
            test_data="dataset.nlvr:test_set",
            files=VAL_TEST,
            evaluate="evaluation.classification:evaluate",
            chance={"acc": 50},
            score="acc",
            detect=lambda state: _classes(state) == 2,
            methods=("true_of", "heat_map"),
            head="cls_head",
            classes=("False", "True"),
            traits=frozenset({"distills", "pairs"}),
        ),
        Task(
            name="pretrain",
            title="zero-shot retrieval",
            config="configs/Pretrain.yaml",
            model="models.pretrain:Pretrain",
            train_data="dataset.caption:train_set",
            test_data="dataset.retrieval:test_set",
            files=VAL_TEST,
            evaluate="evaluation.retrieval:evaluate",
            chance="evaluation.retrieval:chance_metrics",
            score="best_r_mean",
            initialize="models.weights:load_encoders",
            detect=_has("text_encoder.bert."),
            methods=(*ALIGNED, "fill_in"),
            head="itm_head",
            classes=MATCHING,
            traits=CONTRASTIVE | {"captions"},
        ),
        Task(
            name="retrieval",
            title="retrieval",
            config="configs/Retrieval_flickr.yaml",
            model="models.retrieval:Retrieval",
            train_data="dataset.retrieval:train_set",
            test_data="dataset.retrieval:test_set",
            files=VAL_TEST,
            evaluate="evaluation.retrieval:evaluate",
            chance="evaluation.retrieval:chance_metrics",
            score="r_mean",
            detect=_has("itm_head.", "vision_proj."),
            methods=ALIGNED,
            head="itm_head",
            classes=MATCHING,
            traits=CONTRASTIVE,
        ),
        Task(
            name="relevance",
            title="relevance",
            config="configs/Relevance.yaml",
            model="models.classification:Relevance",
            train_data="dataset.relevance:train_set",
            test_data="dataset.relevance:test_set",
            files=VAL_TEST,
            evaluate="evaluation.relevance:evaluate",
            chance=dict.fromkeys(("auc", "auc_other_image", "auc_other_words"), 50),
            score="auc",
            detect=_has("itm_head."),
            methods=("heat_map",),
            head="itm_head",
            classes=("irrelevant", "relevant"),
            traits=frozenset({"distills"}),
        ),
        Task(
            name="grounding",
            title="grounding",
            config="configs/Grounding.yaml",
            model="models.retrieval:Retrieval",
            train_data="dataset.grounding:train_set",
            test_data="dataset.grounding:test_set",
            # one file holds all splits; each ref has its split
            files={"val": "test_file", "test": "test_file"},
            evaluate="evaluation.grounding:evaluate",
            chance="evaluation.grounding:chance_metrics",
            check="models.gradcam:check_block",
            score="val_d",
            methods=ALIGNED,
            head="itm_head",
            classes=MATCHING,
            traits=CONTRASTIVE,
        ),
        Task(
            name="attributes",
            title="attributes",
            config="configs/Attributes.yaml",
            model="models.retrieval:Retrieval",
            test_data="dataset.attributes:test_set",
            files=VAL_TEST,
            evaluate="evaluation.attributes:evaluate",
            chance="evaluation.attributes:chance_metrics",
            methods=ALIGNED,
            head="itm_head",
            classes=MATCHING,
            traits=frozenset({"projects"}),
        ),
    )
}


def find_task(name: str) -> Task:
    """Return the row of a task. Raises InputError if there is no such task."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def detect_task(state: Mapping[str, Any]) -> str:
    """Return the task of a checkpoint's tensors by name.

    Weights of grounding and attributes are retrieval weights, so the result is retrieval.

    Raises:
        InputError: The tensors belong to no task.
    """
    for task in TASKS.values():
        if task.detect and task.detect(state):
            return task.name
    heads = dict.fromkeys(task.head for task in TASKS.values() if task.head)
    raise InputError(
        "cannot tell the task of the checkpoint, because it has none of the modules text_decoder,"
        f" {', '.join(heads)}; name a checkpoint of a task"
    )
