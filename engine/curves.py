"""TensorBoard curves of a run.

What cannot be written is left out: curves are not a reason to stop.
"""

import sys
import threading

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Scalars by step in a folder. purge_step: what an earlier, killed run has drawn from this step
    on is hidden.
    """

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.writer = folder, purge_step, None
        self.before, threading.excepthook = threading.excepthook, self._excepthook

    def _excepthook(self, failed):
        # TensorBoard's thread raises its errors in the next write; it need not also print them
        if not (
            isinstance(failed.exc_value, OSError)
            and type(failed.thread).__module__.startswith("tensorboard")
        ):
            self.before(failed)

    def add(self, values, step):
        """values: name -> number."""
        try:
            self.folder.mkdir(exist_ok=True)
            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            print(
                f"note: cannot draw curves in {self.folder}: {error.strerror}; going on without this point",
                file=sys.stderr,
            )
            self.writer, self.purge_step = None, step + 1

    def close(self):
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            print(f"note: cannot draw curves in {self.folder}: {error.strerror}", file=sys.stderr)
        threading.excepthook = self.before


def read_curves(folder):
    """The scalars in a run's folder: name without train/ -> steps, values, seconds since 1970,
    arrays [N] each.
    """
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    scalars = {
        tag.removeprefix("train/"): accumulator.Scalars(tag)
        for tag in accumulator.Tags()["scalars"]
    }
    return {
        name: tuple(
            map(np.array, zip(*[(event.step, event.value, event.wall_time) for event in events]))
        )
        for name, events in scalars.items()
    }
