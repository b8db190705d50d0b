"""Weights and configuration of a checkpoint as a file of their own, .safetensors or .pth, without the state of training.

Names are those of the released checkpoints, and either file is accepted wherever this repository takes a checkpoint.
"""

from configs.flags import Flags
from utils import begin_script, run_script

flags = Flags(__doc__, "--checkpoint output/VE/checkpoint_best.pth --to ve.safetensors")
flags.add_argument("--checkpoint", required=True, metavar="FILE", help="the file to read, .pth, .bin or .safetensors")
flags.add_argument("--to", required=True, metavar="FILE", help="the file to write, .safetensors or .pth")
flags.add_argument("--momentum", action="store_true", help="with the momentum model and its queues, to train on")
flags.add_argument("--overwrite", action="store_true", help="write over an existing file")
if __name__ == "__main__":
    begin_script(flags)

import os
from pathlib import Path

import torch

from models.checkpoint import METADATA, QUEUES, named_tensors, read_checkpoint, write_weights
from utils import InputError, atomic_write

SUFFIXES = (".safetensors", ".pth")


def released_names(tensors):
    """Return tensors by name with the position_ids that files of other or newer code lack and released ones have."""
    positions = ".position_embeddings.weight"
    embeddings = [name.removesuffix(positions) for name in tensors if name.endswith(positions)]
    ids = {f"{name}.position_ids": torch.arange(len(tensors[name + positions]))[None] for name in embeddings}
    return tensors | {name: value for name, value in ids.items() if name not in tensors}


def check_target(path, overwrite):
    """Raise InputError where the file to write has no known suffix, exists already or cannot be written."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"--to {path}: the name of a weight file ends in {' or '.join(SUFFIXES)}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"--to {path}: cannot write there, name a file in a folder that exists")
    if path.exists() and not overwrite:
        raise InputError(f"--to {path} exists already: name another file, or add --overwrite")


def export(source, target, momentum=False, overwrite=False):
    """Write the weights of a checkpoint file, its config and its epoch to another file, atomically.

    momentum: with the momentum model and the queues, which hold its features. Returns (number of tensors,
    modules and queues left out, the keys of METADATA that came along). Raises InputError.
    """
    target = Path(target)
    check_target(target, overwrite)
    content = read_checkpoint(source)
    tensors = released_names(named_tensors(content, source))
    left_out = [name for name in tensors if not momentum and (name.split(".")[0].endswith("_m") or name in QUEUES)]
    kept = {name: value for name, value in tensors.items() if name not in left_out}
    more = {key: content[key] for key in METADATA if key in content}
    try:
        with atomic_write(target) as file:
            write_weights(file, target.suffix, kept, more)
    except TypeError as error:
        raise InputError(f"checkpoint {source}: its config cannot be written as JSON: {error}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"--to {target}: cannot write it: {error}") from None
    return len(kept), list(dict.fromkeys(name.split(".")[0] for name in left_out)), list(more)


def main():
    args = flags.parse_args()
    count, left_out, more = export(args.checkpoint, args.to, args.momentum, args.overwrite)
    size = Path(args.to).stat().st_size / 1e6
    print(f"wrote {args.to}: {count} tensors, {size:.1f} MB, with {' and '.join(more) or 'no config'}")
    if left_out:
        print(f"  left out: {', '.join(left_out)}; --momentum keeps them")


if __name__ == "__main__":
    run_script(main)
