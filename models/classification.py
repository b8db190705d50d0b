"""Classification from the [CLS] position of the multimodal encoder under momentum distillation:

VE, NLVR2, relevance.
"""

import torch
from torch import nn

from models.albef import ALBEF, check_objectives
from models.head import Head
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_


class Classifier(ALBEF):
    """An ALBEF with a head over `classes` classes and, if the configuration distills, momentum
    copies of it all.

    A subclass says in `keys_values` how its images meet the multimodal encoder, and may have
    another head than one of two layers: the name of the module, and build_head(width, classes).
    """

    head = "cls_head"

    def __init__(self, config, bert, tokenizer, classes):
        super().__init__(config, bert, tokenizer)
        self.classes = classes
        self.add_module(self.head, self.build_head(self.bert_config["hidden_size"], classes))
        if config["distill"]:
            check_objectives("distill", config["distill"], [])
            self.add_momentum("visual_encoder", "text_encoder", self.head)

    @staticmethod
    def build_head(width, classes):
        return nn.Sequential(Head(width, width), nn.ReLU(), Head(width, classes))

    def keys_values(self, bert, image_embeds):
        """The images' keys and values for each multimodal layer of bert, from the embeddings of all
        images.
        """
        return bert.image_keys_values(image_embeds)

    def classify(self, image, text):
        """image: all images of a batch; text with input_ids and attention_mask [B, L] -> logits [B,
        classes].
        """
        return self._classify(self.visual_encoder, self.bert, getattr(self, self.head), image, text)

    def _classify(self, visual_encoder, bert, head, image, text):
        keys_values = self.keys_values(bert, visual_encoder.forward_features(image))
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return head(bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)[:, 0])

    def distilled_loss(self, image, text, targets, alpha, update_momentum):
        """Cross-entropy with the targets [B] mixed with the momentum model's classes by alpha
        (Section 3.3), a scalar.
        """
        logits, logits_m = self.classify(image, text), None
        if self.config["distill"]:
            with torch.no_grad():
                if update_momentum:
                    update_momentum_(self, self.config["momentum"])
                logits_m = self._classify(
                    self.visual_encoder_m, self.bert_m, getattr(self, f"{self.head}_m"), image, text
                )
        return distilled_cross_entropy(logits, targets, logits_m, alpha)[0].mean()
