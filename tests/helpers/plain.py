"""The pre-training step written out plainly: what the fast path must equal, and is timed against.

Separate passes for matched pairs, negatives and masked texts; every image's keys and values
computed anew for each text row; the vocabulary head at every position; attention as two matrix
products and a softmax.
"""

import torch
import torch.nn.functional as F

from models.contrastive import feature_similarity
from models.losses import sample_negatives
from models.momentum import enqueue_, update_momentum_


def unfuse(model):
    """Makes the image encoders compute attention unfused."""
    for encoder in (model.visual_encoder, model.visual_encoder_m):
        for block in encoder.blocks:
            block.attn.fused_attn = False


def attention(block, hidden, source, mask=None):
    """hidden [R, L, C] attends to source [R, N, C'], mask [R, N] or [R, L, N]: an Attention block
    with explicit softmax.
    """
    projections = block.self
    dim = projections.query.out_features // projections.num_heads
    query, keys, values = (
        linear(x).unflatten(-1, (projections.num_heads, dim)).transpose(1, 2)
        for linear, x in (
            (projections.query, hidden),
            (projections.key, source),
            (projections.value, source),
        )
    )
    scores = query @ keys.transpose(2, 3) / dim**0.5
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask  # [R, 1 or L, N]
        scores = scores + (1 - mask[:, None].to(scores.dtype)) * -10000.0
    probs = F.dropout(scores.softmax(dim=-1), projections.dropout_prob, hidden.requires_grad)
    return block.output((probs @ values).transpose(1, 2).flatten(2), hidden)


def run_layers(layers, hidden, mask, image_embeds=None):
    for layer in layers:
        hidden = attention(layer.attention, hidden, hidden, mask)
        if image_embeds is not None:
            hidden = attention(layer.crossattention, hidden, image_embeds)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return hidden


def encode_text(bert, input_ids, mask):
    return run_layers(bert.encoder.layer[: bert.fusion_layer], bert.embeddings(input_ids), mask)


def fuse(bert, text_embeds, mask, image_embeds):
    return run_layers(bert.encoder.layer[bert.fusion_layer :], text_embeds, mask, image_embeds)


def feature(proj, embeds):
    return F.normalize(proj(embeds[:, 0]), dim=-1)


def pretrain_losses(model, image, text, alpha, masked):
    """The losses of Pretrain.losses with everything on. masked: (input_ids, labels)."""
    batch, mask, temp = image.shape[0], text.attention_mask, model.temp
    with torch.no_grad():
        temp.clamp_(0.001, 0.5)
        update_momentum_(model, model.config.momentum)
        image_embeds_m = model.visual_encoder_m.forward_features(image)
        image_feat_m = feature(model.vision_proj_m, image_embeds_m)
        text_feat_m = feature(model.text_proj_m, encode_text(model.bert_m, text.input_ids, mask))
        text_all = torch.cat([text_feat_m.T, model.text_queue.clone()], dim=1)
        image_all = torch.cat([image_feat_m.T, model.image_queue.clone()], dim=1)
        onehot = torch.zeros(batch, text_all.shape[1], device=image.device).fill_diagonal_(1)
        targets_i2t = alpha * (image_feat_m @ text_all / temp).softmax(dim=1) + (1 - alpha) * onehot
        targets_t2i = alpha * (text_feat_m @ image_all / temp).softmax(dim=1) + (1 - alpha) * onehot
    image_embeds = model.visual_encoder.forward_features(image)
    text_embeds = encode_text(model.bert, text.input_ids, mask)
    sim_i2t = feature(model.vision_proj, image_embeds) @ text_all / temp
    sim_t2i = feature(model.text_proj, text_embeds) @ image_all / temp
    loss_i2t = -(sim_i2t.float().log_softmax(dim=1) * targets_i2t).sum(dim=1).mean()
    loss_t2i = -(sim_t2i.float().log_softmax(dim=1) * targets_t2i).sum(dim=1).mean()
    enqueue_([model.image_queue, model.text_queue], [image_feat_m, text_feat_m], model.queue_ptr)

    itself = torch.eye(batch, dtype=torch.bool, device=image.device)
    negative_text, _ = sample_negatives(sim_i2t[:, :batch], itself)
    negative_image, _ = sample_negatives(sim_t2i[:, :batch], itself)
    matched = fuse(model.bert, text_embeds, mask, image_embeds)
    unmatched = fuse(
        model.bert,
        torch.cat([text_embeds, text_embeds[negative_text]]),
        torch.cat([mask, mask[negative_text]]),
        torch.cat([image_embeds[negative_image], image_embeds]),
    )
    itm_logits = model.itm_head(torch.cat([matched[:, 0], unmatched[:, 0]]))
    itm_labels = torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long().to(image.device)

    input_ids, labels = masked
    with torch.no_grad():
        fused_m = fuse(
            model.bert_m, encode_text(model.bert_m, input_ids, mask), mask, image_embeds_m
        )
        soft = model.text_encoder_m.cls.predictions(fused_m).softmax(dim=-1)
    logits = model.mlm_logits(
        fuse(model.bert, encode_text(model.bert, input_ids, mask), mask, image_embeds)
    )
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    distilled = -(logits.log_softmax(dim=-1) * soft).sum(dim=-1)[labels != -100].mean()
    return {
        "loss_ita": (loss_i2t + loss_t2i) / 2,
        "loss_itm": F.cross_entropy(itm_logits, itm_labels),
        "loss_mlm": (1 - alpha) * hard + alpha * distilled,
    }


@torch.no_grad()
def rerank(
    model, image_embeds, image_feat, text_embeds, text_feat, attention_mask, k, queries=None
):
    """Re-ranking query by query, first images, then texts: every pair anew, texts padded, all
    positions computed.

    Arguments and result of ALBEF.rerank; queries: only the first ones of each direction, for
    timing.
    """

    def score(text, image):  # as many indices of each
        fused = fuse(model.bert, text_embeds[text], attention_mask[text], image_embeds[image])
        return model.itm_logits(fused)[:, 1]

    sim = feature_similarity(image_feat, text_feat)
    scores_i2t, scores_t2i = torch.full_like(sim, -100.0), torch.full_like(sim.T, -100.0)
    for image in range(len(sim))[:queries]:
        texts = sim[image].topk(min(k, sim.shape[1])).indices
        scores_i2t[image, texts] = score(texts, torch.full_like(texts, image))
    for text in range(sim.shape[1])[:queries]:
        images = sim[:, text].topk(min(k, len(sim))).indices
        scores_t2i[text, images] = score(torch.full_like(images, text), images)
    return scores_i2t, scores_t2i


@torch.no_grad()
def rank_answers(model, image, question, answer_list, k):
    """VQA.rank_answers as the released code does it: every candidate whole, with its own copy of
    the question's states.
    """
    mask, decoder = question.attention_mask, model.text_decoder
    embeds = encode_text(model.bert, question.input_ids, mask)
    states = fuse(model.bert, embeds, mask, model.visual_encoder.forward_features(image))

    def logits(input_ids, states, states_mask):
        hidden, length = decoder.bert.embeddings(input_ids), input_ids.shape[1]
        causal = torch.ones(1, length, length, device=hidden.device).tril()
        for layer in decoder.bert.encoder.layer:
            hidden = attention(layer.attention, hidden, hidden, causal)
            hidden = attention(layer.crossattention, hidden, states, states_mask)
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return decoder.cls.predictions(hidden)

    ids = answer_list.input_ids
    first = logits(ids[:1, :1].repeat(len(image), 1), states, mask)[:, 0].softmax(dim=1)[
        :, ids[:, 1]
    ]
    first, candidates = first.topk(min(k, len(ids)), dim=1)
    scores = []
    for number, chosen in enumerate(candidates):
        copies = [
            x[number : number + 1].repeat(len(chosen), 1, *[1] * (x.ndim - 2))
            for x in (states, mask)
        ]
        log_probs = (
            logits(ids[chosen, :-1], *copies)
            .log_softmax(dim=-1)
            .gather(2, ids[chosen, 1:, None])[..., 0]
        )
        scores.append(
            first[number].log() + (log_probs * answer_list.attention_mask[chosen, 1:]).sum(dim=1)
        )
    probs, order = torch.stack(scores).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order), probs
