"""Prints how many parameters' state each process of a sharded optimizer holds. Started by test_recovery.py in several processes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from engine.processes import init_process_group
from optim import create_optimizer
from utils import run_script


def main():
    init_process_group("cpu")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config = {"opt": "adamW", "lr": 0.1, "weight_decay": 0.02, "temp_lr_scale": 1.0}
    optimizer = create_optimizer(config, model, sharded=True)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    print(len(optimizer.optim.state))


run_script(main)
