"""Image-text retrieval (Section 5): contrastive learning and matching, where several texts belong
to one image.
"""

from typing import Protocol

import torch
from torch import Tensor

from models.bert import BertModel
from models.contrastive import ContrastiveModel
from models.losses import itm_loss
from utils import Text


class RetrievalBatch(Protocol):
    """What `Retrieval.forward` reads of a batch of the data set."""

    image: Tensor  # [B, 3, H, W]
    text: Text  # [B, L]
    idx: Tensor  # image ids [B]


class Retrieval(ContrastiveModel):
    """The model of retrieval fine-tuning; a pair is positive wherever the image ids are equal, also
    in the queue.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertModel, tokenizer, known=("itc", "itm"))
        self.register_buffer("idx_queue", torch.full((1, config["queue_size"]), -100))

    def extra_metrics(self):
        return {"temp": self.temp} if "itc" in self.objectives else {}

    def forward(
        self, batch: RetrievalBatch, *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            batch.image,
            batch.text,
            idx=batch.idx,
            alpha=alpha,
            update_momentum=update_momentum,
        )

    def losses(
        self,
        image: Tensor,
        text: Text,
        *,
        idx: Tensor,
        alpha: float = 0.4,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """One step's losses, any of loss_ita, loss_itm as the configuration has them on.

        image [B, 3, H, W]; text with input_ids and attention_mask [B, L]; idx [B]: image ids, none
        negative; alpha: the weight of distillation; update_momentum is False in all but one of the
        batches that share an optimizer step.
        """
        self.begin_step(update_momentum)
        positives = idx[:, None] == idx  # [B, B]
        image_embeds, image_feat = self.encode_image(image)
        text_embeds, text_feat = self.encode_text(text)

        losses, contrast = {}, None
        if "itc" in self.objectives:
            with torch.no_grad():
                features_m = (
                    self.encode_image(image, momentum=True)[1],
                    self.encode_text(text, momentum=True)[1],
                )
                # [B, B + Q]
                matches = torch.cat([positives, idx[:, None] == self.idx_queue], dim=1).float()
                targets = matches / matches.sum(dim=1, keepdim=True)
            losses["loss_ita"], _, contrast = self.contrastive(
                image_feat, text_feat, features_m, targets, alpha
            )
            self.enqueue(features_m, idx_queue=idx[:, None])
        if "itm" in self.objectives:
            keys_values = self.bert.image_keys_values(image_embeds)
            cls, _, valid = self.match(
                text_embeds, text.attention_mask, keys_values, contrast, positives
            )
            losses["loss_itm"] = itm_loss(self.itm_head(cls), valid)
        return losses
