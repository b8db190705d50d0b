"""Pretrain.py that lists the files of each process's batches in its output folder. Started by test_recovery.py under torchrun."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine import loop
import Pretrain
from utils import rank, run_script

plain = loop.iterate


def iterate(run, *args):
    result = plain(run, *args)
    with open(run.output_dir / f"files{rank()}.txt", "a") as file:
        file.writelines(f"{name}\n" for name in result[1])
    return result


loop.iterate = iterate
run_script(Pretrain.main)
