"""Signs of a run that does not learn: each is one line, once. test_learning has a run without."""

import json
from types import SimpleNamespace

import pytest

from configs.config import as_config
from dataset.build import build_dataset
from engine.overview import describe_data, describe_weights
from engine.signs import text_signs, warn_of_training
from models import build_model
from models.tokenizer import load_tokenizer


def test_a_run_that_does_not_learn_says_so_once(pretrain, shapes, tmp_path):
    """All entries are the same pair, so that there is nothing to tell apart."""
    entry = json.loads((shapes / "pretrain.json").read_text())[0]
    (tmp_path / "same.json").write_text(json.dumps(48 * [{**entry, "caption": "a red circle"}]))
    keys = {"min_scale": 1.0, "randaugment": False, "hflip": False, "test_file": None}
    flags = ["scheduler={epochs: 20, warmup_iters: 10}", "keep_checkpoints=1"]
    flags += ["bert_config.hidden_dropout_prob=0", "bert_config.attention_probs_dropout_prob=0"]
    status, notes = pretrain("--set", *flags, train_file=str(tmp_path / "same.json"), **keys)
    assert status == 0
    for what in ("different images are", "different texts are", "matching (ITM) has not begun"):
        assert notes.count(what) == 1


@pytest.mark.parametrize(
    ("warmup", "begin", "warns"), [(None, 90, False), (None, 120, True), (300, 270, False)]
)
def test_an_epoch_counts_if_it_began_after_the_warm_up_and_100_iterations(warmup, begin, warns):
    state = SimpleNamespace(
        epoch=3,
        iterations=begin // 3,
        schedule=SimpleNamespace(warmup_iters=warmup),
        sums={"image_cos": 5.0},
        counted=5,
        skipped=0,
        skipped_steps=0,
        warned=set(),
    )
    warn_of_training(state)
    assert state.warned == ({"train_image_cos"} if warns else set())


@pytest.mark.parametrize(
    ("caption", "keys", "sign"),
    [
        ("a red circle", {}, None),
        ("a red 漢", {}, "unknown to the vocabulary, such as '漢'"),
        ("a red circle " * 11, {"max_tokens": 40}, "100% of the texts are cut by max_words 30"),
        ("a red circle " * 9, {}, "100% of the texts are cut by max_tokens 25"),
    ],
)
def test_texts_that_lose_much_are_named(pretrain, shapes, tmp_path, caption, keys, sign):
    entries = json.loads((shapes / "pretrain.json").read_text())
    for entry in entries:
        entry["caption"] = caption
    (tmp_path / "list.json").write_text(json.dumps(entries))
    keys |= {"train_file": str(tmp_path / "list.json"), "test_file": None}
    status, notes = pretrain("--set", "scheduler.epochs=1", **keys)
    assert status == 0
    assert sign in notes if sign else not notes


def test_shards_have_no_texts_to_look_at(tiny_config, sharded):
    config = as_config({**tiny_config, "train_file": sharded})
    train_set = build_dataset("pretrain", "train", config, seed=0)
    assert not list(text_signs(train_set, load_tokenizer(config)[0]))
    assert describe_data(train_set) == "48 entries"


def test_the_first_lines_tell_data_and_weights(tiny_config):
    train_set = build_dataset("pretrain", "train", tiny_config, seed=0)
    texts = sum(len(train_set.entry(index).texts) for index in range(len(train_set)))
    assert describe_data(train_set) == f"48 entries, 48 images, {texts} texts"
    model = build_model("pretrain", tiny_config)
    model.pretrained = [name for name, _ in model.visual_encoder.named_parameters(prefix="x")]
    model.pretrained = [f"visual_encoder.{name[2:]}" for name in model.pretrained]
    model.pretrained += ["text_encoder.bert.embeddings.word_embeddings.weight"]
    line = describe_weights(model)
    assert "pre-trained: visual_encoder, text_encoder (" in line
    assert "random: vision_proj, text_proj, itm_head" in line
