"""Loading weights: every conversion, the report, and the errors."""

import json
import os
import re
import shutil
import zipfile

import pytest
import torch
from conftest import ROOT, refusal
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForMaskedLM

from configs.load import load_config
from engine.checkpointing import resume
from models import build_model
from models.conversions import interpolate_pos_embed, task_names
from models.tokenizer import build_tokenizer, load_tokenizer
from models.weights import (
    checkpoint_epoch,
    find_checkpoint,
    load_checkpoint,
    load_text_encoder,
    load_vision_encoder,
    read_weights,
    summarize_names,
    write_weights,
)
from tools.export import export_file
from utils import InputError, Text

BERT = json.load(open("tests/golden/bert.json"))


@pytest.fixture
def state(golden):
    """The pre-trained weights of tests/golden, whose momentum weights differ from the base."""
    return dict(golden("pretrain.pt")["state_dict"])


@pytest.fixture
def build(golden):
    """Builds a model of a task in the size of the golden values, from random weights."""
    return lambda task, **keys: build_model(
        task, {**golden("vqa.pt")["config"], "bert_config": BERT, **keys}
    )


@pytest.fixture
def model(golden):
    torch.manual_seed(0)
    return build_model("pretrain", {**golden("pretrain.pt")["config"], "bert_config": BERT})


@pytest.fixture
def load(tmp_path):
    """Writes weights to file.pth, or what else a file may hold, and loads it into a model."""

    def load(model, content, **flags):
        torch.save(content, tmp_path / "file.pth")
        return load_checkpoint(model, tmp_path / "file.pth", **flags)

    return load


@pytest.fixture(scope="module")
def hugging_face():
    torch.manual_seed(1)
    keys = {
        key: value
        for key, value in BERT.items()
        if key not in ("architectures", "fusion_layer", "encoder_width")
    }
    return BertForMaskedLM(BertConfig(**keys)).eval()


def test_position_embeddings_are_interpolated_as_released(golden):
    data = golden("pos_embed.pt")
    for name, tokens in (("to_6x6", 37), ("to_3x3", 10)):
        assert torch.allclose(
            interpolate_pos_embed(data["pos_embed"], tokens), data[name], atol=1e-5
        )


def old_names(state):
    """The names of BERT files from before 2019."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in state.items()
    }


@pytest.mark.parametrize("form", ["folder", "safetensors", "bin", "old bin", "bare encoder"])
@torch.no_grad()
def test_bert_is_split_into_text_and_multimodal_encoder(model, hugging_face, tmp_path, form):
    state = {name: value.contiguous().clone() for name, value in hugging_face.state_dict().items()}
    source = tmp_path / "pytorch_model.bin"
    if form == "folder":
        hugging_face.save_pretrained(tmp_path)
        source = tmp_path
    elif form == "safetensors":
        source = tmp_path / "bert.safetensors"
        save_file(state, source)
    elif form == "bare encoder":
        torch.save(
            {
                name.removeprefix("bert."): v
                for name, v in state.items()
                if name.startswith("bert.")
            },
            source,
        )
    else:
        torch.save(old_names(state) if form == "old bin" else state, source)
    report = load_text_encoder(model.eval(), source)

    ids = torch.tensor([[2, 8, 9, 10, 0], [2, 30, 31, 32, 33]])
    text = Text(ids, (ids > 0).long())
    real, mask = text.attention_mask.bool(), text.attention_mask.bool()[:, None, None]
    output = hugging_face(*text, output_hidden_states=True)
    assert torch.allclose(
        model.encode_text(text)[0][real],
        output.hidden_states[BERT["fusion_layer"]][real],
        atol=1e-5,
    )
    # all layers but for the new cross-attention
    for encoder in (model.text_encoder, model.text_encoder_m):
        hidden = encoder.bert.embeddings(ids)
        for layer, theirs in zip(encoder.bert.encoder.layer, output.hidden_states[1:], strict=True):
            hidden = layer(hidden, mask)
            assert torch.allclose(hidden[real], theirs[real], atol=1e-5)
        head = torch.allclose(encoder.cls.predictions(hidden)[real], output.logits[real], atol=1e-5)
        assert head == (form != "bare encoder")
    assert all(
        "crossattention" in name or "cls.predictions" in name or "position_ids" in name
        for name in report.new
    )
    assert sum("crossattention" in name for name in report.new) == 2 * 10
    assert "converted" in str(report) and "new" in str(report)


@torch.no_grad()
@pytest.mark.parametrize("suffix, size", [(".pth", 48), (".safetensors", 48), (".pth", 64)])
def test_image_embeddings_are_those_of_timm(model, tmp_path, suffix, size):
    torch.manual_seed(3)
    vit = VisionTransformer(
        img_size=size, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=10
    ).eval()
    for param in vit.parameters():
        param.normal_(std=0.2)
    with open(tmp_path / f"vit{suffix}", "wb") as file:
        write_weights(file, suffix, vit.state_dict(), {})
    report = load_vision_encoder(model.eval(), tmp_path / f"vit{suffix}")
    assert report.resized == ["visual_encoder.pos_embed"] * (size != 48)
    assert sorted(report.ignored) == ["head.bias", "head.weight"] and not report.new
    if size != 48:
        vit = VisionTransformer(
            img_size=48, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=10
        ).eval()
        state = read_weights(tmp_path / f"vit{suffix}")
        vit.load_state_dict({**state, "pos_embed": interpolate_pos_embed(state["pos_embed"], 10)})
    image = torch.randn(2, 3, 48, 48)
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        assert torch.allclose(
            encoder.forward_features(image), vit.forward_features(image), atol=1e-5
        )


def test_bert_with_half_a_vocabulary_head_is_refused(model, hugging_face, tmp_path):
    state = hugging_face.state_dict()
    del state["cls.predictions.transform.LayerNorm.bias"]
    torch.save(state, tmp_path / "bert.bin")
    with pytest.raises(
        InputError,
        match=r"lacks 1 tensors .*transform.LayerNorm.bias; check that this is the right file$",
    ):
        load_text_encoder(model, tmp_path / "bert.bin")


def test_another_kind_of_vit_is_refused(model, tmp_path):
    vit = VisionTransformer(
        img_size=48, patch_size=16, embed_dim=16, depth=2, num_heads=2, init_values=1.0
    )
    torch.save(vit.state_dict(), tmp_path / "scaled.pth")
    with pytest.raises(InputError, match=r"no place for: blocks.0.ls1.gamma, .*another kind"):
        load_vision_encoder(model, tmp_path / "scaled.pth")
    torch.save({**vit.state_dict(), "dist_token": vit.cls_token}, tmp_path / "distilled.pth")
    assert "use the plain DeiT" in refusal(load_vision_encoder, model, tmp_path / "distilled.pth")


def test_released_checkpoint_without_position_ids_or_momentum_and_at_another_resolution(
    golden, state, load, tmp_path
):
    state = {
        name: value
        for name, value in state.items()
        if "position_ids" not in name and "_m." not in name
    }
    model = build_model(
        "pretrain", {**golden("pretrain.pt")["config"], "image_res": 64, "bert_config": BERT}
    )
    report = load(model, {"state_dict": state, "epoch": "last"})
    assert checkpoint_epoch(tmp_path / "file.pth") == 0
    assert "visual_encoder.pos_embed" in report.resized
    assert len(report.copied) == sum(
        1 for name in model.state_dict() if "_m." in name and "position_ids" not in name
    )
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(
        model.state_dict()[f"text_encoder_m.{words}"], state[f"text_encoder.{words}"]
    )
    assert torch.equal(model.image_queue, state["image_queue"])


def test_missing_weights_are_an_error_unless_allowed(model, state, load):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in [
        name for name in state if name.startswith("itm_head") or "layer.1.attention.self" in name
    ]:
        del state[name]
    message = refusal(load, model, {"model": state})
    assert "lacks 14 tensors of the model: text_encoder.bert.encoder.layer.1.attention" in message
    assert " and 9 more; " in message and "--allow_missing" in message
    # a refused file changes nothing
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "itm_head.weight" in load(model, {"model": state}, allow_missing=True).new


def test_a_fine_tuned_file_lacks_the_vocabulary_head_alone(model, golden, load):
    message = refusal(load, model, golden("retrieval.pt")["state_dict"])
    names = message.partition("tensors of the model: ")[2].partition(" and ")[0].split(", ")
    assert len(names) == 5 and all(name.startswith("text_encoder.cls.") for name in names)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda value: value[:4], r"has shape \[4, 16\].*\[8, 16\].*embed_dim"),
        (torch.Tensor.int, "has shape .*torch.int32.*torch.float32"),
        (torch.Tensor.to_sparse, "is sparse"),
    ],
)
def test_tensors_of_another_shape_or_kind_are_named(model, state, load, change, message):
    name = "vision_proj.weight"
    with pytest.raises(InputError, match=f"{name} {message}"):
        load(model, {**state, name: change(state[name])})


def test_unreadable_files_are_one_line(tmp_path, state):
    whole = tmp_path / "whole.pth"
    torch.save(state, whole)
    for size in (0, 3, 5000, whole.stat().st_size - 100):
        (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:size])
        assert "cut.pth" in refusal(read_weights, tmp_path / "cut.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    shutil.copy(whole, tmp_path / "changed.pth")
    (tmp_path / "changed.pth.sha256").write_text(f"{0:064x}  changed.pth\n")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name in ("text.pth", "cut.safetensors", "changed.pth", "empty.pth", "absent.pth"):
        assert name in refusal(read_weights, tmp_path / name)


def test_a_compressed_checkpoint_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    torch.save({"model": {"a": torch.zeros(10)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.namelist():
            bomb.writestr(record, plain.read(record))
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("read"))
    assert "compressed records" in refusal(read_weights, tmp_path / "bomb.pth")


def test_a_folder_and_an_address_are_told_from_a_missing_file(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert f"{run}: the folder has no weight file" in refusal(read_weights, run)
    # each one more likely to be meant
    for name in ("checkpoint_10.pth", "checkpoint_last.pth", "checkpoint_best.pth"):
        (run / name).touch()
        assert find_checkpoint(f"{run}/") == run / name
    address = "https://example.org/ALBEF.pth"
    assert "is a URL" in refusal(read_weights, address)
    assert "does not exist" in refusal(read_weights, "ALBEF.pth")


@pytest.mark.parametrize("value", ["x", 5, [1], {}, torch.zeros(2)], ids=str)
def test_a_vocabulary_that_is_none_is_named(tiny_config, tmp_path, value):
    tokenizer, config = load_tokenizer(tiny_config)
    model, path = build_model("pretrain", config, tokenizer), tmp_path / "file.pth"
    torch.save({"model": model.state_dict(), "tokenizer_json": value}, path)
    messages = refusal(load_checkpoint, model, path), refusal(build_tokenizer, path)
    for message in messages:
        assert str(path) in message and re.search("vocabulary|tokenizer_json", message)


def test_a_report_counts_and_names_each_kind(build, state, load, tmp_path):
    report = load(build("ve"), state)
    first, *lines = str(report).splitlines()
    assert first == f"{tmp_path / 'file.pth'}: 240 of 248 tensors loaded"
    counts = {"converted": 180, "new": 8, "ignored": 28}
    assert [line.split(" (")[0] for line in lines] == [f"  {k}: {n}" for k, n in counts.items()]
    assert "temp, image_queue, text_queue, queue_ptr, " in lines[-1] and "and 23 more" in lines[-1]
    assert "text_encoder.bert.embeddings.word_embeddings.weight -> text_encoder." in lines[0]
    assert all(len(getattr(report, kind)) == count for kind, count in counts.items())
    assert summarize_names(["a", "b", "c"], 2) == "a, b and 1 more"
    assert summarize_names(["a", "b"], 2) == "a, b"


def first_parts(names):
    return {name.split(".")[0] for name in names}


def test_pre_training_fills_the_answer_decoder(build, state, load):
    model = build("vqa")
    report = load(model, {"model": state})
    loaded = model.state_dict()
    for copy in ("", "_m"):
        source, decoder = f"text_encoder{copy}", f"text_decoder{copy}"
        key = "encoder.layer.3.attention.self.key.bias"
        pairs = {f"{source}.{key}": f"bert.{key}"}
        for layer in (0, 1):  # the multimodal layers are 2 and 3
            for name in (
                "attention.self.query.weight",
                "crossattention.self.key.weight",
                "output.LayerNorm.bias",
            ):
                pairs[f"{decoder}.bert.encoder.layer.{layer}.{name}"] = (
                    f"bert.encoder.layer.{layer + 2}.{name}"
                )
        for name in (
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.transform.dense.weight",
        ):
            pairs[f"{decoder}.{name}"] = name
        assert all(
            torch.equal(loaded[name], state[f"{source}.{old}"]) for name, old in pairs.items()
        )
    assert not report.new and not report.copied
    assert first_parts(report.ignored) == {
        "temp",
        "image_queue",
        "text_queue",
        "queue_ptr",
        "itm_head",
        "vision_proj",
        "vision_proj_m",
        "text_proj",
        "text_proj_m",
    }


@pytest.mark.parametrize(
    "task, head", [("nlvr", {"cls_head", "cls_head_m"}), ("nlvr_pretrain", {"ta_head"})]
)
def test_both_blocks_of_a_pair_are_the_layer_and_momentum_starts_as_the_base(
    build, state, load, task, head
):
    model = build(task)
    report = load(model, {"model": state})
    loaded = model.state_dict()
    for block, layer in {0: 0, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3}.items():
        name = f"encoder.layer.{block}.attention.self.query.weight"
        old = f"text_encoder.bert.encoder.layer.{layer}.attention.self.query.weight"
        assert torch.equal(loaded[f"text_encoder.{name}"], state[old])
        if task == "nlvr":
            assert torch.equal(loaded[f"text_encoder_m.{name}"], loaded[f"text_encoder.{name}"])
    assert first_parts(report.new) == head
    assert "visual_encoder_m.cls_token" in report.ignored


def test_text_assignment_continues_as_nlvr(build, load):
    assigned, model = build("nlvr_pretrain").state_dict(), build("nlvr")
    report = load(model, {"model": assigned})
    loaded = model.state_dict()
    for name, value in assigned.items():
        if name.startswith(("text_encoder", "visual_encoder")):
            base, _, rest = name.partition(".")
            assert torch.equal(loaded[name], value) and torch.equal(
                loaded[f"{base}_m.{rest}"], value
            )
    assert not report.converted and set(report.new) == {
        name for name in loaded if name.startswith("cls_head")
    }


def test_a_head_may_be_new_in_training_not_in_evaluation(build, state, load):
    model = build("ve")
    assert first_parts(load(model, {"model": state}).new) == {"cls_head", "cls_head_m"}
    for task, lacking in (
        ("ve", "cls_head, which the evaluation of this task needs"),
        ("vqa", "text_decoder, which the evaluation of this task needs"),
    ):
        with pytest.raises(InputError, match=f"file.pth has no {lacking}"):
            load(build(task), {"model": state}, complete=True)
    tuned = model.state_dict()
    assert not load(build("ve"), {"model": tuned}, complete=True).new
    del tuned["cls_head.0.weight"]
    assert "lacks 1 tensors of the model: cls_head.0.weight" in refusal(
        load, model, {"model": tuned}
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_precision_and_order_do_not_matter(model, state, tmp_path, suffix):
    halves = {
        f"module._orig_mod.{name}": value.half() if value.is_floating_point() else value
        for name, value in state.items()
    }
    with open(tmp_path / f"half{suffix}", "wb") as file:
        write_weights(file, suffix, dict(reversed(halves.items())), {})
    report = load_checkpoint(model, tmp_path / f"half{suffix}")
    assert not report.new and not report.ignored and not report.converted
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype and torch.equal(
            value, state[name].half().to(value.dtype)
        ), name


def test_files_of_before_torch_1_6_load(model, state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert len(load_checkpoint(model, tmp_path / "old.pth").loaded) == len(state)
    assert torch.equal(model.itm_head.weight, state["itm_head.weight"])


def test_queues_of_another_size_start_anew_together_with_their_pointer(golden, load):
    data, queues = golden("retrieval.pt"), {"image_queue", "text_queue", "idx_queue", "queue_ptr"}
    state, size = (
        {**data["state_dict"], "queue_ptr": torch.tensor([3])},
        data["config"]["queue_size"],
    )
    # the others are of no use without it
    alone = {name: value for name, value in state.items() if name != "text_queue"}
    for weights, queue_size, new in (
        (state, size, False),
        (state, size + 2, True),
        (alone, size, True),
    ):
        model = build_model(
            "retrieval", {**data["config"], "bert_config": BERT, "queue_size": queue_size}
        )
        before = {name: model.state_dict()[name].clone() for name in queues}
        assert set(load(model, weights).new) == (queues if new else set())
        assert all(
            torch.equal(model.state_dict()[name], before[name] if new else state[name])
            for name in queues
        )


def test_a_momentum_module_is_missing_as_a_whole_or_not_at_all(model, state, load):
    report = load(
        model,
        {name: value for name, value in state.items() if not name.startswith("text_encoder_m.")},
    )
    assert report.copied and all(name.startswith("text_encoder_m.") for name in report.copied)
    assert all(
        torch.equal(model.state_dict()[name], state[name.replace("_m.", ".", 1)])
        for name in report.copied
    )
    assert torch.equal(model.visual_encoder_m.pos_embed, state["visual_encoder_m.pos_embed"])
    lost = "text_encoder_m.bert.encoder.layer.1.output.dense.weight"
    del state[lost]
    assert f"lacks 1 tensors of the model: {lost}" in refusal(load, model, state)
    assert load(model, state, allow_missing=True).copied == [lost]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_weights_that_no_training_gives_are_refused(model, state, load, value):
    name = "visual_encoder.blocks.1.attn.qkv.weight"
    weight, row = state[name], torch.tensor([3])
    state[name] = weight.to("meta") if value is None else weight.index_fill(0, row, value)
    message = refusal(load, model, {"model": state})
    assert f"file.pth: 1 tensors ({name}) hold NaN or infinity" in message


@pytest.mark.parametrize("allow_missing", [False, True])
def test_a_head_of_another_task_is_called_so(build, load, allow_missing):
    with pytest.raises(
        InputError,
        match=r"cls_head.2.weight has shape \[3, 16\] .* \[2, 16\].*image_res.*bert_config",
    ):
        load(build("nlvr"), build("ve").state_dict(), allow_missing=allow_missing)


def test_weights_without_a_place_are_an_error(build, load):
    """They would be left out silently: layers of a pair would stand for layers, cross-attention
    would be lost.
    """
    with pytest.raises(InputError, match=r"no place for: text_encoder.encoder.layer.4.*two images"):
        load(build("ve"), build("nlvr_pretrain").state_dict())
    earlier = build("ve", bert_config={**BERT, "fusion_layer": 1}).state_dict()
    with pytest.raises(
        InputError,
        match=r"no place for: text_encoder.encoder.layer.1.crossattention.*fusion_layer",
    ):
        load(build("ve"), earlier)
    assert load(build("ve"), earlier, allow_missing=True).ignored


def test_pairs_that_share_more_than_those_of_the_file_are_refused(build, load):
    states = {
        share: build("nlvr", share=share).state_dict()
        for share in ("none", "cross_attention", "all")
    }
    for share, source in (("cross_attention", "none"), ("all", "none"), ("all", "cross_attention")):
        with pytest.raises(
            InputError,
            match=r"layer.3.* and .*layer.2.* differ, but the model shares them .*key share",
        ):
            load(build("nlvr", share=share), states[source])
        load(build("nlvr", share=source), states[share])


# --------------------------------------------------------------------------------------------------
# malicious files


class Attack:
    """Pickled, a command that creates the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["evil.pth", "evil.bin", "evil.safetensors"])
def test_malicious_files_are_not_run_by_any_reader(model, tmp_path, name, zipped):
    trace, path, folder = tmp_path / "trace", tmp_path / name, tmp_path / "folder"
    folder.mkdir()
    content = {"model": {"weight": torch.ones(1), "more": Attack(trace)}, "config": {}}
    for file in (path, folder / "pytorch_model.bin", tmp_path / "works.pth"):
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
    torch.load(tmp_path / "works.pth", weights_only=False)
    assert trace.exists()  # the attack works where pickles are trusted
    trace.unlink()
    (tmp_path / "evil.yaml").write_text(
        f"image_res: !!python/object/apply:os.system ['touch {trace}']\n"
    )
    for read in (
        lambda: read_weights(path),
        lambda: checkpoint_epoch(path),
        lambda: load_checkpoint(model, path),
        lambda: load_text_encoder(model, path),
        lambda: load_text_encoder(model, folder),
        lambda: load_vision_encoder(model, path),
        lambda: load_vision_encoder(model, folder),
        lambda: resume(path, None),
        lambda: export_file(path, tmp_path / "out.safetensors"),
        lambda: build_tokenizer(str(path)),
        lambda: load_config(tmp_path / "evil.yaml"),
    ):
        with pytest.raises(InputError, match=r"evil|pytorch_model"):
            read()
        assert not trace.exists()


def test_no_script_reads_a_file_in_another_way():
    """Checkpoints and the index of a search are read by read_checkpoint, without running what they
    hold.

    YAML is read by load_config, REFER's pickle by an unpickler that imports nothing.
    """
    found = {}
    for path in ROOT.rglob("*.py"):
        if not {".venv", "tests"} & set(path.relative_to(ROOT).parts):
            for name in re.findall(
                r"torch\.load\b|torch\.hub|pickle\.loads?\b|Unpickler\)|YAML\(.*\)\.load",
                path.read_text(),
            ):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert found.pop("torch.load") == ["models/weights.py"]
    assert found == {
        'YAML(typ="safe").load': ["configs/load.py"],
        "Unpickler)": ["dataset/refer.py"],
    }


def test_both_text_encoders_of_retrieval_have_their_names_in_pretraining(tiny_config):
    weights = build_model("retrieval", tiny_config).state_dict()
    names = task_names(build_model("pretrain", tiny_config), weights)
    for encoder in ("text_encoder", "text_encoder_m"):
        rest = "embeddings.word_embeddings.weight"
        assert names[f"{encoder}.bert.{rest}"] == f"{encoder}.{rest}"
