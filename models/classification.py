"""Classification from the multimodal [CLS] position under momentum distillation (Section 5)."""

from typing import Protocol

import torch
from torch import Tensor, nn

from models.albef import ALBEF, check_objectives
from models.bert import BertModel, Head
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_
from utils import Text


class ClassificationBatch(Protocol):
    """What `Classifier.forward` reads of a batch of the data set."""

    image: tuple[Tensor, ...]  # the images [B, 3, H, W] of each sentence, one or two
    text: Text  # [B, L]
    targets: Tensor  # classes [B]


class Classifier(ALBEF):
    """An ALBEF with a head over `classes` classes and, if the configuration distills, momentum
    copies of it all.

    A subclass has `losses` and `predict`, sets `classes`, and may have another head: the name of
    its module and `build_head`.
    """

    classes: int
    head_name = "cls_head"

    def __init__(self, config, bert, tokenizer):
        super().__init__(config, bert, tokenizer)
        width = self.bert_config["hidden_size"]
        self.add_module(self.head_name, self.build_head(width, self.classes))
        if config["distill"]:
            check_objectives("distill", config["distill"], [])
            self.add_momentum("visual_encoder", "text_encoder", self.head_name)

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
        return self._classify(
            self.visual_encoder, self.bert, getattr(self, self.head_name), image, text
        )

    def _classify(self, visual_encoder, bert, head, image, text):
        keys_values = self.keys_values(bert, visual_encoder.forward_features(image))
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return head(bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)[:, 0])

    def forward(
        self, batch: ClassificationBatch, *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            *batch.image,
            batch.text,
            targets=batch.targets,
            alpha=alpha,
            update_momentum=update_momentum,
        )

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
                    self.visual_encoder_m,
                    self.bert_m,
                    getattr(self, f"{self.head_name}_m"),
                    image,
                    text,
                )
        return distilled_cross_entropy(logits, targets, logits_m, alpha)[0].mean()


class SingleImageClassifier(Classifier):
    """Classifier of one image and one text."""

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertModel, tokenizer)

    def predict(self, image: Tensor, text: Text) -> Tensor:
        """image [B, 3, H, W], text with input_ids and attention_mask [B, L] -> logits [B, classes]."""
        return self.classify(image, text)

    def losses(
        self,
        image: Tensor,
        text: Text,
        *,
        targets: Tensor,
        alpha: float = 0.4,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """The loss of a step: image [B, 3, H, W], text [B, L], targets [B] classes, alpha the
        weight of distillation.
        """
        return {"loss": self.distilled_loss(image, text, targets, alpha, update_momentum)}


class VE(SingleImageClassifier):
    """Visual entailment: contradiction 0, neutral 1, entailment 2."""

    classes = 3


class Relevance(SingleImageClassifier):
    """Relevance of an ad, its image and "query [SEP] words of the ad": irrelevant 0, relevant 1.

    The classifier is the ITM head, which pre-training has taught whether an image and a text match.
    """

    classes = 2
    head_name, build_head = "itm_head", Head
