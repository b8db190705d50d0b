"""Retrieval.py as a whole: fine-tuning, choosing the best epoch, resuming, evaluation, several
processes, bad input.
"""

import json
import os
import re
import sys

import pytest
import torch
from chaos import assert_same_run
from conftest import log, refusal
from helpers.launch import launch
from helpers.tasks import data_of
from helpers.training import command_line, signal_at

import engine.trainer
import evaluation.retrieval
from engine.launch import Interrupted
from inference import load_model
from tools import search
from utils import TrainingStopped


@pytest.fixture
def config(tiny_config, shapes):
    keys = {"batch_size": None, "batch_size_train": 16}
    scheduler = {**tiny_config["scheduler"], "epochs": 3}
    return {**tiny_config, **data_of("Retrieval", shapes), **keys, "scheduler": scheduler}


@pytest.fixture
def run(call, pretrained, tmp_path):
    """Runs Retrieval.py on a configuration."""

    def start(config, output_dir, *flags, checkpoint=pretrained):
        command = command_line(config, output_dir, tmp_path)
        call("Retrieval", *command, "--checkpoint", checkpoint, *flags)

    return start


def retrieved(folder):
    """The content of a run's retrieval.json."""
    return json.loads((folder / "result/retrieval.json").read_text())


@pytest.fixture
def scores(monkeypatch):
    """Scores that the evaluations return one after the other, in place of what they find; and the
    weights that they saw.
    """
    given, seen, real = [], [], evaluation.retrieval.evaluate

    def evaluate(model, *args, **options):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        score = given.pop(0)
        changed = {"r_mean": score, "itc_r_mean": 50.0 + len(given)}
        return {**real(model, *args, **options), **changed}

    monkeypatch.setattr(evaluation.retrieval, "evaluate", evaluate)
    return given, seen


def test_best_epoch_by_validation_is_kept_and_tested(
    config, run, tmp_path, monkeypatch, capsys, scores
):
    given, seen = scores
    given += [20.0, 30.0, 30.0, 99.0, 99.0]
    folder, step, training = tmp_path / "run", engine.trainer.train_step, []
    monkeypatch.setattr(
        engine.trainer,
        "train_step",
        lambda state, *others: training.append(state.model.training) or step(state, *others),
    )
    run(config, folder)
    assert all(training)  # also after a validation
    entries = log(folder)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert [entry["val_r_mean"] for entry in entries] == [20, 30, 30]
    assert ["test_r_mean" in entry for entry in entries] == [False, True, False]
    names = {"train_loss_ita", "train_loss_itm", "train_temp", "val_txt_r1", "val_itc_img_r10"}
    assert names <= entries[0].keys()
    best, last = (
        torch.load(folder / f"checkpoint_{name}.pth", weights_only=True)
        for name in ("best", "last")
    )
    assert (best["epoch"], last["epoch"]) == (1, 2)
    assert not (folder / "checkpoint_00.pth").exists()
    tested = seen[-1]
    assert all(torch.equal(value, best["model"][name]) for name, value in tested.items())
    assert not torch.equal(tested["itm_head.weight"], last["model"]["itm_head.weight"])
    out, err = capsys.readouterr()
    assert re.findall("^epoch .*r_mean.*$", err, re.M) == [
        "epoch 0: val r_mean 20, best 20 (epoch 0)",
        "epoch 1: val r_mean 30, best 30 (epoch 1)",
        "epoch 2: val r_mean 30, best 30 (epoch 1)",
    ]
    assert f"best epoch by val_r_mean 30: epoch 1, {folder / 'checkpoint_best.pth'}" in out
    (line,) = (line for line in err.splitlines() if line.startswith("to try it"))
    command = line.rpartition(": python -m ")[2].replace("FOLDER", config["image_root"])
    monkeypatch.setattr(sys, "argv", command.replace("INDEX", str(folder / "index")).split())
    search.main()  # as the run proposes
    assert (folder / "index/features.npy").exists()
    results = retrieved(folder)
    assert len(results["image_to_text"]) == 12 and len(results["text_to_image"]) == 36
    assert all(len(query["results"]) == config["k_test"] for query in results["text_to_image"])
    for text, query in enumerate(results["text_to_image"]):  # three texts an image
        own = results["image_to_text"][text // 3]["image"]
        assert all(
            found["hit"] == (found["image"] == own)
            for found in query["results"] + query["itc_results"]
        )
    best_file = folder / "checkpoint_best.pth"
    run(config, folder, "--evaluate", "--split", "test", checkpoint=best_file)
    assert retrieved(folder / "evaluation") == results
    # the better ranking in the validation of the best epoch, not of the last one
    assert results["ranking"] == best["ranking"] != last["ranking"]
    assert results["ranking"] == {"by": "itc", "k": config["k_test"], "itc": 53, "itm": 30}
    assert results["k"] == config["k_test"]
    model = load_model(folder, "cpu")
    assert model.default_rerank == 0
    for query in results["text_to_image"][::12]:
        images = [os.path.join(config["image_root"], r["image"]) for r in query["results"]]
        probs = [r["probability"] for r in query["results"]]
        assert probs == pytest.approx(model.match(images, query["caption"]).tolist(), abs=1e-4)
    images = [os.path.join(config["image_root"], q["image"]) for q in results["image_to_text"]]
    texts = [query["caption"] for query in results["text_to_image"]]
    for query, row in zip(
        results["text_to_image"], model.rank(images, texts, k=10, rerank=0), strict=True
    ):
        found = [
            (images.index(os.path.join(config["image_root"], r["image"])), r["probability"])
            for r in query["itc_results"]
        ]
        assert found == [(i, pytest.approx(p, abs=1e-4)) for i, p in row]


def test_a_worse_epoch_after_a_resume_does_not_replace_the_best(config, run, tmp_path, scores):
    given, seen = scores
    given += [30.0, 99.0, 20.0, 25.0, 99.0]
    folder = tmp_path / "run"
    run(config, folder, "--set", "scheduler.epochs=1")
    run(config, folder, "--resume")
    assert [entry["val_r_mean"] for entry in log(folder)] == [30, 20, 25]
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 0 and best["resume"]["best"] == {"score": 30, "epoch": 0}
    assert all(torch.equal(value, best["model"][name]) for name, value in seen[-1].items())


@pytest.mark.parametrize("before", [[], [30.0]])
def test_a_score_that_is_not_finite_stops_a_run_and_is_never_the_best(
    config, run, tmp_path, scores, before
):
    scores[0].extend([*before, float("nan")])
    folder = tmp_path / "run"
    with pytest.raises(TrainingStopped, match="val_r_mean"):
        run(config, folder)
    assert [entry["val_r_mean"] for entry in log(folder) if "val_r_mean" in entry] == before
    assert (folder / "checkpoint_best.pth").exists() == bool(before)
    last = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert last["epoch"] == len(before)


def test_interrupted_in_an_epoch_and_in_a_validation_equals_uninterrupted(
    config, run, tmp_path, monkeypatch
):
    run(config, tmp_path / "whole")
    for module, name, number in (
        (engine.trainer, "train_step", 5),
        (evaluation.retrieval, "evaluate", 2),
    ):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(module, name, signal_at(number)(getattr(module, name)))
            run(config, tmp_path / "parts", "--resume")
    run(config, tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_several_k_in_one_run_are_those_of_single_runs(
    config, run, call, pretrained, tmp_path, capsys
):
    run(config, tmp_path / "many", "--evaluate", "--k_test", "100", "2", "12")
    out = capsys.readouterr().out
    assert all(f"ITC + ITM, k {k} " in out for k in (2, 12, 100))
    many = log(tmp_path / "many")[-1]
    call("tools.visualize", "--run", tmp_path / "many")
    assert (tmp_path / "many/retrieval.png").stat().st_size > 10_000
    for k, prefix in ((2, "k2_"), (100, "")):
        run(config, tmp_path / str(k), "--evaluate", "--k_test", k)
        one = log(tmp_path / str(k))[-1]
        assert one["checkpoint"] == str(pretrained)
        assert not (tmp_path / str(k) / "config.yaml").exists()
        for name in ("txt_r1", "txt_r10", "img_r1", "img_r10", "r_mean"):
            assert many[f"test_{prefix}{name}"] == one[f"test_{name}"]


def text_scores(folder):
    """The scores of the images that each text has found, by image."""
    queries = retrieved(folder)["text_to_image"]
    return [{found["image"]: found["score"] for found in query["results"]} for query in queries]


def test_bf16_scores_are_close_to_those_of_fp32(config, run, tmp_path):
    for precision in ("fp32", "bf16"):
        # all candidates, so that both score the same pairs
        keys = {"precision": precision, "k_test": 36}
        run({**config, **keys}, tmp_path / precision, "--evaluate")
    scores = text_scores(tmp_path / "fp32"), text_scores(tmp_path / "bf16")
    gaps = [
        abs(a[name] - b[name]) for a, b in zip(*scores, strict=True) for name in a.keys() & b.keys()
    ]
    assert len(gaps) > 200 and 0 < max(gaps) < 0.01


def test_two_processes_evaluate_as_one(config, run, pretrained, tmp_path):
    config["batch_size_test"] = 5
    run(config, tmp_path / "one", "--evaluate")
    for where in ("host", "recompute"):
        command = command_line({**config, "image_embeds": where}, tmp_path / where, tmp_path)
        two = launch("Retrieval.py", *command, "--checkpoint", pretrained, "--evaluate")
        assert two.returncode == 0, two.stderr
        assert log(tmp_path / where) == [pytest.approx(entry) for entry in log(tmp_path / "one")]
        scores = text_scores(tmp_path / "one"), text_scores(tmp_path / where)
        for one, found in zip(*scores, strict=True):
            assert [*found] == [*one] and found == pytest.approx(one, abs=1e-5)


BAD_INPUT = {
    "k_test 0": ({}, ["--k_test", "0"], "--k_test: 0 is out of range"),
    "k_test a word": ({}, ["--k_test", "16", "many"], "--k_test: invalid int value: 'many'"),
    "k_test 0 in the configuration": (
        {"k_test": 0},
        [],
        "k_test is 0; it must be a whole number of at least 1",
    ),
    "no checkpoint": ({}, ["--checkpoint", ""], "--checkpoint is missing"),
    "train list as test_file": (
        {"test_file": "retrieval_train.json"},
        [],
        "entry 0 .*caption.*a retrieval test needs .*list",
    ),
    "image without caption": (
        {"test_file": [{"image": "images/test/000000.jpg", "caption": []}]},
        [],
        "entry 0.*caption",
    ),
    "empty test caption": (
        {"test_file": [{"image": "images/test/000000.jpg", "caption": ["?!"]}]},
        [],
        "entry 0.*empty",
    ),
    "empty train caption": (
        {"train_file": [{"image": "images/train/000000.jpg", "caption": " .", "image_id": 1}]},
        [],
        "entry 0.*empty",
    ),
    "no image_id in one entry": (
        {
            "train_file": [
                {"image": "images/train/000000.jpg", "caption": "a star", **extra}
                for extra in ({"image_id": 1}, {})
            ]
        },
        [],
        "entry 1.*'image_id'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_and_nothing_is_written(config, run, shapes, tmp_path, case):
    keys, flags, message = BAD_INPUT[case]
    for key, value in keys.items():
        if isinstance(value, list):
            (tmp_path / "bad.json").write_text(json.dumps(value))
        path = {list: tmp_path / "bad.json", str: shapes / str(value)}.get(type(value))
        config[key] = [str(path)] if path else value
    assert re.search(message, refusal(run, config, tmp_path / "run", *flags))
    assert not list((tmp_path / "run").glob("[!.]*"))
