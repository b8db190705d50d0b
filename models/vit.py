"""Image encoder (Section 3.1): timm's VisionTransformer without its classification head."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from configs.config import Config


def build_vit(config: Config, initializer_range: float = 0.02) -> VisionTransformer:
    """Build a ViT. Its `forward_features` maps images to embeddings, [CLS] first.

    An initializer range of 0.02 suits a width of 768. A small model from random weights learns much
    faster with about 1 / sqrt(width), and hardly at all if its patch embedding starts small.

    Args:
        config: The keys image_res, patch_size, vision_width, vision_depth and vision_heads.
        initializer_range: Standard deviation of the linear layers' random weights, half that of
            patch and position embeddings.

    Returns:
        Model from [B, 3, image_res, image_res] to [B, 1+N, vision_width].
    """
    vit = VisionTransformer(
        img_size=config.resolution,
        patch_size=config.patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_depth,
        num_heads=config.vision_heads,
        num_classes=0,
        global_pool="",
    )
    for module in vit.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=initializer_range)
    for weight in (vit.patch_embed.proj.weight, vit.pos_embed):
        # timm types pos_embed of every ViT as optional
        nn.init.trunc_normal_(weight, std=2 * initializer_range)  # ty: ignore[invalid-argument-type]
    return vit
