"""Objectives (Section 3.2) and their distilled forms (Section 3.3) on plain tensors."""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from models.albef import SpecialIds


class Features(NamedTuple):
    """Projected, normalized features of images and texts, [B, D] each, or queues, [D, Q] each."""

    image: Tensor
    text: Tensor


class MaskedText(NamedTuple):
    """A text with masked tokens."""

    input_ids: Tensor  # [B, L]
    labels: Tensor  # [B, L], the token at masked positions and -100 elsewhere
    positions: Tensor  # [M], flat indices into [B * L] of the masked positions


def masked_text(input_ids: Tensor, labels: Tensor) -> MaskedText:
    """Find the masked positions; on a GPU this waits for the device."""
    return MaskedText(input_ids, labels, (labels.flatten() != -100).nonzero().squeeze(1))


def mask_tokens(
    input_ids: Tensor, vocab_size: int, special_ids: "SpecialIds", probability: float = 0.15
) -> MaskedText:
    """Mask tokens as BERT does (Section 3.2).

    Of the chosen tokens 80% become [MASK], 10% a random token, and 10% stay.

    Args:
        input_ids: Tokens [B, L].
        vocab_size: Number of word pieces.
        special_ids: Ids of padding and [CLS], which are never chosen, and of [MASK].
        probability: Probability of a token to be chosen.
    """
    draw = torch.rand(input_ids.shape, device=input_ids.device)
    chosen = (draw < probability) & (input_ids != special_ids.pad) & (input_ids != special_ids.cls)
    labels = input_ids.masked_fill(~chosen, -100)
    kind = torch.rand(input_ids.shape, device=input_ids.device)
    random_ids = torch.randint_like(input_ids, vocab_size)
    masked = input_ids.masked_fill(chosen & (kind < 0.8), special_ids.mask)
    masked = torch.where(chosen & (kind >= 0.8) & (kind < 0.9), random_ids, masked)
    return masked_text(masked, labels)


def distilled_cross_entropy(
    logits: Tensor, targets: Tensor, logits_m: Tensor | None = None, alpha: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute (1 - alpha) H(y, p) + alpha H(q, p) of each row in float32.

    This is Equations 6 and 7 up to the constant entropy of q.

    Args:
        logits: Logits of p [R, K].
        targets: y, class indices [R] or distributions [R, K].
        logits_m: Logits of q, of the momentum model [R, K]. Default: no distillation.
        alpha: Weight of distillation.

    Returns:
        The loss [R] and H(y, p) [R].
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
    """Similarities, divided by temp, with this batch's momentum features, then the queue."""

    i2t: Tensor  # [B, B + Q]
    t2i: Tensor  # [B, B + Q]


def similarities(
    features: Features, features_m: Features, queues: Features, temp: Tensor
) -> Contrast:
    """Compute s(I, T) / temp and s(T, I) / temp (Equation 1) in float32.

    With the momentum features as `features` these are the s' of Section 3.3.

    Args:
        features: Features [B, D].
        features_m: Momentum features [B, D].
        queues: Queues of momentum features [D, Q].
        temp: Temperature.
    """
    with torch.autocast(features.image.device.type, enabled=False):
        i2t = torch.cat([features.image @ features_m.text.T, features.image @ queues.text], dim=1)
        t2i = torch.cat([features.text @ features_m.image.T, features.text @ queues.image], dim=1)
        return Contrast(i2t / temp, t2i / temp)


def itc_loss(
    contrast: Contrast, targets: Tensor, contrast_m: Contrast | None = None, alpha: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the image-text contrastive loss (Equations 2 and 6).

    Args:
        contrast: Similarities of the features.
        targets: Class indices [B] or distributions [B, B + Q].
        contrast_m: Similarities of the momentum features. Default: no distillation.
        alpha: Weight of distillation.

    Returns:
        The loss, and the one-hot loss of Equation 2.
    """
    soft_i2t, soft_t2i = contrast_m or (None, None)
    i2t, i2t_hard = distilled_cross_entropy(contrast.i2t, targets, soft_i2t, alpha)
    t2i, t2i_hard = distilled_cross_entropy(contrast.t2i, targets, soft_t2i, alpha)
    return (i2t.mean() + t2i.mean()) / 2, (i2t_hard.mean() + t2i_hard.mean()) / 2


@torch.no_grad()
def draw(log_weights: Tensor, count: int) -> Tensor:
    """Draw different columns of each row, without a loop over rows or a wait for the device.

    The columns with the largest sums of log weight and Gumbel noise are such a sample.

    Args:
        log_weights: Logarithms of weights [R, K], -inf for never.
        count: Number of columns to draw.

    Returns:
        Indices [R, count].
    """
    gumbel = -torch.empty_like(log_weights).exponential_().log()
    return (log_weights + gumbel).topk(count, dim=1).indices


@torch.no_grad()
def sample_negatives(sim: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a hard negative for each row from softmax(sim) without the positives (Section 3.2).

    Args:
        sim: Similarities divided by temp [B, B], all equal for uniform negatives.
        positives: Pairs that match, bool [B, B].

    Returns:
        Indices [B] and validity, bool [B]: the index of a row without any negative is not valid.
    """
    index = draw(sim.float().masked_fill(positives, -torch.inf), count=1)
    return index[:, 0], ~positives.all(dim=1)


def itm_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Compute the image-text matching loss (Equation 4), the mean over valid samples.

    Args:
        logits: Logits [3B, 2] of B matched pairs, then of B negatives twice, in the same order.
        valid: Whether a sample has a negative, bool [B].

    Returns:
        The loss, an exact 0 if no sample is valid.
    """
    batch = valid.shape[0]
    labels = torch.cat([valid.new_ones(batch), valid.new_zeros(2 * batch)]).long()
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    weight = valid.repeat(3).float()
    return (loss * weight).sum() / weight.sum().clamp(min=1)


def mlm_loss(
    logits: Tensor, labels: Tensor, logits_m: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """Compute the masked language modeling loss (Equations 3 and 7).

    Args:
        logits: Logits at the masked positions [M, V].
        labels: Tokens at the masked positions [M].
        logits_m: Logits of the momentum model [M, V]. Default: no distillation.
        alpha: Weight of distillation.

    Returns:
        The loss, an exact 0 without a masked token.
    """
    loss, _ = distilled_cross_entropy(logits, labels, logits_m, alpha)
    return loss.sum() / max(1, labels.shape[0])
