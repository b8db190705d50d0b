"""Compiled layers: what they compute, and how often they are compiled.

Their graphs are traced, and run without a compiler.
"""

import logging
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close, refusal
from timm.models.vision_transformer import Block
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.parallel import DistributedDataParallel

from configs.config import as_config
from dataset.caption import CaptionBatch
from engine.precision import MAX_GRAPHS, compile_layers, compiles
from engine.trainer import create_train_state, train_step
from models import build_model
from models.gradcam import itm_gradcam
from utils import Text

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Leave torch's settings and no compiled code to the tests that follow."""
    settings = {"optimize_ddp": True, "recompile_limit": 8, "suppress_errors": False}
    # what pytest collects of a test would have every step of the tracing
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(settings),
        torch.fx.experimental._config.patch(use_duck_shape=True),
    ):
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs():
    """The graphs that `backend` has been given."""
    return []


@pytest.fixture
def backend(graphs):
    """Computes graphs as they are, and their gradients by autograd."""
    return lambda graph, inputs: graphs.append(graph) or graph.forward


@pytest.fixture
def aot_backend(graphs):
    """aot_eager: forward and backward passes are graphs of single operations."""
    return lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs)


def text(length, batch=4):
    """Random texts of which the longest has `length` tokens."""
    generator = torch.Generator().manual_seed(length)
    lengths = torch.randint(5, length + 1, (batch, 1), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    return Text(torch.randint(4, 20, (batch, length), generator=generator) * mask, mask)


def start(config):
    """Return a pre-training run from random weights."""
    torch.manual_seed(0)
    model = build_model("pretrain", config).train()
    return create_train_state(model, range(1), config, device=CPU, seed=0)


def step(state, number, length):
    """Take a step on texts of a length. Return the losses."""
    size = state.config.image_res
    image = torch.randint(
        256, (4, 3, size, size), generator=torch.Generator().manual_seed(number), dtype=torch.uint8
    )
    batch = CaptionBatch(image, text(length), torch.full((4,), -1), [], [])
    state.iteration = number
    return train_step(state, iter([batch]), 0.4).losses


def test_compiled_steps_equal_eager_ones_and_are_compiled_once_for_all_lengths(
    tiny_config, graphs, aot_backend
):
    bert = {
        **tiny_config["bert_config"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_hidden_layers": 2,
        "fusion_layer": 1,
    }
    plain, compiled = (
        start({**tiny_config, "bert_config": bert, "vision_depth": 1}) for _ in range(2)
    )
    compile_layers(compiled.model, backend=aot_backend)
    assert torch._dynamo.config.recompile_limit == MAX_GRAPHS  # and not what timm has set
    counts = []
    # as long as the model is wide, or as the rows of masks are apart: what is equal by chance must
    # not be compiled in
    for number, length in enumerate([16, 12, 24, 13, 25, 17]):
        ours, theirs = (step(run, number, length) for run in (compiled, plain))
        for name in theirs:
            assert_close(name, ours[name], theirs[name], 1e-3, 1e-5)
        counts.append(len(graphs))
    assert counts[0] == counts[-1] <= 16


def test_data_parallelism_does_not_split_layers(tmp_path, graphs, backend):
    model, x = (
        torch.nn.Sequential(Block(16, 2), Block(16, 2)),
        torch.randn(2, 5, 16, requires_grad=True),
    )
    compile_layers(model, backend=backend)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        DistributedDataParallel(model, bucket_cap_mb=1e-4)(x).sum().backward()
    finally:
        dist.destroy_process_group()
    assert len(graphs) == 1


def test_grad_cam_of_a_compiled_model_has_the_attention_of_the_very_step(
    released, golden, graphs, backend
):
    data, (_, model, _) = golden("gradcam.pt"), released("retrieval")
    compile_layers(model.eval(), backend=backend)
    words = Text(data["input_ids"], data["attention_mask"])
    cams = itm_gradcam(model, data["image"], words, data["itm_block_num"])
    assert_close("per token", cams, data["itm_cam_per_token"], 1e-4, 1e-5)
    # encoders are compiled, open attention is not
    assert graphs and not any("softmax" in graph.code for graph in graphs)


@pytest.mark.parametrize(
    "key, device, deterministic, compiled",
    [
        ("auto", CUDA, False, True),
        ("auto", CUDA, True, False),
        ("auto", CPU, False, False),
        (True, CPU, True, True),
        (False, CUDA, False, False),
    ],
)
def test_layers_are_compiled_on_a_gpu_unless_results_must_repeat(
    key, device, deterministic, compiled, monkeypatch
):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with mock.patch("torch.compile") as tried, mock.patch("torch.zeros"):
        assert (
            compiles(as_config({"compile": key, "deterministic": deterministic}), device)
            is compiled
        )
        assert tried.called is compiled
    if compiled:  # for the next start
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == os.path.join(
            os.environ["ALBEF_CACHE"], "torchinductor"
        )
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
        with mock.patch("torch.compile"), mock.patch("torch.zeros"):
            compiles(as_config({"compile": key, "deterministic": deterministic}), device)
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"


def test_compiled_code_is_not_loaded_from_a_folder_that_everyone_can_write(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("ALBEF_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with mock.patch("torch.compile") as tried, mock.patch("torch.zeros"):
        assert "ALBEF_CACHE" in refusal(compiles, as_config({"compile": True}), CPU)
    assert not tried.called and "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_without_a_compiler_training_goes_on_unless_compilation_is_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    zeros = torch.zeros
    failing = mock.patch(
        "torch.compile",
        side_effect=RuntimeError("Cannot find a working triton installation.\nMore"),
    )
    with failing, mock.patch("torch.zeros", lambda *size, device: zeros(size)):
        assert not compiles(as_config({}), CUDA)
        note = capsys.readouterr().err
        assert (
            note.startswith("note: torch.compile does not work here (Cannot find")
            and note.count("\n") == 1
        )
        assert "Triton" in refusal(compiles, as_config({"compile": True}), CPU)


def test_a_layer_that_cannot_be_compiled_computes_as_it_is(tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("a compiler's bug")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    with mock.patch("torch.compile"), mock.patch("torch.zeros"):
        assert compiles(as_config({"compile": "auto", "deterministic": False}), CUDA)
    model, x = torch.nn.Sequential(Block(16, 2)), torch.randn(2, 5, 16)
    expected = model(x)
    compile_layers(model, backend=fail)
    assert torch.equal(model(x), expected)
