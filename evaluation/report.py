"""Title and folder of an evaluation's results."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from engine.output_dir import writing
from utils import atomic_write


class Report(NamedTuple):
    """The title and the folder of an evaluation's results, on rank 0 only.

    Attributes:
        title: Weights and split, for every printed line.
        split: The split.
        epoch: Epoch of the weights.
        folder: Folder of the files of results.
    """

    title: str
    split: str
    epoch: int
    folder: Path

    def write(self, name: str, content: Any) -> Path:
        """Write a JSON file of results. Return its path. Raises TrainingStopped."""
        path = self.folder / name
        with writing(path, "make room, and evaluate again"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, "w") as file:
                json.dump(content, file)
        return path
