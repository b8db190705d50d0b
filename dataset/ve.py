"""SNLI-VE: does the sentence follow from the image?"""

from typing import Literal

from dataset.annotations import Entry

LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}


class Entailment(Entry):
    """A sentence about an image."""

    wanted = f'VE needs entries {{"image": name, perhaps without .jpg, "sentence": text, "label": {" or ".join(LABELS)}}}'
    image: str
    sentence: str
    label: Literal[*LABELS]

    @property
    def images(self):
        return [self.image if self.image.endswith(".jpg") else f"{self.image}.jpg"]

    @property
    def texts(self):
        return [self.sentence]

    @property
    def target(self):
        return LABELS[self.label]
