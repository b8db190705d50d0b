"""NLVR2, whether a sentence is true of two images, and text assignment, its pre-training."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from configs.config import BertConfig, Config
from models.albef import ALBEF
from models.bert import BertModel, Head, KeysValues
from models.classification import Classifier
from models.contrastive import feature_similarity
from models.losses import draw
from models.tokenizer import Tokenizer
from utils import Text

if TYPE_CHECKING:
    from dataset.caption import CaptionBatch

# divisor of the image-image similarities that negatives are drawn by; not the learned temp
IMAGE_TEMP = 0.07


class PairBert(BertModel):
    """BERT with two consecutive blocks in place of each multimodal layer, one for each image."""

    images_per_text = 2

    def __init__(self, config: BertConfig, share: str) -> None:
        """Build the layers with random weights.

        Args:
            config: BERT configuration of the single-image model.
            share: Weights that the blocks of a pair share (Table 7): "cross_attention" for the
                projections to keys and values, "all" or "none".
        """
        fusion = config.fusion_layer
        depth = fusion + 2 * (config.num_hidden_layers - fusion)
        super().__init__(replace(config, num_hidden_layers=depth))
        self.share = share
        layers = self.encoder.layer
        for number in range(fusion, depth, 2):
            if share == "all":
                layers[number + 1] = layers[number]
            elif share == "cross_attention":
                first, second = (layers[number + i].crossattention.self for i in (0, 1))
                second.key = first.key  # ty: ignore[invalid-assignment]  # not typed in torch
                second.value = first.value  # ty: ignore[invalid-assignment]

    def image_keys_values(
        self, image_embeds: Tensor, pairs: tuple[Tensor, Tensor] | None = None
    ) -> list[KeysValues]:
        """Project images to the keys and values of each multimodal block.

        Args:
            image_embeds: Image embeddings [I, 1+N, C].
            pairs: Indices of the first and of the second images, [B] each. Default: the first
                images are the first half of `image_embeds`.

        Returns:
            Keys and values [B, h, 1+N, d], of the first images for even blocks and of the second
            images for odd blocks.
        """

        def split(values: Tensor) -> list[Tensor]:
            return [*values.chunk(2)] if pairs is None else [values[index] for index in pairs]

        layers, keys_values = self.encoder.layer[self.fusion_layer :], []
        for even, odd in zip(layers[::2], layers[1::2], strict=True):
            if self.share == "none":
                for block, embeds in zip((even, odd), split(image_embeds), strict=True):
                    keys_values.append(block.crossattention.self.keys_values(embeds))
            else:
                keys, values = even.crossattention.self.keys_values(image_embeds)
                keys_values += zip(split(keys), split(values), strict=True)
        return keys_values


class NLVR(Classifier):
    """NLVR2: the sentence is false 0, true 1."""

    classes = 2

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, lambda bert: PairBert(bert, config.share), tokenizer)

    def predict(self, image0: Tensor, image1: Tensor, text: Text) -> Tensor:
        """Classify pairs of images [B, 3, H, W] with texts [B, L] -> logits [B, 2]."""
        return self.classify(torch.cat([image0, image1]), text)

    def losses(
        self,
        image0: Tensor,
        image1: Tensor,
        text: Text,
        *,
        targets: Tensor,
        alpha: float = 0.4,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """Return the `distilled_loss` of pairs of images [B, 3, H, W] with texts [B, L]."""
        options = {"alpha": alpha, "update_momentum": update_momentum}
        return self.distilled_loss(torch.cat([image0, image1]), text, targets=targets, **options)


class TextAssignment(ALBEF):
    """Text assignment (Section 5): the text describes image 0, image 1 or neither (2)."""

    # only __init__ writes it
    text_encoder: PairBert  # ty: ignore[incompatible-mutable-override]

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, lambda bert: PairBert(bert, config.share), tokenizer)
        width = self.bert_config.hidden_size
        self.vision_proj = Head(config.vision_width, config.embed_dim)
        self.text_proj = Head(width, config.embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(config.temp)))
        self.ta_head = Head(width, 3)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the projections. Image features are used only to draw negatives."""
        return [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]

    @torch.no_grad()
    def negative_weights(self, image_embeds: Tensor) -> Tensor:
        """Compute the weights by which negative images are drawn.

        This is the softmax of image-image similarity / 0.07. An image's weight for itself is then
        set to 0 without rescaling the others.

        Args:
            image_embeds: Image embeddings [B, 1+N, C].

        Returns:
            Weights [B, B], 0 on the diagonal.
        """
        feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        return (feature_similarity(feat, feat) / IMAGE_TEMP).softmax(dim=1).fill_diagonal_(0)

    def _classify(
        self, image_embeds: Tensor, text: Text, pairs: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        keys_values = self.text_encoder.image_keys_values(image_embeds, pairs)
        text_embeds = self.bert.encode_text(text.input_ids, text.attention_mask)
        fused = self.bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)
        return self.ta_head(fused[:, 0])

    def predict(self, image0: Tensor, image1: Tensor, text: Text) -> Tensor:
        """Classify pairs of images [B, 3, H, W] with texts [B, L] -> logits [B, 3]."""
        images = torch.cat([image0, image1])
        return self._classify(self.visual_encoder.forward_features(images), text)

    @torch.no_grad()
    def draw_pairs(self, image_embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a pair of images and a class for each text of a batch.

        The classes are equally likely. "Neither" needs two other images, so that a batch of fewer
        than 3 leaves it out.

        Args:
            image_embeds: Image embeddings [B, 1+N, C].

        Returns:
            Indices of the first images, indices of the second images and classes, [B] each.
        """
        batch, device = len(image_embeds), image_embeds.device
        itself = torch.arange(batch, device=device)
        negatives = draw(self.negative_weights(image_embeds).log(), count=min(2, batch))  # [B, 2]
        label = torch.randint(3 if batch > 2 else 2, (batch,), device=device)
        first = torch.where(label == 0, itself, negatives[:, 0])
        second = torch.where(label == 0, negatives[:, 0], negatives[:, -1])
        return first, torch.where(label == 1, itself, second), label

    def forward(
        self, batch: "CaptionBatch", *, alpha: float = 0.0, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch; text assignment has no distillation."""
        return self.losses(batch.image, batch.text)

    def losses(self, image: Tensor, text: Text) -> dict[str, Tensor]:
        """Compute the loss of images [B, 3, H, W] with their texts [B, L].

        A batch of one has no negatives, so that its loss is an exact 0.
        """
        image_embeds = self.visual_encoder.forward_features(image)
        first, second, label = self.draw_pairs(image_embeds)
        loss = F.cross_entropy(self._classify(image_embeds, text, (first, second)), label)
        return {"loss": loss if len(image) > 1 else 0 * loss}
