"""The pre-training model against the released implementation's numbers, the plain path, and its own
edge cases.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_close, assert_released_step
from helpers.plain import pretrain_losses, unfuse

from models import build_model
from models.bert import TextRows
from utils import Text

BERT = "tests/golden/bert.json"


@pytest.fixture
def step(released):
    data, model, text = released("pretrain")
    return data, model, text, (data["masked_input_ids"], data["labels"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_gradients_and_state_are_the_released_ones(released, checkpointing):
    data, model, text = released("pretrain", gradient_checkpointing=checkpointing)
    assert model.bert.gradient_checkpointing == checkpointing
    masked = data["masked_input_ids"], data["labels"]
    losses = model.losses(data["image"], text, alpha=data["alpha"], masked=masked)
    assert set(losses) == {"loss_mlm", "loss_ita", "loss_itm"}
    assert_released_step(model, losses, data)


def test_features_are_the_released_ones(step, golden):
    _, model, _, _ = step
    data = golden("features.pt")
    text = Text(data["input_ids"], data["attention_mask"])
    real = text.attention_mask.bool()
    with torch.no_grad():
        image_embeds, image_feat = model.eval().encode_image(data["image"])
        text_embeds, text_feat = model.encode_text(text)
        fused = model.fuse(text_embeds, text.attention_mask, image_embeds)
        ours = {
            "image_embeds": image_embeds,
            "image_feat": image_feat,
            "text_feat": text_feat,
            "itm_logits": model.itm_logits(fused),
            "text_embeds": text_embeds[real],
            "fusion_embeds": fused[real],
            "mlm_logits": model.mlm_logits(fused)[real],
        }
    for name, value in ours.items():
        theirs = data[name][real] if value.ndim == 2 and data[name].ndim == 3 else data[name]
        assert_close(name, value, theirs, 1e-4, 1e-5)


def random_batch(batch, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 61, (batch, length), generator=generator)
    input_ids[:, 0] = 2
    lengths = torch.randint(3, length + 1, (batch,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = torch.where(
        (torch.rand(batch, length, generator=generator) < 0.3) & (mask == 1), input_ids, -100
    )
    image = torch.randn(batch, 3, 48, 48, generator=generator)
    return (
        image,
        Text(input_ids * mask, mask),
        (torch.where(labels != -100, 4, input_ids * mask), labels),
    )


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {
        name: param.grad.clone()
        for name, param in model.named_parameters()
        if param.grad is not None
    }


def test_fast_step_equals_plain_step(step):
    data, model, _, _ = step
    image, text, masked = random_batch(5)
    results = []
    for losses_of in (
        lambda *a: model.losses(*a[:2], alpha=0.4, masked=a[2]),
        lambda *a: pretrain_losses(model, *a[:2], 0.4, a[2]),
    ):
        model.load_state_dict(data["state_dict"])
        torch.manual_seed(1)
        losses = losses_of(image, text, masked)
        results.append((losses, gradients(model, losses), model.image_queue.clone()))
        unfuse(model)
    (fast, fast_grads, fast_queue), (plain, plain_grads, plain_queue) = results
    for name in plain:
        assert_close(name, fast[name].detach(), plain[name].detach(), 1e-5, 1e-6)
    assert fast_grads.keys() == plain_grads.keys()
    for name in plain_grads:
        assert_close(name, fast_grads[name], plain_grads[name], 1e-4, 1e-6)
    assert_close("image_queue", fast_queue, plain_queue, 1e-5, 1e-6)


@torch.no_grad()
def test_texts_attend_to_the_images_that_are_named_whatever_their_order(step):
    model = step[1].eval()
    bert, (image, text, _) = model.bert, random_batch(3)
    embeds, mask = model.encode_text(text)[0], text.attention_mask
    image_embeds = model.encode_image(image)[0]
    keys_values, index = bert.image_keys_values(image_embeds), torch.tensor([2, 0, 0])
    named = bert.fuse(embeds, mask, keys_values, image_index=index)
    expected = model.fuse(embeds, mask, image_embeds[index])
    assert_close("named", named, expected, 1e-5, 1e-6)
    one_image = bert.fuse(embeds, mask, bert.image_keys_values(image_embeds[:1]))
    assert_close("one image", one_image[1:], expected[1:], 1e-5, 1e-6)
    parts = [
        TextRows(embeds, mask, index),
        TextRows(embeds, mask),
        TextRows(embeds.flip(0), mask.flip(0), index.flip(0), cls_only=True),
        TextRows(embeds, mask, cls_only=True),
    ]
    paired = model.fuse(embeds, mask, image_embeds)
    results = [expected, paired, expected.flip(0)[:, :1], paired[:, :1]]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2]):
        fused = bert.fuse_all([parts[number] for number in order], keys_values)
        for number, states in zip(order, fused, strict=True):
            assert_close(f"part {number}", states, results[number], 1e-5, 1e-6)


TABLE_1 = {
    "MLM + ITM": {"objectives": ["mlm", "itm"], "distill": False},
    "ITC + MLM + ITM": {"hard_negatives": False, "distill": False},
    "ITC + MLM + ITM_hard": {"distill": False},
    "ITC_MoD + MLM + ITM_hard": {"distill": ["itc"]},
    "Full": {},
    "ITC alone": {"objectives": ["itc"]},
    "ITM alone": {"objectives": ["itm"]},
    "MLM alone": {"objectives": ["mlm"]},
}


@pytest.mark.parametrize("row", TABLE_1)
def test_rows_of_table_1_are_configurations(released, row):
    _, model, _ = released("pretrain", **TABLE_1[row])
    image, text, masked = random_batch(4)
    losses = model.losses(image, text, alpha=0.4, masked=masked)
    names = {"itc": "loss_ita", "itm": "loss_itm", "mlm": "loss_mlm"}
    assert set(losses) == {names[name] for name in model.objectives}
    grads = gradients(model, losses)
    # data parallelism waits for the gradient of every trained parameter
    idle = set(map(id, model.idle_parameters()))
    assert set(grads) == {
        name
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in idle
    }
    assert all(grad.isfinite().all() for grad in grads.values())


def test_distillation_is_off_per_objective(released):
    image, text, masked = random_batch(4)

    def losses(alpha, **keys):
        _, model, _ = released("pretrain", **keys)
        torch.manual_seed(0)
        return {
            name: loss.item()
            for name, loss in model.eval().losses(image, text, alpha=alpha, masked=masked).items()
        }

    plain, only_itc, full = losses(0.0), losses(0.4, distill=["itc"]), losses(0.4)
    assert only_itc["loss_mlm"] == pytest.approx(plain["loss_mlm"], rel=1e-6)
    assert only_itc["loss_ita"] == pytest.approx(full["loss_ita"], rel=1e-6)
    assert full["loss_mlm"] != pytest.approx(plain["loss_mlm"], rel=1e-4)
    off = losses(0.4, distill=False)
    assert off == pytest.approx(plain, rel=1e-6)


def test_a_batch_without_negatives_or_masked_tokens_gives_exact_zeros(step):
    _, model, _, _ = step
    image, text, _ = random_batch(1)
    masked = text.input_ids, torch.full_like(text.input_ids, -100)
    losses = model.losses(image, text, masked=masked)
    assert losses["loss_itm"].item() == losses["loss_mlm"].item() == 0.0
    grads = gradients(model, losses)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["itm_head.weight"].abs().max() == 0


def test_temp_is_kept_in_its_range(step):
    data, model, text, masked = step
    for start, kept in ((2.0, 0.5), (0.0, 0.001)):
        with torch.no_grad():
            model.temp.fill_(start)
        model.losses(data["image"], text, masked=masked)
        assert model.temp.item() == pytest.approx(kept)


def test_random_weights_and_dropout_are_those_of_the_configuration(golden):
    data = golden("pretrain.pt")
    bert = {
        **json.loads(Path(BERT).read_text()),
        "initializer_range": 0.3,
        "hidden_dropout_prob": 0.5,
    }
    torch.manual_seed(0)
    model = build_model("pretrain", {**data["config"], "bert_config": bert})
    vit = model.visual_encoder
    for weight, std in (
        (model.bert.encoder.layer[0].intermediate.dense.weight, 0.3),
        (vit.patch_embed.proj.weight, 0.6),
        (vit.blocks[0].mlp.fc1.weight, 0.3),
        (model.text_encoder.cls.predictions.transform.dense.weight, 0.3),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    embeds = model.train().bert.embeddings(torch.arange(5, 45)[None])
    assert (embeds == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_mutual_information_bound_comes_from_the_onehot_loss(step):
    data, model, text, masked = step
    onehot = model.losses(data["image"], text, alpha=0.0, masked=masked)["loss_ita"].item()
    bound = torch.log(torch.tensor(2.0 + model.image_queue.shape[1])).item() - onehot
    assert model.mi_bound.item() == pytest.approx(bound, abs=1e-5)
    model.load_state_dict(data["state_dict"])
    model.losses(data["image"], text, alpha=0.4, masked=masked)
    assert model.mi_bound.item() == pytest.approx(bound, abs=1e-5)


def test_losses_stay_in_float32_under_bf16_autocast(step):
    data, model, text, masked = step
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(data["image"], text, alpha=0.4, masked=masked)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(data[name], rel=0.03)
    assert model.image_queue.dtype == torch.float32
