"""Classification by the multimodal [CLS] under momentum distillation (Section 5)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from configs.config import BertConfig, Config
from models.albef import ALBEF, check_objectives
from models.bert import BertForMaskedLM, BertModel, Head
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_
from models.tokenizer import Tokenizer
from utils import Text

if TYPE_CHECKING:
    from dataset.classification import ClassificationBatch


class Classifier(ALBEF):
    """ALBEF with a classifier, and momentum copies if the configuration distills.

    A subclass defines `classes`, `predict` and `losses`. It may define another head by `head_name`
    and `build_head`.
    """

    classes: int
    head_name = "cls_head"

    def __init__(
        self,
        config: Config,
        bert: Callable[[BertConfig], BertModel | BertForMaskedLM],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(config, bert, tokenizer)
        width = self.bert_config.hidden_size
        self.add_module(self.head_name, self.build_head(width, self.classes))
        if config.distill:
            check_objectives("distill", config.distill, [])
            self.add_momentum("visual_encoder", "text_encoder", self.head_name)

    @staticmethod
    def build_head(width: int, classes: int) -> nn.Module:
        """Build the head [B, width] -> [B, classes]."""
        return nn.Sequential(Head(width, width), nn.ReLU(), Head(width, classes))

    def classify(self, image: Tensor, text: Text, momentum: bool = False) -> Tensor:
        """Compute logits.

        Args:
            image: Images [B, 3, H, W]; for pairs [2B, 3, H, W], the first images, then the second.
            text: Texts [B, L].
            momentum: Whether to use the momentum model.

        Returns:
            Logits [B, classes].
        """
        bert = self.bert_m if momentum else self.bert
        encoder = self.visual_encoder_m if momentum else self.visual_encoder
        head = self.get_submodule(f"{self.head_name}_m" if momentum else self.head_name)
        keys_values = bert.image_keys_values(encoder.forward_features(image))
        text_embeds = bert.encode_text(text.input_ids, text.attention_mask)
        return head(bert.fuse(text_embeds, text.attention_mask, keys_values, cls_only=True)[:, 0])

    def forward(
        self, batch: "ClassificationBatch", *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        options = {"alpha": alpha, "update_momentum": update_momentum}
        return self.losses(*batch.image, batch.text, targets=batch.targets, **options)

    def distilled_loss(
        self, image: Tensor, text: Text, *, targets: Tensor, alpha: float, update_momentum: bool
    ) -> dict[str, Tensor]:
        """Compute the cross-entropy with the targets and the momentum model's classes.

        Args:
            image: As in `classify`.
            text: Texts [B, L].
            targets: Classes [B].
            alpha: Weight of distillation.
            update_momentum: Whether to update the momentum model, once in an optimizer step.

        Returns:
            loss, a scalar.
        """
        logits, logits_m = self.classify(image, text), None
        if self.config.distill:
            with torch.no_grad():
                if update_momentum:
                    update_momentum_(self, self.config.momentum)
                logits_m = self.classify(image, text, momentum=True)
        return {"loss": distilled_cross_entropy(logits, targets, logits_m, alpha)[0].mean()}


class SingleImageClassifier(Classifier):
    """Classifier of an image and a text."""

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, BertModel, tokenizer)

    def predict(self, image: Tensor, text: Text) -> Tensor:
        """Classify images [B, 3, H, W] with texts [B, L] -> logits [B, classes]."""
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
        """Return the `distilled_loss` of images [B, 3, H, W] with texts [B, L]."""
        options = {"alpha": alpha, "update_momentum": update_momentum}
        return self.distilled_loss(image, text, targets=targets, **options)


class VE(SingleImageClassifier):
    """Visual entailment: contradiction 0, neutral 1, entailment 2."""

    classes = 3


class Relevance(SingleImageClassifier):
    """Relevance of an image and its words to a query: irrelevant 0, relevant 1.

    The text is "query [SEP] words". The classifier is the ITM head, which pre-training has taught
    whether an image and a text match.
    """

    classes = 2
    head_name, build_head = "itm_head", Head
