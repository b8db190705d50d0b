"""The data of shapes that tests of all tasks use."""

# script: the keys of the configuration that hold its data, by file name in the folder of shapes;
# metrics of its log
TASKS = {
    "VQA": (
        {
            "train_file": ["vqa_train.json"],
            "val_file": ["vqa_val.json"],
            "test_file": ["vqa_test.json"],
            "answer_list": "answer_list.json",
            "vqa_root": "",
        },
        {"val_acc", "test_acc", "test_acc_yes/no", "test_acc_number", "test_acc_other"},
    ),
    "VE": (
        {
            "train_file": ["ve_train.json"],
            "val_file": ["ve_val.json"],
            "test_file": ["ve_test.json"],
        },
        {"val_acc", "test_acc"},
    ),
    "NLVR": (
        {
            "train_file": ["nlvr_train.json"],
            "val_file": ["nlvr_dev.json"],
            "test_file": ["nlvr_test.json"],
        },
        {"val_acc", "test_acc"},
    ),
    "Relevance": (
        {
            "train_file": ["relevance_train.json"],
            "val_file": ["relevance_val.json"],
            "test_file": ["relevance_test.json"],
        },
        {"val_auc", "test_auc"},
    ),
    "Pretrain_nlvr": ({"train_file": ["pretrain.json"], "test_file": None}, set()),
    "Grounding": (
        {
            "train_file": ["grounding_train.json"],
            "test_file": ["grounding_test.json"],
            "refcoco_data": "",
            "det_file": "refcoco+/dets.json",
        },
        {"val_d", "testA_d", "testB_d"},
    ),
}
