"""Evaluation: every result belongs to its sample, whatever the process, the order or the batch that
it came from.
"""

import pytest
import torch

import evaluation.distributed
import evaluation.retrieval
from configs.config import as_config
from dataset.build import build_dataset
from dataset.text import MAX_TOKENS, tokenize
from dataset.transforms import normalize
from evaluation.retrieval import encode_images, encode_texts
from models import build_model
from models.tokenizer import build_tokenizer
from utils import seed_everything

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_config):
    seed_everything(0)
    return build_model("retrieval", tiny_config).eval()


def test_results_of_several_processes_are_in_the_order_of_the_samples(monkeypatch):
    monkeypatch.setattr(
        evaluation.distributed, "gather_lists", lambda mine: [*mine, (1, "b"), (3, "d")]
    )
    assert evaluation.distributed.merge_results({0: "a", 2: "c", 4: "e"}) == list("abcde")


@pytest.mark.parametrize("processes", [1, 5])
def test_every_sample_is_some_process_s_once(tiny_config, monkeypatch, processes):
    dataset = build_dataset("retrieval", "test", tiny_config)
    seen = []
    for rank in range(processes):
        monkeypatch.setattr(evaluation.distributed, "world_size", lambda: processes)
        monkeypatch.setattr(evaluation.distributed, "rank", lambda rank=rank: rank)
        for numbers, images in evaluation.distributed.iter_rank_share(
            dataset, as_config({**tiny_config, "batch_size_test": 5}), CPU, "images"
        ):
            seen += numbers
            assert all(
                torch.equal(image, normalize(dataset[number]))
                for number, image in zip(numbers, images, strict=True)
            )
    assert sorted(seen) == list(range(12))


@torch.no_grad()
def test_texts_of_any_length_keep_their_features_and_tokens(tiny_config, model):
    tokenizer = build_tokenizer(tiny_config["tokenizer"])
    texts = [
        "a red circle",
        "red",
        "a green square left of a red circle and a blue star",
        "a blue star",
        "green",
    ]
    embeds, feat, mask = encode_texts(model, texts, tokenizer, as_config(tiny_config), CPU)
    for text, *found, own in zip(texts, embeds, feat, mask, strict=True):
        alone, alone_feat = model.encode_text(tokenize([text], tokenizer, MAX_TOKENS))
        length = alone.shape[1]
        assert own.tolist() == [1] * length + [0] * (len(own) - length)
        assert torch.allclose(found[0][:length], alone[0], atol=1e-5) and torch.allclose(
            found[1], alone_feat[0], atol=1e-5
        )


@torch.no_grad()
def test_images_keep_their_features_and_embeddings(tiny_config, model):
    dataset = build_dataset("retrieval", "test", tiny_config)
    for where in ("host", "recompute"):
        config = as_config({**tiny_config, "batch_size_test": 5})
        embeds, feat = encode_images(model, dataset, config, CPU, keep=where == "host")
        for i in (0, 4, 5, 11):
            alone = model.encode_image(normalize(dataset[i][None]))
            assert torch.allclose(embeds[i : i + 1], alone[0], atol=1e-5) and torch.allclose(
                feat[i], alone[1][0], atol=1e-5
            )
