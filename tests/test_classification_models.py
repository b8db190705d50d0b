"""VE, NLVR2 and text assignment against the released implementation's numbers."""

import pytest
import torch
from conftest import assert_close, assert_released_step

from models import build_model
from utils import Text


@pytest.mark.parametrize("task", ["ve", "nlvr"])
def test_loss_gradients_and_classes_are_the_released_ones(released, task):
    data, model, text = released(task)
    images = data["image"].chunk(2 if task == "nlvr" else 1)
    with torch.no_grad():
        prediction = model.predict(*images, text)
    assert_close("prediction", prediction, data["prediction"], 1e-4, 1e-5)
    losses = model.losses(*images, text, targets=data["targets"], alpha=data["alpha"])
    assert_released_step(model, losses, data)


def test_text_assignment_is_the_released_one(released, monkeypatch):
    data, model, text = released("nlvr_pretrain")
    image, first, second = data["image"], data["first"], data["second"]
    with torch.no_grad():
        weights = model.negative_weights(model.visual_encoder.forward_features(image))
        prediction = model.predict(image[first], image[second], text)
    assert_close("negative_weights", weights, data["negative_weights"], 1e-4, 1e-5)
    assert_close("prediction", prediction, data["prediction"], 1e-4, 1e-5)
    monkeypatch.setattr(model, "draw_pairs", lambda image_embeds: (first, second, data["labels"]))
    loss = model.losses(image, text)["loss"].detach()
    assert_close("loss", loss, torch.tensor(data["loss"]), 1e-4, 1e-5)


@pytest.mark.parametrize("task", ["ve", "vqa"])
def test_the_momentum_model_moves_once_for_an_optimizer_step(released, task):
    data, model, text = released(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {name: data[name] for name in ("targets", "n", "weights", "alpha") if name in data}
    if task == "vqa":
        inputs["answer"] = Text(data["answer_input_ids"], data["answer_attention_mask"])
    model.losses(data["image"], text, **inputs, update_momentum=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_distilled_loss_without_distillation_is_the_cross_entropy(released):
    data, model, text = released("ve", distill=False)
    loss = model.losses(data["image"], text, targets=data["targets"], alpha=data["alpha"])["loss"]
    logits = model.predict(data["image"], text)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits, data["targets"]))
    assert not any("_m." in name for name in model.state_dict())


@torch.no_grad()
def test_sharing_of_a_pair_of_blocks(golden):
    """Table 7: given the same weights all three kinds of sharing compute the same; they differ in
    what is one parameter.
    """
    data = golden("nlvr.pt")
    text = Text(data["input_ids"], data["attention_mask"])
    config = {**data["config"], "bert_config": "tests/golden/bert_nlvr.json", "distill": False}
    models = [
        build_model("nlvr", {**config, "share": share}).eval()
        for share in ("all", "cross_attention", "none")
    ]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    predictions = [model.predict(*data["image"].chunk(2), text) for model in models]
    assert_close("cross_attention", predictions[1], predictions[0], 1e-5, 1e-6)
    assert_close("none", predictions[2], predictions[0], 1e-5, 1e-6)
    size_all, size_cross, size_none = (
        sum(param.numel() for param in model.parameters()) for model in models
    )
    assert size_none - size_cross == 6 * 2 * (16 * 16 + 16)  # keys and values of the six pairs
    assert size_none - size_all == sum(
        param.numel() for param in models[2].bert.encoder.layer[6::2].parameters()
    )


def test_text_assignment_draws_equal_classes_and_never_the_own_image_as_negative(released):
    _, model, _ = released("nlvr_pretrain")
    torch.manual_seed(0)
    embeds = torch.randn(6, 10, 16)
    counts = torch.zeros(3)
    for _ in range(400):
        first, second, label = model.draw_pairs(embeds)
        own = torch.arange(6)
        assert torch.equal(first == own, label == 0)
        assert torch.equal(second == own, label == 1)
        assert (first != second).all()
        counts += label.bincount(minlength=3)
    assert ((counts / counts.sum() - 1 / 3).abs() < 0.03).all()
    first, second, label = model.draw_pairs(embeds[:2])
    assert set(label.tolist()) <= {0, 1} and (first != second).all()


def test_text_assignment_negatives_follow_image_similarity(released):
    _, model, _ = released("nlvr_pretrain")
    torch.manual_seed(0)
    embeds = torch.randn(4, 10, 16)
    weights = model.negative_weights(embeds)
    expected = weights / weights.sum(dim=1, keepdim=True)
    drawn = torch.zeros(4, 4)
    for _ in range(3000):
        first, second, label = model.draw_pairs(embeds)
        negative = torch.where(label == 0, second, first)
        drawn[torch.arange(4), negative] += (label != 2).float()
    assert ((drawn / drawn.sum(dim=1, keepdim=True) - expected).abs() < 0.04).all()


def test_text_assignment_of_a_single_pair_is_an_exact_zero(released):
    data, model, text = released("nlvr_pretrain")
    loss = model.losses(data["image"][:1], Text(text.input_ids[:1], text.attention_mask[:1]))[
        "loss"
    ]
    loss.backward()
    assert loss.item() == 0
