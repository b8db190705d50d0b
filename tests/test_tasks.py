"""The scripts that fine-tune, but for Retrieval.py, as a whole: training, resuming, evaluation, bad
input.
"""

import functools
import itertools
import json
import pickle
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from chaos import assert_same_run
from conftest import contents, exit_status, log, refusal
from helpers.launch import launch
from helpers.tasks import METRICS, data_of
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


@pytest.fixture
def config_of(tiny_config, few_shapes):
    """The configuration of a script on its data."""
    keys = {"batch_size_test": 5, "max_skipped": 0.0}

    def build(script, epochs=2):
        scheduler = {**tiny_config["scheduler"], "epochs": epochs}
        return {**tiny_config, **data_of(script, few_shapes), **keys, "scheduler": scheduler}

    return build


@pytest.fixture
def run(call, pretrained, tmp_path):
    """Runs a script on a configuration."""

    def start(script, config, output_dir, *flags, checkpoint=pretrained):
        command = command_line(config, output_dir, tmp_path)
        call(script, *command, "--checkpoint", checkpoint, *flags)

    return start


@pytest.mark.parametrize("script", METRICS)
def test_interrupted_and_resumed_equals_uninterrupted(
    config_of, run, tmp_path, monkeypatch, capsys, script
):
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
    assert METRICS[script] <= set().union(*entries)
    validated = {"val_acc", "val_auc", "val_d"} & entries[0].keys()
    kept = {path.name for path in (tmp_path / "whole").glob("checkpoint_*.pth")}
    expected = {"checkpoint_best.pth"} if validated else {"checkpoint_00.pth", "checkpoint_01.pth"}
    assert kept == expected | {"checkpoint_last.pth"}


def test_generated_answers_may_be_as_long_as_the_longest_to_train_on(
    config_of, run, shapes, tmp_path, capsys
):
    config = {**config_of("VQA", 1), "answer_list": None, "num_beams": 2, "val_file": None}
    tokenizer = build_tokenizer(config["tokenizer"])
    answer = "a red circle left of a blue star, a green square and a pink moon"
    entries = json.loads((shapes / "vqa_train.json").read_text())[:16]
    entries[3] |= {"answer": [answer, "red"], "dataset": "vqa"}
    (tmp_path / "train.json").write_text(json.dumps(entries))
    config["train_file"] = [str(tmp_path / "train.json")]
    length = len(tokenizer(answer + "[SEP]")["input_ids"]) - 1  # without [CLS]
    assert length > 11
    with mock.patch.object(VQA, "generate", autospec=True, side_effect=VQA.generate) as generate:
        run("VQA", config, tmp_path / "run")
    assert {call.args[3] for call in generate.mock_calls} == {2}
    file = tmp_path / "run/checkpoint_00.pth"
    state = torch.load(file, weights_only=True)
    assert state["config"]["max_answer_tokens"] == length
    # makes the model repeat one word in every answer
    head = "text_decoder.cls.predictions"
    state["model"][f"{head}.transform.LayerNorm.weight"].zero_()
    state["model"][f"{head}.bias"].zero_()[tokenizer.convert_tokens_to_ids("red")] = 99
    torch.save(state, file)
    # --config names a file without the key
    for flags, expected in (([], length), (["--set", "max_answer_tokens=4"], 4)):
        run("VQA", config, tmp_path / "out", "--evaluate", *flags, checkpoint=file)
        answers = json.loads((tmp_path / "out/result/vqa_result_epoch0.json").read_text())
        assert {entry["answer"] for entry in answers} == {" ".join(["red"] * expected)}
    assert load_model(file).model.max_answer_tokens == length
    assert "by the official formula" in capsys.readouterr().out


@pytest.mark.parametrize("script", METRICS)
def test_two_processes_train_and_evaluate_as_one_evaluates(config_of, run, tmp_path, script):
    config = {**config_of(script, 1), "val_file": None}
    command = command_line(config, tmp_path / "two", tmp_path)
    two = launch(f"{script}.py", *command, "--checkpoint", tmp_path / "pretrained.pth")
    assert two.returncode == 0, two.stderr
    (entry,) = log(tmp_path / "two")
    assert entry["train_loss" if script != "Grounding" else "train_loss_itm"] > 0
    if METRICS[script]:
        name = "best" if script == "Grounding" else "last"
        file = tmp_path / f"two/checkpoint_{name}.pth"
        run(script, config, tmp_path / "one", "--evaluate", checkpoint=file)
        found = {key: value for line in log(tmp_path / "one") for key, value in line.items()}
        assert METRICS[script] & found.keys()
        for key in found.keys() - {"checkpoint", "epoch"}:
            assert found[key] == pytest.approx(entry[key]), key


@pytest.mark.parametrize("script", METRICS)
def test_data_sets_can_be_handed_to_a_process(config_of, script):
    task = {"Pretrain_nlvr": "nlvr_pretrain"}.get(script, script.lower())
    config, tokenizer = config_of(script), build_tokenizer("tests/golden/vocab.txt")
    for split, key in {"train": "train_file", **find_task(task).files}.items():
        if config[key]:
            dataset = build_dataset(task, split, config)
            collate = functools.partial(dataset.collate, tokenizer=tokenizer)
            copied = pickle.loads(pickle.dumps(collate)).func.__self__
            assert repr(copied[1]) == repr(dataset[1])


# a stopped run of VE: how a command line may not fit it, what the message says
UNFIT = {
    "another task": (
        "NLVR",
        {},
        "checkpoint_last.pth is a checkpoint of task ve, but this script trains task nlvr",
    ),
    "other data": ("VE", {"train_file": ["ve_val.json"]}, "the number of entries of train_file"),
    "another architecture": ("VE", {"vision_depth": 1}, "or other parameters"),
    "another optimizer": ("VE", {"optimizer": {"opt": "sgd"}}, "was saved with another optimizer"),
    "no epochs": ("VE", {"scheduler": {"epochs": 0}}, "scheduler.epochs is 0"),
    "too much accumulation": ("VE", {"accumulate": 1000}, "accumulate 1000"),
}


def test_a_refused_resume_changes_no_file(config_of, run, shapes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine.trainer, "train_step", signal_at(3)(engine.trainer.train_step))
        run("VE", config_of("VE"), tmp_path / "run")
    before = contents(tmp_path / "run")
    for script, keys, message in UNFIT.values():
        config = {**config_of(script), **keys}
        config["train_file"] = [str(shapes / name) for name in config["train_file"]]
        assert message in refusal(run, script, config, tmp_path / "run", "--resume")
        assert contents(tmp_path / "run") == before, message


def test_a_run_says_where_it_stands_and_what_comes_next(config_of, run, call, tmp_path, capsys):
    folder = tmp_path / "run"
    run("VE", config_of("VE"), folder, "--resume")
    out, err = capsys.readouterr()
    assert f"note: --resume: {folder} has no checkpoint yet, so a new run starts" in err
    assert re.findall(r"epoch \d: val acc \S+, best \S+ \(epoch \d\)", err)
    (best,) = re.findall(r"^best epoch by val_acc .*: epoch (\d), (.*)$", out, re.MULTILINE)
    assert best[1] == str(folder / "checkpoint_best.pth")
    tested = next(entry["test_acc"] for entry in log(folder) if entry["epoch"] == int(best[0]))
    call("VE", "--evaluate", "--checkpoint", folder, "--device", "cpu")
    assert log(folder / "evaluation")[-1]["test_acc"] == tested
    capsys.readouterr()
    # more epochs, with the run's own configuration, and then fewer than there are
    resume = "--resume", "--output_dir", folder, "--device", "cpu", "--set"
    call("VE", *resume, "scheduler.epochs=3")
    err = capsys.readouterr().err
    assert f"configuration: {folder / 'checkpoint_'}" in err and "epoch 2, iteration 0" in err
    call("VE", *resume, "scheduler.epochs=1")
    err = capsys.readouterr().err
    assert "the run is complete: it has trained 3 epochs, and scheduler.epochs is 1" in err
    assert "global batch" not in err
    assert [entry["epoch"] for entry in log(folder)] == [0, 1, 2]


def test_evaluation_leaves_a_run_as_it_is_and_evaluates_what_it_is_asked_for(
    config_of, run, tmp_path, capsys
):
    config, folder = config_of("VQA", 1), tmp_path / "run"
    run("VQA", config, folder)
    before, results = contents(folder), folder / "evaluation"
    evaluate = functools.partial(run, "VQA", checkpoint=folder / "checkpoint_best.pth")
    for split in ("val", "test"):
        evaluate(config, folder, "--evaluate", "--split", split)
        assert {name.split("_")[0] for name in log(results)[-1]} == {split, "checkpoint", "epoch"}
    assert "holds a run" in capsys.readouterr().err
    after = contents(folder)
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(results).as_posix() for path in after.keys() - before.keys()} == {
        "log.txt",
        "result/vqa_val_result_epoch0.json",
        "result/vqa_result_epoch0.json",
    }
    message = refusal(evaluate, config, folder, "--split", "val")
    assert "--split val has an effect only with --evaluate" in message
    config["val_file"] = None
    message = refusal(evaluate, config, tmp_path / "new", "--evaluate", "--split", "val")
    assert "--evaluate has no data; set the key val_file" in message


@pytest.fixture
def repository(config_of, tmp_path, monkeypatch):
    """A folder with default configurations of its own, of another model than tiny_config's, as the
    working directory.
    """
    monkeypatch.chdir(tmp_path)
    for name, script in (("VE", "VE"), ("Retrieval_flickr", "Retrieval")):
        folder = tmp_path / "configs" / name
        folder.mkdir(parents=True)
        config = {**config_of(script), "embed_dim": 12, "scheduler": {"epochs": 1}}
        _, path, *_ = command_line(config, "", folder)
        path.rename(tmp_path / f"configs/{name}.yaml")
    return tmp_path


def test_the_configuration_is_that_of_the_flag_or_the_checkpoint_or_the_script(
    config_of, run, call, repository, tmp_path, capsys
):
    weights = torch.load("pretrained.pth")
    torch.save({**weights, "config": config_of("Pretrain_nlvr")}, "pretrained.pth")
    run("VE", config_of("VE", 1), tmp_path / "mine")
    tested = [entry["test_acc"] for entry in log(tmp_path / "mine")]
    capsys.readouterr()

    def source(script, *flags):
        call(script, "--device", "cpu", *flags)
        lines = capsys.readouterr().err.splitlines()
        (line,) = (line for line in lines if line.startswith("configuration: "))
        models = [line.rpartition(" ")[2] for line in lines if line.startswith("model and ")]
        return line.split()[1], *models

    # a checkpoint of the task: its own, and its run's folder
    evaluate = "VE", "--evaluate", "--checkpoint", "mine/checkpoint_best.pth", "--split", "test"
    assert source(*evaluate) == ("mine/checkpoint_best.pth",)
    assert [entry["test_acc"] for entry in log(tmp_path / "mine/evaluation")] == tested
    assert source(*evaluate, "--config", "configs/VE.yaml") == ("configs/VE.yaml",)
    assert (tmp_path / "output/VE/log.txt").exists()
    # a new run from a checkpoint of another task: the script's
    new = source("VE", "--checkpoint", "pretrained.pth", "--output_dir", "new")
    assert new == ("configs/VE.yaml",)
    assert torch.load("new/checkpoint_last.pth")["config"]["embed_dim"] == 12
    # and one from a checkpoint of the same task: the configuration of the checkpoint
    start = "VE", "--checkpoint", "new/checkpoint_best.pth", "--output_dir", "newer"
    assert source(*start, "--set", "batch_size=4") == ("new/checkpoint_best.pth",)
    assert torch.load("newer/checkpoint_last.pth")["config"]["batch_size"] == 4
    # not one of the released code
    released = {"schedular": {"sched": "cosine"}, "test_file": "/export/ve.json"}
    model = torch.load("mine/checkpoint_best.pth")["model"]
    torch.save({"model": model, "config": released}, "released.pth")
    found = source("VE", "--evaluate", "--checkpoint", "released.pth")
    assert found == ("configs/VE.yaml", "released.pth")
    # weights of another task that a script can evaluate: the script's data and their model
    source_of = source("Retrieval", "--evaluate", "--checkpoint", "pretrained.pth")
    assert source_of == ("configs/Retrieval_flickr.yaml", "pretrained.pth")
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


def test_vqa_results_are_what_the_official_server_takes(config_of, run, shapes, tmp_path, capsys):
    config = {**config_of("VQA", 1), "val_file": None}
    run("VQA", config, tmp_path / "run")
    out, err = capsys.readouterr()
    assert "VQA accuracy: acc " in out and "to search: " not in err

    def results(folder):
        return json.loads((tmp_path / folder / "result/vqa_result_epoch0.json").read_text())

    questions = json.loads((shapes / "vqa_test.json").read_text())
    ids = [entry["question_id"] for entry in questions]
    assert [result["question_id"] for result in results("run")] == ids
    answers = json.loads((shapes / "answer_list.json").read_text())
    assert {result["answer"] for result in results("run")} <= set(answers)

    keys = ("image", "question", "question_id", "dataset")
    blind = [{key: entry[key] for key in keys} for entry in questions]
    (tmp_path / "blind.json").write_text(json.dumps(blind))
    config["test_file"] = [str(tmp_path / "blind.json")]
    file = tmp_path / "run/checkpoint_00.pth"
    run("VQA", config, tmp_path / "blind", "--evaluate", checkpoint=file)
    assert results("blind") == results("run")
    assert "accuracy" not in capsys.readouterr().out
    config["answer_list"] = None
    run("VQA", config, tmp_path / "free", "--evaluate", checkpoint=file)
    free = {result["answer"] for result in results("free")}
    assert not any("##" in answer or "[" in answer for answer in free)


def test_weights_of_answers_are_their_shares(tiny_config, shapes, tmp_path):
    entry = {"image": "images/train/000000.jpg", "question": "what color is it?", "question_id": 1}
    answers = {
        "vqa": {**entry, "dataset": "vqa", "answer": ["red"] * 7 + ["blue"] * 3},
        "vg": {**entry, "dataset": "vg", "answer": "orange"},
    }
    for name, content in answers.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([content]))
    files = [str(tmp_path / f"{name}.json") for name in answers]
    roots = {"vqa_root": str(shapes), "vg_root": str(shapes)}
    dataset = build_dataset("vqa", "train", {**tiny_config, "train_file": files, **roots})
    tokenizer = build_tokenizer(tiny_config["tokenizer"])
    batch = dataset.collate([dataset[0], dataset[1]], tokenizer)
    assert batch.n.tolist() == [2, 1] and batch.weights.tolist() == pytest.approx([0.7, 0.3, 0.5])
    assert [tokenizer.decode(ids) for ids in batch.answer[0]] == [
        f"[CLS] {word} [SEP]" for word in ("red", "blue", "orange")
    ]
    assert tokenizer.decode(batch.question[0][0]) == "[CLS] what color is it"


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
    dataset = build_dataset("relevance", "test", config)
    tokenizer = build_tokenizer(config["tokenizer"])
    batch = dataset.collate([dataset[0], dataset[1]], tokenizer)
    expected = "[CLS] red star [SEP] free big star free big"
    assert tokenizer.decode(batch.text.input_ids[0]) == expected
    assert batch.targets.tolist() == [0, 1]


def test_relevance_starts_from_the_itm_head_and_can_be_evaluated_before_training(
    config_of, run, pretrained, tmp_path
):
    config = config_of("Relevance")
    weights, model = torch.load(pretrained)["model"], build_model("relevance", config)
    assert not load_checkpoint(model, pretrained, complete=True).new
    state = model.state_dict()
    for name, kind in itertools.product(("itm_head", "itm_head_m"), ("weight", "bias")):
        assert torch.equal(state[f"{name}.{kind}"], weights[f"itm_head.{kind}"])
    assert detect_task(state) == "relevance" and detect_task(weights) == "pretrain"
    run("Relevance", config, tmp_path / "out", "--evaluate", "--split", "test", "--alone")
    (entry,) = log(tmp_path / "out")
    assert {"test_auc", "test_auc_other_image", "test_auc_other_words"} <= entry.keys()


def test_ads_with_the_image_or_the_words_of_another(config_of):
    dataset = build_dataset("relevance", "test", config_of("Relevance"))
    own, other = dataset[3], dataset[15]
    image, words = (Swapped(dataset, part)[3] for part in ("image", "words"))
    assert torch.equal(image.image, other.image) and image.sentence == own.sentence
    query, title = own.sentence.split(" [SEP] ")[0], other.sentence.split(" [SEP] ")[1]
    assert words.sentence == f"{query} [SEP] {title}" and torch.equal(words.image, own.image)
    assert image.target == words.target == own.target and len(dataset) == 24


def test_the_ads_that_a_model_finds_relevant_come_first(config_of, monkeypatch):
    config = config_of("Relevance")
    dataset, model = build_dataset("relevance", "test", config), build_model("relevance", config)
    targets = iter([entry.label for entry in dataset.entries])

    def predict(image, text):
        return torch.tensor([[0.0, 2.0 * next(targets) - 1] for _ in image])

    monkeypatch.setattr(model, "predict", predict)
    tokenizer = build_tokenizer(config["tokenizer"])
    assert evaluate(model, dataset, tokenizer, config, torch.device("cpu")) == {"auc": 100}


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
def test_accuracies_are_percent(config_of, run, tmp_path, monkeypatch, capsys, script):
    config, checkpoint = config_of(script), tmp_path / "any.pth"
    torch.save({"model": build_model(script.lower(), config).state_dict()}, checkpoint)
    monkeypatch.setattr(*RIGHT[script])
    run(script, config, tmp_path / "out", "--evaluate", checkpoint=checkpoint)
    logged = {name: value for entry in log(tmp_path / "out") for name, value in entry.items()}
    assert {logged[name] for name in METRICS[script]} == {25}
    assert "25.00%" in capsys.readouterr().out


def test_grounding_reads_its_splits_from_several_files_and_trains_without_refs(
    config_of, run, shapes, tmp_path
):
    config = config_of("Grounding", 1)
    train, test = (
        json.loads((shapes / f"grounding_{split}.json").read_text()) for split in ("train", "test")
    )
    refs = pickle.loads((shapes / "refcoco+/refs(unc).p").read_bytes())
    val = {ref["ref_id"] for ref in refs if ref["split"] == "val"}
    files = {
        "train": [{"image": entry["image"], "text": entry["text"]} for entry in train],
        "val": [entry for entry in test if entry["ref_id"] in val],
        "test": [entry for entry in test if entry["ref_id"] not in val],
    }
    for name, entries in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    train_file, *test_files = (str(tmp_path / f"{name}.json") for name in files)
    keys = {"train_file": train_file, "test_file": test_files}
    run("Grounding", {**config, **keys}, tmp_path / "two")
    (entry,) = log(tmp_path / "two")
    best = tmp_path / "two/checkpoint_best.pth"
    run("Grounding", config, tmp_path / "one", "--evaluate", checkpoint=best)
    val, test = log(tmp_path / "one")
    for name, alone in {"val_d": val, "testA_d": test, "testB_d": test}.items():
        assert entry[name] == pytest.approx(alone[name])


def test_grounding_on_another_data_set_of_refer_has_its_splits(config_of, run, shapes, tmp_path):
    config, folder = config_of("Grounding"), tmp_path / "refer/refcocog"
    folder.mkdir(parents=True)
    refs = pickle.loads((shapes / "refcoco+/refs(unc).p").read_bytes())
    refs = [{**ref, "split": ref["split"].rstrip("AB")} for ref in refs]
    (folder / "refs(umd).p").write_bytes(pickle.dumps(refs))
    (folder / "instances.json").symlink_to(shapes / "refcoco+/instances.json")
    torch.save({"model": build_model("grounding", config).state_dict()}, tmp_path / "any.pth")
    config |= {"refcoco_data": str(tmp_path / "refer"), "refer_dataset": "refcocog"}
    run("Grounding", config, tmp_path / "out", "--evaluate", checkpoint=tmp_path / "any.pth")
    names = [set(entry) - {"checkpoint", "epoch"} for entry in log(tmp_path / "out")]
    assert names == [{"val_d"}, {"test_d"}]


OVERFLOWING = {  # script: weights that make its scores overflow, the name in the message
    "VQA": ("text_decoder.cls", "question "),
    "VE": ("cls_head", "ve_val.json: entry 0"),
    "NLVR": ("cls_head", "nlvr_dev.json: entry 0"),
    "Relevance": ("itm_head", "relevance_val.json: entry 0"),
    "Grounding": ("itm_head", "ref_id "),
    "Retrieval": ("vision_proj", "image 0"),
    "Attributes": ("vision_proj", "annotation 0"),
}


@pytest.fixture
def overflow(config_of, tmp_path):
    """Writes overflowing.pth, finite weights of a script whose scores are not finite; returns the
    script's configuration.
    """

    def write(script):
        config = config_of(script)
        model = build_model(script.lower(), config)
        for name, param in model.named_parameters():
            if OVERFLOWING[script][0] in name:
                param.data.fill_(3e38)
        torch.save({"model": model.state_dict()}, tmp_path / "overflowing.pth")
        return config

    return write


@pytest.mark.parametrize("script", [*OVERFLOWING, "VQA without a list"])
def test_scores_that_are_not_finite_end_an_evaluation(overflow, run, tmp_path, capsys, script):
    script, _, generated = script.partition(" ")
    config, checkpoint = overflow(script), tmp_path / "overflowing.pth"
    if generated:
        config["answer_list"] = None
    status = exit_status(
        lambda: run(script, config, tmp_path / "out", "--evaluate", checkpoint=checkpoint)
    )
    (line,) = re.findall("^error: .*$", capsys.readouterr().err, re.M)
    split = "test" if script == "Attributes" else "val"
    file = (config["val_file"] or config["test_file"])[0]
    assert status == 1 and line.startswith(f"error: {split} {file}: ")
    assert OVERFLOWING[script][1] in line
    assert not (tmp_path / "out/log.txt").exists() and not (tmp_path / "out/result").exists()


def test_scores_that_are_not_finite_end_all_processes(overflow, tmp_path):
    command = command_line(overflow("Retrieval"), tmp_path / "two", tmp_path)
    checkpoint = tmp_path / "overflowing.pth"
    two = launch("Retrieval.py", *command, "--evaluate", "--checkpoint", checkpoint)
    assert two.returncode and "error: val " in two.stderr
    assert not (tmp_path / "two/log.txt").exists()


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
        "entry 1 .*has no 'answer', but other entries have",
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
        "objectives names mlm, .* itc, itm",
    ),
    "eos out of the vocabulary": ("VQA", "eos", "</s>", "eos is '</s>', which is not a token"),
    "same question twice": (
        "VQA",
        "test_file",
        [QUESTION, QUESTION],
        "entry 1 .*same question_id 7",
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
        "val_file .*all labels are 1, but the ROC AUC needs both",
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
    "block out of range": ("Grounding", "--block_num", "1", "--block_num 1: .* 2 to 3"),
    "evaluation of pre-trained weights": (
        "VE",
        "--evaluate",
        None,
        "has no cls_head.*a task that trains it",
    ),
    "evaluation of text assignment": ("Pretrain_nlvr", "--evaluate", None, "nothing to evaluate"),
    "long answers": ("VQA", "max_answer_tokens", 40, "max_answer_tokens is 40"),
    "no beams": (
        "VQA",
        "num_beams",
        0,
        "num_beams is 0; it must be a whole number from 1 to 1,000",
    ),
    "unknown sharing": (
        "NLVR",
        "share",
        "some",
        "share is 'some'; it must be one of cross_attention, all, none",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_before_the_first_step(config_of, run, tmp_path, case):
    script, key, value, message = BAD_INPUT[case]
    config, flags = config_of(script), []
    if key.startswith("--"):
        flags = [key] if value is None else [key, value]
    elif isinstance(value, list | dict):
        (tmp_path / "bad.json").write_text(json.dumps(value))
        config[key] = str(tmp_path / "bad.json")
    else:
        config[key] = value
    assert re.search(message, refusal(run, script, config, tmp_path / "run", *flags))
    assert not list((tmp_path / "run").glob("*.pth"))


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
