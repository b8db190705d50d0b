"""Process group, seeds, logging, configuration loading and checking."""

import argparse
import difflib
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

# the data workers tokenize, each in one thread; without this the library warns at every fork
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the file, key or line, and the remedy.

    Scripts print it without a stack trace and exit with status 2. A data worker hands its errors over wrapped in a
    stack trace, of which the last line is the message.
    """

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].removeprefix("utils.InputError: "))


class TrainingStopped(RuntimeError):
    """Training cannot go on (a loss is not finite, too many broken images). Scripts exit with status 1."""


class Interrupted(Exception):
    """SIGTERM or Ctrl-C: the run was saved and leaves with the signal's exit status."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


# ---------------------------------------------------------------------------------------------------------------------
# configuration

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
    "batch_size": int, "batch_size_train": int, "batch_size_test": 64, "accumulate": 1, "clip_grad": float, "reference_batch": int,
    "precision": "fp32", "compile": False, "gradient_checkpointing": False, "shard_optimizer": False, "deterministic": False,
    "log_every": 50, "save_every": 1000, "keep_checkpoints": int, "max_skipped_steps": 0,
    "optimizer": {"opt": "adamW", "lr": 1e-4, "weight_decay": 0.02, "temp_lr_scale": 1.0},
    "scheduler": {
        "sched": "cosine", "lr": 1e-4, "epochs": 30, "min_lr": 1e-5, "decay_rate": 1.0, "warmup_lr": 1e-5,
        "warmup_epochs": 10, "cooldown_epochs": 0, "warmup_iters": int,
    },
    # accepted because released files have them, without effect
    "eval_ema": object, "coco_file": str,
}  # fmt: skip
RENAMED = {"schedular": "scheduler"}
CHOICES = {"precision": ["fp32", "bf16"], "image_embeds": ["host", "recompute"], "share": ["cross_attention", "all", "none"]}
AT_LEAST_1 = ("k_test", "num_beams", "shuffle_buffer", "reference_batch", "keep_checkpoints")
OBJECTIVES = ["itc", "mlm", "itm"]
LISTS_OR_STRINGS = ("train_file", "val_file", "test_file")


def _unknown(key, known, where):
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
    return InputError(f"{where}: unknown key {key!r}, {hint}")


def _check_value(key, value, default, where):
    """Raises InputError for a value of another kind than the key's default has."""
    kind = default if isinstance(default, type) else type(default)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    fits, wanted = {
        bool: (isinstance(value, bool) or (key == "distill" and isinstance(value, list)), "true or false"),
        int: (number and isinstance(value, int), "a whole number"),
        float: (number, "a number, not negative"),  # YAML reads "1e-4" in quotes and 1,000 as text
        str: (isinstance(value, str), "a string"),
        list: (isinstance(value, list) or (key in LISTS_OR_STRINGS and isinstance(value, str)), "a list"),
        dict: (isinstance(value, dict), "a mapping of keys to values"),
        object: (True, ""),
    }[kind]
    if not fits and not (value is None and isinstance(default, type)):
        raise InputError(f"{where}: {key} is {value!r}, it must be {wanted}")
    if key in AT_LEAST_1 and value is not None and value < 1:
        raise InputError(f"{where}: {key} is {value}, it must be at least 1")
    if key in CHOICES and value not in CHOICES[key]:
        raise InputError(f"{where}: {key} is {value!r}, it must be one of {', '.join(CHOICES[key])}")


def with_defaults(config, where="config"):
    """A checked copy of a task's configuration with every default filled in.

    Released spellings (schedular) are accepted. Raises InputError for an unknown key, naming the nearest one, and for a
    value of the wrong kind; where names the file in the message.
    """
    config = {RENAMED.get(key, key): value for key, value in config.items()}
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
        result[key] = value
    for key, default in DEFAULTS.items():
        if isinstance(default, dict):
            filled = {inner: None if isinstance(value, type) else value for inner, value in default.items()}
            result[key] = {**filled, **result.get(key, {})}
        else:
            result.setdefault(key, None if isinstance(default, type) else default)
    for key in ("objectives", "distill"):
        wrong = [name for name in result[key] if name not in OBJECTIVES] if isinstance(result[key], list) else []
        if wrong:
            raise InputError(f"{where}: {key} has {wrong[0]!r}, it may hold {', '.join(OBJECTIVES)}")
    if not result["objectives"]:
        raise InputError(f"{where}: objectives is empty, name at least one of {', '.join(OBJECTIVES)}")
    for key in LISTS_OR_STRINGS:
        if isinstance(result[key], str):
            result[key] = [result[key]]
    return result


def _parse_override(text):
    key, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--set {text}: write it as key=value")
    try:
        return key.split("."), YAML(typ="safe").load(value)
    except YAMLError as error:
        raise InputError(f"--set {text}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None


def override(config, overrides, where):
    """config with key=value overrides (dots reach into optimizer and scheduler), checked and completed as by with_defaults."""
    config = {RENAMED.get(key, key): dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for text in overrides:
        (*outer, key), value = _parse_override(text)
        target = config
        for name in outer:
            target = target.setdefault(RENAMED.get(name, name), {})
            if not isinstance(target, dict):
                raise InputError(f"--set {text}: {name} has no keys of its own")
        target[RENAMED.get(key, key) if not outer else key] = value
    return with_defaults(config, where)


def load_config(path, overrides=()):
    """Reads a YAML file and applies overrides as `override` does."""
    try:
        config = YAML(typ="safe").load(Path(path))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
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
    with atomic_write(Path(output_dir) / "config.yaml", "w") as file:
        YAML(typ="safe").dump(config, file)


# ---------------------------------------------------------------------------------------------------------------------
# command line


def _flag(text):
    """A boolean flag that may stand alone or carry a word, as the released --resume True."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def argument_parser(description, config, output_dir):
    """The flags that every task script has; config and output_dir are the task's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=config)
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--checkpoint", default="", help="start from the weights of this file")
    parser.add_argument("--text_encoder", help="BERT weights: hub name, folder, .bin, .safetensors, or random")
    parser.add_argument("--tokenizer", help="vocab file, folder or hub name; text_encoder's by default")
    parser.add_argument("--evaluate", action="store_true", help="evaluate and leave, no training")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, type=_flag,
        help="continue the run in output_dir exactly where it was saved (Pretrain.py: or the one saved in --checkpoint)",
    )  # fmt: skip
    parser.add_argument("--allow_missing", action="store_true", help="weights missing in --checkpoint stay as initialized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", default=42, type=int)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    ignored = "accepted for released command lines, without effect: the launcher decides"
    for name in ("--world_size", "--dist_url", "--distributed", "--local_rank", "--local-rank"):
        parser.add_argument(name, help=ignored)
    return parser


def run_script(main):
    """Runs a script's main function and turns the errors a user can do something about into one line and a status."""
    try:
        main()
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except Interrupted as error:
        status, message = 128 + error.signum, error
    except TrainingStopped as error:
        status, message = 1, f"error: {error}"
    except InputError as error:
        status, message = 2, f"error: {error}"
        if rank() > 0:
            time.sleep(1)  # most likely all processes say the same; the launcher ends this one once the first has left
    else:
        if is_distributed():
            dist.destroy_process_group()
        return
    if is_main() or status == 2:
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # other processes of a group may wait in a collective operation for this one, which a normal exit would wait for
    os._exit(status) if is_distributed() else sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# processes and seeds


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


def is_main():
    return rank() == 0


def local_rank():
    """Rank within this machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _slurm_to_environment():
    """Translates Slurm's variables to torchrun's, where srun has started several tasks without torchrun."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in os.environ:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_PORT", "29500")
    if "MASTER_ADDR" not in os.environ:
        command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
        os.environ["MASTER_ADDR"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def init_process_group(device):
    """Joins the process group of the launcher, if there is one, and returns this process's device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {device}: torch finds no GPU here, use --device cpu")
    _slurm_to_environment()
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device {device}: torch knows no such device, use cuda or cpu") from None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def seed_of(*coordinates):
    """A well-mixed 63-bit seed for whole-number coordinates such as (seed, epoch, iteration, rank)."""
    return int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)


def seed_everything(*coordinates):
    """Seeds Python, NumPy and torch (all devices). Every training step does so: resuming needs no generator state."""
    value = seed_of(*coordinates)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


# ---------------------------------------------------------------------------------------------------------------------
# files


@contextmanager
def atomic_write(path, mode="wb"):
    """Opens a temporary file beside path and renames it to path when the block ends well: never a half-written file."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.chmod(name, 0o666 & ~_umask())
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def make_output_dir(path):
    """Creates output_dir and checks that it can be written to, before anything expensive. Raises InputError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--output_dir {path}: cannot write there ({error.strerror}), name another folder") from None
