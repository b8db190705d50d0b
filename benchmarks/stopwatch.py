"""Seconds of a computation, on a GPU or elsewhere."""

import time

import torch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device, repeats):
    """Seconds of each of `repeats` calls: CUDA events on a GPU, the wall clock elsewhere."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            synchronize(device)
            times.append(start.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return times
