"""`make gpu` on a machine without GPU: its error, and all of its work on a tiny model."""

import json
import sys
from unittest import mock

import pytest
import torch
from conftest import ROOT, exit_status
from helpers.launch import launch

import Pretrain
from configs.load import override

sys.path.insert(0, str(ROOT / "tests/gpu"))
sys.path.insert(1, str(ROOT / "benchmarks"))
import checks
import dataloader
import pretrain_step
import report

CPU = torch.device("cpu")


@pytest.fixture
def size(tiny_config, monkeypatch):
    bert = {
        **tiny_config["bert_config"],
        "vocab_size": 30522,
        "num_hidden_layers": 2,
        "fusion_layer": 1,
    }
    config = {**tiny_config, "bert_config": bert, "queue_size": 64, "vision_depth": 1}
    size = report.Size(
        lambda *keys: override(config, list(keys), "tiny"),
        (4,),
        2,
        1,
        {"backend": "eager"},
    )
    monkeypatch.setattr(pretrain_step, "full_size_config", lambda name, *keys: size.config(*keys))
    monkeypatch.setattr(pretrain_step, "MATMUL", 64)
    monkeypatch.setattr(pretrain_step, "WARM_UP", 1)
    for module in (pretrain_step, checks):  # tests/test_compile.py compiles
        monkeypatch.setattr(module, "compile_layers", lambda model, **options: None)
    monkeypatch.setattr(dataloader, "PHOTOS", 2)
    monkeypatch.setattr(dataloader, "PAIRS", 16)
    return size


def test_the_report_runs_end_to_end_and_says_what_is_wrong(size, tmp_path, monkeypatch, capsys):
    # runs of several processes are tested for every task elsewhere
    of_processes = {
        "processes repeat and resume": mock.Mock(
            side_effect=AssertionError("again: 1 tensors differ")
        )
    }

    def launch(device, processes, *flags):  # without another start of Python
        argv = ["Pretrain.py", "--device", device.type, *map(str, flags)]
        with mock.patch.object(sys, "argv", argv):
            return exit_status(Pretrain.main), ""

    monkeypatch.setattr(checks, "launch", launch)
    monkeypatch.setattr(checks, "ended", lambda ended: ended)
    with mock.patch.dict(checks.CHECKS, of_processes):
        assert report.report(CPU, size, tmp_path) == [*of_processes]
    output = capsys.readouterr().out
    assert output.splitlines()[-1].endswith("not fit to train: processes repeat and resume")
    content = json.loads((tmp_path / "report.json").read_text())
    modes = [(row["batch"], row["mode"]) for row in content["steps"]]
    assert modes == [(4, "eager"), (4, "compiled")] and content["scaling"]["1"] > 0
    page = (tmp_path / "report.md").read_text()
    for part in ("| 4 | compiled |", "FAILED: again: 1 tensors differ"):
        assert part in page


@pytest.mark.parametrize("precision", checks.GOLDEN)
def test_golden_values_that_are_off_are_said(size, monkeypatch, precision):
    monkeypatch.setitem(checks.GOLDEN, precision, (-1, -1))
    with pytest.raises(AssertionError, match=f"off by {precision} "):
        checks.golden(CPU, size)


def test_without_a_gpu_it_says_so_in_one_line():
    ended = launch("tests/gpu/report.py", processes=1)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and "no GPU" in line
