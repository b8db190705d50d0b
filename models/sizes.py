"""Sizes of the pre-trained encoders that a configuration names without giving their sizes."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from configs.config import VIT_KEYS, read_bert_values
from models.hub import find_file
from models.weights import WEIGHT_FILES, read_weights
from utils import InputError

HEAD_WIDTH = 64  # of each attention head in timm's and DeiT's ViTs; the weights do not have it


def vit_sizes(source: str) -> dict[str, int]:
    """Return the keys VIT_KEYS of a ViT.

    Args:
        source: The key vision_encoder: a name of timm, a weight file, a folder or a hub name.

    Raises:
        InputError: The source cannot be read or is not a plain ViT.
    """
    if not Path(source).exists() and timm.is_model(source):
        with torch.device("meta"):  # no memory, no weights
            vit = timm.create_model(source)
        if type(vit) is not VisionTransformer:
            raise InputError(
                f"vision_encoder: the timm model {source} is not a plain ViT; name another model"
            )
        # timm types a list of modules as one module
        attention: Any = vit.blocks[0].attn
        patch = vit.patch_embed.patch_size[0]
        sizes = vit.embed_dim, len(vit.blocks), attention.num_heads, patch
        return dict(zip(VIT_KEYS, sizes, strict=True))
    path = find_file(source, WEIGHT_FILES, "vision_encoder")
    weights = read_weights(path)
    patches = weights.get("patch_embed.proj.weight")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    if patches is None or patches.ndim != 4 or not depth:
        raise InputError(
            f"vision_encoder: {path} has no ViT weights as timm and DeiT name them"
            " (patch_embed.proj.weight, blocks.0, ...); name another file"
        )
    width, _, patch, _ = patches.shape
    sizes = width, depth, max(1, width // HEAD_WIDTH), patch
    return dict(zip(VIT_KEYS, sizes, strict=True))


def bert_sizes(source: str, encoder_width: int) -> dict[str, Any]:
    """Return the keys of bert_config from the config.json of a BERT.

    Its upper half becomes the multimodal encoder.

    Args:
        source: The key text_encoder: a folder, a weight file beside its config.json, or a hub name.
        encoder_width: Width of the image encoder.

    Raises:
        InputError: There is no config.json, or it is not of a BERT.
    """
    folder = Path(source).parent if Path(source).is_file() else source
    path = find_file(folder, ["config.json"], "text_encoder")
    bert = read_bert_values(path)
    layers = bert.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise InputError(
            f"text_encoder: {path} is not the configuration of a BERT model; name another encoder"
        )
    return {**bert, "fusion_layer": layers // 2, "encoder_width": encoder_width}
