"""Read the training curves of a run."""

from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_curves(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Read the TensorBoard curves in a run's folder.

    Returns:
        By name without "train/": steps, values and seconds since 1970, arrays [N] each.
    """
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        points = [(event.step, event.value, event.wall_time) for event in accumulator.Scalars(tag)]
        curves[tag.removeprefix("train/")] = tuple(map(np.array, zip(*points, strict=True)))
    return curves
