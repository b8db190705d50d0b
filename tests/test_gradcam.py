"""Grad-CAM against the released implementation's maps."""

import functools

import pytest
import torch
from conftest import assert_close, refusal

from models.gradcam import cross_gradcam, default_block, itc_gradcam, itm_gradcam
from utils import Text


@pytest.fixture
def retrieval(golden, released):
    """(golden maps, the released model, its text)."""
    data = golden("gradcam.pt")
    return data, released("retrieval")[1].eval(), Text(data["input_ids"], data["attention_mask"])


def test_maps_of_matching_are_the_released_ones(retrieval):
    data, model, text = retrieval
    cams = itm_gradcam(model, data["image"], text, data["itm_block_num"])
    assert_close("per token", cams, data["itm_cam_per_token"], 1e-4, 1e-5)
    assert_close("whole text", cams.mean(dim=1), data["itm_cam"], 1e-4, 1e-5)


def test_maps_of_contrastive_similarity_are_the_released_ones(retrieval):
    data, model, text = retrieval
    assert_close(
        "itc",
        itc_gradcam(model, data["image"], text, data["itc_block_num"]),
        data["itc_cam"],
        1e-4,
        1e-5,
    )


def test_maps_of_padded_and_single_texts_agree_and_attention_is_fused_again(retrieval):
    data, model, text = retrieval
    together = itm_gradcam(model, data["image"], text, 2)
    length = int(text.attention_mask[1].sum())
    alone = itm_gradcam(
        model,
        data["image"][1:2],
        Text(text.input_ids[1:2, :length], text.attention_mask[1:2, :length]),
        2,
    )
    assert_close("one of a batch", together[1:2, :length], alone, 1e-4, 1e-6)
    assert not together[1, length:].any()
    itc_gradcam(model, data["image"], text, 0)
    assert all(block.attn.fused_attn for block in model.visual_encoder.blocks)
    assert "attend" not in vars(model.bert.encoder.layer[2].crossattention.self)
    assert all(param.grad is None for param in model.parameters())


def true_score(model, fused):
    """The sum of NLVR2's logits of "true"."""
    return model.cls_head(fused[:, 0])[:, 1].sum()


@pytest.mark.parametrize("share", ["all", "none"])
def test_maps_of_a_pair_that_shares_all_are_those_of_equal_blocks(released, share):
    (data, first, text), (_, second, _) = (
        released("nlvr", distill=False, share=kind) for kind in ("all", share)
    )
    models = [first.eval(), second.eval()]
    models[1].load_state_dict(models[0].state_dict())
    heats = []
    for model in models:
        image_embeds = model.visual_encoder.forward_features(data["image"])
        keys_values = model.bert.image_keys_values(image_embeds)
        score = functools.partial(true_score, model)
        heats.append(cross_gradcam(model, keys_values, text, 8, score)[0])
    for one, other in zip(*heats, strict=True):
        assert_close("heat", one, other, 1e-4, 1e-8)


@torch.no_grad()
def test_a_pair_of_blocks_has_a_map_for_each_image(released):
    data, model, text = released("nlvr")
    model.eval()

    def maps(images, block_num):
        with torch.enable_grad():
            image_embeds = model.visual_encoder.forward_features(images)
            keys_values = model.bert.image_keys_values(image_embeds)
        score = functools.partial(true_score, model)
        return cross_gradcam(model, keys_values, text, block_num, score)

    heats, value = maps(data["image"], 10)
    assert len(heats) == 2 and heats[0].shape == (2, 9, 3, 3)
    assert_close("score", value, data["prediction"][:, 1].sum(), 1e-4, 1e-5)
    same, _ = maps(data["image"], 11)  # either block of a pair names it
    assert all(torch.equal(left, right) for left, right in zip(heats, same, strict=True))
    changed = data["image"].clone()
    changed[2:] = 0  # the second images
    assert not torch.allclose(maps(changed, 16)[0][1], maps(data["image"], 16)[0][1])
    assert default_block(model) == 10


def test_blocks_out_of_range_are_named(retrieval):
    data, model, text = retrieval
    message = refusal(itm_gradcam, model, data["image"], text, 1)
    assert message.startswith("--block_num 1: ") and message.endswith(" from 2 to 3")
    message = refusal(itc_gradcam, model, data["image"], text, 2)
    assert message.startswith("--block_num 2: ") and message.endswith(" from 0 to 1")
    assert default_block(model) == 3 and default_block(model, words=True) == 2
    assert default_block(model, "itc") == 1
