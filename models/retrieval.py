"""Image-text retrieval (Section 5): contrastive learning and matching with equal image ids."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from configs.config import Config
from models.bert import BertModel
from models.contrastive import ContrastiveModel, MatchOutput
from models.losses import Features, itm_loss
from models.tokenizer import Tokenizer
from utils import Text

if TYPE_CHECKING:
    from dataset.caption import CaptionBatch


class Retrieval(ContrastiveModel):
    """Model of retrieval and grounding: pairs with equal image ids are positive."""

    idx_queue: Tensor

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, BertModel, tokenizer, known=("itc", "itm"))
        self.register_buffer("idx_queue", torch.full((1, config.queue_size), -100))

    def forward(
        self, batch: "CaptionBatch", *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            batch.image, batch.text, idx=batch.idx, alpha=alpha, update_momentum=update_momentum
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
        """Compute the losses of the objectives that are on.

        Args:
            image: Images [B, 3, H, W].
            text: Texts [B, L].
            idx: Image ids [B], not negative.
            alpha: Weight of distillation.
            update_momentum: Whether to update the momentum model, once in an optimizer step.

        Returns:
            loss_ita and loss_itm, scalars.
        """
        self.begin_step(update_momentum)
        positives = idx[:, None] == idx  # [B, B]
        image_embeds, image_feat = self.encode_image(image)
        text_embeds, text_feat = self.encode_text(text)
        losses, contrast, match = {}, None, MatchOutput()
        if "itc" in self.objectives:  # Equations 1, 2 and 6
            with torch.no_grad():
                features_m = Features(
                    self.encode_image(image, momentum=True)[1],
                    self.encode_text(text, momentum=True)[1],
                )
                # [B, B + Q]
                matches = torch.cat([positives, idx[:, None] == self.idx_queue], dim=1).float()
                targets = matches / matches.sum(dim=1, keepdim=True)
            losses["loss_ita"], _, contrast = self.contrastive(
                Features(image_feat, text_feat), features_m, targets, alpha
            )
            self.enqueue(features_m, idx_queue=idx[:, None])
        if "itm" in self.objectives:  # Equation 4
            match = self.match(
                image_embeds,
                text_embeds,
                text.attention_mask,
                contrast=contrast,
                positives=positives,
            )
        if match.valid is not None:
            losses["loss_itm"] = itm_loss(self.itm_head(match.cls), match.valid)
        return losses
