"""Memory per GPU of a pre-training step by batch size, precision, gradient checkpointing and optimizer sharding: an estimate.

How it is made, and what is not in it, stands in engine/memory.py, which a run consults where memory runs out.

    python benchmarks/memory.py [--config FILE] [--set key=value ...] [--batch_size 16 32 64 128] [--world_size 8]
"""

import argparse
import itertools
from pathlib import Path

from bench import ROOT

import torch

import Pretrain
from configs.schema import load_config, read_bert_config
from engine.memory import USABLE, Memory, estimate
from pretrain_step import make_batch

GPUS = (24, 40, 80)  # GB
ON_OFF = {True: "on", False: "off"}


def pretrain_batch(config):
    """Return a batch of random images and texts for a configuration."""
    batch = make_batch(config["batch_size"], config["image_res"])
    batch.text.input_ids.clamp_(max=read_bert_config(config["bert_config"])["vocab_size"] - 1)
    return batch


def estimate_pretraining(config, world_size, gpu=True):
    """Return the Memory of a pre-training step of a configuration. Raises InputError."""
    return estimate("pretrain", config, Pretrain.step, pretrain_batch(config), world_size, gpu)


def largest_fitting(batch_sizes, totals, gigabytes):
    """Return the largest batch size whose total leaves enough of a GPU's memory free, - if none does."""
    return max((b for b, total in zip(batch_sizes, totals) if total <= USABLE * gigabytes * 1e9), default="-")


def print_estimates(config, batch_sizes, world_size):
    print(f"{'':37}{'GB at batch size':>{8 * len(batch_sizes)}}   {'largest batch size within':>27}")
    print(f"{'precision':11}{'checkpointing':15}{'optimizer':11}" + "".join(f"{b:8}" for b in batch_sizes) + "   "
          + "".join(f"{f'{gb} GB':>9}" for gb in GPUS))  # fmt: skip
    for precision, checkpointing in itertools.product(("fp32", "bf16"), (False, True)):
        options = {"precision": precision, "gradient_checkpointing": checkpointing}
        memories = [estimate_pretraining({**config, **options, "batch_size": size}, world_size) for size in batch_sizes]
        for sharded in (False, True):
            totals = [memory.total(sharded) for memory in memories]
            print(f"{precision:11}{ON_OFF[checkpointing]:15}{'sharded' if sharded else 'whole':11}"
                  + "".join(f"{total / 1e9:8.2f}" for total in totals)
                  + "   " + "".join(f"{largest_fitting(batch_sizes, totals, gb):>9}" for gb in GPUS), flush=True)  # fmt: skip
    memory, checkpointing = estimate_pretraining(config, world_size), ON_OFF[config["gradient_checkpointing"]]
    print(f"parts in GB at batch {config['batch_size']}, {config['precision']}, checkpointing {checkpointing}:")
    print(", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in Memory._fields[:-1])
          + f"; {memory.shard / 1e9:.2f} of the optimizer if sharded")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/Pretrain.yaml"))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 32, 64, 128], help="of each process")
    parser.add_argument("--world_size", type=int, default=8, help="processes")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    if isinstance(config["bert_config"], str):
        config["bert_config"] = str(ROOT / config["bert_config"])
    print(f"memory of a pre-training step of {Path(args.config).name} on each of {args.world_size} processes, "
          f"estimated for a GPU, torch {torch.__version__}")  # fmt: skip
    print_estimates(config, args.batch_size, args.world_size)


if __name__ == "__main__":
    main()
