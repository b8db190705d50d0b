"""ALBEF pre-training (Section 3): contrastive learning, matching and masked language modeling."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from configs.config import Config
from models.bert import BertForMaskedLM
from models.contrastive import ContrastiveModel, MatchOutput, mutual_information_bound
from models.losses import Features, MaskedText, itm_loss, mask_tokens, masked_text, mlm_loss
from models.tokenizer import Tokenizer
from utils import Text

if TYPE_CHECKING:
    from dataset.caption import CaptionBatch


class Pretrain(ContrastiveModel):
    """Pre-training model: contrastive learning, matching and masked language modeling."""

    # only __init__ writes these
    text_encoder: BertForMaskedLM  # ty: ignore[incompatible-mutable-override]
    text_encoder_m: BertForMaskedLM  # ty: ignore[incompatible-mutable-override]
    mi_bound: Tensor

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, BertForMaskedLM, tokenizer, known=("itc", "mlm", "itm"))
        # Section 4, of the last step
        self.register_buffer("mi_bound", torch.zeros(()), persistent=False)

    def mlm_logits(self, fused: Tensor) -> Tensor:
        """Compute vocabulary logits [..., V] of fused states [..., C]."""
        return self.text_encoder.cls.predictions(fused)

    def mask(self, input_ids: Tensor) -> MaskedText:
        """Mask texts [B, L] at random."""
        vocab_size, probability = self.bert_config.word_pieces, self.config.mlm_probability
        return mask_tokens(input_ids, vocab_size, self.special_ids, probability)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that no objective reaches."""
        idle = super().idle_parameters()
        if "mlm" not in self.objectives:
            head = self.text_encoder.cls.predictions
            idle += [head.bias, *head.transform.parameters()]
        return idle

    def prepare(self, batch: Any) -> Any:
        """Mask the texts of a batch on the host."""
        if "mlm" not in self.objectives:
            return batch
        return batch._replace(masked=self.mask(batch.text.input_ids))

    def extra_metrics(self) -> dict[str, Tensor]:
        """Return the metrics of contrastive learning, with the bound of mutual information."""
        metrics = super().extra_metrics()
        return {**metrics, "mi_bound": self.mi_bound} if metrics else {}

    def forward(
        self, batch: "CaptionBatch", *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            batch.image, batch.text, alpha, batch.masked, update_momentum=update_momentum
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
        """Compute the losses of the objectives that are on (Equation 5).

        Args:
            image: Images [B, 3, H, W].
            text: Texts [B, L].
            alpha: Weight of distillation.
            masked: Masked texts, or input_ids and labels [B, L] of them. Default: masked here.
            update_momentum: Whether to update the momentum model, once in an optimizer step.

        Returns:
            loss_ita, loss_itm and loss_mlm, scalars.
        """
        batch = len(image)
        self.begin_step(update_momentum)
        texts, masked = self._append_masked(text, masked)
        image_embeds, image_feat = self.encode_image(image)  # [B, 1+N, C], [B, D]
        text_embeds, text_feat = self.encode_text(texts)  # [B or 2B, L, C], [B or 2B, D]
        features_m, mlm_logits_m = self.momentum_forward(image, texts, masked)
        losses, contrast, match = {}, None, MatchOutput()
        if features_m is not None:  # Equations 1, 2 and 6
            features = Features(image_feat, text_feat[:batch])
            targets = torch.arange(batch, device=image.device)  # the pair itself, in the batch
            loss, onehot, contrast = self.contrastive(features, features_m, targets, alpha)
            losses["loss_ita"] = loss
            self.mi_bound.copy_(mutual_information_bound(onehot, contrast.i2t.shape[1]))
            self.enqueue(features_m)
        if self.objectives != ["itc"]:
            match = self.match(
                image_embeds,
                text_embeds[:batch],
                text.attention_mask,
                contrast=contrast,
                masked_embeds=None if masked is None else text_embeds[batch:],
            )
        if match.valid is not None:  # Equation 4
            losses["loss_itm"] = itm_loss(self.itm_head(match.cls), match.valid)
        if match.masked is not None and masked is not None:  # Equations 3 and 7
            logits = self.mlm_logits(at_masked(match.masked, masked))
            labels = masked.labels.flatten()[masked.positions]
            losses["loss_mlm"] = mlm_loss(logits, labels, mlm_logits_m, alpha)
        return losses

    def _append_masked(
        self, text: Text, masked: MaskedText | tuple[Tensor, Tensor] | None
    ) -> tuple[Text, MaskedText | None]:
        """Append the masked versions to texts [B, L] -> [2B, L], to encode both in one pass."""
        if "mlm" not in self.objectives:
            return text, None
        masked = self.mask(text.input_ids) if masked is None else masked
        masked = masked if isinstance(masked, MaskedText) else masked_text(*masked)
        input_ids = torch.cat([text.input_ids, masked.input_ids])
        return Text(input_ids, text.attention_mask.repeat(2, 1)), masked

    @torch.no_grad()
    def momentum_forward(
        self, image: Tensor, texts: Text, masked: MaskedText | None
    ) -> tuple[Features | None, Tensor | None]:
        """Compute the momentum model's features, and its MLM logits for distillation.

        Args:
            image: Images [B, 3, H, W].
            texts: Texts, and after them their masked versions if MLM is on [B or 2B, L].
            masked: The masked texts.

        Returns:
            Momentum features [B, D], None without ITC, and MLM logits [M, V] at the masked
            positions, None if MLM is not distilled.
        """
        distilled = masked if "mlm" in self.distilled else None
        if "itc" not in self.objectives and distilled is None:
            return None, None
        batch = len(image)
        image_embeds_m, image_feat_m = self.encode_image(image, momentum=True)
        if distilled is None:
            texts = Text(texts.input_ids[:batch], texts.attention_mask[:batch])
        text_embeds_m, text_feat_m = self.encode_text(texts, momentum=True)
        features_m = None
        if "itc" in self.objectives:
            features_m = Features(image_feat_m, text_feat_m[:batch])
        if distilled is None:
            return features_m, None
        keys_values = self.bert_m.image_keys_values(image_embeds_m)
        mask = texts.attention_mask[batch:]
        fused_m = self.bert_m.fuse(text_embeds_m[batch:], mask, keys_values)
        return features_m, self.text_encoder_m.cls.predictions(at_masked(fused_m, distilled))


def at_masked(fused: Tensor, masked: MaskedText) -> Tensor:
    """Select the masked positions of fused states [B, L, C] -> [M, C]."""
    return fused.flatten(0, 1).index_select(0, masked.positions)
