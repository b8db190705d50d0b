"""Helpers of the benchmarks: device, full-size configurations, random texts, timing."""

import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for tests/helpers
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from configs.load import load_config
from utils import Text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# how OpenMP threads wait; scripts use passive
POLICY = os.environ.get("OMP_WAIT_POLICY", "default")
NAME = (
    torch.cuda.get_device_name()
    if DEVICE.type == "cuda"
    else f"CPU, {torch.get_num_threads()} threads (OMP_WAIT_POLICY {POLICY})"
)
MACHINE = f"{NAME}, torch {torch.__version__}"
CLS = 101


def full_size_config(name, *overrides):
    """Return the Config of configs/NAME.yaml with overrides, from any working directory."""
    return load_config(f"configs/{name}.yaml", overrides)


def random_text(lengths, padded, generator):
    """Return a Text of random tokens after [CLS]: lengths [B], padded to `padded` tokens."""
    mask = (torch.arange(padded) < lengths[:, None]).long()
    input_ids = torch.randint(1000, 30000, mask.shape, generator=generator) * mask
    input_ids[:, 0] = CLS
    return Text(input_ids, mask)


def synchronize():
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, repeats):
    """Return the seconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return times


def seconds_in_a_row(function, repeats):
    """Return the seconds of a call, the mean of several on a GPU, else the median.

    On a GPU time is measured between two events, so that kernel launches run ahead.
    """
    if DEVICE.type != "cuda":
        return statistics.median(seconds(function, repeats))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats
