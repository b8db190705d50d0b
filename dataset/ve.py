"""SNLI-VE: does the sentence follow from the image?"""

import reprlib

from dataset.annotations import check_entry, where
from utils import InputError

LABELS = {"contradiction": 0, "neutral": 1, "entailment": 2}


def ve_entry(entry, path, number):
    """Reads an entry {image: name without .jpg, sentence, label} for LabeledDataset. Raises InputError."""
    check_entry(entry, {"image": str, "sentence": str, "label": str}, path, number)
    if entry["label"] not in LABELS:
        raise InputError(f"{where(path, number)}: its label is {reprlib.repr(entry['label'])}, it must be {', '.join(LABELS)}",
                         "wrong 'label'")
    image = entry["image"] if entry["image"].endswith(".jpg") else f"{entry['image']}.jpg"
    return {"images": [image], "sentence": entry["sentence"], "target": LABELS[entry["label"]]}
