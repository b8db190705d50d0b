"""Compare the ranks of a run before the first step: configuration, seed, tokenizer, code and data."""

from pathlib import Path

import torch

from configs.config import FILE_KEYS, as_config
from utils import InputError, gather_lists, hash_contents, is_distributed

# nodes may have different paths and numbers of cores
OF_A_NODE = {*FILE_KEYS, "num_workers"}


def check_agreement(config: dict, seed: int, tokenizer, data_sets: dict) -> None:
    """Compare configuration, seed, tokenizer, code and data with those of the other ranks; every
    rank must call it.

    Args:
        config: The complete configuration. Paths may differ.
        seed: The flag --seed.
        tokenizer: The tokenizer of the texts.
        data_sets: The data sets by the key of their files.

    Raises:
        InputError: On all ranks, if anything differs on any rank.
    """
    if not is_distributed():
        return
    own = {
        f"the key {key}": value
        for key, value in as_config(config).to_dict().items()
        if key not in OF_A_NODE
    }
    own["--seed"] = seed
    own |= {
        key: f"{len(data_set)} samples ({data_set.digest()})" for key, data_set in data_sets.items()
    }
    own["the tokenizer"] = hash_contents([tokenizer.backend_tokenizer.to_str().encode()])
    own["the code"] = (
        f"{hash_contents(map(Path.read_bytes, _sources()))} with torch {torch.__version__}"
    )
    first, *others = gather_lists([own])
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise InputError(
                    f"{name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {rank}: "
                    "give all ranks the same files and flags"
                )


def _sources():
    root = Path(__file__).resolve().parents[1]
    folders = ("configs", "dataset", "engine", "evaluation", "models", "optim", "scheduler")
    return sorted(path for folder in folders for path in (root / folder).glob("**/*.py"))
