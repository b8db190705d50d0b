"""The retrieval model against the released implementation's numbers, and re-ranking against its
plain form.
"""

import pytest
import torch
from conftest import assert_close, assert_released_step
from helpers import plain

from utils import Text


def test_losses_gradients_and_state_are_the_released_ones(released):
    data, model, text = released("retrieval")
    losses = model.losses(data["image"], text, idx=data["idx"], alpha=data["alpha"])
    assert set(losses) == {"loss_ita", "loss_itm"}
    assert_released_step(model, losses, data)


def test_losses_without_distillation_are_the_released_ones(released):
    data, model, text = released("retrieval", distill=False)
    losses = model.losses(data["image"], text, idx=data["idx"], alpha=data["alpha"])
    for name, loss in losses.items():
        assert_close(name, loss.detach(), torch.tensor(data[f"{name}_no_distill"]), 1e-4, 1e-5)


@torch.no_grad()
def test_evaluation_scores_are_the_released_ones(released, golden):
    data, model = golden("retrieval_eval.pt"), released("retrieval")[1].eval()
    image_embeds, image_feat = model.encode_image(data["image"])
    text_embeds, text_feat = model.encode_text(Text(data["input_ids"], data["attention_mask"]))
    assert_close("sims", image_feat @ text_feat.T, data["sims"], 1e-4, 1e-5)
    scores = model.rerank(
        image_embeds, image_feat, text_embeds, text_feat, data["attention_mask"], data["k_test"]
    )
    for name, ours in zip(("scores_i2t", "scores_t2i"), scores, strict=True):
        assert torch.equal(ours == -100, data[name] == -100)
        assert_close(name, ours, data[name], 1e-4, 1e-5)


@pytest.mark.parametrize("k", [1, 5, 100])
@torch.no_grad()
def test_reranking_equals_the_plain_path(released, k):
    model = released("retrieval")[1].eval()
    generator = torch.Generator().manual_seed(k)
    lengths = torch.randint(2, 15, (23,), generator=generator)
    mask = (torch.arange(14) < lengths[:, None]).long()
    text = Text(torch.randint(5, 61, (23, 14), generator=generator) * mask, mask)
    image_embeds, image_feat = model.encode_image(torch.randn(7, 3, 48, 48, generator=generator))
    text_embeds, text_feat = model.encode_text(text)
    arguments = image_embeds, image_feat, text_embeds, text_feat, mask, k
    both = model.rerank(*arguments, rows=4), plain.rerank(model, *arguments)
    for fast, slow in zip(*both, strict=True):
        assert torch.equal(fast == -100, slow == -100)
        assert (fast - slow).abs().max() < 1e-4
        top = min(10, k, fast.shape[1])
        assert torch.equal(fast.topk(top).indices, slow.topk(top).indices)


def test_images_with_one_id_are_never_each_others_negatives(released):
    _, model, _ = released("retrieval")
    idx = torch.tensor([7, 7, 3, 5])
    contrast = torch.zeros(4, 4), torch.zeros(4, 4)
    positives = idx[:, None] == idx
    for seed in range(50):
        torch.manual_seed(seed)
        negative_text, negative_image, valid = model.negatives(contrast, positives)
        assert valid.all()
        assert (idx[negative_text] != idx).all() and (idx[negative_image] != idx).all()


def test_a_batch_of_one_image_id_has_no_matching_loss(released):
    data, model, text = released("retrieval")
    losses = model.losses(data["image"], text, idx=torch.tensor([4, 4]), alpha=0.4)
    assert losses["loss_itm"] == 0 and losses["loss_ita"].isfinite()
    sum(losses.values()).backward()
