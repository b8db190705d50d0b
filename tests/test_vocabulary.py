"""A run's vocabulary and BERT configuration stay with its checkpoints after a move."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import exit_status, refusal
from ruamel.yaml import YAML

import Pretrain
import Retrieval
from inference import load_model
from inference.index import load_model_of, read_index
from models import build_model
from models.tokenizer import build_tokenizer, difference
from models.weights import load_checkpoint, read_checkpoint
from tools import export, search

TEXT = "a red circle left of a blue square"


@pytest.fixture
def own(shapes, tiny_config, tmp_path):
    """Return the tiny configuration with its own vocabulary and BERT configuration in
    tmp_path/data.
    """
    (tmp_path / "data").mkdir()
    shutil.copy(shapes / "vocab.txt", tmp_path / "data/vocab.txt")
    tiny_config["tokenizer"] = str(tmp_path / "data/vocab.txt")
    return tiny_config


@pytest.fixture
def trained(own, pretrain, tmp_path, shapes):
    """Return (folder of a run, a similarity of its model) after its files were deleted."""
    assert pretrain(tokenizer=own["tokenizer"])[0] == 0
    image = next(iter(sorted(map(str, (shapes / "images/test").glob("*.jpg")))))
    return tmp_path / "out", image, load_model(tmp_path / "out", "cpu").similarity(image, TEXT)


def other_vocabulary(path):
    """Exchange the last two pieces of a vocab file, as a new training of the vocabulary may do."""
    *pieces, one, two = path.read_text().splitlines()
    path.write_text("\n".join([*pieces, two, one]) + "\n")


def script(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", list(map(str, ["script.py", *flags, "--device", "cpu"])))
    return exit_status(main)


def test_a_run_is_whole_wherever_it_is_moved(trained, own, tmp_path, monkeypatch, capsys):
    folder, image, similarity = trained
    moved = shutil.copytree(folder, tmp_path / "moved")  # this process locks the original folder
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "bert.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("tokenizer.json").write_text("that of something else")
    alone = shutil.copy(moved / "checkpoint_last.pth", tmp_path / "alone.pth")
    for source in (moved, "../moved", alone):
        assert load_model(source, "cpu").similarity(image, TEXT) == similarity
    config = YAML(typ="safe").load(moved / "config.yaml")
    assert config["tokenizer"] == "tokenizer.json" and config["bert_config"]["vocab_size"] > 5
    evaluate = [
        "--evaluate",
        "--checkpoint",
        moved / "checkpoint_last.pth",
        "--output_dir",
        tmp_path / "e",
    ]
    for flags in ([], ["--config", moved / "config.yaml"]):
        assert script(monkeypatch, Pretrain.main, *evaluate, *flags) == 0
        more = ["--resume", "--output_dir", moved, "--set", f"scheduler.epochs={3 + len(flags)}"]
        assert script(monkeypatch, Pretrain.main, *more, *flags) == 0
        out = capsys.readouterr().err
        assert "configuration of the saved run: scheduler\n" in out and "resuming from" in out
    assert read_checkpoint(moved / "checkpoint_last.pth")["epoch"] == 4
    shutil.rmtree(moved / "tensorboard")
    (moved / "tokenizer.json").unlink()
    assert load_model(moved, "cpu").tokenizer(TEXT)["input_ids"]


def test_another_vocabulary_of_the_same_size_is_refused_by_name(
    trained, own, shapes, tmp_path, monkeypatch, capsys
):
    folder, image, similarity = trained
    vocab, checkpoint = Path(own["tokenizer"]), folder / "checkpoint_last.pth"
    assert (
        load_model(folder, "cpu", overrides=[f"tokenizer={vocab}"]).similarity(image, TEXT)
        == similarity
    )
    other_vocabulary(vocab)
    # with the vocabulary of the run
    assert load_model(folder, "cpu").similarity(image, TEXT) == similarity
    message = refusal(load_model, folder, "cpu", None, None, [f"tokenizer={vocab}"])
    assert str(vocab) in message and str(checkpoint) in message
    config = ["--config", tmp_path / "config.yaml"]
    for main, flags in (
        (
            Pretrain.main,
            ["--evaluate", "--checkpoint", checkpoint, "--output_dir", tmp_path / "test", *config],
        ),
        (Pretrain.main, ["--checkpoint", checkpoint, "--output_dir", tmp_path / "new", *config]),
        (
            Pretrain.main,
            ["--resume", "--output_dir", folder, *config, "--set", "scheduler.epochs=3"],
        ),
        (
            Retrieval.main,
            [
                "--checkpoint",
                checkpoint,
                "--output_dir",
                tmp_path / "tuned",
                *config,
                "--set",
                f"train_file={shapes}/retrieval_train.json",
                "scheduler.epochs=1",
            ],
        ),
    ):
        assert script(monkeypatch, main, *flags) == 2
        error = capsys.readouterr().err
        assert (
            str(vocab) in error
            and str(checkpoint) in error
            and f"--set tokenizer={checkpoint}" in error
        )
        fine = [*flags, *([] if "--set" in flags else ["--set"]), f"tokenizer={checkpoint}"]
        assert script(monkeypatch, main, *fine) == 0


def test_the_choice_of_accents_is_compared_and_forms_of_a_file_are_not(own, tmp_path):
    folder, vocab = tmp_path / "data", Path(own["tokenizer"])
    plain = build_tokenizer(vocab)
    (tmp_path / "same").mkdir()
    plain.backend_tokenizer.save(str(tmp_path / "same/tokenizer.json"))
    before = plain.backend_tokenizer.to_str()
    assert difference(before, build_tokenizer(tmp_path / "same").backend_tokenizer.to_str()) == ""
    for settings in (
        {"strip_accents": False},
        {"do_lower_case": False},
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        other = build_tokenizer(folder).backend_tokenizer.to_str()
        assert difference(before, other)
    model = build_model("pretrain", own, plain)
    torch.save({"model": model.state_dict(), "tokenizer_json": other}, tmp_path / "a.pth")
    assert str(vocab) in refusal(load_checkpoint, model, tmp_path / "a.pth")


def test_checkpoints_without_a_vocabulary_load_as_they_did(trained, own, tmp_path, monkeypatch):
    folder, image, similarity = trained
    content = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    del content["tokenizer_json"]
    content["config"] |= {"tokenizer": own["tokenizer"], "bert_config": str(tmp_path / "bert.json")}
    torch.save(content, tmp_path / "earlier.pth")
    assert load_model(tmp_path / "earlier.pth", "cpu").similarity(image, TEXT) == similarity
    flags = ["--resume", "--checkpoint", tmp_path / "earlier.pth", "--output_dir", tmp_path / "b"]
    assert script(monkeypatch, Pretrain.main, *flags, "--set", "scheduler.epochs=3") == 0
    assert read_checkpoint(tmp_path / "b/checkpoint_last.pth")["epoch"] == 2
    model = load_model(folder, "cpu").model
    torch.save(content["model"], tmp_path / "bare.pth")
    load_checkpoint(model, tmp_path / "bare.pth")


def test_exports_hold_the_vocabulary(trained, own, tmp_path, monkeypatch):
    folder, image, similarity = trained
    shutil.rmtree(tmp_path / "data")
    for target in ("one.safetensors", "one.pth", "whole/"):
        flags = ["--checkpoint", folder / "checkpoint_last.pth", "--output", f"{tmp_path}/{target}"]
        monkeypatch.setattr(sys, "argv", list(map(str, ["export", *flags])))
        assert exit_status(export.main) == 0
        assert load_model(tmp_path / target, "cpu").similarity(image, TEXT) == similarity
    model = load_model(tmp_path / "one.pth", "cpu")
    other = json.loads((tmp_path / "whole/tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    *_, one, two = vocab
    other["model"]["vocab"] = vocab | {one: vocab[two], two: vocab[one]}
    (tmp_path / "whole/tokenizer.json").write_text(json.dumps(other))
    assert "model.safetensors" in refusal(
        load_checkpoint, model.model, tmp_path / "whole/model.safetensors"
    )


def test_an_index_finds_the_vocabulary_in_its_checkpoint(trained, tmp_path, monkeypatch):
    folder, image, similarity = trained
    moved = tmp_path / "elsewhere"
    monkeypatch.chdir(tmp_path)
    assert (
        script(
            monkeypatch,
            search.main,
            "index",
            Path(image).parent,
            "--checkpoint",
            "out",
            "--output",
            "index",
        )
        == 0
    )
    folder.rename(moved)
    monkeypatch.chdir(moved)
    index = read_index(tmp_path / "index")
    model = load_model_of(index, tmp_path / "index", "cpu", moved / "checkpoint_last.pth")
    assert model.similarity(image, TEXT) == similarity
