"""Every configuration key of every task: its default and its check; loading and saving YAML files."""

import copy
import difflib
import json
import reprlib
import sys
from pathlib import Path

from ruamel.yaml import YAML

from utils import InputError, atomic_write

# every key of every task with its default; a type stands for a key without one, a task that needs the key says so
DEFAULTS = {
    # data
    "train_file": list, "val_file": list, "test_file": list, "image_root": "", "vqa_root": str, "vg_root": str,
    "answer_list": str, "refcoco_data": str, "det_file": str, "image_res": int, "hflip": True,
    "min_scale": float, "randaugment": True,
    "max_skipped": 0.01, "num_workers": int, "shuffle_buffer": 2000,
    # model
    "bert_config": object, "vision_width": 768, "vision_depth": 12, "vision_heads": 12, "patch_size": 16, "embed_dim": 256,
    "text_encoder": "bert-base-uncased", "vision_encoder": "deit_base_patch16_224.fb_in1k", "tokenizer": str,
    # method
    "objectives": ["itc", "mlm", "itm"], "hard_negatives": True, "distill": True, "alpha": 0.4, "warm_up": True,
    "temp": 0.07, "momentum": 0.995, "queue_size": 65536, "mlm_probability": 0.15, "k_test": 128, "image_embeds": "host",
    "eos": "[SEP]", "num_beams": 3, "share": "cross_attention",
    # training
    "batch_size": int, "batch_size_train": int, "batch_size_test": 64, "accumulate": 1, "clip_grad": float,
    "reference_batch": int,
    "precision": "fp32", "compile": False, "gradient_checkpointing": False, "shard_optimizer": False, "deterministic": False,
    "log_every": 50, "save_every": 1000, "keep_checkpoints": int, "max_skipped_steps": 0,
    "optimizer": {"opt": "adamW", "lr": 1e-4, "weight_decay": 0.02, "temp_lr_scale": 1.0},
    "scheduler": {
        "sched": "cosine", "lr": 1e-4, "epochs": 30, "min_lr": 1e-5, "decay_rate": 1.0, "warmup_lr": 1e-5,
        "warmup_epochs": 10, "cooldown_epochs": 0, "warmup_iters": int,
    },
    # accepted because released files have them, without effect
    "eval_ema": bool, "coco_file": str,
}  # fmt: skip
RENAMED = {"schedular": "scheduler"}
CHOICES = {"precision": ["fp32", "bf16"], "image_embeds": ["host", "recompute"], "share": ["cross_attention", "all", "none"]}
AT_LEAST_1 = (
    "image_res", "shuffle_buffer", "vision_width", "vision_depth", "vision_heads", "patch_size", "embed_dim", "queue_size",
    "k_test", "num_beams", "batch_size", "batch_size_train", "batch_size_test", "accumulate", "reference_batch", "log_every",
    "keep_checkpoints",
)  # fmt: skip
SHARES = ("min_scale", "max_skipped", "alpha", "momentum", "mlm_probability")  # from 0 to 1, not in percent
LARGEST = 10**15  # more is a slip of the finger, or infinity
OBJECTIVES = ["itc", "mlm", "itm"]
LISTS_OR_STRINGS = ("train_file", "val_file", "test_file")


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3  # a value may hold itself


def _shown(value):
    """A value as error messages show it: on one line and not long."""
    try:
        return _REPR.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _unknown(key, known, where):
    near = [f"{outer}.{key}" for outer, inner in DEFAULTS.items() if isinstance(inner, dict) and key in inner]
    if not near and isinstance(key, str):
        near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(known)}"
    return InputError(f"{where}: unknown key {_shown(key)}, {hint}")


def _are_paths(value):
    paths = value if isinstance(value, list) else [value]
    return all(isinstance(path, str) and path for path in paths)


def _is_json(value):
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # not every string of Python can be encoded
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _check_value(key, value, default, where):
    """Raises InputError for a value of another kind than the key's default has, or that no file could hold."""
    kind = default if isinstance(default, type) else type(default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST
    paths = key in LISTS_OR_STRINGS
    fits, wanted = {
        bool: (isinstance(value, bool) or (key == "distill" and isinstance(value, list)), "true or false"),
        int: (number and isinstance(value, int), "a whole number, not negative, up to 10^15"),
        float: (number, "a number, not negative, up to 10^15"),  # YAML reads "1e-4" in quotes and 1,000 as text
        str: (isinstance(value, str), "a string"),
        list: (_are_paths(value) if paths else isinstance(value, list), "a path or a list of paths" if paths else "a list"),
        dict: (isinstance(value, dict), "a mapping of keys to values"),
        object: (isinstance(value, (str, dict)), "a path or a mapping of keys to values"),
    }[kind]
    if not fits and not (value is None and isinstance(default, type)):
        raise InputError(f"{where}: {key} is {_shown(value)}, it must be {wanted}")
    if kind is not dict and not _is_json(value):
        raise InputError(f"{where}: {key} is {_shown(value)}, it may hold text, finite numbers, true, false, null, lists and "
                         "mappings of these")
    if key in AT_LEAST_1 and value is not None and value < 1:
        raise InputError(f"{where}: {key} is {value}, it must be at least 1")
    if key in SHARES and value is not None and value > 1:
        raise InputError(f"{where}: {key} is {value}, it must be from 0 to 1")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"{where}: {key} is {_shown(value)}, it must be one of {', '.join(CHOICES[key])}")


def _renamed(config, where):
    """config with our spelling of every key. Raises InputError where it has both spellings of one."""
    for released, ours in RENAMED.items():
        if released in config and ours in config:
            raise InputError(f"{where}: {released} and {ours} are one key, keep one of them")
    return {RENAMED.get(key, key): value for key, value in config.items()}


def with_defaults(config, where="config"):
    """A checked copy of a task's configuration with every default filled in.

    Released spellings (schedular) are accepted. Raises InputError for an unknown key, naming the nearest one, and for a
    value of the wrong kind; where names the file in the message.
    """
    config = _renamed(config, where)
    result = {}
    for key, value in config.items():
        if key not in DEFAULTS:
            raise _unknown(key, [*DEFAULTS, *RENAMED], where)
        _check_value(key, value, DEFAULTS[key], where)
        if isinstance(DEFAULTS[key], dict):
            for inner in value:
                if inner not in DEFAULTS[key]:
                    raise _unknown(inner, list(DEFAULTS[key]), f"{where}: {key}")
                _check_value(f"{key}.{inner}", value[inner], DEFAULTS[key][inner], where)
        result[key] = copy.copy(value)
    for key, default in DEFAULTS.items():
        if isinstance(default, dict):
            filled = {inner: None if isinstance(value, type) else value for inner, value in default.items()}
            result[key] = {**filled, **result.get(key, {})}
        else:
            result.setdefault(key, None if isinstance(default, type) else copy.copy(default))
    for key in ("objectives", "distill"):
        wrong = [name for name in result[key] if name not in OBJECTIVES] if isinstance(result[key], list) else []
        if wrong:
            raise InputError(f"{where}: {key} has {_shown(wrong[0])}, it may hold {', '.join(OBJECTIVES)}")
    if not result["objectives"]:
        raise InputError(f"{where}: objectives is empty, name at least one of {', '.join(OBJECTIVES)}")
    for key in LISTS_OR_STRINGS:
        if isinstance(result[key], str):
            result[key] = [result[key]]
    return result


def _one_line(text):
    return " ".join(str(text).split())


def _parse_yaml(source, name):
    """The value that a YAML file or string holds. Raises InputError, with name for the file or string, unless it holds one."""
    try:
        return YAML(typ="safe").load(source)
    except OSError:
        raise
    except RecursionError:
        raise InputError(f"{name}: lists and mappings are nested too deeply") from None
    except Exception as error:  # numbers, dates and characters that do not exist raise nearly anything
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = ", ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
        raise InputError(f"{name}{line}: not valid YAML: {_one_line(problem or error)}") from None


def override(config, overrides, where):
    """config with key=value overrides (dots reach into optimizer and scheduler), checked and completed as by with_defaults."""
    config = _renamed(config, where)
    for text in overrides:
        shown = f"--set {_one_line(text)}"
        path, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"{shown}: write it as key=value")
        *outer, key = path.split(".")
        target = config
        for name in outer:
            name = RENAMED.get(name, name)
            if not isinstance(target.get(name, {}), dict):
                raise InputError(f"{shown}: {_shown(name)} has no keys of its own")
            target[name] = dict(target.get(name, {}))  # the caller keeps its own as it is
            target = target[name]
        target[RENAMED.get(key, key) if not outer else key] = _parse_yaml(value, shown)
    return with_defaults(config, where)


def load_config(path, overrides=()):
    """Reads a YAML file and applies overrides as `override` does."""
    try:
        config = _parse_yaml(Path(path), path)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a configuration is a mapping of keys to values")
    return override(config, overrides, path)


def require(config, *keys):
    """Raises InputError for a key that the task needs and the configuration lacks."""
    for key in keys:
        if config[key] is None:
            raise InputError(f"the configuration lacks the key {key}: add it to the file or pass --set {key}=...")


def save_config(config, output_dir):
    """The snapshot config.yaml of the configuration as it runs, defaults and overrides included."""
    yaml = YAML(typ="safe")
    yaml.width = sys.maxsize  # where a long string is folded, a blank may be lost
    with atomic_write(Path(output_dir) / "config.yaml", "w") as file:
        yaml.dump(config, file)
