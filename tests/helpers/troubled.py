"""Pretrain.py, or the script SCRIPT, to which something happens that the environment says. Started
by tests.

TRACE=FILE     the main process appends its process number and each iteration that it begins
FILES=PREFIX   each process appends the files of its batches to PREFIX and its rank
INTERRUPT      process 1 gets SIGTERM in its 8th iteration, and the main process gets no CPU when it
               leaves
ERROR=WORDS    process 1 raises ValueError(ERROR) in it
MISHAP=NUMBER  in this iteration of the first start, process 1 sends SIGTERM to the process BATCH,
               or without that is killed; the run goes on when SIGTERM has come to all of its
               processes
OTHER=FILE     rank 1 has this configuration
HOLD           the main process writes "heard" to TRACE at a signal in its first iteration, which
               does not end
SLOW=SECONDS   a checkpoint takes so long to be written, in the middle
FULL           the disk is full whenever an epoch ends, and the clock of process 1 stands still
SIGNAL         process 1 gets SIGTERM when an epoch ends
NOTICE=SECONDS the main process says so soon that it waits for others
"""

import errno
import importlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from engine import checkpointing, rendezvous, trainer
from engine.launch import SIGNALS, run_script
from utils import is_main, rank

script, trouble = importlib.import_module(os.environ.get("SCRIPT", "Pretrain")), os.environ
first_start = not Path(trouble.get("TRACE", "")).is_file()
train_step, end_epoch, save = trainer.train_step, trainer.end_epoch, torch.save
leave = trainer.StopSignal.__exit__
calls = itertools.count(1)


def append(path, text):
    with open(path, "a") as file:
        file.write(text)


def meet_mishap():
    told, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *args: (told.append(True), before(*args)))
    if rank() == 1:
        batch = trouble.get("BATCH")
        os.kill(int(batch or os.getpid()), signal.SIGTERM if batch else signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # so that the other process has to wait for this one


def troubled_step(state, batches, alpha):
    number = state.epoch * state.iterations + state.iteration
    if "TRACE" in trouble and is_main():
        append(trouble["TRACE"], f"{os.getpid()} {number}\n")
    if "HOLD" in trouble:
        handler = {signum: signal.getsignal(signum) for signum in SIGNALS}
        for signum in SIGNALS:
            signal.signal(
                signum,
                lambda signum, frame: (
                    handler[signum](signum, frame),
                    append(trouble["TRACE"], "heard\n"),
                ),
            )
        time.sleep(3600)
    if next(calls) == 8 and trouble.get("RANK") == "1":
        if "ERROR" in trouble:
            raise ValueError(trouble["ERROR"])
        if "INTERRUPT" in trouble:
            os.kill(os.getpid(), signal.SIGTERM)
    if number == int(trouble.get("MISHAP", -1)) and first_start:
        meet_mishap()
    output = train_step(state, batches, alpha)
    if "FILES" in trouble:
        append(f"{trouble['FILES']}{rank()}", "".join(f"{name}\n" for name in output.files))
    return output


def slow_save(state, file):
    save(state, file)
    time.sleep(float(trouble["SLOW"]))


def slow_leave(stop, *error):
    leave(stop, *error)
    time.sleep(1)


def save_to_full_disk(state, file):
    if state["resume"]["iteration"] == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save(state, file)


def interrupted_end_epoch(*args):
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return end_epoch(*args)


if "OTHER" in trouble and trouble["RANK"] == "1":
    sys.argv[sys.argv.index("--config") + 1] = trouble["OTHER"]
trainer.train_step = troubled_step
if "INTERRUPT" in trouble and trouble["RANK"] == "0":
    trainer.StopSignal.__exit__ = slow_leave
if "SLOW" in trouble:
    torch.save = slow_save
if "FULL" in trouble:
    torch.save = save_to_full_disk
    if trouble["RANK"] == "1":
        checkpointing.time = SimpleNamespace(monotonic=lambda: 0.0)
if "NOTICE" in trouble:
    rendezvous.NOTICE = float(trouble["NOTICE"])
if "SIGNAL" in trouble:
    trainer.end_epoch = interrupted_end_epoch
run_script(script.main)
