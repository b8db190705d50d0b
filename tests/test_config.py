"""Configurations, schedules and optimizer groups."""

import json
import os
from itertools import pairwise

import pytest
import torch
from conftest import ROOT, refusal
from msgspec.structs import replace
from transformers import BertConfig

from configs.config import Config, OptimizerConfig, as_config, read_bert_config
from configs.effects import unread_keys
from configs.load import load_config, override
from configs.tasks import TASKS
from inference import load_model
from models import build_model
from optim import create_optimizer, parameter_groups
from scheduler import learning_rate

# own.yaml names a BERT of the hub: test_sizes loads it with another one
CONFIGS = [path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "own"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_fits_its_bert_config_and_has_no_key_in_vain(path):
    config, names = load_config(path), sorted(TASKS, key=len, reverse=True)
    assert config.bert_config.encoder_width == config.vision_width
    task = next((name for name in names if path.stem.lower().startswith(name)), "pretrain")
    assert unread_keys(task, config) == []


def test_pretraining_config_is_the_papers_recipe():
    config = load_config("configs/Pretrain.yaml").to_dict()
    expected = {
        "batch_size": 64,
        "image_res": 256,
        "queue_size": 65536,
        "momentum": 0.995,
        "alpha": 0.4,
        "temp": 0.07,
        "mlm_probability": 0.15,
        "embed_dim": 256,
        "vision_width": 768,
    }
    assert {key: config[key] for key in expected} == expected
    expected = {
        "opt": "adamW",
        "lr": 1e-4,
        "weight_decay": 0.02,
        "temp_lr_scale": 1,
        "new_lr_scale": 1,
        "opt_eps": None,
        "opt_betas": None,
    }
    assert config["optimizer"] == expected
    rates = [
        learning_rate(config["scheduler"], epoch, i, 3000)
        for epoch, i in ((0, 0), (0, 1001), (29, 0))
    ]
    assert rates == pytest.approx([1e-5, 1e-4, 1.02465e-5], rel=1e-4)


def test_released_configs_are_the_released_ones():
    assert load_config("configs/Grounding.yaml").test_file == (
        "data/refcoco+_val.json",
        "data/refcoco+_test.json",
    )
    assert load_config("configs/NLVR_pretrain.yaml").batch_size == 64
    all_images, four_million = (
        load_config("configs/Pretrain.yaml"),
        load_config("configs/Pretrain_4M.yaml"),
    )
    assert replace(all_images, train_file=four_million.train_file) == four_million != all_images


@pytest.mark.parametrize("task", json.load(open("tests/golden/lr.json")))
def test_learning_rates_are_the_released_ones(task):
    golden = json.load(open("tests/golden/lr.json"))[task]
    scheduler = as_config({"scheduler": golden["schedular"]}).to_dict()["scheduler"]
    iterations, epochs = golden["iterations_per_epoch"], golden["schedular"]["epochs"]
    changes, last = [], None
    for epoch in range(epochs):
        for iteration in range(iterations):
            rate = learning_rate(scheduler, epoch, iteration, iterations)
            if rate != last:
                changes.append([epoch, iteration, rate])
            last = rate
    assert [c[:2] for c in changes] == [c[:2] for c in golden["changes"]]
    assert [c[2] for c in changes] == pytest.approx([c[2] for c in golden["changes"]], rel=1e-9)


def test_smooth_schedule_warms_up_and_ends_at_the_minimum():
    scheduler = as_config(
        {
            "scheduler": {
                "lr": 1e-3,
                "min_lr": 1e-5,
                "warmup_lr": 0.0,
                "epochs": 3,
                "warmup_iters": 10,
            }
        }
    ).to_dict()
    rates = [learning_rate(scheduler["scheduler"], t // 50, t % 50, 50) for t in range(150)]
    assert rates[0] == 0 and rates[5] == pytest.approx(5e-4) and rates[10] == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-5, rel=0.05)


def test_released_spelling_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_file: a.json\nschedular: {epochs: 3}\nbatch_size_train: 8\n")
    config = load_config(
        path, ["scheduler.min_lr=1e-3", "objectives=[itc, itm]", "train_file=[b.json, c.json]"]
    )
    assert config.scheduler.epochs == 3 and config.scheduler.min_lr == 1e-3
    assert config.batch_size == 8 and config.objectives == ("itc", "itm")
    assert config.train_file == ("b.json", "c.json")
    assert load_config(path, ["schedular.epochs=5"]).scheduler.epochs == 5
    # what it does not name stays
    assert load_config(path, ["scheduler={min_lr: 0.5}"]).scheduler.epochs == 3


@pytest.mark.parametrize(
    "keys, flags",
    [
        ({"optimizer": {"lr": 2e-3}}, []),
        ({"optimizer": None, "scheduler": {"lr": 2e-3}}, []),
        ({"optimizer": {"lr": 2e-3}, "schedular": {"lr": 2e-3}}, []),
        ({"optimizer": {"lr": 1e-3}, "scheduler": {"lr": 1e-3}}, ["optimizer.lr=2e-3"]),
        ({"optimizer": {"lr": 1e-3}, "scheduler": {"lr": 1e-3}}, ["scheduler.lr=2e-3"]),
        (
            {"optimizer": {"lr": 1e-3}, "scheduler": None, "schedular": {"lr": 1e-3}},
            ["schedular.lr=2e-3"],
        ),
        ({"batch_size": 16}, []),
        ({"batch_size": None, "batch_size_train": 16}, []),
        ({"batch_size": 8}, ["batch_size_train=16"]),
        ({"batch_size_train": 8}, ["batch_size=16"]),
    ],
)
def test_two_names_of_a_key_are_one_key(keys, flags):
    config = override(keys, flags, "config")
    if "optimizer" in keys:
        assert config.optimizer.lr == config.to_dict()["scheduler"]["lr"] == 2e-3
    else:
        assert config.batch_size == 16 and "batch_size_train" not in config.to_dict()


def saved(folder):
    """The last checkpoint of the run of the fixture pretrain."""
    return torch.load(folder / "out/checkpoint_last.pth", weights_only=True)


def assert_loads_again(folder):
    """Asserts that the configurations in config.yaml and in the checkpoint build the model of the
    checkpoint.
    """
    state = saved(folder)
    for config in load_config(folder / "out/config.yaml"), state["config"]:
        build_model("pretrain", config).load_state_dict(state["model"])


def test_settings_reach_the_model_and_the_optimizer_and_a_run_folder_needs_no_other_file(
    pretrain, tmp_path, monkeypatch
):
    optimizer = "optimizer.opt_eps=1e-6", "optimizer.opt_betas=[0.8, 0.95]"
    flags = "--set", "test_file=null", "scheduler.epochs=1", "bert_config.intermediate_size=24"
    assert pretrain(*flags, *optimizer) == (0, "")
    state = saved(tmp_path)
    name = "text_encoder.bert.encoder.layer.0.intermediate.dense.weight"
    assert state["model"][name].shape == (24, 16)
    for group in state["optimizer"]["param_groups"]:
        assert group["eps"] == 1e-6 and tuple(group["betas"]) == (0.8, 0.95)
    monkeypatch.setattr("configs.config.ROOT", tmp_path / "moved away")
    (tmp_path / "bert.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_loads_again(tmp_path)
    load_model(tmp_path / "out", "cpu")


@pytest.mark.parametrize("in_file", [True, False])
def test_the_size_of_the_vocabulary_is_the_tokenizers_where_it_is_auto(
    pretrain, tiny_config, tmp_path, in_file
):
    bert = {**tiny_config["bert_config"], "vocab_size": "auto"}
    flags = [] if in_file else ["bert_config.vocab_size=auto"]
    keys = {"bert_config": bert} if in_file else {}
    assert pretrain("--set", "test_file=null", "scheduler.epochs=1", *flags, **keys) == (0, "")
    size = saved(tmp_path)["config"]["bert_config"]["vocab_size"]
    assert size == tiny_config["bert_config"]["vocab_size"]
    assert_loads_again(tmp_path)
    config = {**tiny_config, "bert_config": bert}
    assert "vocab_size is auto" in refusal(build_model, "pretrain", config)


@pytest.mark.parametrize(
    "key, value, hint",
    [
        ("hiden_dropout_prob", 0.9, "did you mean hidden_dropout_prob?"),
        ("hidden_dropout", 0.9, ""),
        ("depth", 3, ""),
        (".depth", 3, ""),
        ("intermediate_size", "many", "'many'"),
        ("vocab_size", 0, "0"),
        ("hidden_size", 2**40, ""),
        ("num_hidden_layers", 2**40, ""),
        ("vocab_size", 2**40, ""),
        ("max_position_embeddings", 2**40, ""),
        ("type_vocab_size", 2**40, ""),
    ],
)
def test_mistakes_in_bert_config_are_named(tiny_config, key, value, hint):
    bert = tiny_config["bert_config"]
    for function, *given in (
        (read_bert_config, {**bert, key: value}),
        (override, {"bert_config": bert}, [f"bert_config.{key}={value}"], "config"),
    ):
        message = refusal(function, *given)
        assert key in message and hint in message


def test_of_keys_in_hugging_faces_files_only_misspelled_ones_are_refused(tiny_config, tmp_path):
    own, path = tiny_config["bert_config"], tmp_path / "bert.json"
    others = {"pooler_num_attention_heads": 12, "layer_norm_epsilon": 1e-5}
    path.write_text(json.dumps({**BertConfig().to_dict(), **others, **own}))
    assert read_bert_config(str(path)) == read_bert_config(own)
    path.write_text(json.dumps({**own, "hiden_dropout_prob": 0.9}))
    message = refusal(read_bert_config, str(path))
    assert "did you mean hidden_dropout_prob" in message and "bert.json" in message


def test_a_configuration_is_a_value():
    given = {"distill": ["itc"], "scheduler": {"epochs": 3}}
    config = as_config(given)
    given["distill"].append("mlm")
    assert config.distill == ("itc",) and as_config(config) is config
    with pytest.raises(AttributeError):
        config.batch_size = 8
    with pytest.raises(AttributeError):
        config.optimizer.lr = 8
    changed = replace(config, batch_size=8)
    assert (config.batch_size, changed.batch_size, changed.scheduler.epochs) == (None, 8, 3)
    again = as_config(changed.to_dict())
    assert again == changed and hash(again) == hash(changed) and again != config
    assert Config() == as_config({}) == as_config({"scheduler": None})


@pytest.mark.parametrize(
    "text,message",
    [
        ("quue_size: 5", "unknown key 'quue_size'; did you mean queue_size?"),
        (
            "optimizer: {weigth_decay: 0.1}",
            "unknown key 'optimizer.weigth_decay'; did you mean optimizer.weight_decay?",
        ),
        ("batch_size: many", "batch_size is 'many'; it must be a whole number"),
        ("queue_size: 1,000", "queue_size is '1,000'; it must be"),
        ("queue_size: 1.5", "queue_size is 1.5; it must be a"),
        (
            "save_every: 15 mins",
            "save_every is '15 mins'; it must be minutes or iterations, such as 15 minutes",
        ),
        ("save_every: 1.5 iterations", "save_every is '1.5 iterations'; it must be"),
        ("save_every: -1", "save_every is -1; it must be"),
        ("hflip: 3", "hflip is 3; it must be true or false"),
        ("temp: 0", "temp is 0; it must be a number from 0.001 to 0.5"),
        ("temp: 1.0e+9", "temp is 1000000000.0"),
        ("vision_depth: 10000000", "vision_depth is 10000000"),
        ("queue_size: 1099511627776", "queue_size is 1099511627776"),
        ("num_workers: 1000000", "num_workers is 1000000"),
        # beyond a machine word
        ("batch_size: 1180591620717411303424", "batch_size is 1180591620717411303424"),
        ("momentum: -1", "momentum is -1"),
        ("precision: fp16", "it must be one of fp32, bf16"),
        (
            "objectives: [itc, mln]",
            "objectives is ['itc', 'mln']; it must be a list of one or more of itc, mlm, itm",
        ),
        ("objectives: []", "objectives is []"),
        ("scheduler: 3", "scheduler is 3; it must be a mapping"),
        ("scheduler: {sched: step}", "scheduler.sched is 'step'; it must be cosine"),
        ("a: [1, 2", "line"),
        ("- 1", "mapping of keys"),
    ],
)
def test_bad_configurations_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    refused = refusal(load_config, path)
    assert message in refused and "bad.yaml" in refused


def test_only_regular_files_are_configurations(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # open() would wait for a writer
    for path in ("/dev/zero", str(tmp_path / "fifo"), str(tmp_path)):
        assert path in refusal(load_config, path)
        assert path in refusal(read_bert_config, path)


def test_weight_decay_spares_biases_and_one_dimensional_parameters(golden):
    data = golden("pretrain.pt")
    model = build_model("pretrain", {**data["config"], "bert_config": "tests/golden/bert.json"})
    plain, decayed = parameter_groups(model, OptimizerConfig())
    names = {id(param): name for name, param in model.named_parameters()}
    assert plain["weight_decay"] == 0 and decayed["weight_decay"] == 0.02
    assert {"temp", "visual_encoder.cls_token", "visual_encoder.pos_embed"} <= {
        names[id(p)] for p in decayed["params"]
    }
    assert all(names[id(p)].endswith(".bias") or p.ndim == 1 for p in plain["params"])
    assert not any("_m." in names[id(p)] for group in (plain, decayed) for p in group["params"])


def test_optimizers_by_name():
    model = torch.nn.Linear(2, 2)
    assert type(create_optimizer({"opt": "lamb"}, model)).__name__ == "Lamb"
    assert "adamZ" in refusal(create_optimizer, {"opt": "adamZ"}, model)
    betas = {"opt": "sgd", "opt_betas": [0.8, 0.95]}
    assert "sgd has no option betas" in refusal(create_optimizer, betas, model)


def test_files_of_the_repository_are_found_from_any_folder(tmp_path, monkeypatch):
    here = load_config("configs/Pretrain.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/Pretrain.yaml") == here
    assert as_config({"bert_config": "configs/config_bert.json"}).bert_config == here.bert_config
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/Pretrain.yaml").write_text("batch_size: 3")
    assert load_config("configs/Pretrain.yaml").batch_size == 3
