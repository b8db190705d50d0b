"""TensorBoard curves of a run. What cannot be written is left out: curves are no reason to stop."""

import sys
import threading

from torch.utils.tensorboard import SummaryWriter

from utils import remake_output_dir


class Curves:
    """Scalars by step in a folder. purge_step: what an earlier, killed run has drawn from this step on is hidden."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.writer = folder, purge_step, None
        self.before, threading.excepthook = threading.excepthook, self._excepthook

    def _excepthook(self, failed):
        # TensorBoard's thread hands its errors over to whoever writes next; it need not also print them
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self.before(failed)

    def add(self, values, step):
        """values: name -> number."""
        try:
            remake_output_dir(self.folder.parent)
            self.folder.mkdir(exist_ok=True)
            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            print(f"note: cannot draw curves in {self.folder}: {error.strerror}; going on without this point", file=sys.stderr)
            self.writer, self.purge_step = None, step + 1

    def close(self):
        try:
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            print(f"note: cannot draw curves in {self.folder}: {error.strerror}", file=sys.stderr)
        threading.excepthook = self.before
