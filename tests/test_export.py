"""tools.export: weights and configuration out to .safetensors and back, in the released names, and
its errors.
"""

import json
import sys

import pytest
import torch
from conftest import exit_status
from safetensors import safe_open
from safetensors.torch import load_file

from models import build_model
from models.weights import checkpoint_epoch, load_checkpoint, read_checkpoint, read_weights
from tools import export as tool
from utils import seed_everything

TASKS = ["pretrain", "retrieval", "vqa", "ve", "nlvr", "nlvr_pretrain"]
CONFIG = {
    "image_res": 48,
    "scheduler": {"lr": 1e-3, "warmup_iters": None},
    "distill": ["itc"],
    "bert_config": {"x": 2},
}


@pytest.fixture
def make(golden):
    """Builds the model of a task in the size of the golden values, with random weights."""

    def build(task, seed=0):
        seed_everything(seed)
        return build_model(
            task, {**golden("vqa.pt")["config"], "bert_config": "tests/golden/bert.json"}
        )

    return build


@pytest.fixture
def checkpoint(make, tmp_path):
    """(state of a pre-training model, the file of a run that holds it)."""
    state = make("pretrain").state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(1000, 1000)}}, "param_groups": []}
    torch.save(
        {"model": state, "optimizer": optimizer, "lr_scheduler": {}, "config": CONFIG, "epoch": 7},
        tmp_path / "run.pth",
    )
    return state, tmp_path / "run.pth"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the tool; returns (exit status, stdout, stderr)."""

    def call(source, target, *flags):
        monkeypatch.setattr(
            sys, "argv", ["export", "--checkpoint", str(source), "--output", str(target), *flags]
        )
        return exit_status(tool.main), *capsys.readouterr()

    return call


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


def test_out_and_back_is_the_same_but_for_the_state_of_training(checkpoint, run, tmp_path):
    state, path = checkpoint
    status, out, err = run(path, tmp_path / "model.safetensors", "--momentum")
    assert status == 0 and out.startswith(
        f"wrote {tmp_path / 'model.safetensors'}: {len(state)} tensors, 0."
    ), err
    assert "MB, with config and epoch" in out and "left out" not in out
    assert_equal(load_file(tmp_path / "model.safetensors"), state)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == CONFIG
    status, _, err = run(tmp_path / "model.safetensors", tmp_path / "back.pth", "--momentum")
    assert status == 0, err
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert_equal(back.pop("model"), state)
    assert back == {"config": CONFIG, "epoch": 7}
    assert (tmp_path / "back.pth").stat().st_size < 2e6  # the optimizer alone has 4 MB
    for name in ("model.safetensors", "back.pth"):
        assert (
            checkpoint_epoch(tmp_path / name) == 7
            and read_checkpoint(tmp_path / name)["config"] == CONFIG
        )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("task", TASKS)
def test_every_model_loads_as_the_released_code_does_and_here(make, run, tmp_path, task):
    model = make(task)
    state = model.state_dict()
    torch.save(
        {name: value for name, value in state.items() if "position_ids" not in name},
        tmp_path / "bare.pth",
    )
    status, out, err = run(tmp_path / "bare.pth", tmp_path / "model.safetensors", "--momentum")
    assert status == 0 and "with no config" in out, err
    exported = load_file(tmp_path / "model.safetensors")
    assert_equal(exported, {name: state[name] for name in exported})
    # position_ids and both names of tied tensors are there
    make(task, seed=1).load_state_dict(exported, strict=True)
    ours = make(task, seed=1)
    report = load_checkpoint(ours, tmp_path / "model.safetensors", complete=True)
    assert_equal(ours.state_dict(), state)
    assert not report.new and not report.ignored


def test_without_momentum_it_is_half_as_large_and_starts_the_momentum_model_from_the_base(
    checkpoint, make, run, tmp_path
):
    state, path = checkpoint
    status, out, err = run(path, tmp_path / "model.safetensors")
    assert (
        status == 0 and "left out: image_queue, text_queue, queue_ptr, visual_encoder_m, " in out
    ), err
    exported = read_weights(tmp_path / "model.safetensors")
    assert exported.keys() == {name for name in state if "_m." not in name and "queue" not in name}
    model = make("pretrain", seed=1)
    report = load_checkpoint(model, tmp_path / "model.safetensors")
    loaded = model.state_dict()
    assert set(report.new) == {"image_queue", "text_queue", "queue_ptr"}
    for name in report.copied:
        assert torch.equal(loaded[name], state[name.replace("_m.", ".", 1)])


def test_an_existing_file_stays_without_overwrite(checkpoint, run, tmp_path):
    _, path = checkpoint
    target = tmp_path / "model.pth"
    target.write_text("precious")
    status, _, err = run(path, target)
    assert (
        status == 2
        and "model.pth exists already" in err
        and "--overwrite" in err
        and target.read_text() == "precious"
    )
    assert run(path, target, "--overwrite")[0] == 0
    assert run(target, target, "--overwrite")[0] == 0  # in place
    assert checkpoint_epoch(target) == 7


def test_errors_are_one_line_and_leave_nothing_behind(checkpoint, run, tmp_path, monkeypatch):
    _, path = checkpoint
    torch.save({"config": CONFIG, "epoch": 7}, tmp_path / "empty.pth")
    content = {"model": {"weight": torch.zeros(2)}, "epoch": torch.tensor(7)}
    torch.save(content, tmp_path / "other.pth")
    (tmp_path / "folder.pth").mkdir()
    before = sorted(tmp_path.iterdir())
    for source, target, message in (
        (tmp_path / "absent.pth", "model.pth", "absent.pth does not exist"),
        (path, "model.onnx", "model.onnx names no weight file"),
        (path, "model", "end a weight file in .safetensors or .pth"),
        (tmp_path / "empty.pth", "model.pth", "empty.pth holds no named tensors"),
        (path, "absent/model.pth", "absent/model.pth: cannot write there"),
        (path, "folder.pth", "folder.pth: cannot write there"),
        (tmp_path / "other.pth", "model.safetensors", "'epoch'"),
    ):
        status, out, err = run(source, tmp_path / target)
        assert status == 2 and message in err and err.count("\n") == 1 and not out
    monkeypatch.setattr(
        "models.weights.write_weights", lambda file, *_: [file.write(b"half"), file.seek(-9)]
    )
    status, _, err = run(path, tmp_path / "model.pth")
    assert status == 1 and "cannot write" in err and "model.pth: " in err
    assert sorted(tmp_path.iterdir()) == before
