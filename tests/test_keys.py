"""The tasks that read each key, in configs/config.py, and the notes of a run on keys without
effect.
"""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import refusal
from helpers.tasks import data_of

import engine.run
from configs.config import (
    FIELDS,
    Config,
    OptimizerConfig,
    SchedulerConfig,
    as_config,
)
from configs.effects import refuse_unread, unread_keys
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


def read_alone(task, config):
    """The configuration with defaults in place of the keys that a task does not read."""
    unread = unread_keys(task, as_config(config))
    return {**config, **{name: FIELDS[name].default for name in unread if name in config}}


@pytest.fixture
def script(run_script, tiny_config, few_shapes):
    """Run a task's script on its shapes with changed keys. Return (exit status, stderr)."""

    def start(task, *flags, **keys):
        config = read_alone(task, {**tiny_config, **data_of(SCRIPTS[task], few_shapes)})
        config["scheduler"] = {"epochs": 1, "warmup_epochs": 0}
        if task != "pretrain" and "--checkpoint" not in flags:
            flags = *flags, "--checkpoint", "random"
        return run_script(SCRIPTS[task], *flags, **{**config, **keys})

    return start


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
    monkeypatch.setattr(engine.run, "unread_keys", lambda *args: [])
    flags, keys = [], {}
    if task in ("pretrain", "nlvr_pretrain"):  # of lists and shards
        keys["train_file"] = [str(shapes / "pretrain.json"), sharded]
    if task == "attributes":
        flags = ["--checkpoint", pretrained]
    assert script(task, *flags, **keys)[0] == 0
    known = set(read)
    if task == "vqa":
        folder = pretrained.parent / "generated"
        assert script(task, "--output_dir", folder, answer_list=None)[0] == 0
    read = (known | read) & FIELDS.keys()
    table = {name for name, field in FIELDS.items() if task in field.tasks}
    assert read - table == READ_IN_VAIN.get(task, set())
    assert table - read <= READ_ELSEWHERE
    assert not any(FIELDS[name].training for name in table) or task != "attributes"


def test_the_table_has_every_task():
    assert set(TASKS) == set().union(*(field.tasks for field in FIELDS.values()))


@pytest.mark.parametrize(
    "flag, words",
    [
        ("k_test=3", []),
        ("schedular.decay_rate=0.5", []),
        ("optimizer={temp_lr_scale: 2}", []),
        ("coco_file=a.json", []),
        ("image_embeds=recompute", ["pretrain", "retrieval"]),
    ],
)
def test_keys_that_a_task_does_not_read_are_refused(flag, words):
    message = refusal(refuse_unread, "ve", [flag])
    assert all(word in message for word in [flag, *words])


def test_keys_that_a_task_does_not_read_end_or_are_named_once_in_a_run(script, tmp_path):
    assert script("ve", "--set", "k_test=3")[0] == 2 and not (tmp_path / "out").exists()
    keys = {"eval_ema": False, "coco_file": "a.json", "max_tokens": 20}
    status, message = script("ve", k_test=3, eos="[MASK]", **keys)
    assert (status, message) == (0, "note: task ve does not read k_test, eos\n")


def test_evaluation_does_not_resume(script):
    status, message = script("ve", "--evaluate", "--resume", "--checkpoint", "a.pth")
    assert status == 2 and "--resume" in message and "--evaluate" in message


# --------------------------------------------------------------------------------------------------
# limits of texts


@pytest.fixture
def long_data(tiny_config, shapes, tmp_path):
    """A configuration of a data set whose texts have 60 words, more than 30 word pieces."""
    keys = ("caption", "text", "question", "sentence", "query")
    bert = {**tiny_config["bert_config"], "max_position_embeddings": 200}

    def config_of(name, text="circle " * 60, **more):
        task, split = name.rsplit("_", 1)
        data = data_of(SCRIPTS[task], shapes)
        entries = json.loads(Path(*data[f"{split}_file"]).read_text())
        for entry in entries:
            entry |= {key: [text] if key == "caption" else text for key in keys if key in entry}
        (tmp_path / "long.json").write_text(json.dumps(entries))
        data[f"{split}_file"] = [str(tmp_path / "long.json")]
        return as_config({**tiny_config, **data, "bert_config": bert, **more})

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
            texts = encode_texts(model, dataset.texts, tokenizer, config, torch.device("cpu"))
            return texts[2].shape[1]
        if name == "vqa_test":
            return dataset.collate_questions([dataset[0]], tokenizer)[1].input_ids.shape[1]
        batch = dataset.collate([dataset[0]], tokenizer)
        return (batch.question if name == "vqa_train" else batch.text).input_ids.shape[1]

    parts = 2 if "relevance" in name else 1  # query and words, each with a token before it
    assert length() == default
    assert length(max_tokens=9) == 9
    assert length(max_tokens=100, max_words=45) == parts * 46
    assert length(max_words=5) == parts * 6


def test_texts_of_which_max_words_leaves_nothing_cannot_be_used(long_data):
    # clean-up keeps leading blanks, each of which counts as a word
    config = long_data("vqa_test", "  where is the circle?", max_words=1)
    assert "max_words" in refusal(build_dataset("vqa", "test", config).__getitem__, 0)
    config = msgspec.structs.replace(config, max_words=3)
    assert build_dataset("vqa", "test", config)[0][1].strip() == "where"


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
    assert message.startswith([*keys][-1]) and f"names {named}, but" in message
    build_model(task, tiny_config)  # its objectives are the default, which fits all tasks


@pytest.mark.parametrize("task", ["pretrain", "nlvr_pretrain", "retrieval"])
def test_batches_without_negatives_are_named_at_the_start(script, tmp_path, task):
    assert "negative" not in script(task)[1]
    status, message = script(task, "--output_dir", tmp_path / "one", "--set", "batch_size=1")
    assert status == 0 and "negative" in message and "batch_size" in message
