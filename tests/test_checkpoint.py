"""Loading weights: every conversion, the report, and the errors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForMaskedLM

from models import build_model
from models.albef import Text
from models.checkpoint import (
    condense, interpolate_pos_embed, load_checkpoint, load_text_encoder, load_vision_encoder, read_weights,
)  # fmt: skip
from utils import InputError

BERT = json.load(open("tests/golden/bert.json"))


@pytest.fixture
def model(golden):
    torch.manual_seed(0)
    return build_model("pretrain", {**golden("pretrain.pt")["config"], "bert_config": BERT})


@pytest.fixture(scope="module")
def hugging_face():
    torch.manual_seed(1)
    keys = {key: value for key, value in BERT.items() if key not in ("architectures", "fusion_layer", "encoder_width")}
    return BertForMaskedLM(BertConfig(**keys)).eval()


def test_position_embeddings_are_interpolated_as_released(golden):
    data = golden("pos_embed.pt")
    for name, tokens in (("to_6x6", 37), ("to_3x3", 10)):
        assert torch.allclose(interpolate_pos_embed(data["pos_embed"], tokens), data[name], atol=1e-5)


def old_names(state):
    """The names of BERT files from before 2019."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }


@pytest.mark.parametrize("form", ["folder", "safetensors", "bin", "old bin", "bare encoder"])
def test_bert_is_split_into_text_and_multimodal_encoder(model, hugging_face, tmp_path, form):
    state = {name: value.contiguous().clone() for name, value in hugging_face.state_dict().items()}
    if form == "folder":
        hugging_face.save_pretrained(tmp_path)
        source = tmp_path
    elif form == "safetensors":
        source = tmp_path / "bert.safetensors"
        save_file(state, source)
    else:
        if form == "bare encoder":
            state = {name.removeprefix("bert."): v for name, v in state.items() if name.startswith("bert.")}
        source = tmp_path / "pytorch_model.bin"
        torch.save(old_names(state) if form == "old bin" else state, source)
    report = load_text_encoder(model, source)

    ids = torch.tensor([[2, 8, 9, 10, 0], [2, 30, 31, 32, 33]])
    text = Text(ids, (ids > 0).long())
    with torch.no_grad():
        expected = hugging_face(*text, output_hidden_states=True).hidden_states[BERT["fusion_layer"]]
        text_embeds, _ = model.eval().encode_text(text)
        momentum_embeds, _ = model.encode_text(text, momentum=True)
    real = text.attention_mask.bool()
    assert torch.allclose(text_embeds[real], expected[real], atol=1e-5)
    assert torch.equal(momentum_embeds, text_embeds)
    layers = hugging_face.bert.encoder.layer
    assert torch.equal(model.bert.encoder.layer[3].output.dense.weight, layers[3].output.dense.weight)
    head_loaded = torch.equal(model.text_encoder.cls.predictions.transform.dense.weight,
                              hugging_face.cls.predictions.transform.dense.weight)
    assert head_loaded == (form != "bare encoder")
    assert all("crossattention" in name or "cls.predictions" in name or "position_ids" in name for name in report.new)
    assert sum("crossattention" in name for name in report.new) == 2 * 10
    assert "converted" in str(report) and "new" in str(report)


def test_deit_is_loaded_and_resized(model, tmp_path):
    torch.manual_seed(2)
    deit = VisionTransformer(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    torch.save({"model": deit.state_dict()}, tmp_path / "deit.pth")
    report = load_vision_encoder(model, tmp_path / "deit.pth")
    assert report.resized == ["visual_encoder.pos_embed"]
    assert sorted(report.ignored) == ["head.bias", "head.weight"]
    assert not report.new
    assert torch.equal(model.visual_encoder.blocks[1].mlp.fc1.weight, deit.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.visual_encoder.pos_embed, interpolate_pos_embed(deit.pos_embed, 10))
    assert torch.equal(model.visual_encoder_m.pos_embed, model.visual_encoder.pos_embed)


def test_released_checkpoint_without_position_ids_or_momentum_and_at_another_resolution(golden, tmp_path):
    data = golden("pretrain.pt")
    state = {k: v for k, v in data["state_dict"].items() if "position_ids" not in k and "_m." not in k}
    torch.save(state, tmp_path / "bare.pth")
    model = build_model("pretrain", {**data["config"], "image_res": 64, "bert_config": BERT})
    report = load_checkpoint(model, tmp_path / "bare.pth")
    assert "visual_encoder.pos_embed" in report.resized
    assert len(report.copied) == sum(1 for name in model.state_dict() if "_m." in name and "position_ids" not in name)
    assert torch.equal(model.text_encoder_m.bert.embeddings.word_embeddings.weight,
                       state["text_encoder.bert.embeddings.word_embeddings.weight"])
    assert torch.equal(model.image_queue, state["image_queue"])


def test_missing_weights_are_an_error_unless_allowed(model, golden, tmp_path):
    state = dict(golden("pretrain.pt")["state_dict"])
    for name in [name for name in state if name.startswith("itm_head") or "layer.1.attention.self" in name]:
        del state[name]
    torch.save({"model": state}, tmp_path / "partial.pth")
    with pytest.raises(InputError, match=r"lacks \d+ tensors.*text_encoder.bert.encoder.layer.1.attention.self.*--allow_missing"):
        load_checkpoint(model, tmp_path / "partial.pth")
    report = load_checkpoint(model, tmp_path / "partial.pth", allow_missing=True)
    assert "itm_head.weight" in report.new


def test_checkpoint_of_another_shape_is_named(model, golden, tmp_path):
    state = dict(golden("pretrain.pt")["state_dict"])
    state["vision_proj.weight"] = torch.zeros(4, 16)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"vision_proj.weight has shape \[4, 16\].*\[8, 16\].*embed_dim"):
        load_checkpoint(model, tmp_path / "other.pth")


class Exploit:
    def __reduce__(self):
        return print, ("this must never run",)


def test_unreadable_files_are_one_line(tmp_path, golden, capsys):
    whole = tmp_path / "whole.pth"
    torch.save(golden("pretrain.pt")["state_dict"], whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save({"model": Exploit()}, tmp_path / "evil.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name in ("cut.pth", "text.pth", "cut.safetensors", "evil.pth", "empty.pth", "absent.pth"):
        with pytest.raises(InputError, match=name) as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "this must never run" not in capsys.readouterr().out


def test_report_condenses_numbered_names():
    names = [f"layer.{i}.output.weight" for i in range(12)] + ["temp", "block.3.x"]
    assert condense(names) == ["layer.{0-11}.output.weight", "temp", "block.3.x"]


@pytest.fixture
def pretrained_file(golden, tmp_path):
    """(state, path of a pre-training checkpoint whose momentum weights differ from the base)."""
    data = golden("pretrain.pt")
    torch.save({"model": data["state_dict"]}, tmp_path / "pretrained.pth")
    return data["state_dict"], tmp_path / "pretrained.pth"


def of_task(golden, task, bert="bert"):
    """A model of a task in the size of the golden values, from random weights."""
    return build_model(task, {**golden("vqa.pt")["config"], "bert_config": f"tests/golden/{bert}.json"})


def test_pre_training_fills_the_answer_decoder(golden, pretrained_file):
    state, path = pretrained_file
    model = of_task(golden, "vqa")
    report = load_checkpoint(model, path)
    loaded = model.state_dict()
    for copy in ("", "_m"):
        source = f"text_encoder{copy}.bert.encoder.layer"
        for layer in (0, 1):  # the multimodal layers are 2 and 3
            for name in ("attention.self.query.weight", "crossattention.self.key.weight", "output.LayerNorm.bias"):
                target = loaded[f"text_decoder{copy}.bert.encoder.layer.{layer}.{name}"]
                assert torch.equal(target, state[f"{source}.{layer + 2}.{name}"])
        words = "embeddings.word_embeddings.weight"
        assert torch.equal(loaded[f"text_decoder{copy}.bert.{words}"], state[f"text_encoder{copy}.bert.{words}"])
        head = "cls.predictions.transform.dense.weight"
        assert torch.equal(loaded[f"text_decoder{copy}.{head}"], state[f"text_encoder{copy}.{head}"])
        assert torch.equal(loaded[f"text_encoder{copy}.encoder.layer.3.attention.self.key.bias"],
                           state[f"{source}.3.attention.self.key.bias"])
    assert not report.new and not report.copied
    assert {name.split(".")[0] for name in report.ignored} == {
        "temp", "image_queue", "text_queue", "queue_ptr", "itm_head", "vision_proj", "vision_proj_m", "text_proj", "text_proj_m",
    }  # fmt: skip


@pytest.mark.parametrize("task", ["nlvr", "nlvr_pretrain"])
def test_both_blocks_of_a_pair_are_the_layer_and_momentum_starts_as_the_base(golden, pretrained_file, task):
    state, path = pretrained_file
    model = of_task(golden, task)
    report = load_checkpoint(model, path)
    loaded = model.state_dict()
    for block, layer in {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3}.items():
        name = f"encoder.layer.{block}.attention.self.query.weight"
        assert torch.equal(loaded[f"text_encoder.{name}"], state[f"text_encoder.bert.encoder.layer.{layer}.attention.self.query.weight"])
        if task == "nlvr":
            assert torch.equal(loaded[f"text_encoder_m.{name}"], loaded[f"text_encoder.{name}"])
    assert {name.split(".")[0].removesuffix("_m") for name in report.new} == {"cls_head" if task == "nlvr" else "ta_head"}
    assert "visual_encoder_m.cls_token" in report.ignored


def test_text_assignment_continues_as_nlvr(golden, tmp_path):
    assigned = of_task(golden, "nlvr_pretrain")
    torch.save({"model": assigned.state_dict()}, tmp_path / "assigned.pth")
    model = of_task(golden, "nlvr")
    report = load_checkpoint(model, tmp_path / "assigned.pth")
    state = model.state_dict()
    for name, value in assigned.state_dict().items():
        if name.startswith(("text_encoder", "visual_encoder")):
            base, _, rest = name.partition(".")
            assert torch.equal(state[name], value) and torch.equal(state[f"{base}_m.{rest}"], value)
    assert not report.converted and set(report.new) == {name for name in state if name.startswith("cls_head")}


def test_a_head_may_be_new_in_training_not_in_evaluation(golden, pretrained_file, tmp_path):
    _, path = pretrained_file
    model = of_task(golden, "ve")
    report = load_checkpoint(model, path)
    assert {name.split(".")[0] for name in report.new} == {"cls_head", "cls_head_m"}
    with pytest.raises(InputError, match="pretrained.pth has no cls_head.*fine-tuned"):
        load_checkpoint(model, path, complete=True)
    torch.save({"model": model.state_dict()}, tmp_path / "ve.pth")
    assert not load_checkpoint(of_task(golden, "ve"), tmp_path / "ve.pth", complete=True).new
    state = model.state_dict()
    del state["cls_head.0.weight"]
    torch.save({"model": state}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match="lacks 1 tensors of the model: cls_head.0.weight"):
        load_checkpoint(model, tmp_path / "cut.pth")
