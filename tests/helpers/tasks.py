"""The data of shapes that tests of all tasks use."""


def splits(name, val="val"):
    """The keys of train, validation and test data in files NAME_SPLIT.json."""
    files = {"train": "train", "val": val, "test": "test"}
    return {f"{split}_file": [f"{name}_{file}.json"] for split, file in files.items()}


# script: the keys of the configuration that hold its data, by file name in the folder of shapes
DATA = {
    "Pretrain": {"train_file": ["pretrain.json"], "test_file": ["test.json"]},
    "Pretrain_nlvr": {"train_file": ["pretrain.json"], "test_file": None},
    "Retrieval": {
        "train_file": ["retrieval_train.json"],
        "val_file": ["val.json"],
        "test_file": ["test.json"],
    },
    "VQA": {**splits("vqa"), "answer_list": "answer_list.json", "vqa_root": ""},
    "VE": splits("ve"),
    "NLVR": splits("nlvr", val="dev"),
    "Relevance": splits("relevance"),
    "Grounding": {
        "train_file": ["grounding_train.json"],
        "test_file": ["grounding_test.json"],
        "refcoco_data": "",
        "det_file": "refcoco+/dets.json",
    },
    "Attributes": {"train_file": None, "test_file": ["attributes.json"]},
}
# script that fine-tunes, but for Retrieval.py: metrics of its log
METRICS = {
    "VQA": {"val_acc", "test_acc", "test_acc_yes/no", "test_acc_number", "test_acc_other"},
    "VE": {"val_acc", "test_acc"},
    "NLVR": {"val_acc", "test_acc"},
    "Relevance": {"val_auc", "test_auc"},
    "Pretrain_nlvr": set(),
    "Grounding": {"val_d", "testA_d", "testB_d"},
}


def data_of(script, shapes):
    """The keys of a script's data in a folder of shapes."""

    def place(value):
        if isinstance(value, list):
            return [str(shapes / name) for name in value]
        return None if value is None else str(shapes / value)

    return {key: place(value) for key, value in DATA[script].items()}
