"""Export the weights and configuration of a checkpoint to a .safetensors or .pth file, without the
state of training.

Tensors have the names of the released checkpoints. All scripts accept either file as a checkpoint.
--to FOLDER/ writes the files of a hub repository, with the vocabulary and a model card; --push
uploads the folder.
"""

from configs.flags import Flags
from utils import begin_script, run_script

flags = Flags(__doc__, "--checkpoint output/VE/checkpoint_best.pth --to ve.safetensors")
flags.add_argument(
    "--checkpoint",
    required=True,
    metavar="FILE",
    help="the file to read, .pth, .bin or .safetensors",
)
flags.add_argument(
    "--to", metavar="FILE", help="the file to write, .safetensors or .pth, or FOLDER/ for the hub"
)
flags.add_argument(
    "--push", metavar="USER/NAME", help="upload to the hub FOLDER/, or the folder --checkpoint"
)
flags.add_argument("--public", action="store_true", help="make the new repository of --push public")
flags.add_argument(
    "--config",
    help="configuration of FOLDER/ for a checkpoint without one: the YAML file of its training",
)
flags.add_argument(
    "--momentum",
    action="store_true",
    help="also write the momentum model and its queues, to train on",
)
flags.add_argument(
    "--overwrite", action="store_true", help="replace an existing file, folder or repository"
)
flags.add_set()
if __name__ == "__main__":
    begin_script(flags)

import json
import os
from pathlib import Path

import torch
from huggingface_hub import ModelCardData

from configs.schema import ANNOTATION_KEYS, BERT_KEYS, FILE_KEYS, read_bert_config
from engine.configuration import DEFAULTS, choose_config, task_in
from models import task_of
from models.weights import (
    METADATA,
    config_beside,
    is_momentum,
    named_tensors,
    read_checkpoint,
    write_weights,
)
from models.hub import check_repository, upload
from models.tokenizer import VOCABULARY, tokenizer_of
from utils import InputError, atomic_write, make_output_dir, read_regular

SUFFIXES = (".safetensors", ".pth")
PUBLISHED = ["model.safetensors", "config.json", "README.md"]  # and the vocabulary
CARD = """---
{metadata}
---

# {name}

ALBEF ([Align before Fuse](https://arxiv.org/abs/2107.07651), Li et al., NeurIPS 2021), task {task}{epoch}.

```python
from inference import load_model

model = load_model("{name}")
```

## Data

{data}

## Metrics

{metrics}
"""


def released_names(tensors):
    """Return tensors by name with the position_ids that files of other or newer code lack and
    released ones have.
    """
    positions = ".position_embeddings.weight"
    embeddings = [name.removesuffix(positions) for name in tensors if name.endswith(positions)]
    ids = {
        f"{name}.position_ids": torch.arange(len(tensors[name + positions]))[None]
        for name in embeddings
    }
    return tensors | {name: value for name, value in ids.items() if name not in tensors}


def check_target(path, overwrite):
    """Raise InputError where the file to write has no known suffix, exists already or cannot be
    written.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"--to {path}: the name of a weight file ends in {' or '.join(SUFFIXES)}, that of a folder in /"
        )
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--to {path}: cannot write there, name a file in a folder that exists")
    if path.exists() and not overwrite:
        raise InputError(f"--to {path} exists already: name another file, or add --overwrite")


def export(source, target, momentum=False, overwrite=False):
    """Write the weights of a checkpoint file, its config and its epoch to another file, atomically.

    momentum: with the momentum model and the queues, which hold its features. Returns (number of
    tensors, modules and queues left out, the keys of METADATA that came along). Raises InputError.
    """
    target = Path(target)
    check_target(target, overwrite)
    content = read_checkpoint(source)
    tensors = released_names(named_tensors(content, source))
    left_out = [name for name in tensors if not momentum and is_momentum(name)]
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    more = {key: content[key] for key in METADATA if key in content}
    try:
        with atomic_write(target) as file:
            write_weights(file, target.suffix, kept, more)
    except TypeError as error:
        raise InputError(
            f"checkpoint {source}: its config cannot be written as JSON: {error}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"--to {target}: cannot write it, is the disk full? ({error})") from None
    return len(kept), list(dict.fromkeys(name.split(".")[0] for name in left_out)), list(more)


def export_folder(args):
    """Write what a hub repository holds: weights, complete configuration, vocabulary and model
    card. Raises InputError.

    Its model.safetensors has no configuration of its own, so that config.json is the only one.
    """
    folder = Path(args.to)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not args.overwrite:
        raise InputError(f"--to {args.to} exists already: name another folder, or add --overwrite")
    content = read_checkpoint(args.checkpoint)
    tensors = released_names(named_tensors(content, args.checkpoint))
    model_task = task_of(tensors)
    task = task_in(content, model_task, args.checkpoint)
    args.evaluate = True
    config = choose_config(task, args, args.checkpoint, DEFAULTS[task]).config
    vocabulary = tokenizer_of(config).backend_tokenizer.to_str()
    data = {
        key: [Path(file).name for file in config[key]] for key in ANNOTATION_KEYS if config[key]
    }
    bert_config = {
        key: value
        for key, value in read_bert_config(config["bert_config"]).items()
        if key in BERT_KEYS
    }
    # without paths of this machine
    config = {key: value for key, value in config.to_dict().items() if key not in FILE_KEYS}
    config |= {"bert_config": bert_config, "tokenizer": VOCABULARY}
    epoch = content.get("epoch")
    metrics = metrics_of(Path(args.checkpoint).parent / "log.txt", epoch)
    make_output_dir(folder, writes=False, flag="--to")
    files = {
        VOCABULARY: vocabulary.encode(),
        "config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }
    files["README.md"] = model_card(args.push or folder.name, task, epoch, data, metrics).encode()
    kept = {key: value for key, value in tensors.items() if args.momentum or not is_momentum(key)}
    try:
        with atomic_write(folder / "model.safetensors") as file:
            write_weights(
                file, ".safetensors", kept, {"epoch": epoch} if isinstance(epoch, int) else {}
            )
        for name, data in files.items():
            with atomic_write(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise InputError(f"--to {args.to}: cannot write it, is the disk full? ({error})") from None
    print(
        f"wrote {folder}/: {len(kept)} tensors, {', '.join(files)}; name the license in README.md"
    )


def metrics_of(log, epoch):
    """Return the validation and test metrics of an epoch from a run's log.txt, by name."""
    try:
        entries = [json.loads(line) for line in read_regular(log).splitlines()]
    except (OSError, ValueError):
        return {}
    return {
        key: value
        for entry in entries
        if entry.get("epoch") == epoch
        for key, value in entry.items()
        if isinstance(value, (int, float)) and not key.startswith("train_") and key != "epoch"
    }


def model_card(name, task, epoch, data, metrics):
    """Return the README.md of a repository, in Markdown; the license is left to the owner."""
    data = "\n".join(f"- `{key}`: {', '.join(names)}" for key, names in data.items())
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items())
    table = (
        f"| metric | value |\n| --- | --- |\n{rows}"
        if rows
        else "The run's log.txt has no metrics of this epoch."
    )
    metadata = ModelCardData(tags=["albef", "vision-language"]).to_yaml()
    return CARD.format(
        metadata=metadata,
        name=name,
        task=task,
        epoch=f", epoch {epoch}" if isinstance(epoch, int) else "",
        data=data or "Not configured.",
        metrics=table,
    )


def published_files(folder):
    """Return the names of an exported folder's files.

    Raises InputError if one is missing or names files elsewhere.
    """
    config = config_beside(folder / "model.safetensors").get("config", {})
    names = [*PUBLISHED, Path(config.get("tokenizer") or VOCABULARY).name]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"--push: {folder} is not a folder that --to has written, it lacks {', '.join(missing)}: add --to "
            "FOLDER/, to write it first"
        )
    return names


def main():
    args = flags.parse_args()
    to_folder = bool(args.to) and args.to.endswith("/")
    if args.push and args.to and not to_folder:
        raise InputError(
            f"--push {args.push}: a repository is a folder: end --to {args.to} with a slash"
        )
    if not (args.push or args.to):
        raise InputError("--to is missing: name the file or the FOLDER/ to write")
    folder = Path(args.to or args.checkpoint)
    if args.push and not to_folder:
        published_files(folder)
    if args.push and not args.overwrite:
        check_repository(args.push)
    if to_folder:
        export_folder(args)
    elif args.to:
        export_file(args)
    if args.push:
        print(f"published {upload(folder, published_files(folder), args.push, args.public)}")


def export_file(args):
    """Write one file and describe its content."""
    count, left_out, more = export(args.checkpoint, args.to, args.momentum, args.overwrite)
    size = Path(args.to).stat().st_size / 1e6
    print(
        f"wrote {args.to}: {count} tensors, {size:.1f} MB, with {' and '.join(more) or 'no config'}"
    )
    if left_out:
        print(f"  left out: {', '.join(left_out)}; --momentum keeps them")


if __name__ == "__main__":
    run_script(main)
