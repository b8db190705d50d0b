"""ALBEF pre-training (Section 3): contrastive learning, matching and masked language modeling under distillation."""

import torch
import torch.nn.functional as F

from models.albef import ALBEF, Text, feature_queue, mutual_information_bound
from models.bert import BertForMaskedLM
from models.losses import itc_loss, itm_loss, mask_tokens, masked_text, mlm_loss, sample_negatives, similarities
from models.momentum import update_momentum_
from models.queue import enqueue_


class Pretrain(ALBEF):
    """The pre-training model.

    Keys of the configuration beyond the architecture: objectives (any of itc, mlm, itm), hard_negatives (false: uniform),
    distill (true, false, or the list of objectives to distill), queue_size, momentum, mlm_probability.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertForMaskedLM, tokenizer)
        self.objectives = config["objectives"]
        self.distilled = config["distill"] if isinstance(config["distill"], list) else self.objectives * config["distill"]
        self.hard_negatives = config["hard_negatives"] and "itc" in self.objectives
        self.momentum = config["momentum"]
        self.add_momentum("visual_encoder", "vision_proj", "text_encoder", "text_proj")
        for queue in ("image_queue", "text_queue"):
            self.register_buffer(queue, feature_queue(config["embed_dim"], config["queue_size"]))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.register_buffer("mi_bound", torch.zeros(()), persistent=False)  # Section 4, of the last step
        self._freeze_idle_parameters()

    def _freeze_idle_parameters(self):
        """Takes what no objective reaches out of training, so that data parallelism does not wait for its gradient."""
        idle = []
        if "itc" not in self.objectives:
            idle += [self.temp, *self.vision_proj.parameters(), *self.text_proj.parameters()]
        if "itm" not in self.objectives:
            idle += self.itm_head.parameters()
        if "mlm" not in self.objectives:
            idle += [self.text_encoder.cls.predictions.bias, *self.text_encoder.cls.predictions.transform.parameters()]
        if self.objectives == ["itc"]:
            idle += self.bert.encoder.layer[self.bert.fusion_layer :].parameters()
        for param in idle:
            param.requires_grad_(False)

    def mlm_logits(self, fused):
        """fused [..., C] -> vocabulary logits [..., V]."""
        return self.text_encoder.cls.predictions(fused)

    def mask(self, input_ids):
        """Masks a batch of texts for MLM: input_ids [B, L] -> MaskedText."""
        vocab_size, probability = self.bert_config["vocab_size"], self.config["mlm_probability"]
        return mask_tokens(input_ids, vocab_size, self.special_ids, probability)

    def extra_metrics(self):
        """Tensors worth logging beside the losses, of the last step."""
        return {"temp": self.temp, "mi_bound": self.mi_bound} if "itc" in self.objectives else {}

    def forward(self, image, text, alpha=0.4, masked=None, update_momentum=True):
        """One step's losses (Equation 5), any of loss_mlm, loss_ita, loss_itm as the configuration has them on.

        image [B, 3, H, W]; text with input_ids and attention_mask [B, L]; alpha: the weight of distillation; masked:
        (input_ids, labels) or a MaskedText, drawn here if not given; update_momentum is False in all but one of the
        batches that share an optimizer step.
        """
        batch = image.shape[0]
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            if update_momentum:
                update_momentum_(self, self.momentum)
        if "mlm" in self.objectives:
            masked = self.mask(text.input_ids) if masked is None else masked
            masked = masked_text(*masked) if len(masked) == 2 else masked
            # the text and its masked version go through the text encoder together
            text_all = Text(torch.cat([text.input_ids, masked.input_ids]), text.attention_mask.repeat(2, 1))
        else:
            text_all = text

        image_embeds, image_feat = self.encode_image(image)  # [B, 1+N, C], [B, D]
        text_embeds, text_feat = self.encode_text(text_all)  # [B or 2B, L, C], [B or 2B, D]
        text_embeds, text_embeds_masked = text_embeds[:batch], text_embeds[batch:]
        text_feat = text_feat[:batch]
        with torch.no_grad():
            features_m, mlm_logits_m = self._momentum_forward(image, text, text_all, masked)

        losses, contrast = {}, None
        if "itc" in self.objectives:
            losses["loss_ita"], contrast = self._contrastive(image_feat, text_feat, features_m, alpha)
        if "itm" in self.objectives or "mlm" in self.objectives:
            keys_values = self.bert.image_keys_values(image_embeds)  # once for all rows of the step
            if "itm" in self.objectives:
                cls, fused, valid = self._match(text_embeds, text_embeds_masked, text.attention_mask, keys_values, contrast)
                losses["loss_itm"] = itm_loss(self.itm_head(cls), valid)
            else:
                fused = self.bert.fuse(text_embeds_masked, text.attention_mask, keys_values)
            if "mlm" in self.objectives:
                logits = self.mlm_logits(fused.flatten(0, 1)[masked.positions])  # [M, V]
                labels = masked.labels.flatten()[masked.positions]
                losses["loss_mlm"] = mlm_loss(logits, labels, mlm_logits_m, alpha)
        return losses

    def _momentum_forward(self, image, text, text_all, masked):
        """The momentum model's features (image_feat_m, text_feat_m) and its MLM logits at the masked positions [M, V]."""
        distill_mlm = "mlm" in self.objectives and "mlm" in self.distilled
        if "itc" not in self.objectives and not distill_mlm:
            return None, None
        batch = image.shape[0]
        image_embeds_m, image_feat_m = self.encode_image(image, momentum=True)
        text_embeds_m, text_feat_m = self.encode_text(text_all if distill_mlm else text, momentum=True)
        features_m = image_feat_m, text_feat_m[:batch]
        if not distill_mlm:
            return features_m, None
        keys_values = self.bert_m.image_keys_values(image_embeds_m)
        fused_m = self.bert_m.fuse(text_embeds_m[batch:], text.attention_mask, keys_values)
        return features_m, self.text_encoder_m.cls.predictions(fused_m.flatten(0, 1)[masked.positions])

    def _contrastive(self, image_feat, text_feat, features_m, alpha):
        """Equations 1, 2 and 6, then the queues take the momentum features. Returns (loss, Contrast)."""
        # backward needs the queues as they were before this step's features enter
        image_queue, text_queue = self.image_queue.clone(), self.text_queue.clone()
        contrast = similarities(image_feat, text_feat, *features_m, image_queue, text_queue, self.temp)
        contrast_m = None
        if "itc" in self.distilled:
            contrast_m = similarities(*features_m, *features_m, image_queue, text_queue, self.temp.detach())
        targets = torch.arange(image_feat.shape[0], device=image_feat.device)
        loss, onehot = itc_loss(contrast, targets, contrast_m, alpha)
        self.mi_bound.copy_(mutual_information_bound(onehot, contrast.i2t.shape[1]))
        enqueue_([self.image_queue, self.text_queue], features_m, self.queue_ptr)
        return loss, contrast

    def _negatives(self, contrast, batch, device):
        """Indices of a negative text for each image and a negative image for each text [B], and validity [B]."""
        itself = torch.eye(batch, dtype=torch.bool, device=device)
        uniform = torch.zeros(batch, batch, device=device)
        i2t, t2i = (sim[:, :batch] for sim in contrast) if self.hard_negatives else (uniform, uniform)
        negative_text, valid = sample_negatives(i2t, itself)
        negative_image, _ = sample_negatives(t2i, itself)
        return negative_text, negative_image, valid

    def _match(self, text_embeds, text_embeds_masked, attention_mask, keys_values, contrast):
        """Fuses matched pairs, their hard negatives and the masked texts in one pass of the multimodal encoder.

        Returns the [CLS] embeddings [3B, C] of B matched pairs, B images with a negative text and B texts with a negative
        image, the fused masked texts [B, L, C] (no rows without MLM), and validity of the negatives [B].
        """
        negative_text, negative_image, valid = self._negatives(contrast, len(text_embeds), text_embeds.device)
        rows = torch.cat([text_embeds, text_embeds[negative_text], text_embeds])
        masks = torch.cat([attention_mask, attention_mask[negative_text], attention_mask])
        mlm_mask = attention_mask[: len(text_embeds_masked)]
        cls, fused = self.bert.fuse_matched_and_masked(
            rows, masks, text_embeds_masked, mlm_mask, keys_values, negative_image
        )
        return cls, fused, valid
