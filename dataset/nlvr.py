"""NLVR2: is the sentence true of the two images?"""

import reprlib

from dataset.annotations import check_entry, where
from utils import InputError

LABELS = {"False": 0, "True": 1}


def nlvr_entry(entry, path, number):
    """Reads an entry {images: [first, second], sentence, label: "True" or "False"} for LabeledDataset. Raises InputError."""
    check_entry(entry, {"images": list, "sentence": str, "label": str}, path, number)
    if len(entry["images"]) != 2:
        raise InputError(f"{where(path, number)} has {len(entry['images'])} images; NLVR2 needs two, the first and the second",
                         "wrong 'images'")
    if entry["label"] not in LABELS:
        label = reprlib.repr(entry["label"])
        raise InputError(f"{where(path, number)}: its label is {label}, it must be {' or '.join(LABELS)}", "wrong 'label'")
    return {"images": entry["images"], "sentence": entry["sentence"], "target": LABELS[entry["label"]]}
