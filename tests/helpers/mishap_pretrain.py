"""Pretrain.py that something happens to in iteration 14 of its first start. Started by test_nodes.py.

BATCH: the process of this number gets SIGTERM, and the run goes on when that has come back to all of its processes. Without,
process 1 is killed, and process 0, busy, hears of it only when its launcher tells it to end. TRACE: a file to which the first
process appends the iterations that it begins.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine import loop
import Pretrain
from utils import is_main, rank, run_script

plain, trace = loop.iterate, Path(os.environ["TRACE"])
first_start = not trace.exists()


def mishap():
    told, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *args: (told.append(True), before(*args)))
    if rank() == 1:
        batch = os.environ.get("BATCH")
        os.kill(int(batch or os.getpid()), signal.SIGTERM if batch else signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # whoever waits for this process has some waiting to do


def iterate(run, batches, epoch, iteration, *others):
    number = epoch * run.iterations + iteration
    if is_main():
        with open(trace, "a") as file:
            file.write(f"{os.getpid()} {number}\n")
    if number == 14 and first_start:
        mishap()
    return plain(run, batches, epoch, iteration, *others)


loop.iterate = iterate
run_script(Pretrain.main)
