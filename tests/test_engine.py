"""The training loop: exact resuming, stopping, broken data."""

import multiprocessing
import os
import signal

import pytest
import torch
from chaos import assert_same_run
from conftest import log
from helpers.launch import launch
from helpers.training import broken_copy, command_line, run, signal_at

from engine.launch import Interrupted
from utils import InputError, TrainingStopped


@pytest.mark.parametrize(
    "workers,accumulate,signum,shards",
    [
        (0, 1, signal.SIGTERM, False),
        (2, 1, signal.SIGINT, True),
        (1, 2, signal.SIGTERM, False),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny_config, sharded, tmp_path, workers, accumulate, signum, shards
):
    config = {**tiny_config, "num_workers": workers, "accumulate": accumulate}
    if shards:
        config["train_file"] = [sharded]
    run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):  # in the middle of epoch 1: 6 batches an epoch
        run(config, tmp_path / "parts", forward=signal_at(9 if accumulate == 1 else 7, signum))
    saved = torch.load(tmp_path / "parts/checkpoint_last.pth", weights_only=True)
    assert saved["resume"]["epoch"] == 1 and 0 < saved["resume"]["iteration"] < 6
    run(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def as_on_macos(monkeypatch):
    """No sched_getaffinity, and data workers that are not forked: whatever they get is pickled."""
    monkeypatch.delattr(os, "sched_getaffinity")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_data_workers_need_not_be_forked(tiny_config, tmp_path, whole, as_on_macos):
    run({**tiny_config, "num_workers": None}, tmp_path)
    assert_same_run(whole, tmp_path)


def test_checkpoint_has_the_released_keys_and_a_finished_run_is_not_overwritten(
    tiny_config, tmp_path
):
    run(tiny_config, tmp_path)
    for name in ("checkpoint_00.pth", "checkpoint_01.pth", "checkpoint_last.pth"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert {"model", "optimizer", "lr_scheduler", "config", "epoch"} <= state.keys()
    assert state["epoch"] == 1
    assert not list(tmp_path.glob(".*"))
    entries = log(tmp_path)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert {
        "train_loss_ita",
        "train_loss_itm",
        "train_loss_mlm",
        "train_lr",
        "train_mi_bound",
    } <= entries[0].keys()
    before = (tmp_path / "checkpoint_last.pth").stat().st_mtime_ns
    with pytest.raises(InputError, match="--resume"):
        run(tiny_config, tmp_path)
    assert (tmp_path / "checkpoint_last.pth").stat().st_mtime_ns == before


@pytest.mark.parametrize("processes", [1, 2])
def test_broken_images_are_skipped_counted_and_listed(tiny_config, shapes, tmp_path, processes):
    root = broken_copy(shapes, tmp_path / "images", 4)
    config = {**tiny_config, "image_root": root, "test_file": None, "max_skipped": 0.5}
    arguments = command_line(config, tmp_path / "run", tmp_path)
    assert launch("Pretrain.py", *arguments, processes=processes).returncode == 0
    reasons = (tmp_path / "run/skipped.txt").read_text().splitlines()
    assert all("images/train/00000" in reason for reason in reasons)
    for entry in log(tmp_path / "run"):
        listed = sum(f"epoch {entry['epoch']}:" in reason for reason in reasons)
        assert 4 <= entry["train_skipped"] == listed  # a replacement may be broken too


def test_too_many_broken_images_stop_the_run(tiny_config, shapes, tmp_path):
    config = {**tiny_config, "image_root": broken_copy(shapes, tmp_path / "images", 5)}
    with pytest.raises(TrainingStopped, match="max_skipped.*skipped.txt"):
        run(config, tmp_path / "run")
