"""Pretrain.py that appends the iterations its first process begins to the file TRACE. Started by chaos.py under torchrun."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine import loop
import Pretrain
from utils import is_main, run_script

plain = loop.iterate
life = f"{os.getpid()}"


def iterate(run, batches, epoch, iteration, *others):
    if is_main():
        with open(os.environ["TRACE"], "a") as file:
            file.write(f"{life} {epoch * run.iterations + iteration}\n")
    return plain(run, batches, epoch, iteration, *others)


loop.iterate = iterate
run_script(Pretrain.main)
