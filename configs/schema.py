"""Every configuration key: its default, its values and the tasks that read it; loading, overriding,
saving YAML files.

A new key is a line in KEYS; config["key"], or config["section"]["key"], then has its value in every
task.
"""

import copy
import difflib
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from utils import InputError, atomic_write, read_regular

# --------------------------------------------------------------------------------------------------
# what a key may hold


class Kind(NamedTuple):
    """`wanted` completes the message "it must be ...", `fits` tests a value."""

    wanted: str
    fits: Callable[[Any], bool]


TASKS = (
    "pretrain",
    "nlvr_pretrain",
    "retrieval",
    "vqa",
    "ve",
    "nlvr",
    "grounding",
    "relevance",
    "attributes",
)


def all_but(*names):
    """Return all tasks except some."""
    return tuple(task for task in TASKS if task not in names)


TRAINED = all_but("attributes")
CONTRASTIVE = ("pretrain", "retrieval", "grounding")  # trained by ITC and ITM
CAPTIONED = ("pretrain", "nlvr_pretrain")  # trained on captions from the web
DISTILLED = all_but("nlvr_pretrain", "attributes")
VALIDATED = ("retrieval", "vqa", "ve", "nlvr", "relevance")  # on val_file


class Key(NamedTuple):
    """A key's default, kind and readers. The default None means that the key may be missing; a task
    may still require it.

    tasks: the tasks that the key has an effect on, empty for keys that only released files have;
    training: the key has no effect in an evaluation.
    """

    default: Any
    kind: Kind
    tasks: tuple = TASKS
    training: bool = False


def trains(default, kind, tasks=TRAINED):
    """Return a Key that has an effect in training only."""
    return Key(default, kind, tasks, training=True)


def number(low=0, high=None):
    """Return the kind of a finite number.

    YAML reads "1e-4" in quotes and 1,000 as text, which does not fit.
    """
    wanted = f"a number from {low}" if high is None else f"a number from {low} to {high}"
    high = sys.float_info.max if high is None else high
    return Kind(wanted, lambda value: type(value) in (int, float) and low <= value <= high)


def whole(low, high=None):
    """Return the kind of a whole number from `low` to `high`, by default to the largest machine
    word.
    """
    wanted = (
        f"a whole number from {low}" if high is None else f"a whole number from {low} to {high:,}"
    )
    high = sys.maxsize if high is None else high
    return Kind(wanted, lambda value: type(value) is int and low <= value <= high)


def one_of(*choices):
    """Return the kind of a value out of `choices`."""
    return Kind("one of " * (len(choices) > 1) + ", ".join(choices), lambda value: value in choices)


def list_of(kind, wanted):
    """Return the kind of a list with at least one value, all of a kind."""
    return Kind(
        wanted, lambda value: isinstance(value, list) and value != [] and all(map(kind.fits, value))
    )


def either(*kinds):
    """Return the kind of a value that fits one of `kinds`."""
    return Kind(
        " or ".join(kind.wanted for kind in kinds),
        lambda value: any(kind.fits(value) for kind in kinds),
    )


def save_interval(value):
    """Return the key save_every as (minutes, iterations), one of them 0, both for never; None if it
    is neither.
    """
    if type(value) is int:
        return (0, value) if value >= 0 else None
    found = (
        re.fullmatch(r"(\d+(?:\.\d+)?) minutes?|(\d+) iterations?", value)
        if isinstance(value, str)
        else None
    )
    return found and (float(found[1] or 0), int(found[2] or 0))


INTERVAL = Kind(
    "minutes or iterations, as in 15 minutes or 1000 iterations",
    lambda value: save_interval(value) is not None,
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
PATH = Kind("a path", lambda value: TEXT.fits(value) and value != "")
PATHS = either(PATH, list_of(PATH, "a list of paths"))
MAPPING = Kind("a mapping of keys to values", lambda value: isinstance(value, dict))
BETAS = Kind(
    "two numbers from 0 to below 1",
    lambda value: (
        isinstance(value, list)
        and len(value) == 2
        and all(number(0, 1).fits(beta) and beta < 1 for beta in value)
    ),
)
# data sets of REFER, their refs
REFER = {"refcoco": "refs(unc).p", "refcoco+": "refs(unc).p", "refcocog": "refs(umd).p"}
OBJECTIVES = list_of(one_of("itc", "mlm", "itm"), "a list of itc, mlm, itm")
# far above any model: larger values would fill the memory before a message appears
COUNT, WIDTH, PIXELS = whole(1, 1000), whole(1, 100_000), whole(1, 10_000)
ROWS = whole(1, 100_000_000)

# --------------------------------------------------------------------------------------------------
# the keys

TEMP_RANGE = 0.001, 0.5  # limits of the learned temperature
KEYS = {
    # data
    "train_file": trains(None, PATHS),
    "val_file": Key(None, PATHS, (*VALIDATED, "attributes")),
    "test_file": Key(None, PATHS, ("pretrain", *VALIDATED, "grounding", "attributes")),
    "image_root": Key("", TEXT, all_but("vqa")),
    "vqa_root": Key(None, TEXT, ("vqa",)),
    "vg_root": Key(None, TEXT, ("vqa",)),
    "answer_list": Key(None, TEXT, ("vqa",)),
    "refcoco_data": Key(None, TEXT, ("grounding",)),
    "refer_dataset": Key("refcoco+", one_of(*REFER), ("grounding",)),  # a folder under refcoco_data
    "det_file": Key(None, TEXT, ("grounding",)),
    "coco_file": Key(None, TEXT, ()),  # in released files, without effect
    "image_res": Key(None, PIXELS),
    "hflip": trains(True, FLAG),
    "min_scale": trains(None, number(0, 1)),
    "randaugment": trains(True, FLAG),
    "max_skipped": trains(0.01, number(0, 1)),
    "num_workers": Key(None, whole(0, 1000)),
    "shuffle_buffer": trains(20000, whole(1), CAPTIONED),
    "max_words": Key(None, whole(1), all_but("attributes")),  # of a text; default: by task
    "max_tokens": Key(None, whole(2)),  # ids of a text, [CLS] included; default: by task
    # model
    "bert_config": Key(None, either(PATH, MAPPING)),
    "vision_width": Key(768, WIDTH),
    "vision_depth": Key(12, COUNT),
    "vision_heads": Key(12, COUNT),
    "patch_size": Key(16, PIXELS),
    "embed_dim": Key(
        256, WIDTH, ("pretrain", "nlvr_pretrain", "retrieval", "grounding", "attributes")
    ),
    "text_encoder": Key("bert-base-uncased", TEXT),
    "vision_encoder": trains("deit_base_patch16_224.fb_in1k", TEXT, ("pretrain",)),
    "tokenizer": Key(None, TEXT),
    # method
    "objectives": trains(["itc", "mlm", "itm"], OBJECTIVES, CONTRASTIVE),
    "hard_negatives": trains(True, FLAG, CONTRASTIVE),
    "distill": trains(True, either(FLAG, OBJECTIVES), DISTILLED),
    "alpha": trains(0.4, number(0, 1), DISTILLED),
    "warm_up": trains(True, FLAG, DISTILLED),
    "temp": trains(0.07, number(*TEMP_RANGE), CONTRASTIVE),
    "momentum": trains(0.995, number(0, 1), DISTILLED),
    "queue_size": trains(65536, ROWS, CONTRASTIVE),
    "mlm_probability": trains(0.15, number(0, 1), ("pretrain",)),
    "k_test": Key(128, whole(1), ("pretrain", "retrieval", "vqa")),
    "image_embeds": Key("host", one_of("host", "recompute"), ("pretrain", "retrieval")),
    "eos": Key("[SEP]", TEXT, ("vqa",)),
    "num_beams": Key(3, COUNT, ("vqa",)),
    # of a generated answer; default: the longest answer of train_file, else 10
    "max_answer_tokens": Key(None, whole(1), ("vqa",)),
    "share": Key(
        "cross_attention", one_of("cross_attention", "all", "none"), ("nlvr", "nlvr_pretrain")
    ),
    "eval_ema": Key(None, FLAG, ()),  # in released files, without effect
    # training
    "batch_size": trains(None, whole(1)),
    "batch_size_test": Key(64, whole(1), all_but("nlvr_pretrain")),
    "accumulate": trains(1, whole(1)),
    "clip_grad": trains(None, number()),
    "reference_batch": trains(None, whole(1)),
    "precision": Key("fp32", one_of("fp32", "bf16")),
    "compile": trains("auto", either(one_of("auto"), FLAG)),
    "gradient_checkpointing": trains(False, FLAG),
    "deterministic": Key(False, FLAG),
    "log_every": trains(50, whole(1)),
    "save_every": trains("15 minutes", INTERVAL),
    "keep_checkpoints": trains(None, whole(1)),
    "max_skipped_steps": trains(0, whole(0)),
    "optimizer.opt": trains("adamW", TEXT),
    "optimizer.lr": trains(1e-4, number()),
    "optimizer.weight_decay": trains(0.02, number()),
    "optimizer.opt_eps": trains(None, number()),  # None: the optimizer's default, as with opt_betas
    "optimizer.opt_betas": trains(None, BETAS),
    "optimizer.temp_lr_scale": trains(1.0, number(), CONTRASTIVE),
    "scheduler.sched": trains("cosine", one_of("cosine")),
    "scheduler.epochs": trains(30, whole(1)),
    "scheduler.min_lr": trains(1e-5, number()),
    # in released files, without effect, like cooldown_epochs
    "scheduler.decay_rate": Key(1.0, number(), ()),
    "scheduler.warmup_lr": trains(1e-5, number()),
    "scheduler.warmup_epochs": trains(10, whole(0)),
    "scheduler.cooldown_epochs": Key(0, whole(0), ()),
    "scheduler.warmup_iters": trains(None, whole(0)),
}
# Hugging Face's keys of bert_config, with its defaults, and two of ALBEF. Those without a default
# are required.
BERT_KEYS = {
    "vocab_size": Key(None, either(ROWS, one_of("auto"))),  # auto: the tokenizer's size
    "hidden_size": Key(None, WIDTH),
    "num_hidden_layers": Key(None, COUNT),
    "num_attention_heads": Key(None, COUNT),
    "fusion_layer": Key(None, whole(0)),  # the layers below it are the text encoder
    "encoder_width": Key(None, WIDTH),  # of the image embeddings
    "intermediate_size": Key(3072, WIDTH),
    "max_position_embeddings": Key(512, ROWS),
    "type_vocab_size": Key(2, COUNT),
    "pad_token_id": Key(0, whole(0)),
    "layer_norm_eps": Key(1e-12, number()),
    "hidden_dropout_prob": Key(0.1, number(0, 1)),
    "attention_probs_dropout_prob": Key(0.1, number(0, 1)),
    "initializer_range": Key(0.02, number()),
    "hidden_act": Key("gelu", one_of("gelu")),
}
# keys of Hugging Face without effect here; a mapping may have no other unknown keys, a file may
BERT_OTHERS = (
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "position_embedding_type",
    "use_cache",
    "gradient_checkpointing",
    "classifier_dropout",
    "add_cross_attention",
)
OTHER_NAMES = {  # names in released files, which have the learning rate twice
    "schedular": "scheduler",
    "batch_size_train": "batch_size",
    "scheduler.lr": "optimizer.lr",
}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
ANNOTATION_KEYS = [name for name, key in KEYS.items() if key.kind is PATHS]
# keys whose values name files, folders or hub repositories
FILE_KEYS = [
    *ANNOTATION_KEYS,
    "image_root",
    "vqa_root",
    "vg_root",
    "answer_list",
    "refcoco_data",
    "det_file",
    "coco_file",
    "bert_config",
    "text_encoder",
    "vision_encoder",
    "tokenizer",
]

# --------------------------------------------------------------------------------------------------
# checks

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80


def _check_known(keys, known, where):
    """Raise InputError for a key that is not known, naming the nearest one."""
    for key in keys:
        if key in known:
            continue
        key = str(key)
        near = [name for name in known if name.endswith(f".{key}")]
        near = near or difflib.get_close_matches(key, [*known, *SECTIONS, *OTHER_NAMES], 1, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "configs/schema.py lists all keys"
        raise InputError(f"{where}: unknown key {_REPR.repr(key)}, {hint}")


def _check_values(values, known, where):
    """Raise InputError for a key that is not known, and for a value that a key may not have."""
    _check_known(values, known, where)
    for key, value in values.items():
        default, kind = known[key][:2]
        if not (kind.fits(value) or (value is None and default is None)):
            raise InputError(f"{where}: {key} is {_REPR.repr(value)}, it must be {kind.wanted}")


def _check_multiple(config, key, divisor, where):
    """Raise InputError where one value does not divide another."""
    value, part = config[key], config[divisor]
    if value is not None and value % part:
        multiple = max(1, round(value / part)) * part
        raise InputError(
            f"{where}: {key} {value} is not a multiple of {divisor} {part}: set {key} to {multiple}, or another "
            f"{divisor}"
        )


# --------------------------------------------------------------------------------------------------
# configurations


def _items(config, where):
    """Yield the keys and values of a configuration, section.key for those of a section.

    Raises InputError.
    """
    for key, value in config.items():
        if OTHER_NAMES.get(key, key) not in SECTIONS:
            yield str(key), value
        elif MAPPING.fits(value):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif value is not None:  # as it is where all its lines are comments
            raise InputError(f"{where}: {key} is {_REPR.repr(value)}, it must be {MAPPING.wanted}")


def _flatten(config, where):
    """Return the values of a configuration by our name of the key, section.key for those of a
    section.

    Raises InputError where a section is not a mapping, and where two names of a key have two
    values.
    """
    flat, names = {}, {}
    for name, value in _items(config, where):
        section, dot, last = name.rpartition(".")
        key = f"{OTHER_NAMES.get(section, section)}{dot}{last}"
        key = OTHER_NAMES.get(key, key)
        if None not in (value, flat.get(key)) and value != flat[key]:
            raise InputError(
                f"{where}: {names[key]} is {_REPR.repr(flat[key])} and {name} is {_REPR.repr(value)}: they are "
                "one key, keep one of them"
            )
        if flat.get(key) is None:
            flat[key], names[key] = value, name
    return flat


def with_defaults(config, where="config"):
    """Return a checked copy of a task's configuration with every default filled in.

    OTHER_NAMES of keys are accepted; the result has the one learning rate as optimizer.lr and as
    scheduler.lr. Raises InputError, with `where` for the file, for an unknown key, naming the
    nearest one, and for a value that a key may not have.
    """
    return override(config, (), where)


def parse_override(text):
    """Parse a key=value override.

    Return its name in messages and its values by key. Raises InputError.
    """
    shown = f"--set {' '.join(text.split())}"
    path, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"{shown}: write it as key=value")
    value = parse_yaml(value, shown)
    section, _, name = path.rpartition(".")
    return shown, {"bert_config": {name: value}} if section == "bert_config" else _flatten(
        {path: value}, shown
    )


def override(config, overrides, where):
    """Return config with key=value overrides, checked and completed as by with_defaults.

    Dots reach into optimizer, scheduler and bert_config; of the latter a file is read. Raises
    InputError.
    """
    flat = _flatten(config, where)
    for text in overrides:
        shown, changed = parse_override(text)
        if isinstance(changed.get("bert_config"), dict) and text.startswith("bert_config."):
            _check_known(changed["bert_config"], BERT_KEYS, shown)
            changed["bert_config"] = (
                _read_bert_file(flat.get("bert_config") or {}) | changed["bert_config"]
            )
        _check_values(changed, KEYS, shown)
        flat |= changed
    _check_values(flat, KEYS, where)
    complete = {}
    for key, value in copy.deepcopy(
        {name: key.default for name, key in KEYS.items()} | flat
    ).items():
        section, _, name = key.rpartition(".")
        (complete.setdefault(section, {}) if section else complete)[name] = value
    complete["scheduler"]["lr"] = complete["optimizer"]["lr"]
    for key in ANNOTATION_KEYS:
        if isinstance(complete[key], str):
            complete[key] = [complete[key]]
    _check_multiple(complete, "image_res", "patch_size", where)
    _check_multiple(complete, "vision_width", "vision_heads", where)
    return complete


def load_config(path, overrides=()):
    """Read a YAML file and applies overrides as `override` does. Raises InputError."""
    try:
        content = read_regular(path)
    except OSError as error:
        _check_folder("--config", path)
        raise InputError(f"--config {path}: {error.strerror}") from None
    config = parse_yaml(content, path)
    if not MAPPING.fits(config):
        raise InputError(f"{path}: a configuration is {MAPPING.wanted}")
    if "tokenizer" in config:
        config["tokenizer"] = beside(path, config["tokenizer"])
    config = override(config, overrides, path)
    for key, value in config.items():
        for text in value if isinstance(value, list) else [value]:
            _check_folder(f"{path}: {key}", text)
    return config


def beside(path, name):
    """Return the path of the file `name` beside the configuration at `path` if it exists there,
    else the name.
    """
    bare = isinstance(name, str) and name and Path(name).name == name
    return (
        str(Path(path).with_name(name)) if bare and Path(path).with_name(name).is_file() else name
    )


def _check_folder(where, path):
    """Raise InputError for a relative path that is found in the repository's folder, but not in the
    one the script runs in.
    """
    folder = Path(__file__).resolve().parents[1]
    if (
        isinstance(path, str)
        and path
        and not os.path.exists(path)
        and os.path.exists(folder / path)
    ):
        raise InputError(
            f"{where} {path} is not in the working directory {Path.cwd()}, where relative paths start, but in "
            f"{folder}: run the script there, or write whole paths"
        )


def _read_bert_file(value):
    """Return the keys of bert_config that a model reads, of a mapping or of the JSON file at a
    path. Raises InputError.

    A mapping may have no other keys except BERT_OTHERS. A file may have any other key that does not
    look like a misspelling.
    """
    if MAPPING.fits(value):
        _check_known([key for key in value if key not in BERT_OTHERS], BERT_KEYS, "bert_config")
        return {key: value[key] for key in value if key in BERT_KEYS}
    try:
        bert = json.loads(read_regular(value))
    except OSError as error:
        raise InputError(f"bert_config: cannot read {value}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"bert_config: {value} is not valid JSON: {error}") from None
    if not MAPPING.fits(bert):
        raise InputError(f"bert_config: {value} is not a JSON object")
    misspelled = [key for key in bert if difflib.get_close_matches(key, BERT_KEYS, 1, 0.9)]
    _check_known(misspelled, BERT_KEYS, f"bert_config {value}")
    return {key: bert[key] for key in bert if key in BERT_KEYS}


def read_bert_config(value):
    """The key bert_config, a mapping or the path of a JSON file -> dict, checked, with defaults.

    Raises InputError.
    """
    bert = {name: key.default for name, key in BERT_KEYS.items()} | _read_bert_file(value)
    where = "bert_config" if MAPPING.fits(value) else f"bert_config {value}"
    missing = [key for key in BERT_KEYS if bert[key] is None]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    _check_values(bert, BERT_KEYS, where)
    _check_multiple(bert, "hidden_size", "num_attention_heads", where)
    if bert["fusion_layer"] >= bert["num_hidden_layers"]:
        raise InputError(
            f"{where}: fusion_layer is {bert['fusion_layer']}, it must be below num_hidden_layers "
            f"{bert['num_hidden_layers']}: the layers from there on fuse text and image"
        )
    return bert


def require(config, *keys):
    """Raise InputError for a key that the task needs and the configuration lacks."""
    for key in keys:
        if config[key] is None:
            raise InputError(
                f"the configuration lacks the key {key}: add it to the file or pass --set {key}=..."
            )


def parse_yaml(content, where):
    """Return the value that YAML text holds.

    Raises InputError, with where for the file, if it holds none.
    """
    try:
        return YAML(typ="safe").load(content)
    # dates and characters that do not exist raise other errors than YAMLError
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = ", ".join(
            filter(None, (getattr(error, "context", None), getattr(error, "problem", None)))
        )
        raise InputError(
            f"{where}{line}: not valid YAML: {' '.join((problem or str(error)).split())}"
        ) from None


def save_config(config, output_dir):
    """Write config.yaml, the configuration as it runs, defaults and overrides included."""
    yaml = YAML(typ="safe")
    yaml.width = 2**31 - 1  # where a long string is folded, a blank may be lost
    with atomic_write(Path(output_dir) / "config.yaml", "w") as file:
        yaml.dump(config, file)
