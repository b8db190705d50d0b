"""The training loop: exact resuming, stopping, broken data, and several processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import Pretrain
from engine.saving import find_resume_file
from dataset import build_dataset
from engine import train
from models import build_model
from models.checkpoint import read_weights
from models.tokenizer import build_tokenizer
from utils import InputError, Interrupted, Text, TrainingStopped, seed_everything

CPU = torch.device("cpu")


def run(config, output_dir, resume=False, step=None):
    """Trains as Pretrain.py does; step(step function) may wrap what a step computes."""
    output_dir.mkdir(exist_ok=True)
    tokenizer = build_tokenizer(config["tokenizer"])
    dataset = build_dataset("pretrain", config, seed=1)
    seed_everything(1)
    model = build_model("pretrain", config, tokenizer)
    plain = Pretrain.step
    resume_from = find_resume_file(output_dir, "", resume)
    train(model, dataset, tokenizer, step(plain) if step else plain, config, output_dir, CPU, 1, resume_from)
    return model


def signal_at(number, signum=signal.SIGTERM):
    """Wraps a step so that the process gets a signal in its number-th call."""

    def wrap(step):
        calls = iter(range(1, 1000))

        def stepped(*args, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signum)
            return step(*args, **options)

        return stepped

    return wrap


def assert_same_run(left, right):
    """Two output folders hold the same weights, optimizer state and losses, bit for bit."""
    states = [torch.load(folder / "checkpoint_last.pth", weights_only=True) for folder in (left, right)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    for i, moments in states[0]["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][i][key]), (i, key)
    assert (left / "log.txt").read_text() == (right / "log.txt").read_text()


@pytest.mark.parametrize("workers,accumulate,signum,shards", [
    (0, 1, signal.SIGTERM, False), (2, 1, signal.SIGINT, True), (1, 2, signal.SIGTERM, False),
])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(tiny_config, sharded, tmp_path, workers, accumulate, signum, shards):
    config = {**tiny_config, "num_workers": workers, "accumulate": accumulate}
    if shards:
        config["train_file"] = [sharded]
    run(config, tmp_path / "whole")
    # in the middle of epoch 1: 6 batches an epoch
    with pytest.raises(Interrupted):
        run(config, tmp_path / "parts", step=signal_at(9 if accumulate == 1 else 7, signum))
    saved = torch.load(tmp_path / "parts/checkpoint_last.pth", weights_only=True)
    assert saved["resume"]["epoch"] == 1 and 0 < saved["resume"]["iteration"] < 6
    run(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def as_on_macos(monkeypatch):
    """No sched_getaffinity, and data workers that are not forked: whatever they get is pickled."""
    monkeypatch.delattr(os, "sched_getaffinity")
    before = multiprocessing.get_start_method()
    multiprocessing.set_forkserver_preload(["dataset", "models.tokenizer"])  # once, not in every worker
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_data_workers_need_not_be_forked(tiny_config, tmp_path, as_on_macos):
    run(tiny_config, tmp_path / "alone")
    run({**tiny_config, "num_workers": None}, tmp_path / "workers")
    assert_same_run(tmp_path / "alone", tmp_path / "workers")


def test_killed_run_continues_from_the_last_save(tiny_config, tmp_path):
    config = {**tiny_config, "save_every": 4}

    class Killed(Exception):
        pass

    def kill(step):
        calls = iter(range(1, 1000))

        def stepped(*args):
            if next(calls) == 12:
                raise Killed  # nothing is saved on the way out, as with SIGKILL
            return step(*args)

        return stepped

    run(config, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, tmp_path / "parts", step=kill)
    run(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_checkpoint_has_the_released_keys_and_a_finished_run_is_not_overwritten(tiny_config, tmp_path):
    run(tiny_config, tmp_path)
    for name in ("checkpoint_00.pth", "checkpoint_01.pth", "checkpoint_last.pth"):
        state = torch.load(tmp_path / name, weights_only=True)
        assert {"model", "optimizer", "lr_scheduler", "config", "epoch"} <= state.keys()
    assert state["epoch"] == 1
    assert not list(tmp_path.glob(".*"))
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1]
    assert {"train_loss_ita", "train_loss_itm", "train_loss_mlm", "train_lr", "train_mi_bound"} <= log[0].keys()
    before = (tmp_path / "checkpoint_last.pth").stat().st_mtime_ns
    with pytest.raises(InputError, match="--resume"):
        run(tiny_config, tmp_path)
    assert (tmp_path / "checkpoint_last.pth").stat().st_mtime_ns == before


def test_accumulation_has_the_gradient_of_the_whole_batch(tiny_config, tmp_path):
    # masked language modeling alone: its loss knows no other samples. Two batches of 4 with as many masked tokens each.
    config = {**tiny_config, "objectives": ["mlm"], "distill": False}
    seed_everything(0)
    tokenizer = build_tokenizer(config["tokenizer"])
    model = build_model("pretrain", config, tokenizer).eval()
    ids = torch.randint(5, 100, (8, 6))
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    text = lambda part: Text(ids[part], torch.ones_like(ids[part]))
    image = torch.randn(8, 3, 32, 32)

    def grad(parts):
        model.zero_grad()
        for i, part in enumerate(parts):
            loss = model(image[part], text(part), masked=(ids[part], labels[part]), update_momentum=i == 0)["loss_mlm"]
            (loss / len(parts)).backward()
        return model.visual_encoder.patch_embed.proj.weight.grad.clone()

    whole, halves = grad([slice(0, 8)]), grad([slice(0, 4), slice(4, 8)])
    assert torch.allclose(whole, halves, rtol=1e-4, atol=1e-8)


def test_nonfinite_loss_names_objective_step_and_files_and_keeps_the_checkpoint(tiny_config, tmp_path):
    def poison(step):
        calls = iter(range(1, 1000))

        def stepped(*args):
            losses = step(*args)
            if next(calls) == 8:
                losses["loss_itm"] = losses["loss_itm"] * float("nan")
            return losses

        return stepped

    with pytest.raises(TrainingStopped) as error:
        run(tiny_config, tmp_path, step=poison)
    message = str(error.value)
    assert "loss_itm not finite in epoch 1 iteration 1;" in message
    assert message.count(".jpg") == 8 and "checkpoint_last.pth" in message and "\n" not in message
    assert all(value.isfinite().all() for value in read_weights(tmp_path / "checkpoint_last.pth").values())


def broken_copy(shapes, folder, how_many):
    """The shapes' pre-training images with the first ones cut off; the others are links."""
    for entry in json.loads((shapes / "pretrain.json").read_text()):
        target = folder / entry["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if how_many > 0:
            target.write_bytes((shapes / entry["image"]).read_bytes()[:400])
            how_many -= 1
        else:
            target.symlink_to(shapes / entry["image"])
    return str(folder)


def test_broken_images_are_skipped_counted_and_listed(tiny_config, shapes, tmp_path):
    root = broken_copy(shapes, tmp_path / "images", 2)
    config = {**tiny_config, "image_root": root, "max_skipped": 0.2}
    run(config, tmp_path / "run")
    first = json.loads((tmp_path / "run/log.txt").read_text().splitlines()[0])
    assert 2 <= first["train_skipped"] <= 6  # a replacement may be broken too
    assert all("images/train/00000" in reason for reason in first["train_skipped_entries"])
    assert (tmp_path / "run/skipped.txt").read_text().count("epoch 0:") == first["train_skipped"]


def test_too_many_broken_images_stop_the_run(tiny_config, shapes, tmp_path):
    config = {**tiny_config, "image_root": broken_copy(shapes, tmp_path / "images", 5)}
    with pytest.raises(TrainingStopped, match="max_skipped.*skipped.txt"):
        run(config, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------------
# two processes


def torchrun(script, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )


def command_line(config, output_dir, tmp_path):
    from ruamel.yaml import YAML

    path = tmp_path / "config.yaml"
    (tmp_path / "bert.json").write_text(json.dumps(config["bert_config"]))
    YAML(typ="safe").dump({**config, "bert_config": str(tmp_path / "bert.json")}, path)
    return ["--config", path, "--output_dir", output_dir, "--device", "cpu"]


def test_two_processes_resume_exactly(tiny_config, tmp_path):
    config = {**tiny_config, "batch_size": 4, "num_workers": 1, "test_file": None}
    whole = torchrun("Pretrain.py", *command_line(config, tmp_path / "whole", tmp_path))
    assert whole.returncode == 0, whole.stderr
    # only one of the two processes hears the signal; both must stop after the same iteration
    parts = torchrun("tests/helpers/interrupt_one_process.py", *command_line(config, tmp_path / "parts", tmp_path))
    assert parts.returncode != 0 and "continue with --resume" in parts.stderr, parts.stderr
    rest = torchrun("Pretrain.py", *command_line(config, tmp_path / "parts", tmp_path), "--resume")
    assert rest.returncode == 0, rest.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_two_processes_have_one_queue_and_averaged_gradients(tmp_path):
    result = torchrun("tests/helpers/compare_processes.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("same") == 2, result.stdout


def test_two_processes_evaluate_as_one(tiny_config, tmp_path):
    tiny_config["batch_size"] = 4
    trained = torchrun("Pretrain.py", *command_line(tiny_config, tmp_path / "two", tmp_path))
    assert trained.returncode == 0, trained.stderr
    checkpoint = tmp_path / "two/checkpoint_last.pth"
    arguments = [*command_line(tiny_config, tmp_path / "one", tmp_path), "--evaluate", "--checkpoint", checkpoint]
    one = subprocess.run([sys.executable, "Pretrain.py", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert one.returncode == 0, one.stderr
    logs = [json.loads(Path(tmp_path / name / "log.txt").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert {k: v for k, v in logs[0].items() if k.startswith("test_")} == pytest.approx(
        {k: v for k, v in logs[1].items() if k.startswith("test_")}
    )
