"""Conversions of released and foreign weights: names of tensors, and grids of position embeddings.

A conversion maps each name in the model to the name of its tensor in the file.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from models.albef import ALBEF


def task_names(model: "ALBEF", weights: Iterable[str]) -> dict[str, str]:
    """Map names of a model to names in a checkpoint of the same or another task.

    From pre-training, text_encoder.bert in the file becomes text_encoder in the model. To VQA, the
    answer decoder's layers come from the multimodal encoder, its embeddings from the text encoder
    and its head from the MLM head, likewise in the momentum model. From one image to two, both
    blocks of a pair come from one layer, and the momentum model is copied from the base.

    Args:
        model: The model to load into.
        weights: Names in the checkpoint.

    Returns:
        Name in the checkpoint by name in the model, "" if the tensor is copied from the base.
    """
    layers, fusion = len(model.bert.encoder.layer), model.bert.fusion_layer
    last = re.compile(rf"text_encoder\..*\.layer\.{layers - 1}\.")
    to_decoder = not any(name.startswith("text_decoder.") for name in weights)
    to_pairs = layers > model.bert_config.num_hidden_layers and not any(map(last.match, weights))

    def source(name: str) -> str:
        if to_pairs and name.split(".")[0].endswith("_m"):
            return ""
        if to_decoder and name.startswith("text_decoder"):
            name = name.replace("text_decoder", "text_encoder", 1)
            name = _renumber(name, lambda layer: fusion + layer)
        if to_pairs:
            name = _renumber(
                name, lambda block: block if block < fusion else fusion + (block - fusion) // 2
            )
        with_bert = re.sub(r"^(text_encoder(_m)?\.)(bert\.)?", r"\1bert.", name)
        without = re.sub(r"^(text_encoder(_m)?\.)bert\.", r"\1", name)
        return next((known for known in (name, with_bert, without) if known in weights), name)

    return {name: source(name) for name in model.state_dict()}


def _renumber(name: str, change: Callable[[int], int]) -> str:
    """Change the number of the layer in a name."""
    return re.sub(r"(?<=\.layer\.)\d+", lambda number: str(change(int(number[0]))), name)


def bert_names(model: "ALBEF", weights: Iterable[str]) -> dict[str, str]:
    """Map names of a pre-training model's text_encoder to names in a file of Hugging Face's BERT.

    Such a file may lack the prefix bert. and the names of tied weights. Before 2019 the weight and
    bias of LayerNorm were named gamma and beta.
    """
    known = {}
    for old in weights:
        name = old.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        prefix = "bert." if name.startswith(("embeddings.", "encoder.")) else ""
        known[f"text_encoder.{prefix}{name}"] = old
    head = "text_encoder.cls.predictions."
    twins = {
        "decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
        "decoder.bias": f"{head}bias",
    }
    for name, twin in twins.items():
        if twin in known:
            known.setdefault(head + name, known[twin])
    names = [name for name in model.state_dict() if name.startswith("text_encoder.")]
    return {name: known.get(name, name) for name in names}


def vit_names(model: nn.Module) -> dict[str, str]:
    """Map names of a model's visual_encoder to names in a file of timm or DeiT."""
    prefix = "visual_encoder."
    names = [name for name in model.state_dict() if name.startswith(prefix)]
    return {name: name.removeprefix(prefix) for name in names}


def can_interpolate(name: str, value: Tensor, target: Tensor) -> bool:
    """Return whether `value` is a position embedding that can take the shape of `target`."""
    if not name.endswith("pos_embed") or value.ndim != 3 or value.shape[::2] != target.shape[::2]:
        return False
    patches = [tensor.shape[1] - 1 for tensor in (value, target)]
    return all(round(number**0.5) ** 2 == number for number in patches)


def interpolate_pos_embed(pos_embed: Tensor, tokens: int) -> Tensor:
    """Interpolate position embeddings to another image_res, bicubically as the released code does.

    Args:
        pos_embed: [1, 1+N, C], [CLS] first, then a square grid.
        tokens: 1 + the number of patches of the new grid.

    Returns:
        [1, tokens, C] with the position of [CLS] unchanged.
    """
    old, new = (round((number - 1) ** 0.5) for number in (pos_embed.shape[1], tokens))
    grid = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :1], grid], dim=1)
