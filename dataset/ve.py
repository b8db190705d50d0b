"""SNLI-VE: does the sentence follow from the image?"""

from typing import Literal, get_args

from configs.config import Config
from dataset.classification import ClassificationDataset, Labeled, build_test_set, build_train_set

Label = Literal["contradiction", "neutral", "entailment"]  # classes 0, 1 and 2
LABELS = get_args(Label)


class Entailment(Labeled):
    """A sentence about an image."""

    wanted = (
        'VE needs entries {"image": name with or without .jpg, "sentence": text, "label":'
        f" {' or '.join(LABELS)}}}"
    )
    image: str
    sentence: str
    label: Label
    labels = LABELS

    @property
    def images(self) -> list[str]:
        """The path of the image, with .jpg."""
        return [self.image if self.image.endswith(".jpg") else f"{self.image}.jpg"]


FORMS = {"train": Entailment, "val": Entailment, "test": Entailment}


def train_set(config: Config, seed: int) -> ClassificationDataset:
    """Build the training set of visual entailment."""
    return build_train_set(Entailment, config, seed)


def test_set(config: Config, split: str) -> ClassificationDataset:
    """Build a test set of visual entailment."""
    return build_test_set(Entailment, config, split)
