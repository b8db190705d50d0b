"""Grad-CAM: where in the image a score comes from, by attention maps times their gradients (Section
6, Figures 4 to 6).

A heat map is the mean over heads of an attention map times the positive part of the score's
gradient with respect to it, on the patch grid of the image, [h, w], rows first. Only the block that
is asked for computes its attention unfused.
"""

import copy

import torch
from torch import nn

from utils import InputError


def _copy(module, **replaced):
    """Copy a module that shares its weights and submodules with the original, except for replaced
    submodules.

    Grad-CAM changes copies, so that other threads can use the model meanwhile. A copy is not
    compiled.
    """
    copied = copy.copy(module)
    copied._modules = {**module._modules, **replaced}
    return copied


class _Recorder(nn.Module):
    """Append attention maps [B, heads, L, 1+N] to a list and return them, with gradients."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, probs):
        self.maps.append(probs if probs.requires_grad else probs.requires_grad_())
        return probs


def _recording_bert(bert, blocks, maps):
    """Copy a multimodal encoder so that the cross-attentions of `blocks` append their maps to the
    list `maps`.
    """
    record = _Recorder(maps)

    def attend(query, keys, values, mask=None):
        scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
        return record(scores.softmax(dim=-1)) @ values

    layers = [copy.copy(layer) for layer in bert.encoder.layer]
    for number in blocks:
        cross = layers[number].crossattention
        attention = _copy(cross.self)
        attention.attend = attend
        layers[number] = _copy(layers[number], crossattention=_copy(cross, self=attention))
    return _copy(bert, encoder=_copy(bert.encoder, layer=nn.ModuleList(layers)))


def _recording_model(model, block_num, maps):
    """Copy a model so that a block of its image encoder appends its self-attention maps to the list
    `maps`.
    """
    encoder = model.visual_encoder
    blocks = [copy.copy(block) for block in encoder.blocks]
    attention = _copy(blocks[block_num].attn, attn_drop=_Recorder(maps))
    attention.fused_attn = False
    blocks[block_num] = _copy(blocks[block_num], attn=attention)
    return _copy(model, visual_encoder=_copy(encoder, blocks=nn.Sequential(*blocks)))


def _heat(attention, gradient, grid):
    """Compute heat maps [B, ..., h, w] from attention and its gradient [B, heads, ..., 1+N], in
    float32 to rank boxes.
    """
    return (attention.float() * gradient.clamp(min=0))[..., 1:].mean(dim=1).unflatten(-1, grid)


def default_block(model, mode="itm", words=False):
    """For itm the third multimodal layer (8 of 12), the last where there are fewer; for itc the
    last block of the ViT.

    words: there has to be heat for words. In the last layer only what [CLS] attends to reaches the
    score, so it is left out.
    """
    if mode == "itc":
        return len(model.visual_encoder.blocks) - 1
    pair = 2 if hasattr(model.bert, "pair_keys_values") else 1
    first, last = model.bert.fusion_layer, len(model.bert.encoder.layer) - pair
    return max(first, min(first + 2 * pair, last - pair * words))


def check_block(model, block_num, mode="itm"):
    """Raise InputError unless the model has such a block: for itm with cross-attention, for itc in
    the image encoder.
    """
    first, end, what = 0, len(model.visual_encoder.blocks), "those of the image encoder"
    if mode == "itm":
        first, end, what = (
            model.bert.fusion_layer,
            len(model.bert.encoder.layer),
            "those with cross-attention",
        )
    if not first <= block_num < end:
        raise InputError(
            f"--block_num {block_num}: {what} are the blocks {first} to {end - 1}, counted from 0"
        )


def text_gradcam(model, image, text, mode="itm", block_num=None):
    """Heat maps [B, h, w] of the whole texts, as grounding takes them: itm, the mean over tokens,
    or itc.

    block_num: the layer, by default default_block's; other arguments as in itm_gradcam.
    """
    block_num = default_block(model, mode) if block_num is None else block_num
    if mode == "itm":
        return itm_gradcam(model, image, text, block_num).mean(dim=1)
    return itc_gradcam(model, image, text, block_num)


def cross_gradcam(model, keys_values, text, block_num, score):
    """Heat maps of a score on the cross-attention of one block, or of a pair of blocks, of the
    multimodal encoder.

    keys_values: of the images, as the encoder's `fuse` takes them; text with input_ids and
    attention_mask [B, L]; block_num: a layer from fusion_layer on, in NLVR2 the first of a pair;
    score(fused [B, L, C]) -> a scalar. Returns (list of [B, L, h, w], one for each image, 0 at
    padding; the score). Raises InputError if there is no such block.
    """
    bert = model.bert
    check_block(model, block_num)
    blocks = [block_num]
    if hasattr(bert, "pair_keys_values"):
        first = block_num - (block_num - bert.fusion_layer) % 2
        blocks = [first, first + 1]
    with torch.no_grad():  # the gradient ends at the attention map
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
    maps = []
    with torch.enable_grad():
        value = score(
            _recording_bert(bert, blocks, maps).fuse(text_embeds, text.attention_mask, keys_values)
        )
        gradients = torch.autograd.grad(value, maps)
    # at padding the gradient is 0: nothing attends to it
    grid = model.visual_encoder.patch_embed.grid_size
    return [
        _heat(attention.detach(), gradient, grid) for attention, gradient in zip(maps, gradients)
    ], value.detach()


def itm_gradcam(model, image, text, block_num):
    """Heat maps of the matching score on the cross-attention of one multimodal layer, for each
    token.

    model: of pre-training or retrieval, in eval mode; image [B, 3, H, W]; text with input_ids and
    attention_mask [B, L]; block_num: the layer, from fusion_layer on. Returns [B, L, h, w], 0 at
    padding; the mean over all L positions is the map of the whole text. Raises InputError if there
    is no such layer.
    """
    with torch.no_grad():
        keys_values = model.bert.image_keys_values(model.visual_encoder.forward_features(image))
    (heat,), _ = cross_gradcam(
        model, keys_values, text, block_num, lambda fused: model.itm_logits(fused)[:, 1].sum()
    )
    return heat


def itc_gradcam(model, image, text, block_num):
    """Heat maps of the contrastive similarity on the self-attention of [CLS] in one block of the
    ViT.

    Arguments as in itm_gradcam, block_num from 0. Returns [B, h, w]. Raises InputError if there is
    no such block.
    """
    check_block(model, block_num, "itc")
    maps = []
    with torch.no_grad():
        _, text_feat = model.encode_text(text)
    with torch.enable_grad():
        _, image_feat = _recording_model(model, block_num, maps).encode_image(image)
        (gradient,) = torch.autograd.grad((image_feat * text_feat).sum() / model.temp, maps)
    grid = model.visual_encoder.patch_embed.grid_size
    return _heat(maps[0].detach()[:, :, 0], gradient[:, :, 0], grid)
