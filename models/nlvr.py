"""NLVR2 (Section 5): is the sentence true of the two images?

And text assignment, its pre-training.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.albef import ALBEF
from models.bert import BertModel, Head
from models.classification import Classifier
from models.contrastive import feature_similarity
from models.losses import draw
from models.pretrain import PretrainBatch
from utils import Text

# of the image-image similarities that negatives are drawn by; a constant, not the learned temp
IMAGE_TEMP = 0.07


class PairBert(BertModel):
    """BERT with two consecutive blocks in place of each multimodal layer, one for the first image,
    one for the second.

    config counts the layers of the single-image model. share: what the two blocks of a pair have in
    common (Table 7), cross_attention (the projections to keys and values), all or none.
    """

    def __init__(self, config, share):
        fusion = config["fusion_layer"]
        super().__init__(
            {**config, "num_hidden_layers": fusion + 2 * (config["num_hidden_layers"] - fusion)}
        )
        self.share = share
        layers = self.encoder.layer
        for first in range(fusion, len(layers), 2):
            if share == "all":
                layers[first + 1] = layers[first]
            elif share == "cross_attention":
                one, other = (
                    layers[first].crossattention.self,
                    layers[first + 1].crossattention.self,
                )
                other.key, other.value = one.key, one.value

    def pair_keys_values(self, image_embeds, first, second):
        """Return keys and values, each [B, h, 1+N, d], for every block, even ones of the images
        `first`, odd ones of `second`.

        image_embeds [I, 1+N, C] of any number of images; first, second: slices or indices [B] of
        them.
        """
        layers, keys_values = self.encoder.layer[self.fusion_layer :], []
        for even, odd in zip(layers[::2], layers[1::2]):
            if self.share == "none":
                sources = (even, image_embeds[first]), (odd, image_embeds[second])
                keys_values += [
                    block.crossattention.self.keys_values(embeds) for block, embeds in sources
                ]
            else:
                keys, values = even.crossattention.self.keys_values(image_embeds)
                keys_values += [(keys[images], values[images]) for images in (first, second)]
        return keys_values


class NLVR(Classifier):
    """Two-way classification of two images and a sentence: False 0, True 1."""

    classes = 2

    def __init__(self, config, tokenizer=None):
        super().__init__(config, lambda bert: PairBert(bert, config["share"]), tokenizer)

    def keys_values(self, bert, image_embeds):
        """As Classifier.keys_values, of the first images, then the second ones [2B, 1+N, C]."""
        half = len(image_embeds) // 2
        return bert.pair_keys_values(image_embeds, slice(half), slice(half, None))

    def predict(self, image0, image1, text):
        """First and second images [B, 3, H, W], text with input_ids and attention_mask [B, L] ->
        logits [B, 2].
        """
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
        """The loss of a step: images [B, 3, H, W] each, text [B, L], targets [B] classes, alpha the
        weight of distillation.
        """
        return {
            "loss": self.distilled_loss(
                torch.cat([image0, image1]), text, targets, alpha, update_momentum
            )
        }


class TextAssignment(ALBEF):
    """Pre-training of the pair model (Section 5): is the first image (0), the second (1) or neither
    (2) the text's?
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, lambda bert: PairBert(bert, config["share"]), tokenizer)
        width = self.bert_config["hidden_size"]
        self.vision_proj = Head(config["vision_width"], config["embed_dim"])
        self.text_proj = Head(width, config["embed_dim"])
        self.temp = nn.Parameter(torch.tensor(float(config["temp"])))
        self.ta_head = Head(width, 3)

    def idle_parameters(self):
        # in the released checkpoints, but only image features are used here, to draw negatives
        return [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]

    @torch.no_grad()
    def negative_weights(self, image_embeds):
        """How likely each image is to be a negative of another: image_embeds [B, 1+N, C] -> [B, B],
        0 on the diagonal.

        The softmax of image-image similarity / 0.07, a row's own image then set to 0 without
        scaling up the others.
        """
        feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        return (feature_similarity(feat, feat) / IMAGE_TEMP).softmax(dim=1).fill_diagonal_(0)

    def _classify(self, image_embeds, first, second, text):
        keys_values = self.bert.pair_keys_values(image_embeds, first, second)
        text_embeds = self.bert.encode_text(text.input_ids, text.attention_mask)
        return self.ta_head(
            self.bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)[:, 0]
        )

    def predict(self, image0, image1, text):
        """First and second images [B, 3, H, W], text with input_ids and attention_mask [B, L] ->
        logits [B, 3].
        """
        image_embeds = self.visual_encoder.forward_features(torch.cat([image0, image1]))
        return self._classify(image_embeds, slice(len(image0)), slice(len(image0), None), text)

    @torch.no_grad()
    def draw_pairs(self, image_embeds):
        """For each text of a batch a first and a second image and the class: three tensors of
        indices [B].

        The classes are equally likely. "Neither" needs two other images: a batch of fewer than 3
        goes without.
        """
        batch, device = len(image_embeds), image_embeds.device
        own = torch.arange(batch, device=device)
        negatives = draw(self.negative_weights(image_embeds).log(), count=min(2, batch))  # [B, 2]
        one, other = negatives[:, 0], negatives[:, -1]
        label = torch.randint(3 if batch > 2 else 2, (batch,), device=device)
        first = torch.where(label == 0, own, one)
        second = torch.where(label == 1, own, torch.where(label == 0, one, other))
        return first, second, label

    def forward(
        self, batch: PretrainBatch, *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch; text assignment has no distillation."""
        return self.losses(batch.image, batch.text)

    def losses(self, image: Tensor, text: Text) -> dict[str, Tensor]:
        """The loss of a step: image [B, 3, H, W], text with input_ids and attention_mask [B, L].

        A batch of one has no negatives: its loss is an exact 0.
        """
        image_embeds = self.visual_encoder.forward_features(image)
        first, second, label = self.draw_pairs(image_embeds)
        logits = self._classify(image_embeds, first, second, text)
        loss = F.cross_entropy(logits, label)
        return {"loss": loss if len(image) > 1 else 0 * loss}
