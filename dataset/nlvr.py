"""NLVR2: is the sentence true of the two images?"""

from typing import Annotated, Literal, get_args

from msgspec import Meta

from configs.config import Config
from dataset.classification import ClassificationDataset, Labeled, build_test_set, build_train_set

Label = Literal["False", "True"]  # classes 0 and 1
LABELS = get_args(Label)


class Statement(Labeled, rename={"paths": "images"}):
    """A sentence about two images."""

    wanted = (
        'NLVR2 needs entries {"images": [first path, second path], "sentence": text, "label":'
        f" {' or '.join(LABELS)}}}"
    )
    paths: Annotated[list[str], Meta(min_length=2, max_length=2)]
    sentence: str
    label: Label
    labels = LABELS

    @property
    def images(self) -> list[str]:
        """The paths of the two images."""
        return self.paths


FORMS = {"train": Statement, "val": Statement, "test": Statement}


def train_set(config: Config, seed: int) -> ClassificationDataset:
    """Build the training set of NLVR2."""
    return build_train_set(Statement, config, seed)


def test_set(config: Config, split: str) -> ClassificationDataset:
    """Build a test set of NLVR2."""
    return build_test_set(Statement, config, split)
