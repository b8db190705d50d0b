"""The objectives of Section 3.2 and their distilled forms of Section 3.3, on plain tensors."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class MaskedText(NamedTuple):
    """A text with masked tokens. positions holds the flat indices (into [B * L]) of the labels that
    are not -100.
    """

    input_ids: torch.Tensor  # [B, L]
    labels: torch.Tensor  # [B, L]
    positions: torch.Tensor  # [M]


def masked_text(input_ids, labels):
    """Find the masked positions.

    On a GPU this waits for the device; in the training loop it runs on the host.
    """
    return MaskedText(input_ids, labels, (labels.flatten() != -100).nonzero().squeeze(1))


def mask_tokens(input_ids, vocab_size, special_ids, probability=0.15):
    """Mask tokens as BERT does (Section 3.2): of the chosen 15%, 80% become [MASK], 10% random, 10%
    stay.

    input_ids: [B, L]; special_ids has pad, cls and mask. [CLS] and padding are never chosen.
    Returns a MaskedText.
    """
    draw = torch.rand(input_ids.shape, device=input_ids.device)
    chosen = (draw < probability) & (input_ids != special_ids.pad) & (input_ids != special_ids.cls)
    labels = input_ids.masked_fill(~chosen, -100)
    kind = torch.rand(input_ids.shape, device=input_ids.device)
    random_ids = torch.randint_like(input_ids, vocab_size)
    masked = input_ids.masked_fill(chosen & (kind < 0.8), special_ids.mask)
    masked = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, masked)
    return masked_text(masked, labels)


def distilled_cross_entropy(logits, targets, logits_m=None, alpha=0.0):
    """(1 - alpha) H(y, p) + alpha H(q, p) for every row (Equations 6 and 7, up to the constant
    entropy of q).

    logits, logits_m: [R, K]; targets: class indices [R] or distributions [R, K]; q =
    softmax(logits_m), or no distillation when logits_m is None. Computed in float32. Returns (loss
    [R], H(y, p) [R]).
    """
    log_p = logits.float().log_softmax(dim=-1)  # shared by both terms
    if targets.is_floating_point():
        hard = -(targets * log_p).sum(dim=-1)
    else:
        hard = F.nll_loss(log_p, targets, reduction="none")
    if logits_m is None:
        return hard, hard
    soft = -(logits_m.float().softmax(dim=-1) * log_p).sum(dim=-1)
    return (1 - alpha) * hard + alpha * soft, hard


class Contrast(NamedTuple):
    """Similarities of a batch with [this batch's momentum features, then the queue], divided by
    temp.
    """

    i2t: torch.Tensor  # [B, B + Q]
    t2i: torch.Tensor  # [B, B + Q]


def similarities(image_feat, text_feat, image_feat_m, text_feat_m, image_queue, text_queue, temp):
    """s(I, T) / temp and s(T, I) / temp of Equation 1. Features [B, D], queues [D, Q]; returns a
    Contrast in float32.

    With the momentum features in place of image_feat and text_feat these are the s' of Section 3.3.
    """
    with torch.autocast(image_feat.device.type, enabled=False):
        i2t = torch.cat([image_feat @ text_feat_m.T, image_feat @ text_queue], dim=1) / temp
        t2i = torch.cat([text_feat @ image_feat_m.T, text_feat @ image_queue], dim=1) / temp
    return Contrast(i2t, t2i)


def itc_loss(contrast, targets, contrast_m=None, alpha=0.0):
    """Image-text contrastive loss (Equation 2), distilled where contrast_m is given (Equation 6).

    targets: class indices [B] or distributions [B, B + Q]. Returns (loss, the one-hot loss of
    Equation 2).
    """
    soft_i2t, soft_t2i = contrast_m or (None, None)
    i2t, i2t_hard = distilled_cross_entropy(contrast.i2t, targets, soft_i2t, alpha)
    t2i, t2i_hard = distilled_cross_entropy(contrast.t2i, targets, soft_t2i, alpha)
    return (i2t.mean() + t2i.mean()) / 2, (i2t_hard.mean() + t2i_hard.mean()) / 2


@torch.no_grad()
def draw(log_weights, count):
    """Draw `count` different columns of each row: log_weights [R, K], -inf for never -> indices [R,
    count].

    The columns with the largest sums of log weight and Gumbel noise: without a loop over rows or a
    wait for the device.
    """
    gumbel = -torch.empty_like(log_weights).exponential_().log()
    return (log_weights + gumbel).topk(count, dim=1).indices


@torch.no_grad()
def sample_negatives(sim, positives):
    """Draw one hard negative per row from softmax(sim) without the positives (Section 3.2).

    sim: [B, B] similarities divided by temp (all equal for uniform negatives); positives: bool [B,
    B]. Returns (index [B], valid [B]): a row without any negative is not valid and its index means
    nothing.
    """
    index = draw(sim.float().masked_fill(positives, -torch.inf), count=1)
    return index[:, 0], ~positives.all(dim=1)


def itm_loss(logits, valid):
    """Image-text matching loss (Equation 4): the mean over the samples that have a negative, an
    exact 0 without any.

    logits: [3B, 2], first the B matched pairs, then two times B negatives in the same order; valid:
    bool [B].
    """
    batch = valid.shape[0]
    labels = torch.cat([valid.new_ones(batch), valid.new_zeros(2 * batch)]).long()
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    weight = valid.repeat(3).float()
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def mlm_loss(logits, labels, logits_m=None, alpha=0.0):
    """Masked language modeling loss (Equation 3), distilled where logits_m is given (Equation 7).

    logits, logits_m: [M, V] at the masked positions; labels: [M]. An exact 0 without a masked
    token.
    """
    loss, _ = distilled_cross_entropy(logits, labels, logits_m, alpha)
    return loss.sum() / max(1, labels.shape[0])
