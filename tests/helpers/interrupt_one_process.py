"""Pretrain.py whose process 1 gets SIGTERM in its 8th step, or meets the error that ERROR says. Started by tests."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import Pretrain
from utils import run_script

plain = Pretrain.step
calls = iter(range(1, 1000))


def step(*args):
    if next(calls) == 8 and os.environ["RANK"] == "1":
        if "ERROR" in os.environ:
            raise ValueError(os.environ["ERROR"])
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(*args)


Pretrain.step = step
run_script(Pretrain.main)
