"""Retrieval.py whose process 1 gets SIGTERM at the end of the first epoch, while process 0 saves. Started by test_recovery.py."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine import loop
import Retrieval
from utils import run_script

plain = loop.save_checkpoint
finish = loop.finish_epoch


def save_checkpoint(*args):
    if os.environ["RANK"] == "0":
        time.sleep(3)
    plain(*args)


def finish_epoch(*args):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return finish(*args)


loop.save_checkpoint, loop.finish_epoch = save_checkpoint, finish_epoch
run_script(Retrieval.main)
