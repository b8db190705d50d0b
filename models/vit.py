"""The image encoder (Section 3.1): timm's VisionTransformer without its classification head."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn


def build_vit(config, initializer_range=0.02):
    """Build a ViT from the keys image_res, patch_size, vision_width, vision_depth, vision_heads.

    The model maps images [B, 3, image_res, image_res] to image_embeds [B, 1+N, vision_width], [CLS]
    first, by `forward_features`. initializer_range: standard deviation of the linear layers' random
    weights, half the standard deviation of patch and position embeddings. 0.02 suits a width of
    768. A small model from random weights learns much faster with about 1 / sqrt(width), and hardly
    at all if its patch embedding starts small.
    """
    vit = VisionTransformer(
        img_size=config["image_res"],
        patch_size=config["patch_size"],
        embed_dim=config["vision_width"],
        depth=config["vision_depth"],
        num_heads=config["vision_heads"],
        num_classes=0,
        global_pool="",
    )
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=initializer_range)
    for weight in (vit.patch_embed.proj.weight, vit.pos_embed):
        nn.init.trunc_normal_(weight, std=2 * initializer_range)
    return vit
