"""Pretrain.py whose process 1 meets an error in its third step. Started by test_recovery.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import Pretrain
from utils import run_script

plain = Pretrain.step
calls = iter(range(1, 1000))


def step(device):
    losses = plain(device)

    def stepped(*args):
        if next(calls) == 3 and os.environ["RANK"] == "1":
            raise ValueError("broken on purpose")
        return losses(*args)

    return stepped


Pretrain.step = step
run_script(Pretrain.main)
