"""A short pre-training with a fixed seed learns all three objectives."""

import itertools
import json

import pytest
from conftest import log, tiny
from helpers.training import CPU, run
from PIL import Image

from dataset.build import build_dataset
from evaluation.retrieval import evaluate
from models.tokenizer import build_tokenizer

SKIES = "black navy blue teal aqua white gray silver purple pink lavender indigo".split()
LANDS = "green lime olive yellow gold orange red maroon brown tan khaki salmon".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def landscapes(shapes, tmp_path):
    """The configuration of a tiny model on images of two colors, whose captions name the colors.

    Of the 144 pairs of colors, all of the test list, the training list lacks every fourth.
    """
    seen, every = [], []
    for i, (sky, land) in enumerate(itertools.product(SKIES, LANDS)):
        image = Image.new("RGB", (32, 32), sky)
        image.paste(land, (0, 16, 32, 32))
        image.save(tmp_path / f"{i}.png")
        pair = {"image": f"{i}.png", "caption": f"{sky} sky over {land} land"}
        every.append({**pair, "caption": [pair["caption"]]})
        if sum(divmod(i, len(LANDS))) % 4:
            seen.append(pair)
    # repeated, because a checkpoint is saved after each epoch
    (tmp_path / "train.json").write_text(json.dumps(16 * seen))
    (tmp_path / "test.json").write_text(json.dumps(every))
    words = [*SPECIAL, *SKIES, "sky", "over", *LANDS, "land"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = tiny(shapes)
    bert = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "encoder_width": 32,
        "initializer_range": 0.15,  # about 1 / sqrt(hidden_size), because the layers are narrow
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return {
        **config,
        "train_file": str(tmp_path / "train.json"),
        "test_file": str(tmp_path / "test.json"),
        "image_root": str(tmp_path),
        "tokenizer": str(tmp_path / "vocab.txt"),
        "bert_config": config["bert_config"] | bert,
        "vision_width": 32,
        "embed_dim": 16,
        "queue_size": 48,
        "momentum": 0.9,
        "batch_size": 24,
        "hflip": False,
        "min_scale": 1.0,
        "randaugment": False,
        "optimizer": {"lr": 3e-3},
        "scheduler": {"epochs": 4, "warmup_iters": 10},
    }


def test_a_short_run_learns(landscapes, tmp_path, caplog):
    model = run(landscapes, tmp_path / "run")
    assert "engine.signs" not in {record.name for record in caplog.records}
    test_set = build_dataset("retrieval", "test", landscapes)
    tokenizer = build_tokenizer(landscapes["tokenizer"])
    metrics = evaluate(model, test_set, tokenizer, landscapes, CPU)
    chance = 100 / len(test_set.texts)
    # 80 and 86, so that the rounding of another CPU does not matter
    assert min(metrics["itc_txt_r1"], metrics["itc_img_r1"]) > 10 * chance
    first, *_, last = log(tmp_path / "run")
    assert last["train_loss_mlm"] < first["train_loss_mlm"] / 2
    # one pair in three matches: the loss without a look at the pair is 0.637
    assert last["train_loss_itm"] < 0.58
