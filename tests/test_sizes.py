"""Encoders of other sizes, by naming them."""

import json

import pytest
import torch
from conftest import refusal
from safetensors.torch import save_file

from configs.config import as_config
from configs.effects import unread_keys
from configs.load import load_config
from engine.checkpointing import LAST
from models import build_model
from optim import parameter_groups

SIZES = {"vision_width": 16, "vision_depth": 2, "vision_heads": 1, "patch_size": 8}


@pytest.fixture
def encoders(tiny_config, tmp_path):
    """A folder of a BERT without an MLM head, and a file of a ViT, as they are published."""
    model = build_model("pretrain", {**tiny_config, "patch_size": 8})
    state = {name: value.contiguous() for name, value in model.state_dict().items()}

    def part(prefix):
        names = [name for name in state if name.startswith(prefix) and "cross" not in name]
        return {name.removeprefix(prefix): state[name] for name in names}

    bert = {key: tiny_config["bert_config"][key] for key in tiny_config["bert_config"]}
    del bert["fusion_layer"], bert["encoder_width"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps({**bert, "model_type": "bert"}))
    save_file(part("text_encoder.bert."), tmp_path / "bert/model.safetensors")
    save_file(part("visual_encoder."), tmp_path / "vit.safetensors")
    return tmp_path / "bert", tmp_path / "vit.safetensors"


def test_a_run_takes_the_sizes_of_the_encoders_that_it_names(pretrain, encoders, tmp_path, caplog):
    bert, vit = map(str, encoders)
    keys = {**dict.fromkeys((*SIZES, "bert_config", "test_file")), "text_encoder": bert}
    scale = "optimizer.new_lr_scale=5"
    flags = ("--set", "scheduler.epochs=1", scale)
    assert pretrain("--vision_encoder", vit, *flags, **keys) == (0, "")
    content = torch.load(tmp_path / "out" / LAST, weights_only=True)
    saved = content["config"]
    assert {key: saved[key] for key in SIZES} == SIZES
    sizes = saved["bert_config"]
    assert (sizes["hidden_size"], sizes["fusion_layer"], sizes["encoder_width"]) == (16, 2, 16)
    # what had weights began with them; the rest learns faster, also when the run is resumed
    pretrained = content["resume"]["pretrained"]
    assert "visual_encoder.blocks.0.attn.qkv.weight" in pretrained
    assert "text_encoder.bert.encoder.layer.3.attention.self.query.weight" in pretrained
    assert not any(".crossattention." in name or "head" in name for name in pretrained)
    assert {group["lr_scale"] for group in content["optimizer"]["param_groups"]} == {1, 5}
    more = ("--resume", "--set", "scheduler.epochs=2", scale)
    status, notes = pretrain(*more, vision_encoder=vit, **keys)
    assert status == 0 and "configuration of the saved run: scheduler" in notes
    assert torch.load(tmp_path / "out" / LAST, weights_only=True)["epoch"] == 1


def test_sizes_that_are_given_hold(encoders):
    bert, vit = map(str, encoders)
    given = {"text_encoder": bert, "vision_encoder": vit, "vision_heads": 4}
    config = as_config({**given, "bert_config": {"fusion_layer": 3}})
    assert (config.vision_heads, config.vision_width, config.bert.fusion_layer) == (4, 16, 3)
    config = as_config({"vision_encoder": "deit_tiny_patch16_224.fb_in1k"})
    assert (config.vision_width, config.vision_depth, config.vision_heads) == (192, 12, 3)


def test_own_yaml_fits_the_encoders_that_it_names(encoders):
    config = load_config("configs/own.yaml", [f"text_encoder={encoders[0]}"])
    assert (config.bert.encoder_width, config.vision_depth) == (192, 12)
    assert unread_keys("pretrain", config) == []
    assert len(build_model("pretrain", config).visual_encoder.blocks) == 12


def test_encoders_without_sizes_are_named(encoders, tmp_path):
    bert, vit = encoders
    assert "the timm model resnet50 is not a plain ViT" in refusal(
        as_config, {"vision_encoder": "resnet50"}
    )
    save_file({"x": torch.zeros(1)}, vit)
    message = refusal(as_config, {"vision_encoder": str(vit)})
    assert str(vit) in message and "patch_embed" in message
    (bert / "config.json").write_text("{}")
    assert str(bert / "config.json") in refusal(as_config, {"text_encoder": str(bert)})
    (bert / "config.json").unlink()
    assert f"text_encoder: folder {bert}" in refusal(as_config, {"text_encoder": str(bert)})


def test_what_has_no_weights_learns_at_its_own_rate(tiny_config):
    config = as_config({**tiny_config, "optimizer": {"new_lr_scale": 3, "temp_lr_scale": 0.5}})
    model = build_model("pretrain", config)
    model.pretrained = [name for name, _ in model.named_parameters() if "encoder" in name]
    rates = {
        id(param): group["lr_scale"]
        for group in parameter_groups(model, config.optimizer)
        for param in group["params"]
    }
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    assert len(rates) == len(trained)
    for name, param in trained:
        expected = 0.5 if name == "temp" else 1 if "encoder" in name else 3
        assert rates[id(param)] == expected, name
