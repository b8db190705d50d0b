"""What Pretrain.py says about bad input: one line, exit status 2, nothing written is lost."""

import argparse
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, contents, exit_status, log, refusal
from PIL import Image

from engine.checkpointing import find_resume_file
from engine.metric_logger import write_log
from engine.output_dir import check_output
from experiments.run import read_experiments
from inference.index import open_index
from models import build_model
from models.hashes import verify_hash
from models.hub import find_file
from models.weights import find_checkpoint, load_vision_encoder
from tools import visualize
from tools.export import export_folder, read_metrics
from tools.visualize import draw_run
from utils import InputError, TrainingStopped


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def bert(folder, **keys):
    """The path of the tiny BERT configuration with some keys changed."""
    return write(folder / "other.json", {**json.loads((folder / "bert.json").read_text()), **keys})


GOOD = {"image": "images/train/000000.jpg", "caption": "a red circle"}
CASES = {
    "missing annotation file": (lambda d: {"train_file": str(d / "no.json")}, ["no.json"]),
    "annotation file is a folder": (lambda d: {"train_file": str(d)}, ["cannot"]),
    "not a list": (lambda d: {"train_file": write(d / "a.json", {"image": 1})}, ["a.json", "list"]),
    "cut off": (lambda d: {"train_file": write(d / "a.json", '[{"image": "x", "capt')}, ["a.json"]),
    "entry without caption": (
        lambda d: {"train_file": write(d / "a.json", [GOOD, {"image": "x"}])},
        ["a.json", "entry 1", "'caption'"],
    ),
    "entry without image": (
        lambda d: {"train_file": write(d / "a.json", [{"caption": "x"}])},
        ["a.json", "entry 0", "'image'"],
    ),
    "missing image_root": (lambda d: {"image_root": str(d / "nowhere")}, ["image_root", "nowhere"]),
    "missing image": (
        lambda d: {"train_file": write(d / "a.json", [GOOD, {**GOOD, "image": "x.jpg"}])},
        ["a.json", "entry 1", "x.jpg", "image_root"],
    ),
    "misspelled key": (lambda d: {"quue_size": 3}, ["quue_size", "queue_size"]),
    "wrong vocab": (lambda d: {"tokenizer": "tests/golden/vocab.txt"}, ["166", "vocab_size"]),
    "no network for BERT": (
        lambda d: {"text_encoder": "some-lab/some-bert"},
        ["text_encoder: some-lab/some-bert", "local copy"],
    ),
    "no network for ViT": (
        lambda d: {"vision_encoder": "deit_base_patch16_224.fb_in1k"},
        ["vision_encoder", "local copy"],
    ),
    "no tokenizer": (
        lambda d: {"tokenizer": None},
        ["text_encoder is random", "the key tokenizer"],
    ),
    "captions for a vocabulary": (
        lambda d: {"tokenizer": write(d / "captions.json", [GOOD])},
        ["captions.json is not a vocabulary"],
    ),
    "too small a data set": (lambda d: {"batch_size": 500}, ["batch_size"]),
    "unknown schedule": (lambda d: {"scheduler": {"sched": "tanh"}}, ["tanh", "cosine"]),
    "two learning rates": (
        lambda d: {"optimizer": {"lr": 1e-3}, "scheduler": {"lr": 2e-3}},
        ["optimizer.lr is 0.001", "scheduler.lr is 0.002", "one key"],
    ),
    "two batch sizes": (
        lambda d: {"batch_size_train": 4},
        ["batch_size is 8", "batch_size_train is 4", "one key"],
    ),
    "patch beyond the image": (
        lambda d: {"image_res": 40},
        ["image_res 40", "patch_size 16", "set image_res to 32, or choose another patch_size"],
    ),
    "heads of the ViT": (
        lambda d: {"vision_heads": 3},
        ["vision_width 16", "vision_heads 3", "another vision_heads"],
    ),
    "heads of BERT": (
        lambda d: {"bert_config": bert(d, num_attention_heads=3)},
        ["hidden_size 16", "num_attention_heads 3"],
    ),
    "no layer that fuses": (
        lambda d: {"bert_config": bert(d, fusion_layer=4)},
        ["fusion_layer 4", "num_hidden_layers 4"],
    ),
    "another activation": (
        lambda d: {"bert_config": bert(d, hidden_act="relu")},
        ["other.json", "hidden_act is 'relu'", "gelu"],
    ),
    "no batch size": (lambda d: {"batch_size": None}, ["batch_size"]),
    "widths differ": (lambda d: {"vision_width": 32}, ["vision_width 32", "encoder_width"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_status_2(pretrain, tiny_config, tmp_path, monkeypatch, case):
    keys, words = CASES[case]
    write(tmp_path / "bert.json", tiny_config["bert_config"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, message = pretrain(**keys(tmp_path))
    lines = message.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), message
    assert all(word in message for word in words), message
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_checkpoint_of_another_shape(pretrain, tiny_config, tmp_path):
    other = build_model("pretrain", {**tiny_config, "embed_dim": 4})
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    status, message = pretrain("--checkpoint", tmp_path / "other.pth")
    assert status == 2 and "vision_proj.weight" in message and "embed_dim" in message


def test_resume_from_bare_weights(pretrain, tiny_config, tmp_path):
    torch.save(build_model("pretrain", tiny_config).state_dict(), tmp_path / "bare.pth")
    status, message = pretrain("--resume", "--checkpoint", tmp_path / "bare.pth")
    assert status == 2 and "'resume'" in message


@pytest.mark.parametrize("resume", [["--resume"], []])
def test_a_folder_with_checkpoints_of_other_code_is_refused(pretrain, pretrained, tmp_path, resume):
    folder, released = tmp_path / "out", {"model": torch.load(pretrained)["model"], "epoch": 0}
    folder.mkdir()
    torch.save(released, folder / "checkpoint_00.pth")
    (folder / "config.yaml").write_text("of the other code\n")
    before = contents(folder)
    status, message = pretrain(*resume)
    assert status == 2 and message.count("\n") == 1
    remedy = f"--checkpoint {folder / 'checkpoint_00.pth'} --output_dir OTHER"
    assert (remedy if resume else "holds a run already") in message
    assert contents(folder) == before
    remedy = ["--checkpoint", folder / "checkpoint_00.pth", "--output_dir", tmp_path / "other"]
    assert pretrain(*remedy, scheduler={"epochs": 1})[0] == 0
    assert contents(folder) == before


def test_a_run_continues_another_one_from_its_newest_checkpoint(pretrain, shapes, tmp_path):
    """The folder's best checkpoint, with which other runs begin, is of an earlier epoch."""
    keys = {"val_file": str(shapes / "val.json"), "test_file": None}
    still = ["optimizer.lr=0", "scheduler.warmup_lr=0", "scheduler.min_lr=0"]
    assert pretrain("--set", *still, **keys)[0] == 0
    one = tmp_path / "out"
    assert torch.load(one / "checkpoint_best.pth", weights_only=True)["epoch"] == 0
    flags = ["--resume", "--checkpoint", one, "--output_dir", tmp_path / "two"]
    assert pretrain(*flags, "--set", *still, "scheduler.epochs=3", **keys)[0] == 0
    assert [entry["epoch"] for entry in log(tmp_path / "two")] == [2]


def test_whole_program_trains_evaluates_draws_and_resumes_when_finished(
    pretrain, tmp_path, monkeypatch
):
    status, _ = pretrain("--resume", "True")
    assert status == 0
    out = tmp_path / "out"
    assert log(out)[-1].keys() >= {
        "test_txt_r1",
        "test_img_r1",
        "test_itc_txt_r1",
        "test_itc_img_r10",
        "epoch",
    }
    rankings = json.loads((out / "result/retrieval.json").read_text())
    assert len(rankings["image_to_text"]) == 12
    assert (
        sum(result["hit"] for query in rankings["text_to_image"] for result in query["results"]) > 0
    )
    assert (out / "config.yaml").exists()
    monkeypatch.setattr(sys, "argv", ["visualize", "--run", str(out)])
    visualize.main()
    for name in ("curves.png", "retrieval.png"):
        assert min(Image.open(out / name).size) > 300
    before = torch.load(out / "checkpoint_last.pth", weights_only=True)["model"]
    assert pretrain("--resume")[0] == 0
    after = torch.load(out / "checkpoint_last.pth", weights_only=True)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    # without --resume the finished run is safe
    status, message = pretrain()
    assert status == 2 and "--resume" in message


# --------------------------------------------------------------------------------------------------
# flags, and the time before main


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", "3"], "--set scheduler.epochs=3"),
        (["--lr=1e-4"], "--set optimizer.lr=1e-4"),
        (["--batch-size", "8"], "--set batch_size=8"),
        (["--optimizer.weight_decay", "0"], "--set optimizer.weight_decay=0"),
        # a second --set does not drop the first
        (["--set", "quue_size=1", "--set", "batch_size=4"], "quue_size"),
        (["--set", "batch_size=4", "output_dir=x"], "--output_dir x"),
        (["--set", "resume=true"], "write --resume"),
        (["--set", "scheduler.epochs=0"], "scheduler.epochs is 0"),
        (["--outptu_dir", "x"], "did you mean --output_dir?"),
        (["--output_dir", "README.md/out"], "--output_dir README.md/out: cannot write there"),
        (["--seed", "x"], "--seed: invalid int value"),
        (["--seed", "-1"], "--seed: -1 is out of range"),
        (["--timeout", "nan"], "--timeout: nan is out of range"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "mps"], "--device mps"),
        (["--evaluate"], "needs --checkpoint"),
        (["x"], "x: unexpected argument"),
    ],
)
def test_wrong_flags_and_keys_are_one_line_with_the_remedy(pretrain, tmp_path, flags, words):
    status, message = pretrain(*flags)
    assert status == 2 and len(message.splitlines()) == 1 and words in message, message
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "run/tensorboard"),
        BrokenPipeError(),
        RuntimeError("gloo timed out"),
        dist.DistBackendError("NCCL error: Duplicate GPU"),
        ValueError("a bug"),
    ],
)
def test_an_error_of_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        exit_status(mock.Mock(side_effect=error))
    assert caught.value is error and not hasattr(error, "__notes__")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_keeps_its_traceback_and_names_three_keys(error):
    with pytest.raises(type(error)) as caught:
        exit_status(mock.Mock(side_effect=error))
    (hint,) = caught.value.__notes__
    assert caught.value is error and {"batch_size", "precision", "gradient_checkpointing"} <= set(
        re.findall(r"\w+", hint)
    )


@pytest.mark.parametrize(
    "read",
    [
        read_experiments,
        verify_hash,
        lambda null: visualize.read_texts(null, 30),
        lambda null: write_log(null.parent, 0, loss=1.0),
    ],
    ids=["experiments", "record", "texts", "log"],
)
def test_only_regular_files_are_read(read, tmp_path):
    """A FIFO would block, and a device without an end fill the memory."""
    for name in ("null", "null.sha256", "log.txt"):
        (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises((OSError, InputError, TrainingStopped), match="not a regular file"):
        read(tmp_path / "null")


@pytest.mark.parametrize(
    "look_up",
    [
        find_checkpoint,
        lambda path: find_checkpoint(path / "a.pth"),
        lambda path: find_file(path, ["vocab.txt"], "tokenizer"),
        lambda path: find_file(path / "vocab.txt", ["vocab.txt"], "tokenizer"),
        lambda path: load_vision_encoder(None, path / "vit.pth"),
        lambda path: find_resume_file(path, "", True),
        lambda path: check_output(path / "a.html"),
        lambda path: open_index(path / "index"),
        lambda path: draw_run(path, path, 1),
        lambda path: export_folder(argparse.Namespace(output=path / "a")),
    ],
)
def test_a_path_without_permission_is_named(look_up):
    for module in ("visualize.curves", "visualize.draw"):
        importlib.import_module(module)  # as the user who may read the environment
    folder = Path(tempfile.mkdtemp())  # below that of pytest only its owner can look
    folder.chmod(0)
    try:
        if os.geteuid() == 0:
            os.seteuid(65534)
        assert str(folder) in refusal(look_up, folder)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.rmdir()


@pytest.mark.parametrize("line", ["5", "null", "[]", "a text", '{"epoch"'])
def test_a_line_of_another_log_is_named_before_the_run(pretrain, tmp_path, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/log.txt").write_text(f'{{"epoch": 0}}\n{line}\n')
    status, message = pretrain()
    assert status == 2 and "log.txt line 2" in message
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["log.txt"]
    with pytest.raises(TrainingStopped, match="log.txt line 2"):
        write_log(tmp_path / "out", 1, loss=1.0)
    assert read_metrics(tmp_path / "out/log.txt", 0) == {}


def test_files_of_the_repository_are_found_from_any_folder(pretrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in ("configs/VE.yaml", ROOT / "configs/VE.yaml"):
        status, message = pretrain("--config", config, "--set", "tokenizer=absent.txt")
        assert status == 2 and "absent.txt" in message


@pytest.mark.parametrize("flag", ["--help_keys", "--help-keys"])
def test_all_keys_are_listed(flag):
    command = [sys.executable, "-X", "importtime", "VE.py", flag]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "torch" not in shown.stderr
    assert (
        "\nscheduler.epochs: a whole number of at least 1\n    default: 30; tasks: all"
        in shown.stdout
    )


def test_a_signal_in_a_callback_ends_the_program():
    """Python ignores an exception in a callback, such as a finalizer or a hook after a fork."""
    program = """
import os, signal, time
from engine.launch import run_script
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
def main():
    Finalized()
    time.sleep(60)
run_script(main)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "SIGTERM: the command ended before it was complete\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_is_one_line(signum):
    script = subprocess.Popen(
        [sys.executable, "-X", "importtime", "VE.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in script.stderr:
            if re.search(r"\| +torch\._", line):
                break
        script.send_signal(signum)
        said = [line for line in script.stderr if not line.startswith("import time:")]
        assert (
            script.wait(30) == 128 + signum
            and len(said) == 1
            and signal.Signals(signum).name in said[0]
        ), said
    finally:
        script.kill()
