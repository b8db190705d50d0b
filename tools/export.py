"""Export the weights and configuration of a checkpoint, without the training state.

--output FILE writes a .safetensors or .pth file, which every script accepts as --checkpoint. The
tensors have the names of the released checkpoints. --output FOLDER/ writes the files of a hub
repository, including the vocabulary and a model card. --push uploads the folder.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import Parser
from engine.launch import run_script
from utils import InputError, permitted

if TYPE_CHECKING:
    from torch import Tensor

    from configs.config import Config

SUFFIXES = (".safetensors", ".pth")
PUBLISHED = ("model.safetensors", "config.json", "README.md")  # besides the vocabulary
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
"""  # noqa: E501, lines of Markdown

parser = Parser(__doc__, "--checkpoint output/VE --output ve.safetensors")
parser.add_argument(
    "--checkpoint",
    required=True,
    metavar="SOURCE",
    help="weight file, folder of a run, or hub repository USER/NAME[@REVISION]",
)
parser.add_argument(
    "--output", metavar="FILE", help=".safetensors or .pth file to write, or FOLDER/ for the hub"
)
parser.add_argument(
    "--push",
    metavar="USER/NAME",
    help="hub repository to upload FOLDER/ to. Without --output, upload the exported folder that"
    " --checkpoint names",
)
parser.add_argument(
    "--public", action="store_true", help="make the repository public if --push creates it"
)
parser.add_argument(
    "--config", metavar="FILE", help="YAML file of the training, for a checkpoint without one"
)
parser.add_argument(
    "--momentum",
    action="store_true",
    help="keep the momentum model and its queues, to continue training",
)
parser.add_argument(
    "--overwrite", action="store_true", help="replace an existing file, folder or repository"
)
parser.add_set()


def released_names(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return tensors by name, with the position_ids that released checkpoints have."""
    import torch

    positions = ".position_embeddings.weight"
    embeddings = [name.removesuffix(positions) for name in tensors if name.endswith(positions)]
    ids = {
        f"{name}.position_ids": torch.arange(len(tensors[name + positions]))[None]
        for name in embeddings
    }
    return {**tensors, **{name: value for name, value in ids.items() if name not in tensors}}


def read_weights(
    source: str, momentum: bool
) -> tuple[dict[str, Any], dict[str, "Tensor"], list[str]]:
    """Read a checkpoint.

    Args:
        source: Weight file, folder of a run or hub repository.
        momentum: Whether to keep the momentum model and the queues, which hold its features.

    Returns:
        The content of the file, its tensors by released name, and the modules left out.

    Raises:
        InputError: The checkpoint cannot be read.
    """
    from models.weights import is_momentum, named_tensors, read_checkpoint

    content = read_checkpoint(source)
    tensors = released_names(named_tensors(content, source))
    left_out = [name for name in tensors if is_momentum(name) and not momentum]
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    return content, kept, list(dict.fromkeys(name.split(".")[0] for name in left_out))


def export_file(
    source: str | Path, target: str | Path, momentum: bool = False, overwrite: bool = False
) -> str:
    """Write the weights of a checkpoint and its values of METADATA to a file, atomically.

    Args:
        source: Weight file, folder of a run or hub repository.
        target: File to write, .safetensors or .pth.
        momentum: Whether to keep the momentum model and the queues.
        overwrite: Whether to replace an existing file.

    Returns:
        A description of the file.

    Raises:
        InputError: The checkpoint cannot be read or the file must not be written.
        TrainingStopped: The file cannot be written.
    """
    from engine.output_dir import check_output, writing
    from models.weights import METADATA, write_weights
    from utils import atomic_write

    target = Path(target)
    if target.suffix not in SUFFIXES:
        raise InputError(
            f"--output {target} names no weight file or folder; end a weight file in"
            f" {' or '.join(SUFFIXES)}, and a folder in /"
        )
    check_output(target, overwrite=overwrite)
    content, tensors, left_out = read_weights(str(source), momentum)
    metadata = {key: content[key] for key in METADATA if key in content}
    # torch.save raises a RuntimeError if the disk is full
    with writing(target, failures=(OSError, RuntimeError)), atomic_write(target) as file:
        write_weights(file, target.suffix, tensors, metadata)
    text = f"wrote {target}: {len(tensors)} tensors, {target.stat().st_size / 1e6:.1f} MB,"
    text += f" with {' and '.join(metadata) or 'no config'}"
    return text + f"\n  left out: {', '.join(left_out)}; --momentum keeps them" * bool(left_out)


def published_config(config: "Config") -> dict[str, Any]:
    """Return a configuration without paths of this machine, with the keys of BERT in it."""
    from configs.config import FILE_KEYS
    from models.tokenizer import VOCABULARY

    values = config.to_dict()
    kept = {key: value for key, value in values.items() if key not in FILE_KEYS}
    return {**kept, "bert_config": values["bert_config"], "tokenizer": VOCABULARY}


@permitted()
def export_folder(args: argparse.Namespace) -> str:
    """Write the files of a hub repository and return a description. Raises InputError.

    model.safetensors has no configuration of its own, so that config.json is the only one.
    """
    from configs.config import ANNOTATION_KEYS
    from configs.tasks import detect_task
    from engine.configuration import choose_config, task_of_checkpoint
    from engine.output_dir import make_output_dir, write_files, writing
    from models.tokenizer import VOCABULARY, load_tokenizer
    from models.weights import find_checkpoint, write_weights
    from utils import atomic_write

    folder = Path(args.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not args.overwrite:
        raise InputError(
            f"--output {folder}/ exists already; name another folder or add --overwrite"
        )
    content, tensors, _ = read_weights(args.checkpoint, args.momentum)
    task = task_of_checkpoint(content, detect_task(tensors), args.checkpoint)
    epoch = content.get("epoch")
    config, _ = choose_config(task, args.checkpoint, file=args.config, overrides=args.set)
    tokenizer, config = load_tokenizer(config)
    card = model_card(
        args.push or folder.name,
        task,
        epoch=epoch,
        data={key: getattr(config, key) for key in ANNOTATION_KEYS if getattr(config, key)},
        metrics=read_metrics(find_checkpoint(args.checkpoint).with_name("log.txt"), epoch),
    )
    files = {
        VOCABULARY: tokenizer.backend_tokenizer.to_str(),
        "config.json": json.dumps(published_config(config), indent=2, ensure_ascii=False),
        "README.md": card,
    }
    make_output_dir(folder, lock=False, flag="--output")
    weights = folder / "model.safetensors"
    with writing(weights), atomic_write(weights) as file:
        # other programs' checkpoints may hold anything under these names
        found = {key: content.get(key) for key in ("epoch", "ranking")}
        metadata = {key: value for key, value in found.items() if isinstance(value, int | dict)}
        write_weights(file, ".safetensors", tensors, metadata)
    write_files({folder / name: text.encode() for name, text in files.items()})
    wrote = f"wrote {folder}/: {', '.join(files)}, {len(tensors)} tensors"
    return f"{wrote}; add a license before you publish it"


def read_metrics(log: Path, epoch: int | None) -> dict[str, float]:
    """Return the validation and test metrics of an epoch from a run's log.txt, by name."""
    from utils import read_log

    try:
        entries = read_log(log)
    except InputError:  # of another program
        return {}
    return {
        key: value
        for entry in entries
        if entry.get("epoch") == epoch
        for key, value in entry.items()
        if isinstance(value, int | float) and not key.startswith(("train_", "epoch"))
    }


def model_card(
    name: str,
    task: str,
    *,
    epoch: int | None,
    data: Mapping[str, list[str]],
    metrics: Mapping[str, float],
) -> str:
    """Return the README.md of a repository, in Markdown; the license is left to the owner.

    Args:
        name: Name of the repository.
        task: Task of the checkpoint.
        epoch: Epoch of the checkpoint, if known.
        data: Paths of annotation files by configuration key; the card has the names of the files.
        metrics: Validation and test metrics by name.
    """
    from huggingface_hub import ModelCardData

    files = {key: ", ".join(Path(path).name for path in paths) for key, paths in data.items()}
    rows = [f"| {key} | {value:.4g} |" for key, value in metrics.items()]
    table = "\n".join(["| metric | value |", "| --- | --- |", *rows])
    return CARD.format(
        metadata=ModelCardData(tags=["albef", "vision-language"]).to_yaml(),
        name=name,
        task=task,
        epoch=f", epoch {epoch}" if isinstance(epoch, int) else "",
        data="\n".join(f"- `{key}`: {names}" for key, names in files.items()) or "Not configured.",
        metrics=table if rows else "The run's log.txt has no metrics of this epoch.",
    )


def published_files(folder: Path) -> list[str]:
    """Return the names of the files to upload. Raises InputError if one is missing."""
    from models.tokenizer import VOCABULARY

    names = [*PUBLISHED, VOCABULARY]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(
            f"--push: {folder} lacks {', '.join(missing)}; add --output FOLDER/ to write them first"
        )
    return names


def main() -> None:
    """Export or upload a checkpoint, as the command line says."""
    args = parser.parse_args()
    to_folder = bool(args.output) and args.output.endswith("/")
    if not (args.push or args.output):
        raise InputError("--output is missing; name the file or the FOLDER/ to write")
    if args.push and args.output and not to_folder:
        raise InputError(f"--push needs a folder; end --output {args.output} with a slash")
    if (args.config or args.set) and not to_folder:
        raise InputError("--config and --set have an effect only with --output FOLDER/; add it")
    if args.public and not args.push:
        raise InputError("--public has an effect only with --push; add it")
    from models.hub import check_repository, upload

    folder = Path(args.output or args.checkpoint)
    if args.push and not to_folder:
        published_files(folder)
    if args.push and not args.overwrite:
        check_repository(args.push)
    if to_folder:
        print(export_folder(args))
    elif args.output:
        print(export_file(args.checkpoint, args.output, args.momentum, args.overwrite))
    if args.push:
        print(f"published {upload(folder, published_files(folder), args.push, args.public)}")


if __name__ == "__main__":
    run_script(main)
