"""NLVR2: is the sentence true of the two images?"""

from typing import Annotated, Literal

from msgspec import Meta

from dataset.annotations import Entry

LABELS = {"False": 0, "True": 1}


class Statement(Entry, rename={"paths": "images"}):
    """A sentence about two images."""

    wanted = f'NLVR2 needs entries {{"images": [first path, second path], "sentence": text, "label": {" or ".join(LABELS)}}}'
    paths: Annotated[list[str], Meta(min_length=2, max_length=2)]
    sentence: str
    label: Literal[*LABELS]

    @property
    def images(self):
        return self.paths

    @property
    def texts(self):
        return [self.sentence]

    @property
    def target(self):
        return LABELS[self.label]
