"""Milliseconds for which a save keeps the training loop waiting, written by the loop itself and by
a thread from a copy.

The states are those of a run of configs/shapes/Pretrain.yaml (`make quickstart`) and of
configs/Pretrain.yaml: weights, momentum weights, queues and Adam's moments. The full one needs 8 GB
of memory and 11 GB of disk.

    python benchmarks/saving.py [--saves 3] [--folder DIR]
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
from bench import DEVICE, MACHINE, ROOT, full_size_config, seconds

from configs.load import load_config
from engine.checkpointing import LAST, Position, Saver
from models import build_model
from optim import create_optimizer


def trained(config):
    """Return a model with weights of its own and an optimizer that has taken a step."""
    model = build_model("pretrain", config).to(DEVICE)
    for param in model.idle_parameters():
        param.requires_grad_(False)
    optimizer = create_optimizer(config["optimizer"], model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param) if param.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def measure(name, config, folder, saves):
    """Print the row of a model: medians of `saves` saves each."""
    model, optimizer = trained(config)
    path = Path(folder) / LAST

    def save(saver):
        saver.save(path, model, optimizer, config, Position(1), seed=0, lr=0.1)

    with (
        Saver(0) as saver,
        mock.patch("engine.checkpointing.copy_to_host", lambda state, *_: state),
    ):
        save(saver)
        saver.finish()
        waited = seconds(lambda: (save(saver), saver.finish()), saves)
    with Saver(0) as saver:
        (first,) = seconds(lambda: save(saver), 1)  # allocates the buffers
        blocked = []
        for _ in range(saves):
            saver.finish()
            blocked += seconds(lambda: save(saver), 1)
    before, after = statistics.median(waited), statistics.median(blocked)
    print(
        f"{name:12}{path.stat().st_size / 1e9:7.2f}{1e3 * before:12.0f}{1e3 * first:14.0f}{1e3 * after:12.0f}"
        f"{before / after:9.1f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument(
        "--folder", help="on the disk to measure; the system's temporary folder by default"
    )
    args = parser.parse_args()
    print(f"milliseconds that a save blocks the loop, {MACHINE}; median of {args.saves}")
    print(
        f"{'model':12}{'GB':>7}{'loop writes':>12}{'copy, first':>14}{'copy, later':>12}{'ratio':>9}"
    )
    bert = f"bert_config={ROOT / 'configs/shapes/config_bert.json'}"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(
            "quickstart",
            load_config(ROOT / "configs/shapes/Pretrain.yaml", [bert]),
            folder,
            args.saves,
        )
        measure("full", full_size_config("Pretrain"), folder, args.saves)


if __name__ == "__main__":
    main()
