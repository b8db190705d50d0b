"""Configurations, schedules and optimizer groups."""

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from models import build_model
from optim import create_optimizer, parameter_groups
from scheduler import check_schedule, distillation_weight, learning_rate
from configs.schema import load_config, with_defaults
from utils import InputError

CONFIGS = sorted(str(path) for path in Path("configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_its_bert_config_fits(path):
    config = load_config(path)
    bert = json.load(open(config["bert_config"]))
    assert bert["encoder_width"] == config["vision_width"]
    assert config["image_res"] % config["patch_size"] == 0
    check_schedule(config["scheduler"])


def test_pretraining_config_is_the_papers_recipe():
    config = load_config("configs/Pretrain.yaml")
    expected = {"batch_size": 64, "image_res": 256, "queue_size": 65536, "momentum": 0.995, "alpha": 0.4, "temp": 0.07,
                "mlm_probability": 0.15, "embed_dim": 256, "vision_width": 768}
    assert {key: config[key] for key in expected} == expected
    assert config["optimizer"] == {"opt": "adamW", "lr": 1e-4, "weight_decay": 0.02, "temp_lr_scale": 1.0}
    rates = [learning_rate(config["scheduler"], epoch, i, 3000) for epoch, i in ((0, 0), (0, 1001), (29, 0))]
    assert rates == pytest.approx([1e-5, 1e-4, 1.02465e-5], rel=1e-4)


@pytest.mark.parametrize("task", json.load(open("tests/golden/lr.json")))
def test_learning_rates_are_the_released_ones(task):
    golden = json.load(open("tests/golden/lr.json"))[task]
    scheduler = with_defaults({"scheduler": golden["schedular"]})["scheduler"]
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
    scheduler = with_defaults({"scheduler": {"lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 0.0, "epochs": 3, "warmup_iters": 10}})
    rates = [learning_rate(scheduler["scheduler"], t // 50, t % 50, 50) for t in range(150)]
    assert rates[0] == 0 and rates[5] == pytest.approx(5e-4) and rates[10] == pytest.approx(1e-3)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11])) and all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(1e-5, rel=0.05)


def test_alpha_ramps_within_the_first_epoch():
    config = with_defaults({})
    assert [distillation_weight(config, 0, i, 4) for i in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert distillation_weight(config, 1, 0, 4) == 0.4
    assert distillation_weight({**config, "warm_up": False}, 0, 0, 4) == 0.4


def test_released_spelling_and_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train_file: a.json\nschedular: {epochs: 3}\n")
    config = load_config(path, ["scheduler.lr=1e-3", "objectives=[itc, itm]", "train_file=[b.json, c.json]"])
    assert config["scheduler"]["epochs"] == 3 and config["scheduler"]["lr"] == 1e-3
    assert config["objectives"] == ["itc", "itm"] and config["train_file"] == ["b.json", "c.json"]
    assert load_config(path, ["schedular.epochs=5"])["scheduler"]["epochs"] == 5


@pytest.mark.parametrize("text,message", [
    ("quue_size: 5", "unknown key 'quue_size', did you mean queue_size?"),
    ("optimizer: {weigth_decay: 0.1}", "optimizer: unknown key 'weigth_decay', did you mean weight_decay?"),
    ("batch_size: many", "batch_size is 'many', it must be a whole number"),
    ("queue_size: 1,000", "queue_size is '1,000', it must be"),
    ("queue_size: 1.5", "queue_size is 1.5, it must be a"),
    ("hflip: 3", "hflip is 3, it must be true or false"),
    ("momentum: -1", "momentum is -1"),
    ("precision: fp16", "it must be one of fp32, bf16"),
    ("objectives: [itc, mln]", "objectives has 'mln'"),
    ("objectives: []", "objectives is empty"),
    ("scheduler: 3", "scheduler is 3, it must be a mapping"),
    ("a: [1, 2", "line"),
    ("- 1", "mapping of keys"),
])  # fmt: skip
def test_bad_configurations_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(InputError, match=r"bad\.yaml") as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weight_decay_spares_biases_and_one_dimensional_parameters(golden):
    data = golden("pretrain.pt")
    model = build_model("pretrain", {**data["config"], "bert_config": "tests/golden/bert.json"})
    plain, decayed = parameter_groups(model, 0.02)
    names = {id(param): name for name, param in model.named_parameters()}
    assert plain["weight_decay"] == 0 and decayed["weight_decay"] == 0.02
    assert {"temp", "visual_encoder.cls_token", "visual_encoder.pos_embed"} <= {names[id(p)] for p in decayed["params"]}
    assert all(names[id(p)].endswith(".bias") or p.ndim == 1 for p in plain["params"])
    assert not any("_m." in names[id(p)] for group in (plain, decayed) for p in group["params"])


def test_optimizers_and_schedules_by_name():
    model = torch.nn.Linear(2, 2)
    assert type(create_optimizer({"opt": "lamb", "lr": 1e-3, "weight_decay": 0.0, "temp_lr_scale": 1.0}, model)).__name__ == "Lamb"
    with pytest.raises(InputError, match="adamZ"):
        create_optimizer({"opt": "adamZ", "lr": 1e-3, "weight_decay": 0.0, "temp_lr_scale": 1.0}, model)
    with pytest.raises(InputError, match="step"):
        check_schedule({"sched": "step"})


def test_snapshot_can_be_loaded_again(tmp_path):
    from configs.schema import save_config

    config = load_config("configs/Pretrain.yaml")
    save_config(config, tmp_path)
    assert load_config(tmp_path / "config.yaml") == config
    assert YAML(typ="safe").load(tmp_path / "config.yaml")["scheduler"]["epochs"] == 30
