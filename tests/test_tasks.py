"""The scripts that fine-tune, but for Retrieval.py, as a whole: training, resuming, evaluation, bad
input.
"""

import functools
import importlib
import json
import pickle
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from chaos import assert_same_run
from conftest import contents, exit_status, log
from helpers.launch import launch
from helpers.tasks import TASKS
from helpers.training import command_line, signal_at

import engine.trainer
from configs.tasks import detect_task, find_task
from dataset.build import build_dataset
from engine.configuration import default_output_dir
from engine.launch import Interrupted
from evaluation.metrics import grounding_accuracy
from evaluation.relevance import Swapped, evaluate, roc_auc
from inference import load_model
from models import build_model
from models.tokenizer import build_tokenizer
from models.vqa import VQA
from models.weights import load_checkpoint
from utils import InputError, TrainingStopped


@pytest.fixture
def program(tiny_config, shapes, pretrained, tmp_path, call):
    """(configuration of a script's data, function that runs a script on a configuration)."""

    def config_of(script):
        paths = {}
        for key, value in TASKS[script][0].items():
            if isinstance(value, list):
                paths[key] = [str(shapes / name) for name in value]
            else:
                paths[key] = None if value is None else str(shapes / value)
        keys = {
            "scheduler": {**tiny_config["scheduler"], "epochs": 2},
            "batch_size_test": 5,
            "max_skipped": 0.0,
        }
        return {**tiny_config, **paths, **keys}

    def run(script, config, output_dir, *arguments, checkpoint=pretrained):
        call(
            f"{script}.py",
            *command_line(config, output_dir, tmp_path),
            "--checkpoint",
            checkpoint,
            *arguments,
        )

    return config_of, run


@pytest.fixture
def call(monkeypatch):
    """Runs a command line of a script in this process."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", list(map(str, [script, *arguments])))
        importlib.import_module(script.removesuffix(".py")).main()

    return run


@pytest.mark.parametrize("script", TASKS)
def test_interrupted_and_resumed_equals_uninterrupted(
    program, tmp_path, monkeypatch, capsys, script
):
    config_of, run = program
    config = config_of(script)
    run(script, config, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine.trainer, "train_step", signal_at(4)(engine.trainer.train_step))
        run(script, config, tmp_path / "parts")
    run(script, config, tmp_path / "parts", "--resume", "True")
    assert re.search(
        r"resuming from .*checkpoint_last.pth: epoch \d, iteration [1-9]", capsys.readouterr().err
    )
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    entries = log(tmp_path / "whole")
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert TASKS[script][1] <= set().union(*entries)
    validated = {"val_acc", "val_auc", "val_d"} & entries[0].keys()
    kept = {path.name for path in (tmp_path / "whole").glob("checkpoint_*.pth")}
    expected = {"checkpoint_best.pth"} if validated else {"checkpoint_00.pth", "checkpoint_01.pth"}
    assert kept == expected | {"checkpoint_last.pth"}


def test_without_a_list_answers_are_generated_with_num_beams(program, tmp_path, monkeypatch):
    config_of, run = program
    config = {**config_of("VQA"), "answer_list": None, "num_beams": 2, "val_file": None}
    torch.save({"model": build_model("vqa", config).state_dict()}, tmp_path / "vqa.pth")
    with mock.patch.object(
        VQA,
        "generate",
        side_effect=lambda image, question, beams: (
            [[beams]] * len(image),
            torch.zeros(len(image)),
        ),
    ):
        run("VQA", config, tmp_path / "out", "--evaluate", checkpoint=tmp_path / "vqa.pth")
    answers = json.loads((tmp_path / "out/result/vqa_result_epoch0.json").read_text())
    assert {entry["answer"] for entry in answers} == {
        build_tokenizer(config["tokenizer"]).decode([2])
    }


def test_generated_answers_may_be_as_long_as_the_longest_to_train_on(
    program, shapes, tmp_path, capsys
):
    config_of, run = program
    tokenizer = build_tokenizer(program[0]("VQA")["tokenizer"])
    answer = "a red circle left of a blue star, a green square and a pink moon"
    entries = json.loads((shapes / "vqa_train.json").read_text())[:16]
    entries[3] |= {"answer": [answer, "red"], "dataset": "vqa"}
    (tmp_path / "train.json").write_text(json.dumps(entries))
    config = {
        **config_of("VQA"),
        "train_file": [str(tmp_path / "train.json")],
        "answer_list": None,
        "num_beams": 1,
    }
    config |= {"val_file": None, "scheduler": {**config["scheduler"], "epochs": 1}}
    length = len(tokenizer(answer + "[SEP]")["input_ids"]) - 1  # without [CLS]
    assert length > 11
    run("VQA", config, tmp_path / "run")
    file = tmp_path / "run/checkpoint_00.pth"
    state = torch.load(file, weights_only=True)
    assert state["config"]["max_answer_tokens"] == length
    for name in ("weight", "bias"):  # makes the model repeat one word in every answer
        state["model"][
            f"text_decoder.cls.predictions.{'transform.LayerNorm.' * (name == 'weight')}{name}"
        ].zero_()
    state["model"]["text_decoder.cls.predictions.bias"][tokenizer.convert_tokens_to_ids("red")] = 99
    torch.save(state, file)
    # --config names a file without the key
    for flags, expected in (([], length), (["--set", "max_answer_tokens=4"], 4)):
        run("VQA", config, tmp_path / "out", "--evaluate", *flags, checkpoint=file)
        answers = json.loads((tmp_path / "out/result/vqa_result_epoch0.json").read_text())
        assert {entry["answer"] for entry in answers} == {" ".join(["red"] * expected)}
    assert load_model(file).model.max_answer_tokens == length
    assert "by the official formula" in capsys.readouterr().out


@pytest.mark.parametrize("script", TASKS)
def test_two_processes_train_and_evaluate_as_one_evaluates(program, tmp_path, script):
    config_of, run = program
    config = {
        **config_of(script),
        "val_file": None,
        "scheduler": {"lr": 1e-3, "epochs": 1, "warmup_iters": 2},
    }
    command = command_line(config, tmp_path / "two", tmp_path)
    two = launch(f"{script}.py", *command, "--checkpoint", tmp_path / "pretrained.pth")
    assert two.returncode == 0, two.stderr
    (entry,) = log(tmp_path / "two")
    assert entry["train_loss" if script != "Grounding" else "train_loss_itm"] > 0
    if TASKS[script][1]:
        name = "best" if script == "Grounding" else "last"
        run(
            script,
            config,
            tmp_path / "one",
            "--evaluate",
            checkpoint=tmp_path / f"two/checkpoint_{name}.pth",
        )
        found = {key: value for line in log(tmp_path / "one") for key, value in line.items()}
        alone = {key: value for key, value in found.items() if key not in ("checkpoint", "epoch")}
        assert alone and alone == pytest.approx({key: entry[key] for key in alone})


@pytest.mark.parametrize("script", TASKS)
def test_data_sets_can_be_handed_to_a_process(program, script):
    config_of, _ = program
    task = {"Pretrain_nlvr": "nlvr_pretrain"}.get(script, script.lower())
    config, tokenizer = config_of(script), build_tokenizer("tests/golden/vocab.txt")
    for split, key in {"train": "train_file", **find_task(task).files}.items():
        if config[key]:
            dataset = build_dataset(task, split, config)
            copied = pickle.loads(
                pickle.dumps(functools.partial(dataset.collate, tokenizer=tokenizer))
            ).func.__self__
            assert repr(copied[1]) == repr(dataset[1])


# a stopped run of VE: how a command line may not fit it, what the message says
UNFIT = {
    "another task": ("NLVR", {}, "checkpoint_last.pth has task ve, but this script's is nlvr"),
    "other data": ("VE", {"train_file": ["ve_val.json"]}, "the number of entries of train_file"),
    "another architecture": ("VE", {"vision_depth": 1}, "or of other parameters"),
    "another optimizer": ("VE", {"optimizer": {"opt": "sgd"}}, "the state of another optimizer"),
    "no epochs": ("VE", {"scheduler": {"epochs": 0}}, "scheduler.epochs is 0"),
    "too much accumulation": ("VE", {"accumulate": 1000}, "accumulate 1000"),
}


def test_a_refused_resume_changes_no_file(program, shapes, tmp_path, monkeypatch):
    config_of, run = program
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine.trainer, "train_step", signal_at(3)(engine.trainer.train_step))
        run("VE", config_of("VE"), tmp_path / "run")
    before = contents(tmp_path / "run")
    for script, keys, message in UNFIT.values():
        config = {**config_of(script), **keys}
        config["train_file"] = [str(shapes / name) for name in config["train_file"]]
        with pytest.raises(InputError, match=message):
            run(script, config, tmp_path / "run", "--resume")
        assert contents(tmp_path / "run") == before, message


def test_a_run_says_where_it_stands_and_what_comes_next(program, call, tmp_path, capsys):
    config_of, run = program
    folder = tmp_path / "run"
    run("VE", config_of("VE"), folder, "--resume")
    out, err = capsys.readouterr()
    assert f"note: --resume: {folder} has no checkpoint yet, a new run starts" in err
    assert re.findall(r"epoch \d: val acc \S+, best \S+ \(epoch \d\)", err)
    (best,) = re.findall(r"^best epoch by val_acc .*: epoch (\d), (.*)$", out, re.MULTILINE)
    assert best[1] == str(folder / "checkpoint_best.pth")
    tested = next(entry["test_acc"] for entry in log(folder) if entry["epoch"] == int(best[0]))
    call("VE.py", "--evaluate", "--checkpoint", folder, "--device", "cpu")
    assert log(folder / "evaluation")[-1]["test_acc"] == tested
    capsys.readouterr()
    # more epochs, with the run's own configuration, and then fewer than there are
    call(
        "VE.py",
        "--resume",
        "--output_dir",
        folder,
        "--device",
        "cpu",
        "--set",
        "scheduler.epochs=3",
    )
    err = capsys.readouterr().err
    assert f"configuration: {folder / 'checkpoint_'}" in err and "epoch 2, iteration 0" in err
    call(
        "VE.py",
        "--resume",
        "--output_dir",
        folder,
        "--device",
        "cpu",
        "--set",
        "scheduler.epochs=1",
    )
    err = capsys.readouterr().err
    assert (
        "the run is complete, it has 3 epochs and scheduler.epochs is 1" in err
        and "global batch" not in err
    )
    assert [entry["epoch"] for entry in log(folder)] == [0, 1, 2]


def test_evaluation_leaves_a_run_as_it_is_and_evaluates_what_it_is_asked_for(
    program, tmp_path, capsys
):
    config_of, run = program
    config = {**config_of("VQA"), "scheduler": {"lr": 1e-3, "epochs": 1}}
    run("VQA", config, tmp_path / "run")
    before, results = contents(tmp_path / "run"), tmp_path / "run/evaluation"
    for split in ("val", "test"):
        run(
            "VQA",
            config,
            tmp_path / "run",
            "--evaluate",
            "--split",
            split,
            checkpoint=tmp_path / "run/checkpoint_best.pth",
        )
        assert {name.split("_")[0] for name in log(results)[-1]} == {split, "checkpoint", "epoch"}
    assert "holds a run" in capsys.readouterr().err
    after = contents(tmp_path / "run")
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(results).as_posix() for path in after.keys() - before.keys()} == {
        "log.txt",
        "result/vqa_val_result_epoch0.json",
        "result/vqa_result_epoch0.json",
    }
    with pytest.raises(InputError, match="--split val is a split for --evaluate"):
        run("VQA", config, tmp_path / "run", "--split", "val")
    with pytest.raises(InputError, match="--evaluate needs the key val_file"):
        run(
            "VQA",
            {**config, "val_file": None},
            tmp_path / "new",
            "--evaluate",
            "--split",
            "val",
            checkpoint=tmp_path / "run/checkpoint_best.pth",
        )


@pytest.fixture
def repository(program, tiny_config, shapes, tmp_path, monkeypatch):
    """A folder with default configurations of its own, of another model than tiny_config's, as the
    working directory.
    """
    monkeypatch.chdir(tmp_path)
    retrieval = {
        f"{split}_file": [str(shapes / f"{name}.json")]
        for split, name in (("train", "retrieval_train"), ("val", "val"), ("test", "test"))
    }
    for name, keys in {
        "VE": program[0]("VE"),
        "Retrieval_flickr": retrieval,
        "Retrieval_coco": retrieval,
    }.items():
        folder = tmp_path / "configs" / name
        folder.mkdir(parents=True)
        command_line(
            {**tiny_config, **keys, "embed_dim": 12, "scheduler": {"epochs": 1}}, "", folder
        )
        (folder / "config.yaml").rename(tmp_path / f"configs/{name}.yaml")
    return tmp_path


def test_the_configuration_is_that_of_the_flag_or_the_checkpoint_or_the_script(
    program, call, repository, tmp_path, capsys
):
    config_of, run = program
    torch.save(
        {**torch.load(tmp_path / "pretrained.pth"), "config": config_of("Pretrain_nlvr")},
        "pretrained.pth",
    )
    run("VE", config_of("VE"), tmp_path / "mine")
    tested = [entry["test_acc"] for entry in log(tmp_path / "mine") if "test_acc" in entry]
    flags, evaluate = (
        ("--device", "cpu"),
        ("--evaluate", "--checkpoint", "mine/checkpoint_best.pth", "--split", "test"),
    )

    def said():
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if line.startswith("configuration: "))
        models = [line.rpartition(" ")[2] for line in lines if line.startswith("model and ")]
        return line.split()[1], *models

    said()
    # a checkpoint of the task: its own, and its run's folder
    call("VE.py", *flags, *evaluate)
    assert said() == ("mine/checkpoint_best.pth",)
    assert [entry["test_acc"] for entry in log(tmp_path / "mine/evaluation")] == tested
    call("VE.py", *flags, *evaluate, "--config", "configs/VE.yaml")
    assert said() == ("configs/VE.yaml",) and (tmp_path / "output/VE/log.txt").exists()
    # a new run from a checkpoint of another task: the script's
    call("VE.py", *flags, "--checkpoint", "pretrained.pth", "--output_dir", "new")
    assert said() == ("configs/VE.yaml",)
    assert torch.load("new/checkpoint_last.pth")["config"]["embed_dim"] == 12
    # and one from a checkpoint of the same task: the configuration of the checkpoint
    call(
        "VE.py",
        *flags,
        "--checkpoint",
        "new/checkpoint_best.pth",
        "--output_dir",
        "newer",
        "--set",
        "batch_size=4",
    )
    assert said() == ("new/checkpoint_best.pth",)
    assert torch.load("newer/checkpoint_last.pth")["config"]["batch_size"] == 4
    # not one of the released code
    released = {"model": torch.load("mine/checkpoint_best.pth")["model"]}
    torch.save(
        {**released, "config": {"schedular": {"sched": "cosine"}, "test_file": "/export/ve.json"}},
        "released.pth",
    )
    call("VE.py", *flags, "--evaluate", "--checkpoint", "released.pth")
    assert said() == ("configs/VE.yaml", "released.pth")
    # weights of another task that a script can evaluate: the script's data and their model
    call("Retrieval.py", *flags, "--evaluate", "--checkpoint", "pretrained.pth")
    assert said() == ("configs/Retrieval_flickr.yaml", "pretrained.pth")
    assert (tmp_path / "output/Retrieval_flickr/log.txt").exists()


def test_the_default_folder_is_named_after_task_and_configuration():
    for task, source, folder in (
        ("retrieval", "configs/Retrieval_coco.yaml", "output/Retrieval_coco"),
        ("retrieval", "configs/shapes/Retrieval.yaml", "output/shapes/Retrieval"),
        ("vqa", "/elsewhere/small.yaml", "output/vqa_small"),
        ("vqa", "output/mine/checkpoint_best.pth", "output/vqa_mine"),
        ("retrieval", "weights/mscoco.pth", "output/retrieval_mscoco"),
    ):
        assert default_output_dir(task, source, evaluate=False) == Path(folder)


def test_vqa_results_are_what_the_official_server_takes(program, shapes, tmp_path, capsys):
    config_of, run = program
    config = config_of("VQA")
    run("VQA", {**config, "val_file": None}, tmp_path / "run")
    assert "VQA accuracy overall" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/result/vqa_result_epoch1.json").read_text())
    questions = json.loads((shapes / "vqa_test.json").read_text())
    assert [result["question_id"] for result in results] == [
        entry["question_id"] for entry in questions
    ]
    assert {result["answer"] for result in results} <= set(
        json.loads((shapes / "answer_list.json").read_text())
    )

    blind = [
        {key: entry[key] for key in ("image", "question", "question_id", "dataset")}
        for entry in questions
    ]
    (tmp_path / "blind.json").write_text(json.dumps(blind))
    config = {**config, "val_file": None, "test_file": [str(tmp_path / "blind.json")]}
    run(
        "VQA",
        config,
        tmp_path / "blind",
        "--evaluate",
        checkpoint=tmp_path / "run/checkpoint_01.pth",
    )
    assert json.loads((tmp_path / "blind/result/vqa_result_epoch1.json").read_text()) == results
    assert "accuracy" not in capsys.readouterr().out
    run(
        "VQA",
        {**config, "answer_list": None},
        tmp_path / "free",
        "--evaluate",
        checkpoint=tmp_path / "run/checkpoint_01.pth",
    )
    free = json.loads((tmp_path / "free/result/vqa_result_epoch1.json").read_text())
    assert all("##" not in result["answer"] and "[" not in result["answer"] for result in free)


def test_weights_of_answers_are_their_shares(tiny_config, shapes, tmp_path):
    from models.tokenizer import load_tokenizer

    image = {
        "image": "images/train/000000.jpg",
        "question": "what color is the star?",
        "question_id": 1,
    }
    (tmp_path / "a.json").write_text(
        json.dumps([{**image, "dataset": "vqa", "answer": ["red"] * 7 + ["blue"] * 3}])
    )
    (tmp_path / "b.json").write_text(json.dumps([{**image, "dataset": "vg", "answer": "orange"}]))
    keys = {
        "train_file": [str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        "vqa_root": str(shapes),
        "vg_root": str(shapes),
    }
    config = {**tiny_config, **keys}
    dataset, tokenizer = build_dataset("vqa", "train", config), load_tokenizer(config)[0]
    batch = dataset.collate([dataset[0], dataset[1]], tokenizer)
    assert batch.n.tolist() == [2, 1] and batch.weights.tolist() == pytest.approx([0.7, 0.3, 0.5])
    assert [tokenizer.decode(ids) for ids in batch.answer[0]] == [
        f"[CLS] {word} [SEP]" for word in ("red", "blue", "orange")
    ]
    assert tokenizer.decode(batch.question[0][0]) == "[CLS] what color is the star"


def test_labels_of_entailment_and_nlvr(tiny_config, shapes):
    for name, key, labels in (
        ("ve", "ve_test.json", ["contradiction", "neutral", "entailment"]),
        ("nlvr", "nlvr_test.json", ["False", "True"]),
    ):
        dataset = build_dataset(name, "test", {**tiny_config, "test_file": [str(shapes / key)]})
        entries = json.loads((shapes / key).read_text())
        for sample, entry in zip(dataset, entries, strict=True):
            assert labels[sample.target] == entry["label"]
            images = [f"{entry['image']}.jpg"] if "image" in entry else entry["images"]
            assert sample.files == [str(shapes / image) for image in images]


IMAGE = "images/test/000000.jpg"


def test_an_ad_is_read_as_query_and_words_cut_to_max_tokens(tiny_config, shapes, tmp_path):
    entries = [
        {"image": IMAGE, "query": "Red Star!", "text": "Free, big star " * 9, "label": label}
        for label in (0, 1)
    ]
    (tmp_path / "ads.json").write_text(json.dumps(entries))
    config = {**tiny_config, "test_file": [str(tmp_path / "ads.json")], "max_tokens": 9}
    dataset, tokenizer = (
        build_dataset("relevance", "test", config),
        build_tokenizer(config["tokenizer"]),
    )
    batch = dataset.collate([dataset[0], dataset[1]], tokenizer)
    assert (
        tokenizer.decode(batch.text.input_ids[0]) == "[CLS] red star [SEP] free big star free big"
    )
    assert batch.targets.tolist() == [0, 1]


def test_relevance_starts_from_the_itm_head_and_can_be_evaluated_before_training(
    program, tiny_config, pretrained, tmp_path
):
    config_of, run = program
    weights, model = torch.load(pretrained)["model"], build_model("relevance", tiny_config)
    assert not load_checkpoint(model, pretrained, complete=True).new
    for head in (model.itm_head, model.itm_head_m):
        assert torch.equal(head.weight, weights["itm_head.weight"]) and torch.equal(
            head.bias, weights["itm_head.bias"]
        )
    assert detect_task(model.state_dict()) == "relevance" and detect_task(weights) == "pretrain"
    run(
        "Relevance",
        config_of("Relevance"),
        tmp_path / "out",
        "--evaluate",
        "--split",
        "test",
        "--alone",
    )
    (entry,) = log(tmp_path / "out")
    assert {"test_auc", "test_auc_other_image", "test_auc_other_words"} <= entry.keys()


def test_ads_with_the_image_or_the_words_of_another(program):
    dataset = build_dataset("relevance", "test", program[0]("Relevance"))
    own, other = dataset[3], dataset[15]
    image, words = (Swapped(dataset, part)[3] for part in ("image", "words"))
    assert torch.equal(image.image, other.image) and image.sentence == own.sentence
    query, title = own.sentence.split(" [SEP] ")[0], other.sentence.split(" [SEP] ")[1]
    assert words.sentence == f"{query} [SEP] {title}" and torch.equal(words.image, own.image)
    assert image.target == words.target == own.target and len(dataset) == 24


def test_the_ads_that_a_model_finds_relevant_come_first(program, monkeypatch):
    config = program[0]("Relevance")
    dataset, model = build_dataset("relevance", "test", config), build_model("relevance", config)
    targets = iter([entry.label for entry in dataset.entries])
    monkeypatch.setattr(
        model,
        "predict",
        lambda image, text: torch.tensor([[0.0, 2.0 * next(targets) - 1] for _ in image]),
    )
    assert evaluate(
        model, dataset, build_tokenizer(config["tokenizer"]), config, torch.device("cpu")
    ) == {"auc": 100}


def test_roc_auc_is_the_golden_one():
    golden = json.loads(Path("tests/golden/attributes.json").read_text())["auc"]
    assert roc_auc(golden["labels"], golden["scores"]) == pytest.approx(golden["roc_auc"])


def quarter_right(*_):
    """Return logits and targets with one right prediction in four."""
    return np.array([[1.0, 0.0]] * 4), np.array([0, 1, 1, 1])


RIGHT = {  # script: what makes a quarter of its test data right
    "VE": ("evaluation.classification.classify", quarter_right),
    "NLVR": ("evaluation.classification.classify", quarter_right),
    "Grounding": (
        "evaluation.grounding.grounding_accuracy",
        lambda *data: dict.fromkeys(grounding_accuracy(*data), 0.25),
    ),
}


@pytest.mark.parametrize("script", RIGHT)
def test_accuracies_are_percent(program, tmp_path, monkeypatch, capsys, script):
    config_of, run = program
    config, folder = config_of(script), tmp_path / "run"
    config["scheduler"]["epochs"] = 1
    monkeypatch.setattr(*RIGHT[script])
    run(script, config, folder)
    names = TASKS[script][1]
    assert [entry[name] for name in names for entry in log(folder)] == [25] * len(names)
    assert "25.00%" in capsys.readouterr().out

    state = torch.load(folder / "checkpoint_last.pth", weights_only=True)
    assert state["resume"]["best"] == {"score": 25, "epoch": 0}


def test_grounding_reads_its_splits_from_several_files_and_trains_without_refs(
    program, shapes, tmp_path
):
    config_of, run = program
    config = config_of("Grounding")
    entries = json.loads((shapes / "grounding_train.json").read_text())
    pairs = [{"image": entry["image"], "text": entry["text"]} for entry in entries]
    expressions = json.loads((shapes / "grounding_test.json").read_text())
    splits = {
        ref["ref_id"]: ref["split"]
        for ref in pickle.loads((shapes / "refcoco+/refs(unc).p").read_bytes())
    }
    by_split = {"val": [], "test": []}
    for entry in expressions:
        by_split["val" if splits[entry["ref_id"]] == "val" else "test"].append(entry)
    for name, entries in {"train": pairs, **by_split}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    files = {
        "train_file": [str(tmp_path / "train.json")],
        "test_file": [str(tmp_path / f"{name}.json") for name in by_split],
    }
    run("Grounding", {**config, **files}, tmp_path / "two", "--set", "scheduler.epochs=1")
    (entry,) = log(tmp_path / "two")
    run(
        "Grounding",
        config,
        tmp_path / "one",
        "--evaluate",
        checkpoint=tmp_path / "two/checkpoint_best.pth",
    )
    (val, test) = log(tmp_path / "one")
    assert {name: entry[name] for name in ("val_d", "testA_d", "testB_d")} == pytest.approx(
        {"val_d": val["val_d"], "testA_d": test["testA_d"], "testB_d": test["testB_d"]}
    )


def test_grounding_on_another_data_set_of_refer_has_its_splits(program, shapes, tmp_path):
    config_of, run = program
    config, folder = config_of("Grounding"), tmp_path / "refer/refcocog"
    folder.mkdir(parents=True)
    refs = pickle.loads((shapes / "refcoco+/refs(unc).p").read_bytes())
    refs = [{**ref, "split": ref["split"].rstrip("AB")} for ref in refs]
    (folder / "refs(umd).p").write_bytes(pickle.dumps(refs))
    (folder / "instances.json").write_bytes((shapes / "refcoco+/instances.json").read_bytes())
    torch.save({"model": build_model("grounding", config).state_dict()}, tmp_path / "any.pth")
    config |= {"refcoco_data": str(tmp_path / "refer"), "refer_dataset": "refcocog"}
    run("Grounding", config, tmp_path / "out", "--evaluate", checkpoint=tmp_path / "any.pth")
    assert [set(entry) - {"checkpoint", "epoch"} for entry in log(tmp_path / "out")] == [
        {"val_d"},
        {"test_d"},
    ]


def test_plain_pre_training_starts_nlvr_without_text_assignment(tiny_config, pretrained):
    model = build_model("nlvr", tiny_config)
    assert {name.split(".")[0] for name in load_checkpoint(model, pretrained).new} == {
        "cls_head",
        "cls_head_m",
    }


OVERFLOWING = {  # script: weights that make its scores overflow, the name in the message
    "VQA": ("text_decoder.cls", "question "),
    "VE": ("cls_head", "ve_val.json: entry 0"),
    "NLVR": ("cls_head", "nlvr_dev.json: entry 0"),
    "Relevance": ("itm_head", "relevance_val.json: entry 0"),
    "Grounding": ("itm_head", "ref_id "),
    "Retrieval": ("vision_proj", "image 0"),
    "Attributes": ("vision_proj", "annotation 0"),
}


def overflowing(script, program, shapes, folder):
    """Return the configuration of a script and a checkpoint file with finite weights whose scores
    are not finite.
    """
    more = {"Retrieval": "test.json", "Attributes": "attributes.json"}
    config = (
        program[0](script)
        if script in TASKS
        else {**program[0]("VE"), "val_file": None, "test_file": str(shapes / more[script])}
    )
    model = build_model(script.lower(), config)
    for name, param in model.named_parameters():
        if OVERFLOWING[script][0] in name:
            param.data.fill_(3e38)
    torch.save({"model": model.state_dict()}, folder / "overflowing.pth")
    return config, folder / "overflowing.pth"


@pytest.mark.parametrize(
    "script, answers", [*((script, "answer_list.json") for script in OVERFLOWING), ("VQA", None)]
)
def test_scores_that_are_not_finite_end_an_evaluation(
    program, shapes, tmp_path, capsys, script, answers
):
    config, checkpoint = overflowing(script, program, shapes, tmp_path)
    config["answer_list"] = answers and str(shapes / answers)
    status = exit_status(
        lambda: program[1](script, config, tmp_path / "out", "--evaluate", checkpoint=checkpoint)
    )
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    split, key = (
        ("test", "test_file")
        if config["val_file"] is None and script != "Grounding"
        else ("val", "val_file")
    )
    files = config["test_file" if script == "Grounding" else key]
    assert status == 1 and line.startswith(
        f"error: {split} {files if isinstance(files, str) else files[0]}: "
    )
    assert OVERFLOWING[script][1] in line
    assert not (tmp_path / "out/log.txt").exists() and not (tmp_path / "out/result").exists()


def test_scores_that_are_not_finite_end_all_processes(program, shapes, tmp_path):
    config, checkpoint = overflowing("Retrieval", program, shapes, tmp_path)
    two = launch(
        "Retrieval.py",
        *command_line(config, tmp_path / "two", tmp_path),
        "--checkpoint",
        checkpoint,
        "--evaluate",
    )
    assert (
        two.returncode and "error: test " in two.stderr and not (tmp_path / "two/log.txt").exists()
    )


QUESTION = {"image": IMAGE, "question": "is it red?", "question_id": 7, "dataset": "vqa"}
VE_ENTRY = {"image": IMAGE[:-4], "sentence": "a star", "label": "neutral"}
AD = {"image": IMAGE, "query": "star", "text": "buy now", "label": 1}
# script, key, value (a list or object is written to a file), what the message says
BAD_INPUT = {
    "empty answer list": ("VQA", "answer_list", [], "bad.json: Expected 'array' of length >= 1"),
    "repeated answer": ("VQA", "answer_list", ["yes", "no", "yes"], "bad.json has 'yes' 2 times"),
    "answer list of numbers": (
        "VQA",
        "answer_list",
        ["yes", 2],
        r"bad.json: .*'int' - at '\$\[1\]'",
    ),
    "answer list missing": (
        "VQA",
        "answer_list",
        "nowhere.json",
        "nowhere.json: cannot be read .*answer_list",
    ),
    "unknown data set": (
        "VQA",
        "train_file",
        [{**QUESTION, "dataset": "coco", "answer": ["a"]}],
        "'coco' - at 'dataset'",
    ),
    "no answers": ("VQA", "train_file", [QUESTION], "entry 0 .* missing required field 'answer'"),
    "answer of vg as a list": (
        "VQA",
        "train_file",
        [{**QUESTION, "dataset": "vg", "answer": ["a"]}],
        "'answer' is .*'vg'",
    ),
    "no vg_root": (
        "VQA",
        "train_file",
        [{**QUESTION, "dataset": "vg", "answer": "a"}] * 8,
        "lacks the key vg_root",
    ),
    "validation without answers": ("VQA", "val_file", [QUESTION], "has no answers to compare with"),
    "answers of some questions": (
        "VQA",
        "test_file",
        [{**QUESTION, "answer": ["a"]}, {**QUESTION, "question_id": 8}],
        "entry 1 .*has no 'answer', though others have",
    ),
    "answers of Visual Genome to score": (
        "VQA",
        "test_file",
        [{**QUESTION, "dataset": "vg", "answer": "a"}],
        "one annotator",
    ),
    "two batch sizes": ("VE", "batch_size_train", 4, "batch_size is 8 and batch_size_train is 4"),
    "objectives of another task": (
        "Grounding",
        "--set",
        "objectives=[mlm]",
        "objectives names mlm: .* itc, itm",
    ),
    "eos out of the vocabulary": ("VQA", "eos", "</s>", "eos is '</s>', which is not a token"),
    "same question twice": (
        "VQA",
        "test_file",
        [QUESTION, QUESTION],
        "entry 1 .*question_id 7 too",
    ),
    "empty question": ("VQA", "test_file", [{**QUESTION, "question": "?"}], "text '\\?' is empty"),
    "unknown label": (
        "VE",
        "train_file",
        [{**VE_ENTRY, "label": "-"}],
        "'-' - at 'label' .*contradiction or neutral",
    ),
    "image without file": (
        "VE",
        "test_file",
        [{**VE_ENTRY, "image": "images/test/absent"}],
        "absent.jpg does not exist",
    ),
    "empty sentence": ("VE", "val_file", [{**VE_ENTRY, "sentence": "..."}], "text '...' is empty"),
    "label 2": (
        "Relevance",
        "train_file",
        [{**AD, "label": 2}],
        "value 2 - at 'label' .*\"label\": 0 or 1",
    ),
    "label as text": ("Relevance", "test_file", [{**AD, "label": "1"}], "'str' - at 'label'"),
    "empty query": ("Relevance", "train_file", [{**AD, "query": "?"}], "query '\\?' is empty"),
    "no words": ("Relevance", "train_file", [{**AD, "text": ""}], "text '' is empty"),
    "one class": (
        "Relevance",
        "val_file",
        [AD, AD],
        "val_file .*all labels are 1, the ROC AUC needs both",
    ),
    "one image": (
        "NLVR",
        "train_file",
        [{"images": [IMAGE], "sentence": "a", "label": "True"}],
        "length >= 2 - at 'images'",
    ),
    "label true": (
        "NLVR",
        "test_file",
        [{"images": [IMAGE] * 2, "sentence": "a", "label": "true"}],
        "'label' .*False or True",
    ),
    "no boxes of an image": (
        "Grounding",
        "det_file",
        {"500": [[0, 0, 9, 9, 1]]},
        "bad.json: no box for image",
    ),
    "unknown ref": (
        "Grounding",
        "test_file",
        [{"image": IMAGE, "text": "a", "ref_id": 10**6}],
        "ref_id 1000000 is not among",
    ),
    "no ref": (
        "Grounding",
        "test_file",
        [{"image": IMAGE, "text": "a"}],
        "entry 0 .* missing required field 'ref_id'",
    ),
    "no such refer": (
        "Grounding",
        "refer_dataset",
        "refcoco++",
        r"refer_dataset is '.*refcoco\+\+'",
    ),
    "no refs": ("Grounding", "refcoco_data", "nowhere", "refs.unc..p does not exist"),
    "empty expression": (
        "Grounding",
        "train_file",
        [{"image": IMAGE, "text": " ", "ref_id": 1}],
        "text ' ' is empty",
    ),
    "block out of range": ("Grounding", "--block_num", "1", "--block_num 1: .* blocks 2 to 3"),
    "evaluation of pre-trained weights": ("VE", "--evaluate", None, "has no cls_head.*fine-tuned"),
    "evaluation of text assignment": ("Pretrain_nlvr", "--evaluate", None, "nothing to evaluate"),
    "long answers": ("VQA", "max_answer_tokens", 40, "max_answer_tokens is 40"),
    "no beams": ("VQA", "num_beams", 0, "num_beams is 0, it must be a whole number from 1"),
    "unknown sharing": (
        "NLVR",
        "share",
        "some",
        "share is 'some', it must be one of cross_attention, all, none",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_before_the_first_step(program, shapes, tmp_path, case):
    config_of, run = program
    script, key, value, message = BAD_INPUT[case]
    config, arguments = config_of(script), []
    if key.startswith("--"):
        arguments = [key] if value is None else [key, value]
    elif isinstance(value, (list, dict)):
        (tmp_path / "bad.json").write_text(json.dumps(value))
        config[key] = str(tmp_path / "bad.json")
    else:
        config[key] = (
            str(shapes / value) if isinstance(value, str) and key not in ("share", "eos") else value
        )
    with pytest.raises(InputError, match=message) as error:
        run(script, config, tmp_path / "run", *arguments)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize(
    ["script", "image"], [("VQA", "images/train/000001.jpg"), ("NLVR", None), ("VE", None)]
)
def test_unusable_training_images_are_counted_and_named(program, shapes, tmp_path, script, image):
    config_of, run = program
    config = config_of(script)
    (name,) = config["train_file"]
    entries = json.loads((shapes / name).read_text())[:8]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no image")
    entries[0] = {
        **entries[0],
        **(
            {"images": [str(broken)] * 2}
            if "images" in entries[0]
            else {"image": str(broken.with_suffix("")) if script == "VE" else str(broken)}
        ),
    }
    (tmp_path / "train.json").write_text(json.dumps(entries))
    with pytest.raises(TrainingStopped, match="broken.jpg"):
        run(script, {**config, "train_file": [str(tmp_path / "train.json")]}, tmp_path / "run")


def test_pretraining_validates_and_ends_without_patience(pretrain, shapes, tmp_path):
    """The better ranking of the validation set travels in the checkpoint."""
    flags = ["--set", "scheduler.epochs=9", "patience=1", "optimizer.lr=0", "scheduler.warmup_lr=0"]
    flags += ["scheduler.min_lr=0"]
    assert pretrain(*flags, val_file=str(shapes / "val.json"))[0] == 0
    first, second = log(tmp_path / "out")[:2]  # of the same weights
    assert len(log(tmp_path / "out")) == 2
    itc, itm = first["val_itc_r_mean"], first["val_r_mean"]
    assert first["val_best_r_mean"] == second["val_best_r_mean"] == max(itc, itm)
    content = torch.load(tmp_path / "out/checkpoint_best.pth", weights_only=True)
    expected = {"by": "itm" if itm > itc else "itc", "k": 4, "itc": itc, "itm": itm}
    assert content["epoch"] == 0 and content["ranking"] == expected
    assert not (tmp_path / "out/checkpoint_00.pth").exists()
    status, _ = pretrain("--resume", *flags, val_file=str(shapes / "val.json"))
    assert status == 0 and len(log(tmp_path / "out")) == 2
