"""ALBEF pre-training (Section 3): contrastive learning, matching and masked language modeling under
distillation.
"""

from typing import Protocol

import torch
from torch import Tensor

from models.bert import BertForMaskedLM
from models.contrastive import ContrastiveModel, mutual_information_bound
from models.losses import MaskedText, itm_loss, mask_tokens, masked_text, mlm_loss
from utils import Text


class PretrainBatch(Protocol):
    """What `Pretrain.forward` reads of a batch of the data set."""

    image: Tensor  # [B, 3, H, W]
    text: Text  # [B, L]
    masked: MaskedText | None


class Pretrain(ContrastiveModel):
    """The pre-training model: contrastive learning, matching, and masked language modeling (key
    mlm_probability).
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertForMaskedLM, tokenizer, known=("itc", "mlm", "itm"))
        # Section 4, of the last step
        self.register_buffer("mi_bound", torch.zeros(()), persistent=False)

    def mlm_logits(self, fused):
        """fused [..., C] -> vocabulary logits [..., V]."""
        return self.text_encoder.cls.predictions(fused)

    def mask(self, input_ids):
        """Mask a batch of texts for MLM: input_ids [B, L] -> MaskedText."""
        vocab_size, probability = self.bert_config["vocab_size"], self.config["mlm_probability"]
        return mask_tokens(input_ids, vocab_size, self.special_ids, probability)

    def idle_parameters(self):
        idle = super().idle_parameters()
        if "mlm" not in self.objectives:
            idle += [
                self.text_encoder.cls.predictions.bias,
                *self.text_encoder.cls.predictions.transform.parameters(),
            ]
        return idle

    def prepare(self, batch):
        return (
            batch._replace(masked=self.mask(batch.text.input_ids))
            if "mlm" in self.objectives
            else batch
        )

    def extra_metrics(self):
        return {"temp": self.temp, "mi_bound": self.mi_bound} if "itc" in self.objectives else {}

    def forward(
        self, batch: PretrainBatch, *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            batch.image,
            batch.text,
            masked=batch.masked,
            alpha=alpha,
            update_momentum=update_momentum,
        )

    def losses(
        self,
        image: Tensor,
        text: Text,
        alpha: float = 0.4,
        masked: MaskedText | tuple[Tensor, Tensor] | None = None,
        *,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """One step's losses (Equation 5), any of loss_mlm, loss_ita, loss_itm as the configuration
        has them on.

        image [B, 3, H, W]; text with input_ids and attention_mask [B, L]; alpha: the weight of
        distillation; masked: (input_ids, labels) or a MaskedText, drawn here if not given;
        update_momentum is False in all but one of the batches that share an optimizer step.
        """
        batch = image.shape[0]
        self.begin_step(update_momentum)
        if "mlm" in self.objectives:
            masked = self.mask(text.input_ids) if masked is None else masked
            masked = masked_text(*masked) if len(masked) == 2 else masked
            # the text and its masked version go through the text encoder together
            text_all = Text(
                torch.cat([text.input_ids, masked.input_ids]), text.attention_mask.repeat(2, 1)
            )
        else:
            text_all = text

        image_embeds, image_feat = self.encode_image(image)  # [B, 1+N, C], [B, D]
        text_embeds, text_feat = self.encode_text(text_all)  # [B or 2B, L, C], [B or 2B, D]
        text_embeds, text_embeds_masked = text_embeds[:batch], text_embeds[batch:]
        text_feat = text_feat[:batch]
        with torch.no_grad():
            features_m, mlm_logits_m = self.momentum_forward(image, text, text_all, masked)

        losses, contrast = {}, None
        if "itc" in self.objectives:
            # a sample's own pair, in the batch's part of the candidates
            targets = torch.arange(batch, device=image.device)
            losses["loss_ita"], onehot, contrast = self.contrastive(
                image_feat, text_feat, features_m, targets, alpha
            )
            self.mi_bound.copy_(mutual_information_bound(onehot, contrast.i2t.shape[1]))
            self.enqueue(features_m)
        if "itm" in self.objectives or "mlm" in self.objectives:
            keys_values = self.bert.image_keys_values(image_embeds)  # once for all rows of the step
            if "itm" in self.objectives:
                itself = torch.eye(batch, dtype=torch.bool, device=image.device)
                cls, fused, valid = self.match(
                    text_embeds,
                    text.attention_mask,
                    keys_values,
                    contrast,
                    itself,
                    text_embeds_masked,
                )
                losses["loss_itm"] = itm_loss(self.itm_head(cls), valid)
            else:
                fused = self.bert.fuse(text_embeds_masked, text.attention_mask, keys_values)
            if "mlm" in self.objectives:
                # [M, V]
                logits = self.mlm_logits(fused.flatten(0, 1).index_select(0, masked.positions))
                labels = masked.labels.flatten()[masked.positions]
                losses["loss_mlm"] = mlm_loss(logits, labels, mlm_logits_m, alpha)
        return losses

    def momentum_forward(self, image, text, text_all, masked):
        """The momentum model's features (image_feat_m, text_feat_m) and its MLM logits at the
        masked positions [M, V].
        """
        distill_mlm = "mlm" in self.objectives and "mlm" in self.distilled
        if "itc" not in self.objectives and not distill_mlm:
            return None, None
        batch = image.shape[0]
        image_embeds_m, image_feat_m = self.encode_image(image, momentum=True)
        text_embeds_m, text_feat_m = self.encode_text(
            text_all if distill_mlm else text, momentum=True
        )
        features_m = image_feat_m, text_feat_m[:batch]
        if not distill_mlm:
            return features_m, None
        keys_values = self.bert_m.image_keys_values(image_embeds_m)
        fused_m = self.bert_m.fuse(text_embeds_m[batch:], text.attention_mask, keys_values)
        return features_m, self.text_encoder_m.cls.predictions(
            fused_m.flatten(0, 1).index_select(0, masked.positions)
        )
