"""The memory that engine/memory.py estimates is what a step takes, and what it says where memory runs out."""

import importlib
import itertools
import json
import os
import sys
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler tells of every machine without a GPU that it has none

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refusal
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import Pretrain
from dataset import build_dataset
from engine import iterate
from engine.memory import USABLE, fitting, gpu_kernels, prepare
from models import build_model
from models.tokenizer import build_tokenizer
from configs.schema import save_config
from utils import seed_everything

sys.path.append(str(ROOT / "benchmarks"))  # where a benchmark that is run as a script finds the others
import memory


@pytest.fixture
def config(tiny_config):
    """A configuration of even fewer layers."""
    bert = {**tiny_config["bert_config"], "num_hidden_layers": 2, "fusion_layer": 1}
    return {**tiny_config, "bert_config": bert, "vision_depth": 1}


@pytest.fixture
def estimate(config):
    """The estimate for a tiny model with some keys changed."""
    return lambda world_size=8, gpu=False, **keys: memory.estimate_pretraining({**config, **keys}, world_size, gpu)


def test_what_outlives_a_step_is_counted_exactly(estimate, config):
    model = build_model("pretrain", config)
    sizes = {name: 4 * param.numel() for name, param in model.named_parameters()}
    trained = [4 * param.numel() for param in model.parameters() if param.requires_grad]
    found = estimate()
    assert found.weights == found.gradients == sum(trained)
    assert found.momentum == sum(sizes.values()) - sum(trained)
    assert found.queues == sum(buffer.nbytes for buffer in model.buffers())
    assert found.optimizer == 2 * sum(trained) + 4 * len(trained)  # two moments and a count of steps
    assert found.total() == sum(found) - found.shard


def test_alone_gradients_come_and_go(estimate):
    alone, one_of_eight = estimate(world_size=1), estimate()
    assert alone.gradients == 0 and alone.shard == alone.optimizer
    assert 0 < one_of_eight.total() - alone.total() <= one_of_eight.gradients


def test_activations_grow_with_the_batch(estimate):
    four, eight = (estimate(batch_size=batch_size) for batch_size in (4, 8))
    assert four[:5] == eight[:5]
    assert eight.activations > 1.5 * four.activations


@pytest.mark.parametrize("lower", [{"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_options_lower_activations_alone(estimate, lower):
    plain, lowered = (estimate(gpu=True, batch_size=32, **keys) for keys in ({}, lower))
    assert lowered.activations < 0.9 * plain.activations
    assert lowered._replace(activations=0) == plain._replace(activations=0)


def test_sharding_divides_the_optimizer_state(estimate, config):
    found = estimate()
    largest = max(8 * param.numel() for param in build_model("pretrain", config).parameters())
    assert found.optimizer / 8 <= found.shard <= found.optimizer / 8 + largest
    assert found.total() - found.total(sharded=True) == found.optimizer - found.shard


def test_attention_of_a_gpu_keeps_no_square():
    saved = []
    with FakeTensorMode(), gpu_kernels(), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        query, key, value = (torch.empty(2, 2, 512, 8, requires_grad=True) for _ in range(3))
        F.scaled_dot_product_attention(query, key, value, torch.ones(2, 1, 1, 512, dtype=torch.bool), 0.1)
    assert max(tensor.untyped_storage().nbytes() for tensor in saved) == query.nbytes


def test_estimate_is_what_a_step_allocates(estimate, config, tmp_path):
    """By the log of torch's CPU allocator, which has the allocations inside operations too."""
    for keys in ({}, {"precision": "bf16", "gradient_checkpointing": True}):
        seed_everything(0)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            model = build_model("pretrain", {**config, **keys})
            batch = memory.pretrain_batch(model.config)
            iterate(prepare(model, Pretrain.step, torch.device("cpu"), 8), itertools.repeat(batch), 0, 0, 0.4)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        logged = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
        totals = [event["args"]["Total Allocated"] for event in logged]
        before = totals[0] - logged[0]["args"]["Bytes"]  # tensors of an earlier profile may still be counted
        assert estimate(**keys).total() == pytest.approx(max(totals) - before, rel=0.05 if not keys else 0.15)
        del model, batch


def test_other_optimizers_are_refused(estimate, config):
    optimizer = {**config["optimizer"], "opt": "sgd"}
    assert "sgd" in refusal(lambda: estimate(optimizer=optimizer))


def test_table_of_estimates(config, tmp_path, monkeypatch, capsys):
    save_config(config, tmp_path)
    keys = ["--set", "precision=fp32", "gradient_checkpointing=true"]
    monkeypatch.setattr(sys, "argv", ["memory.py", "--config", str(tmp_path / "config.yaml"), "--batch_size", "8", *keys])
    memory.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 128
    options = itertools.product(("fp32", "bf16"), ("off", "on"), ("whole", "sharded"))
    assert [tuple(line.split()[:3]) for line in lines[3:11]] == list(options)
    assert all(line.split()[-3:] == ["8", "8", "8"] for line in lines[3:11])
    assert lines[11] == "parts in GB at batch 8, fp32, checkpointing on:"
    assert lines[12].startswith("weights 0.00, ")


def test_largest_batch_leaves_a_tenth_free():
    assert memory.largest_fitting([1, 2, 4], [10e9, 21.6e9, 22e9], 24) == 2
    assert memory.largest_fitting([1], [22e9], 24) == "-"


def total_of(config, **keys):
    return memory.estimate_pretraining({**config, **keys}, 1).total()


def test_what_would_fit_is_the_largest_batch_within_the_memory_of_each_option(config):
    tokenizer, dataset = build_tokenizer(config["tokenizer"]), build_dataset("pretrain", config)
    usable = total_of(config, batch_size=4) * 1.05
    found = fitting("pretrain", config, Pretrain.step, dataset, tokenizer, usable, 1)
    assert found["fp32", False] == 4 and found["bf16", True] >= found["bf16", False] >= 4
    assert fitting("pretrain", {**config, "batch_size": 1}, Pretrain.step, dataset, tokenizer, 1000, 1) == {}


@pytest.mark.parametrize("script, task, file", [("VQA", "vqa", "vqa_train.json"), ("NLVR", "nlvr", "nlvr_train.json")])
def test_what_would_fit_is_known_of_every_task(config, shapes, script, task, file):
    config = {**config, "train_file": [str(shapes / file)], "vqa_root": str(shapes)}
    dataset, step = build_dataset(f"{task}_train", config), importlib.import_module(script).step
    found = fitting(task, config, step, dataset, build_tokenizer(config["tokenizer"]), 1e12, 1)
    assert found == {("fp32", False): 4, ("fp32", True): 8, ("bf16", False): 8, ("bf16", True): 8}


def test_memory_that_runs_out_in_training_is_one_line_that_says_what_would_fit(pretrain, tiny_config, monkeypatch):
    plain = Pretrain.step

    def full(model, batch, *rest):
        if isinstance(batch.image, FakeTensor):  # of the estimate
            return plain(model, batch, *rest)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.\nGPU 0 has a total capacity of 79.11 GiB")

    usable = total_of(tiny_config, batch_size=4) * 1.05 / USABLE
    monkeypatch.setattr(Pretrain, "step", full)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(total_memory=int(usable)))
    status, said = pretrain()
    line = said.splitlines()[-1]
    assert status == 1 and "Traceback" not in said
    assert line.startswith("error: out of GPU memory (0 GB) with batch_size 8 in fp32, gradient_checkpointing false; by")
    assert "--set batch_size=4 precision=fp32 gradient_checkpointing=false, or batch_size=" in line and "2.50 GiB" in line
