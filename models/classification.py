"""Classification from the [CLS] position of the multimodal encoder under momentum distillation: what VE and NLVR2 share."""

import torch
from torch import nn

from models.albef import ALBEF
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_


class Classifier(ALBEF):
    """An ALBEF with a two-layer head over `classes` classes and, if the configuration distills, momentum copies of it all.

    A subclass says in `keys_values` how its images meet the multimodal encoder.
    """

    def __init__(self, config, bert, tokenizer, classes):
        super().__init__(config, bert, tokenizer)
        width = self.bert_config["hidden_size"]
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        if config["distill"]:
            self.add_momentum("visual_encoder", "text_encoder", "cls_head")

    def keys_values(self, bert, image_embeds):
        """The images' keys and values for each multimodal layer of bert, from the embeddings of all images."""
        return bert.image_keys_values(image_embeds)

    def classify(self, image, text):
        """image: all images of a batch; text with input_ids and attention_mask [B, L] -> logits [B, classes]."""
        return self._classify(self.visual_encoder, self.bert, self.cls_head, image, text)

    def _classify(self, visual_encoder, bert, cls_head, image, text):
        keys_values = self.keys_values(bert, visual_encoder.forward_features(image))
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return cls_head(bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)[:, 0])

    def distilled_loss(self, image, text, targets, alpha, update_momentum):
        """Cross-entropy with the targets [B] mixed with the momentum model's classes by alpha (Section 3.3), a scalar."""
        logits, logits_m = self.classify(image, text), None
        if self.config["distill"]:
            with torch.no_grad():
                if update_momentum:
                    update_momentum_(self, self.config["momentum"])
                logits_m = self._classify(self.visual_encoder_m, self.bert_m, self.cls_head_m, image, text)
        return distilled_cross_entropy(logits, targets, logits_m, alpha)[0].mean()
