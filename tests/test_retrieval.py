"""Retrieval.py as a whole: fine-tuning, choosing the best epoch, resuming, evaluation, several
processes, bad input.
"""

import json
import sys

import pytest
import torch
from chaos import assert_same_run
from conftest import log
from helpers.launch import launch
from helpers.training import command_line, signal_at

import engine.trainer
import evaluation.retrieval
import Retrieval
from engine.launch import Interrupted
from models import build_model
from models.weights import load_checkpoint
from tools import visualize
from utils import InputError, TrainingStopped


@pytest.fixture
def config(tiny_config, shapes):
    files = {f"{split}_file": [str(shapes / f"{split}.json")] for split in ("val", "test")}
    train = {
        "train_file": [str(shapes / "retrieval_train.json")],
        "batch_size": None,
        "batch_size_train": 16,
    }
    return {**tiny_config, **files, **train, "scheduler": {**tiny_config["scheduler"], "epochs": 3}}


def run(monkeypatch, config, output_dir, tmp_path, *arguments):
    command = ["Retrieval.py", *command_line(config, output_dir, tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    Retrieval.main()


@pytest.fixture
def scores(monkeypatch):
    """Scores that the evaluations return one after the other, in place of what they find; and the
    weights that they saw.
    """
    given, seen, real = [], [], evaluation.retrieval.evaluate

    def evaluate(model, *args, **options):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {**real(model, *args, **options), "r_mean": given.pop(0)}

    monkeypatch.setattr(evaluation.retrieval, "evaluate", evaluate)
    return given, seen


def test_best_epoch_by_validation_is_kept_and_tested(
    config, pretrained, tmp_path, monkeypatch, capsys, scores
):
    given, seen = scores
    given += [20.0, 30.0, 30.0, 99.0, 99.0]
    folder, step, training = tmp_path / "run", engine.trainer.train_step, []
    monkeypatch.setattr(
        engine.trainer,
        "train_step",
        lambda state, *others: training.append(state.model.training) or step(state, *others),
    )
    run(monkeypatch, config, folder, tmp_path, "--checkpoint", pretrained)
    assert all(training)  # also after a validation
    entries = log(folder)
    assert [entry["epoch"] for entry in entries] == [0, 1, 2]
    assert [entry["val_r_mean"] for entry in entries] == [20, 30, 30]
    assert ["test_r_mean" in entry for entry in entries] == [False, True, False]
    assert {
        "train_loss_ita",
        "train_loss_itm",
        "train_temp",
        "val_txt_r1",
        "val_itc_img_r10",
    } <= entries[0].keys()
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
    assert [
        line for line in err.splitlines() if line.startswith("epoch ") and "r_mean" in line
    ] == [
        "epoch 0: val r_mean 20, best 20 (epoch 0)",
        "epoch 1: val r_mean 30, best 30 (epoch 1)",
        "epoch 2: val r_mean 30, best 30 (epoch 1)",
    ]
    assert f"best epoch by val_r_mean 30: epoch 1, {folder / 'checkpoint_best.pth'}" in out
    results = json.loads((folder / "result/retrieval.json").read_text())
    assert len(results["image_to_text"]) == 12 and len(results["text_to_image"]) == 36
    assert all(len(query["results"]) == config["k_test"] for query in results["text_to_image"])
    run(
        monkeypatch,
        config,
        folder,
        tmp_path,
        "--checkpoint",
        folder / "checkpoint_best.pth",
        "--evaluate",
        "--split",
        "test",
    )
    assert json.loads((folder / "evaluation/result/retrieval.json").read_text()) == results


def test_a_worse_epoch_after_a_resume_does_not_replace_the_best(
    config, pretrained, tmp_path, monkeypatch, scores
):
    given, seen = scores
    given += [30.0, 99.0, 20.0, 25.0, 99.0]
    folder = tmp_path / "run"
    run(
        monkeypatch,
        config,
        folder,
        tmp_path,
        "--checkpoint",
        pretrained,
        "--set",
        "scheduler.epochs=1",
    )
    run(monkeypatch, config, folder, tmp_path, "--checkpoint", pretrained, "--resume")
    assert [entry["val_r_mean"] for entry in log(folder)] == [30, 20, 25]
    best = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    assert best["epoch"] == 0 and best["resume"]["best"] == {"score": 30, "epoch": 0}
    assert all(torch.equal(value, best["model"][name]) for name, value in seen[-1].items())


@pytest.mark.parametrize("before", [[], [30.0]])
def test_a_score_that_is_not_finite_stops_a_run_and_is_never_the_best(
    config, pretrained, tmp_path, monkeypatch, scores, before
):
    scores[0].extend([*before, float("nan")])
    folder = tmp_path / "run"
    with pytest.raises(TrainingStopped, match="val_r_mean"):
        run(monkeypatch, config, folder, tmp_path, "--checkpoint", pretrained)
    assert [entry["val_r_mean"] for entry in log(folder) if "val_r_mean" in entry] == before
    best, last = (folder / f"checkpoint_{name}.pth" for name in ("best", "last"))
    assert best.exists() == bool(before)
    assert torch.load(last, weights_only=True)["epoch"] == len(before)


@pytest.mark.parametrize("where", ["in an epoch", "in a validation"])
def test_interrupted_and_resumed_equals_uninterrupted(
    config, pretrained, tmp_path, monkeypatch, where
):
    run(monkeypatch, config, tmp_path / "whole", tmp_path, "--checkpoint", pretrained)
    module, name, number = {
        "in an epoch": (engine.trainer, "train_step", 9),
        "in a validation": (evaluation.retrieval, "evaluate", 2),
    }[where]
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, name, signal_at(number)(getattr(module, name)))
        run(patch, config, tmp_path / "parts", tmp_path, "--checkpoint", pretrained)
    run(monkeypatch, config, tmp_path / "parts", tmp_path, "--checkpoint", pretrained, "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_several_k_in_one_run_are_those_of_single_runs(
    config, pretrained, tmp_path, monkeypatch, capsys
):
    flags = ("--checkpoint", pretrained, "--evaluate", "--k_test")
    run(monkeypatch, config, tmp_path / "many", tmp_path, *flags, "100", "2", "12")
    out = capsys.readouterr().out
    assert all(f"ITC + ITM, k {k} " in out for k in (2, 12, 100))
    many = log(tmp_path / "many")[-1]
    monkeypatch.setattr(sys, "argv", ["visualize", "--run", str(tmp_path / "many")])
    visualize.main()
    assert (tmp_path / "many/retrieval.png").stat().st_size > 10_000
    for k, prefix in ((2, "k2_"), (100, "")):
        run(monkeypatch, config, tmp_path / str(k), tmp_path, *flags, str(k))
        one = log(tmp_path / str(k))[-1]
        assert one["checkpoint"] == str(pretrained)
        assert not (tmp_path / str(k) / "config.yaml").exists()
        for name in ("txt_r1", "txt_r10", "img_r1", "img_r10", "r_mean"):
            assert many[f"test_{prefix}{name}"] == one[f"test_{name}"]


def test_recomputed_image_embeddings_give_the_same_scores(
    config, pretrained, tmp_path, monkeypatch
):
    results = []
    for where in ("host", "recompute"):
        folder = tmp_path / where
        run(
            monkeypatch,
            {**config, "image_embeds": where, "batch_size_test": 5},
            folder,
            tmp_path,
            "--checkpoint",
            pretrained,
            "--evaluate",
        )
        results.append(json.loads((folder / "result/retrieval.json").read_text()))
    assert results[0] == results[1]


def test_bf16_scores_are_close_to_those_of_fp32(config, pretrained, tmp_path, monkeypatch):
    scores = []
    for precision in ("fp32", "bf16"):
        # all candidates, so that both score the same pairs
        keys = {"precision": precision, "k_test": 36}
        folder = tmp_path / precision
        run(
            monkeypatch,
            {**config, **keys},
            folder,
            tmp_path,
            "--checkpoint",
            pretrained,
            "--evaluate",
        )
        queries = json.loads((folder / "result/retrieval.json").read_text())["text_to_image"]
        scores.append([{r["image"]: r["score"] for r in query["results"]} for query in queries])
    gaps = [
        abs(a[name] - b[name]) for a, b in zip(*scores, strict=True) for name in a.keys() & b.keys()
    ]
    assert len(gaps) > 200 and 0 < max(gaps) < 0.01


def test_two_processes_evaluate_as_one(config, pretrained, tmp_path, monkeypatch):
    arguments = ["--checkpoint", pretrained, "--evaluate", "--set", "batch_size_test=5"]
    run(monkeypatch, config, tmp_path / "one", tmp_path, *arguments)
    for where in ("host", "recompute"):
        command = command_line({**config, "image_embeds": where}, tmp_path / where, tmp_path)
        two = launch("Retrieval.py", *command, *arguments)
        assert two.returncode == 0, two.stderr
        for entry, same in zip(log(tmp_path / where), log(tmp_path / "one"), strict=True):
            assert entry == pytest.approx(same)
        one, two = (
            json.loads((tmp_path / name / "result/retrieval.json").read_text())
            for name in ("one", where)
        )
        for query, same in zip(one["text_to_image"], two["text_to_image"], strict=True):
            assert [r["image"] for r in query["results"]] == [r["image"] for r in same["results"]]
            assert [r["score"] for r in query["results"]] == pytest.approx(
                [r["score"] for r in same["results"]], abs=1e-5
            )


def test_pre_trained_weights_load_by_their_names(tiny_config, pretrained):
    model = build_model("retrieval", {**tiny_config, "image_res": 48, "queue_size": 7})
    report = load_checkpoint(model, pretrained)
    state = torch.load(pretrained, weights_only=True)["model"]
    for name in (
        "embeddings.word_embeddings.weight",
        "encoder.layer.3.crossattention.self.key.bias",
    ):
        for copy in ("text_encoder", "text_encoder_m"):
            assert torch.equal(model.state_dict()[f"{copy}.{name}"], state[f"{copy}.bert.{name}"])
    assert report.resized == ["visual_encoder.pos_embed", "visual_encoder_m.pos_embed"]
    assert set(report.new) == {"image_queue", "text_queue", "idx_queue", "queue_ptr"}
    assert all("cls.predictions" in name for name in report.ignored)


BAD_INPUT = {
    "k_test 0": ({}, ["--k_test", "0"], "--k_test: 0 is out of range"),
    "k_test a word": ({}, ["--k_test", "16", "many"], "--k_test: invalid int value: 'many'"),
    "k_test 0 in the configuration": (
        {"k_test": 0},
        [],
        "k_test is 0, it must be a whole number from 1",
    ),
    "no checkpoint": ({"--checkpoint": None}, [], "--checkpoint is missing"),
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
def test_bad_input_is_named_and_nothing_is_written(
    config, shapes, pretrained, tmp_path, monkeypatch, case
):
    keys, arguments, message = BAD_INPUT[case]
    for key, value in keys.items():
        if isinstance(value, list):
            path = tmp_path / "bad.json"
            path.write_text(json.dumps(value))
            value = path
        elif isinstance(value, str):
            value = shapes / value
        if key != "--checkpoint":
            config[key] = value if isinstance(value, int) else [str(value)]
    if "--checkpoint" not in keys:
        arguments = [*arguments, "--checkpoint", pretrained]
    with pytest.raises(InputError, match=message) as error:
        run(monkeypatch, config, tmp_path / "run", tmp_path, *arguments)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("[!.]*"))
