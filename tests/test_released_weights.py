"""Full-size checkpoints with exactly the released keys: which task takes which, what is refused,
and the memory it takes.

Files of meta tensors are as long as their names: keys and shapes of every model are checked without
its gigabytes.
"""

import functools
import json
import os
import random
import re

import pytest
import torch
from conftest import ROOT, refusal
from helpers.launch import start_alone

from models import build_model
from models.weights import load_checkpoint

KEYS = json.loads((ROOT / "tests/golden/state_dict_keys.json").read_text())
TASK = {
    "Pretrain": "pretrain",
    "Retrieval": "retrieval",
    "VQA": "vqa",
    "VE": "ve",
    "NLVR": "nlvr",
    "Pretrain_nlvr": "nlvr_pretrain",
}
QUEUES = {"image_queue", "text_queue", "queue_ptr"}
HEAD, TA_HEAD = {"cls_head", "cls_head_m"}, {"ta_head"}
# file: task that takes it -> what is new there (first part of the name)
TAKEN = {
    "Pretrain": {
        "pretrain": set(),
        "retrieval": {"idx_queue"},
        "grounding": {"idx_queue"},
        "vqa": set(),
        "ve": HEAD,
        "nlvr": HEAD,
        "nlvr_pretrain": TA_HEAD,
    },
    "Retrieval": {
        "retrieval": set(),
        "grounding": set(),
        "ve": HEAD,
        "nlvr": HEAD,
        "nlvr_pretrain": TA_HEAD,
    },
    "VQA": {"vqa": set(), "ve": HEAD, "nlvr": HEAD},
    "VE": {"ve": set()},
    "NLVR": {"nlvr": set()},
    "Pretrain_nlvr": {"nlvr_pretrain": set(), "nlvr": HEAD},
}
TASKS = [*TASK.values(), "grounding"]


@functools.cache
def model_of(task):
    """A full-size model without values."""
    image_res = 256 if task in ("pretrain", "nlvr_pretrain") else 384
    with torch.device("meta"):
        return build_model(
            task, {"image_res": image_res, "bert_config": str(ROOT / "configs/config_bert.json")}
        )


@pytest.mark.parametrize("name", TASK)
def test_full_size_keys_shapes_and_parameter_counts(name):
    model, counts = model_of(TASK[name]), KEYS[f"{name}.__parameters__"]
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == KEYS[name]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counts["trainable"]
    assert sum(p.numel() for p in model.parameters()) == counts["all"]


def state_of(name):
    whole = {key: torch.empty(shape, device="meta") for key, shape in KEYS[name].items()}
    integers = {
        key: value.long()
        for key, value in whole.items()
        if key.endswith(("position_ids", "queue_ptr", "idx_queue"))
    }
    return {**whole, **integers}


def write(path, state):
    """A file as the released code writes it."""
    torch.save(
        {
            "model": state,
            "optimizer": {
                "state": {0: {"step": 7, "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 1e-5, "params": [0]}],
            },
            "lr_scheduler": {"base_values": [1e-4], "metric": None, "_rng_state": None},
            "config": {"image_res": 256, "schedular": {"sched": "cosine", "lr": 1e-4}},
            "epoch": 29,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The path of a released file by the name of its model."""
    folder = tmp_path_factory.mktemp("released")
    return functools.cache(lambda name: write(folder / f"{name}.pth", state_of(name)))


def first_parts(names):
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ["name", "task"], [(name, task) for name, tasks in TAKEN.items() for task in tasks]
)
def test_a_released_file_is_taken_whole(released, name, task):
    model = model_of(task)
    report = load_checkpoint(model, released(name))
    assert first_parts(report.new) == TAKEN[name][task]
    filled = (
        {part for part in first_parts(model.state_dict()) if part.endswith("_m")}
        - first_parts(KEYS[name])
        - HEAD
    )
    if task == "nlvr" and name != "NLVR":  # momentum starts as the base
        filled = {"visual_encoder_m", "text_encoder_m"}
    elif (name, task) == ("Pretrain", "vqa"):  # from text_encoder_m
        filled = set()
    assert first_parts(report.copied) == filled
    assert len(report.loaded) + len(report.copied) + len(report.new) == len(model.state_dict())
    resolutions = {
        KEYS[name]["visual_encoder.pos_embed"][1],
        model.visual_encoder.pos_embed.shape[1],
    }
    assert all(resized.endswith("pos_embed") for resized in report.resized)
    assert ("visual_encoder.pos_embed" in report.resized) == (len(resolutions) == 2)
    assert all(len(line) < 400 for line in str(report).splitlines()), report
    if TASK[name] == task:
        assert not report.ignored and not report.converted


@pytest.mark.parametrize(
    ["name", "task"], [(name, task) for name in TAKEN for task in TASKS if task not in TAKEN[name]]
)
def test_a_released_file_of_no_use_is_refused_by_name(released, name, task):
    if "cls_head" in first_parts(KEYS[name]) and task in ("ve", "nlvr"):
        message = r"cls_head.2.weight has shape .*image_res.*bert_config"
    elif (name, task) == ("Pretrain_nlvr", "ve"):
        message = r"no place for: text_encoder.encoder.layer.12.* two images"
    else:
        message = r"lacks \d+ tensors of the model: .*(itm_head|text_(en|de)coder.cls|proj|temp)"
    found = refusal(load_checkpoint, model_of(task), released(name))
    assert re.search(message, found) and len(found) < 600


@pytest.mark.parametrize("name", TASK)
def test_order_is_free_and_damage_is_refused_by_name(name, tmp_path):
    state, model, path = state_of(name), model_of(TASK[name]), tmp_path / "file.pth"
    weights = [
        key
        for key in state
        if key not in ("temp", "queue_ptr") and not key.endswith(("position_ids", "_queue"))
    ]
    draw = random.Random(name)
    for key in draw.sample(weights, 2):
        rest = {other: value for other, value in state.items() if other != key}
        message = refusal(load_checkpoint, model, write(path, {**rest, f"{key}_old": state[key]}))
        assert (
            f"lacks 1 tensors of the model: {key}" in message
            and f"it has {key}_old instead" in message
        )
        larger = torch.empty(2, *state[key].shape, device="meta")
        assert f"{key} has shape [2, " in refusal(
            load_checkpoint, model, write(path, {**state, key: larger})
        )
    for share in (0.3, 0.8):  # cut off within the base model, and within the momentum model
        part = dict(list(state.items())[: int(share * len(state))])
        assert re.search(r"lacks \d+ tensors", refusal(load_checkpoint, model, write(path, part)))
    shuffled = draw.sample(list(state.items()), len(state))
    report = load_checkpoint(model, write(path, dict(shuffled)))
    assert len(report.loaded) == len(model.state_dict())


# Writes pre-training files of zeros to argv[2:] and loads each into a VE model of ones of the
# configuration argv[1]. Prints for each the names left at ones, the bytes of the model and of the
# file, and by how many bytes the memory that is not pages of a file has grown at most.
LOAD = """
import ctypes, json, os, sys, threading, time
import torch
from models import build_model
from models.weights import load_checkpoint, write_weights

def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def build(task):
    with torch.device("meta"):
        return build_model(task, json.loads(sys.argv[1])).to_empty(device="cpu")

def sample():
    while True:
        samples.append(memory())
        time.sleep(0.001)

# glibc keeps freed blocks below a moving threshold for reuse, which would hide what loading takes
M_MMAP_THRESHOLD = -3
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
samples = []
threading.Thread(target=sample, daemon=True).start()
state = {name: value.zero_() for name, value in build("pretrain").state_dict().items()}
for path in sys.argv[2:]:
    with open(path, "wb") as file:
        write_weights(file, os.path.splitext(path)[1], state, {"epoch": 29})
del state
for path in sys.argv[2:]:
    before = memory()
    model = build("ve")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    samples.clear()
    load_checkpoint(model, path)
    samples.append(memory())
    ends = {name: value.flatten()[[0, -1]].tolist() for name, value in model.named_parameters()}
    ones = [name for name, values in ends.items() if values == [1, 1]]
    assert all(values == [0, 0] for name, values in ends.items() if name not in ones)
    size = sum(value.nbytes for value in model.parameters())
    print(json.dumps([ones, size, os.path.getsize(path), max(samples) - before]))
    del model
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="memory is measured as Linux counts it"
)
def test_loading_takes_the_memory_of_the_model_alone(tmp_path):
    bert = json.loads((ROOT / "configs/config_bert.json").read_text())
    bert |= {"num_hidden_layers": 2, "fusion_layer": 1, "vocab_size": 1000}
    config = {"image_res": 64, "bert_config": bert, "vision_depth": 3, "queue_size": 64}
    paths = [str(tmp_path / f"file{suffix}") for suffix in (".pth", ".safetensors")]
    (tmp_path / "load.py").write_text(LOAD)
    command = [tmp_path / "load.py", json.dumps(config), *paths]
    load, output, errors = start_alone(tmp_path / "said", *command)
    load.join(120)
    assert load.exitcode == 0, errors.read_text()
    for ones, model, file, grown in map(json.loads, output.read_text().splitlines()):
        assert file > 250e6 and first_parts(ones) == HEAD
        assert 0.9 * model < grown < model + 0.1 * file
