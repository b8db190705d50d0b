"""Scores stay float32 under bf16, so that scores of different inputs do not tie."""

import pytest
import torch

from models import build_model
from models.contrastive import feature_similarity
from models.gradcam import text_gradcam
from utils import Text

COUNT = 40  # images
LAST = "itm_head", "cls_head.2", "ta_head", "predictions.decoder"  # layers whose outputs are scores


def texts(rows, seed=0):
    """Return random texts of equal length, each with [CLS] first."""
    ids = torch.randint(5, 61, (rows, 6), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 2
    return Text(ids, torch.ones_like(ids))


def same(count):
    """Repeat one text for every image."""
    return Text(*(values.expand(count, -1) for values in texts(1)))


def reranking(model, image):
    text = texts(1)
    image_embeds, image_feat = model.encode_image(image)
    text_embeds, text_feat = model.encode_text(text)
    return model.rerank(
        image_embeds, image_feat, text_embeds, text_feat, text.attention_mask, COUNT
    )[1]


def attributes(model, image):
    model.vision_proj.weight[1:] = 0  # the images differ in one number only
    model.vision_proj.bias[1] = 1
    return feature_similarity(model.encode_image(image)[1], model.encode_text(texts(1))[1])


def grounding(model, image):
    heat = text_gradcam(model, image[:16], same(16))
    return heat[heat > 0]  # elsewhere the gradient is negative


def classes(model, image):
    return model.predict(image, same(len(image)))[:, 1]


def pairs(model, image):
    return model.predict(image, image.flip(0), same(len(image)))[:, 1]


def ranking(model, image):
    """Two-token answers that begin alike."""
    ids = torch.tensor([[2, 7, last] for last in range(5, 61)])
    return model.rank_answers(image[:1], same(1), Text(ids, torch.ones_like(ids)), len(ids))[1]


def generation(model, image):
    return model.answer_logits(
        model.encode_question(image[:1], same(1)), torch.tensor([[2, 7]]), torch.tensor([0])
    )


def words(model, image):
    fused = model.fuse(
        model.encode_text(texts(1))[0], texts(1).attention_mask, model.encode_image(image[:1])[0]
    )
    return model.mlm_logits(fused[0, 1])


@pytest.mark.parametrize(
    "task, scores",
    [
        ("retrieval", reranking),
        ("retrieval", attributes),
        ("retrieval", grounding),
        ("ve", classes),
        ("relevance", classes),
        ("nlvr", pairs),
        ("nlvr_pretrain", pairs),
        ("vqa", ranking),
        ("vqa", generation),
        ("pretrain", words),
    ],
)
@torch.no_grad()
def test_scores_of_different_inputs_do_not_tie_under_bf16(released, task, scores):
    data, model, _ = released("ve" if task == "relevance" else task)
    if task == "relevance":
        torch.manual_seed(0)
        model = build_model(task, {**data["config"], "bert_config": "tests/golden/bert.json"})
    image = torch.randn(COUNT, *data["image"].shape[1:], generator=torch.Generator().manual_seed(0))
    for name, module in model.named_modules():
        if name.endswith(LAST):
            # shared by all inputs, so that bf16 has few digits for their differences
            module.bias += 8
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(model.eval(), image).flatten()
    assert found.dtype == torch.float32
    assert len(found.unique()) == len(found)
