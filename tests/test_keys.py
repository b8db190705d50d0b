"""The tasks that read each key, in configs/config.py, and the notes of a run on keys without
effect.
"""

import importlib
import json
import logging
import sys

import msgspec
import pytest
import torch
from conftest import ROOT, exit_status, refusal
from helpers.tasks import TASKS as DATA
from helpers.training import command_line

import engine.run
from configs.config import (
    FIELDS,
    Config,
    OptimizerConfig,
    SchedulerConfig,
    as_config,
    read_bert_config,
)
from configs.effects import notes, unread_keys
from configs.load import load_config, override
from configs.tasks import TASKS
from dataset.build import build_dataset
from evaluation.retrieval import encode_texts
from inference import load_model
from models import build_model
from models.tokenizer import load_tokenizer

SCRIPTS = {
    "pretrain": "Pretrain",
    "nlvr_pretrain": "Pretrain_nlvr",
    "retrieval": "Retrieval",
    "vqa": "VQA",
    "ve": "VE",
    "nlvr": "NLVR",
    "grounding": "Grounding",
    "relevance": "Relevance",
    "attributes": "Attributes",
}
MORE_DATA = {
    "Pretrain": {"train_file": ["pretrain.json"], "test_file": ["test.json"]},
    "Retrieval": {
        "train_file": ["retrieval_train.json"],
        "val_file": ["val.json"],
        "test_file": ["test.json"],
    },
    "Attributes": {"train_file": None, "test_file": ["attributes.json"]},
}
# by task: keys that shared code reads although they have no effect in the task
READ_IN_VAIN = {
    "vqa": {"image_root"},
    "nlvr_pretrain": {"patience", "temp", "alpha", "warm_up"},
    "attributes": {
        "objectives",
        "hard_negatives",
        "distill",
        "temp",
        "queue_size",
        "gradient_checkpointing",
        "max_words",
    },
}
# keys that are read while loading the file, on a GPU, in a second epoch, at a step that is not
# finite, or without validation
READ_ELSEWHERE = {
    "scheduler.sched",
    "log_every",
    "scheduler.min_lr",
    "max_skipped_steps",
    "keep_checkpoints",
}


def record_reads(monkeypatch):
    """Record the keys of configurations that are read from now on, as section.key in a section."""
    read = set()

    def recorder(fields, prefix):
        def get(section, name):
            if name in fields:
                read.add(prefix + name)
            return object.__getattribute__(section, name)

        return get

    for section, prefix in (
        (Config, ""),
        (OptimizerConfig, "optimizer."),
        (SchedulerConfig, "scheduler."),
    ):
        monkeypatch.setattr(
            section, "__getattribute__", recorder(section.__struct_fields__, prefix), raising=False
        )
    return read


@pytest.fixture
def script(tiny_config, shapes, tmp_path, monkeypatch, capsys, caplog):
    """Run a task's script on its shapes with changed keys. Return (exit status, stderr)."""

    def call(task, *flags, **keys):
        name = SCRIPTS[task]
        data = MORE_DATA.get(name) or DATA[name][0]
        paths = {
            key: [str(shapes / file) for file in files]
            if isinstance(files, list)
            else files and str(shapes / files)
            for key, files in data.items()
        }
        paths |= (
            {"vqa_root": str(shapes)}
            if task == "vqa"
            else {"refcoco_data": str(shapes)}
            if task == "grounding"
            else {}
        )
        used = {
            key: value
            for key, value in (tiny_config | paths).items()
            if key not in unread_keys(task, as_config(tiny_config | paths))
        }
        config = {**used, "scheduler": {"epochs": 1, "warmup_epochs": 0}, **keys}
        argv = [f"{name}.py", *command_line(config, tmp_path / "out", tmp_path), *flags]
        argv += [] if task == "pretrain" or "--checkpoint" in flags else ["--checkpoint", "random"]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        with caplog.at_level(logging.WARNING):
            status = exit_status(importlib.import_module(name).main)
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize("task", TASKS)
def test_the_table_says_which_task_reads_a_key(
    script, pretrained, sharded, shapes, monkeypatch, task
):
    read, choose = record_reads(monkeypatch), engine.run.choose_config

    def choose_config(*args, **options):
        chosen = choose(*args, **options)
        read.clear()  # checks read every key
        return chosen

    monkeypatch.setattr(engine.run, "choose_config", choose_config)
    monkeypatch.setattr(engine.run, "notes", lambda *args: [])
    keys = {}
    if task in ("pretrain", "nlvr_pretrain"):  # of lists and shards
        keys = {"train_file": [str(shapes / "pretrain.json"), sharded]}
    assert (
        script(task, *(["--checkpoint", pretrained] if task == "attributes" else []), **keys)[0]
        == 0
    )
    first = set(read)
    if task == "vqa":
        assert (
            script(task, "--output_dir", pretrained.parent / "generated", answer_list=None)[0] == 0
        )
    table = {name for name, field in FIELDS.items() if task in field.tasks}
    read = (first | read) & FIELDS.keys()
    assert read - table == READ_IN_VAIN.get(task, set())
    assert table - read <= READ_ELSEWHERE
    assert not any(FIELDS[name].training for name in table) or task != "attributes"


def test_the_table_has_every_task():
    assert set(TASKS) == set().union(*(field.tasks for field in FIELDS.values()))


def test_configurations_of_the_repository_have_no_key_in_vain():
    for path in (ROOT / "configs").rglob("*.yaml"):
        name = path.stem.lower()
        task = next(
            (task for task in sorted(TASKS, key=len, reverse=True) if name.startswith(task)),
            "pretrain",
        )
        assert notes(task, load_config(path), [], False) == [], path


def test_keys_that_a_task_does_not_read_are_refused_or_named_once(script, tmp_path):
    for flag in (
        "k_test=3",
        "schedular.decay_rate=0.5",
        "optimizer={temp_lr_scale: 2}",
        "coco_file=a.json",
    ):
        status, message = script("ve", "--set", flag)
        assert status == 2 and flag in message and message.count("\n") == 1
    status, message = script("ve", "--set", "image_embeds=recompute")
    assert "pretrain" in message and "retrieval" in message and not (tmp_path / "out").exists()
    status, message = script(
        "ve", k_test=3, eos="[MASK]", eval_ema=False, coco_file="a.json", max_tokens=20
    )
    (line,) = message.splitlines()
    assert status == 0 and "k_test" in line and "eos" in line
    assert not {"eval_ema", "coco_file", "max_tokens"} & set(
        line.replace(",", " ").replace(":", " ").split()
    )


@pytest.mark.parametrize(
    "task, flags, named",
    [
        ("pretrain", ["shuffle_buffer=9"], "shuffle_buffer"),
        (
            "pretrain",
            ["scheduler.warmup_iters=2", "scheduler.warmup_epochs=9"],
            "scheduler.warmup_epochs",
        ),
        ("pretrain", ["objectives=[itc, itm]", "mlm_probability=0.3"], "mlm_probability"),
        ("ve", ["distill=false", "alpha=0.1"], "alpha"),
        ("ve", ["keep_checkpoints=1"], "keep_checkpoints"),
        ("vqa", ["num_beams=2"], "num_beams"),
        ("vqa", ["max_answer_tokens=5"], "max_answer_tokens"),
        ("vqa", ["answer_list=null", "k_test=3"], "k_test"),
    ],
)
def test_settings_that_others_make_idle_are_named(tiny_config, task, flags, named):
    config = {**tiny_config, "val_file": ["val.json"], "answer_list": "a.json"}
    config = as_config(
        {
            key: value
            for key, value in config.items()
            if key not in unread_keys(task, as_config(config))
        }
    ).to_dict()
    (line,) = notes(task, override(config, flags, "config"), flags, False)
    assert f"{named}:" in line
    (line,) = notes(
        task, override(config, ["accumulate=2"], "config"), ["accumulate=2", "max_tokens=9"], True
    )
    assert "accumulate:" in line


def test_evaluation_does_not_resume(script):
    status, message = script("ve", "--evaluate", "--resume", "--checkpoint", "a.pth")
    assert status == 2 and "--resume" in message and "--evaluate" in message


# --------------------------------------------------------------------------------------------------
# limits of texts


@pytest.fixture
def long_data(tiny_config, shapes, tmp_path):
    """A configuration of every task with texts of 60 words, more than 30 word pieces."""
    words, image = " ".join(["circle"] * 60), "images/test/000000.jpg"
    common = {
        "image": image,
        "caption": words,
        "image_id": 1,
        "text": words,
        "question": words,
        "question_id": 1,
        "dataset": "vqa",
        "answer": ["red"],
        "sentence": words,
        "label": "entailment",
        "query": words,
        "ref_id": 0,
    }
    refs = json.loads((shapes / "grounding_test.json").read_text())

    def config_of(name, **keys):
        entries = [dict(common)]
        if name.startswith("nlvr_pretrain") or name == "pretrain_train":
            entries[0]["caption"] = [words]
        elif name.startswith("nlvr"):
            entries[0] |= {"images": [image] * 2, "label": "True"}
        elif name.startswith("relevance"):
            entries = [common | {"label": label} for label in (0, 1)]
        elif name == "retrieval_test":
            entries[0]["caption"] = [words]
        elif name == "grounding_test":
            entries = [{**entry, "text": words} for entry in refs]
        (tmp_path / "long.json").write_text(json.dumps(entries))
        bert = {**tiny_config["bert_config"], "max_position_embeddings": 200}
        paths = {
            f"{split}_file": [str(tmp_path / "long.json")] for split in ("train", "val", "test")
        }
        more = {
            "vqa_root": str(shapes),
            "refcoco_data": str(shapes),
            "det_file": str(shapes / "refcoco+/dets.json"),
        }
        return as_config({**tiny_config, **paths, **more, "bert_config": bert, **keys})

    return config_of


@pytest.mark.parametrize(
    "name, default",
    [
        ("pretrain_train", 25),
        ("nlvr_pretrain_train", 25),
        ("retrieval_train", 30),
        ("retrieval_test", 30),
        ("grounding_train", 30),
        ("grounding_test", 30),
        ("vqa_train", 25),
        ("vqa_test", 51),
        ("ve_train", 31),
        ("ve_test", 31),
        ("nlvr_train", 31),
        ("nlvr_val", 31),
        ("relevance_train", 64),
        ("relevance_test", 64),
    ],
)
def test_limits_of_texts_are_keys_of_every_task(long_data, name, default):
    def length(**keys):
        config = long_data(name, **keys)
        dataset, tokenizer = build_dataset(*name.rsplit("_", 1), config), load_tokenizer(config)[0]
        if name == "retrieval_test":
            model = build_model("retrieval", config)
            return encode_texts(model, dataset.texts, tokenizer, config, torch.device("cpu"))[
                2
            ].shape[1]
        if name == "vqa_test":
            return dataset.collate_questions([dataset[0]], tokenizer)[1].input_ids.shape[1]
        batch = dataset.collate([dataset[0]], tokenizer)
        return (batch.question if name == "vqa_train" else batch.text).input_ids.shape[1]

    assert length() == default
    assert length(max_tokens=9) == 9 and length(max_tokens=100, max_words=45) == (
        92 if "relevance" in name else 46
    )
    assert length(max_words=5) == (12 if "relevance" in name else 6)


def test_texts_of_which_max_words_leaves_nothing_cannot_be_used(long_data):
    config = long_data("vqa_test", max_words=1)
    (path,) = config.test_file
    entries = json.loads(open(path).read())
    # clean-up keeps leading blanks, each of which counts as a word
    entries[0]["question"] = "  where is the circle?"
    with open(path, "w") as file:
        json.dump(entries, file)
    assert "max_words" in refusal(build_dataset("vqa", "test", config).__getitem__, 0)
    assert (
        build_dataset("vqa", "test", msgspec.structs.replace(config, max_words=3))[0][1].strip()
        == "where"
    )


def test_more_ids_than_the_model_has_positions_are_refused(script):
    status, message = script("ve", "--set", "max_tokens=41")
    assert status == 2 and "max_tokens" in message and "max_position_embeddings" in message


@pytest.mark.parametrize(
    "task, limit",
    [
        ("retrieval", {"max_words": 3}),
        ("retrieval", {"max_tokens": 4}),
        ("ve", {"max_tokens": 4}),
        ("vqa", {"max_words": 3}),
    ],
)
def test_a_loaded_model_reads_as_much_of_a_text_as_it_was_trained_on(
    tiny_config, shapes, tmp_path, task, limit
):
    config = {**tiny_config, **limit}
    model = build_model(task, config, load_tokenizer(config)[0])
    torch.save(
        {"model": model.state_dict(), "config": model.config.to_dict()}, tmp_path / "model.pth"
    )
    model, image = load_model(tmp_path / "model.pth", "cpu"), str(shapes / "images/test/000000.jpg")
    method = {"retrieval": model.match, "ve": model.entails, "vqa": model.answer}[task]
    assert method(image, "a red circle and more") == method(image, "a red circle")
    assert method(image, "a red circle") != method(image, "a red")


# --------------------------------------------------------------------------------------------------
# objectives and negatives


@pytest.mark.parametrize(
    "task, keys, named",
    [
        ("retrieval", {"objectives": ["itc", "mlm"]}, "mlm"),
        ("retrieval", {"distill": ["mlm"]}, "mlm"),
        ("pretrain", {"distill": ["itc", "itm"]}, "itm"),
        ("pretrain", {"objectives": ["itc"], "distill": ["mlm"]}, "mlm"),
        ("ve", {"distill": ["itc"]}, "itc"),
        ("vqa", {"distill": ["itc", "mlm"]}, "itc, mlm"),
    ],
)
def test_objectives_that_a_task_does_not_have_are_refused(tiny_config, task, keys, named):
    message = refusal(build_model, task, {**tiny_config, **keys})
    assert message.startswith([*keys][-1]) and f"names {named}:" in message
    build_model(task, tiny_config)  # its objectives are the default, which fits all tasks


@pytest.mark.parametrize("task", ["pretrain", "nlvr_pretrain", "retrieval"])
def test_batches_without_negatives_are_named_at_the_start(script, tmp_path, task):
    assert "negative" not in script(task)[1]
    status, message = script(task, "--output_dir", tmp_path / "one", "--set", "batch_size=1")
    assert status == 0 and "negative" in message and "batch_size" in message


# --------------------------------------------------------------------------------------------------
# bert_config


def test_misspelled_keys_of_bert_config_are_refused(tiny_config, tmp_path):
    bert = tiny_config["bert_config"]
    for wrong in ("hiden_dropout_prob", "hidden_dropout", "depth"):
        assert wrong in refusal(read_bert_config, {**bert, wrong: 0.9})
    (tmp_path / "bert.json").write_text(json.dumps({**bert, "hiden_dropout_prob": 0.9}))
    message = refusal(read_bert_config, str(tmp_path / "bert.json"))
    assert "did you mean hidden_dropout_prob" in message and "bert.json" in message


def test_the_other_keys_of_hugging_faces_files_are_accepted(tiny_config, tmp_path):
    from transformers import BertConfig

    others = {
        **BertConfig().to_dict(),
        "pooler_num_attention_heads": 12,
        "layer_norm_epsilon": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps({**others, **tiny_config["bert_config"]}))
    own = read_bert_config(tiny_config["bert_config"])
    assert read_bert_config(str(tmp_path / "config.json")) == own
    assert (
        read_bert_config(
            {**tiny_config["bert_config"], "architectures": ["BertModel"], "model_type": "bert"}
        )
        == own
    )
