"""Grad-CAM: heat maps of the image regions behind a score (Section 6, Figures 4 to 6).

A heat map is the mean over heads of an attention map times the positive part of the score's
gradient with respect to it. It has the grid of patches, [h, w], rows first.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.albef import ALBEF
from models.bert import BertModel, KeysValues
from models.contrastive import ContrastiveModel
from utils import InputError, Text


def _copy(module: Any, **replaced: nn.Module) -> Any:
    """Copy a module with replaced submodules. All weights are shared with the original.

    Grad-CAM changes copies, so that other threads can use the model meanwhile. A copy is not
    compiled.
    """
    copied = copy.copy(module)
    copied._modules = {**module._modules, **replaced}
    return copied


class _Recorder(nn.Module):
    """Append attention maps [B, heads, L, 1+N] to a list and return them, with gradients."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, probs: Tensor) -> Tensor:
        self.maps.append(probs if probs.requires_grad else probs.requires_grad_())
        return probs


def _recording_bert(bert: BertModel, blocks: Sequence[int], maps: list[Tensor]) -> BertModel:
    """Copy a BERT so that the cross-attentions of `blocks` append their maps to `maps`."""
    record = _Recorder(maps)

    def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
        return record(scores.softmax(dim=-1)) @ values

    layers = [copy.copy(layer) for layer in bert.encoder.layer]
    for number in blocks:
        cross = layers[number].crossattention
        attention = _copy(cross.self)
        attention.attend = attend
        layers[number] = _copy(layers[number], crossattention=_copy(cross, self=attention))
    return _copy(bert, encoder=_copy(bert.encoder, layer=nn.ModuleList(layers)))


def _recording_model(
    model: ContrastiveModel, block_num: int, maps: list[Tensor]
) -> ContrastiveModel:
    """Copy a model so that a block of the image encoder appends its attention map to `maps`."""
    encoder = model.visual_encoder
    blocks = [copy.copy(block) for block in encoder.blocks]
    attention = _copy(blocks[block_num].attn, attn_drop=_Recorder(maps))
    attention.fused_attn = False
    blocks[block_num] = _copy(blocks[block_num], attn=attention)
    return _copy(model, visual_encoder=_copy(encoder, blocks=nn.Sequential(*blocks)))


def _heat(attention: Tensor, gradient: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute heat maps [B, ..., h, w] in float32 from maps [B, heads, ..., 1+N] and gradients."""
    return (attention.float() * gradient.clamp(min=0))[..., 1:].mean(dim=1).unflatten(-1, grid)


def default_block(model: ALBEF, mode: str = "itm", words: bool = False) -> int:
    """Return the block whose attention is shown by default.

    Args:
        model: The model.
        mode: "itm" for the third multimodal layer (8 of 12) or the last one if there are fewer,
            "itc" for the last block of the image encoder.
        words: Whether single words need heat. The last layer is left out, because only [CLS]
            reaches the score from it.
    """
    if mode == "itc":
        return len(model.visual_encoder.blocks) - 1
    step = model.bert.images_per_text
    first, last = model.bert.fusion_layer, len(model.bert.encoder.layer) - step
    return max(first, min(first + 2 * step, last - step * words))


def check_block(model: ALBEF, block_num: int | None = None, mode: str = "itm") -> None:
    """Raise InputError unless a block has the attention that Grad-CAM reads.

    Args:
        model: The model.
        block_num: Index of the block, None for the default one.
        mode: "itm" for cross-attention, "itc" for the image encoder.
    """
    first, end, what = 0, len(model.visual_encoder.blocks), "block of the image encoder"
    if mode == "itm":
        first, end = model.bert.fusion_layer, len(model.bert.encoder.layer)
        what = "block with cross-attention"
    if block_num is not None and not first <= block_num < end:
        raise InputError(
            f"--block_num {block_num}: no {what} has this index; name one from {first} to {end - 1}"
        )


def text_gradcam(
    model: ContrastiveModel,
    image: Tensor,
    text: Text,
    mode: str = "itm",
    block_num: int | None = None,
) -> Tensor:
    """Compute heat maps of whole texts, as grounding reads them.

    Args:
        model: Model in eval mode.
        image: Images [B, 3, H, W].
        text: Texts [B, L].
        mode: "itm" for the mean over tokens of `itm_gradcam`, or "itc" for `itc_gradcam`.
        block_num: Index of the block, by default of `default_block`.

    Returns:
        Heat maps [B, h, w].

    Raises:
        InputError: The model has no such block.
    """
    block_num = default_block(model, mode) if block_num is None else block_num
    if mode == "itm":
        return itm_gradcam(model, image, text, block_num).mean(dim=1)
    return itc_gradcam(model, image, text, block_num)


def cross_gradcam(
    model: ALBEF,
    keys_values: Sequence[KeysValues],
    text: Text,
    block_num: int,
    score: Callable[[Tensor], Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Compute heat maps of a score on the cross-attention of a multimodal block.

    Args:
        model: Model in eval mode.
        keys_values: Keys and values of the images, from `bert.image_keys_values`.
        text: Texts [B, L].
        block_num: Index of the layer, in NLVR2 of either layer of a pair.
        score: Function of the fused states [B, L, C] that returns a scalar.

    Returns:
        One map [B, L, h, w] for each image of a text, 0 at padding, and the score.

    Raises:
        InputError: The model has no such block.
    """
    bert = model.bert
    check_block(model, block_num)
    first = block_num - (block_num - bert.fusion_layer) % bert.images_per_text
    blocks = range(first, first + bert.images_per_text)
    with torch.no_grad():  # the gradient ends at the attention map
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
    maps: list[Tensor] = []
    with torch.enable_grad():
        recording = _recording_bert(bert, blocks, maps)
        value = score(recording.fuse(text_embeds, text.attention_mask, keys_values))
        gradients = torch.autograd.grad(value, maps)
    # the gradient is 0 at padding, because no token attends to it
    grid = model.visual_encoder.patch_embed.grid_size
    pairs = zip(maps, gradients, strict=True)
    return [_heat(attention.detach(), gradient, grid) for attention, gradient in pairs], (
        value.detach()
    )


def itm_gradcam(model: ContrastiveModel, image: Tensor, text: Text, block_num: int) -> Tensor:
    """Compute heat maps of the matching score on cross-attention, for each token.

    Args:
        model: Model in eval mode.
        image: Images [B, 3, H, W].
        text: Texts [B, L].
        block_num: Index of the layer, from `fusion_layer` on.

    Returns:
        Heat maps [B, L, h, w], 0 at padding. The mean over L is the map of the whole text.

    Raises:
        InputError: The model has no such layer.
    """
    with torch.no_grad():
        keys_values = model.bert.image_keys_values(model.visual_encoder.forward_features(image))
    (heat,), _ = cross_gradcam(
        model, keys_values, text, block_num, lambda fused: model.itm_logits(fused)[:, 1].sum()
    )
    return heat


def itc_gradcam(model: ContrastiveModel, image: Tensor, text: Text, block_num: int) -> Tensor:
    """Compute heat maps of the contrastive similarity on the self-attention of the image's [CLS].

    Args:
        model: Model in eval mode.
        image: Images [B, 3, H, W].
        text: Texts [B, L].
        block_num: Index of the block of the image encoder.

    Returns:
        Heat maps [B, h, w].

    Raises:
        InputError: The model has no such block.
    """
    check_block(model, block_num, "itc")
    maps: list[Tensor] = []
    with torch.no_grad():
        _, text_feat = model.encode_text(text)
    with torch.enable_grad():
        _, image_feat = _recording_model(model, block_num, maps).encode_image(image)
        (gradient,) = torch.autograd.grad((image_feat * text_feat).sum() / model.temp, maps)
    grid = model.visual_encoder.patch_embed.grid_size
    return _heat(maps[0].detach()[:, :, 0], gradient[:, :, 0], grid)
