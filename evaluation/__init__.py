"""Evaluation of every task: each `evaluate` returns metrics by name and, given a Report, prints and
writes what it found.
"""

import json
from pathlib import Path
from typing import NamedTuple

from utils import TrainingStopped, atomic_write


class Report(NamedTuple):
    """What an evaluation says of itself, on the main process alone; the others, and validation,
    have None.
    """

    title: str  # which weights and split, in every line
    split: str
    epoch: int  # of the weights
    folder: Path  # for the files of results

    def write(self, name, content):
        """Write a JSON file of results. Return its path. Raises TrainingStopped."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump(content, file)
        except OSError as error:
            raise TrainingStopped(
                f"cannot write {path}: {error.strerror}; make room, and evaluate again"
            ) from None
        return path
