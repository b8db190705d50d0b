"""Visual entailment (Section 5): does the sentence follow from the image?"""

from models.bert import BertModel
from models.classification import Classifier


class VE(Classifier):
    """Three-way classification of an image and a sentence: contradiction 0, neutral 1, entailment
    2.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertModel, tokenizer, classes=3)

    def predict(self, image, text):
        """image [B, 3, H, W], text with input_ids and attention_mask [B, L] -> logits [B, 3]."""
        return self.classify(image, text)

    def forward(self, image, text, targets, alpha=0.4, update_momentum=True):
        """The loss of a step: image [B, 3, H, W], text [B, L], targets [B] classes, alpha the
        weight of distillation.
        """
        return {"loss": self.distilled_loss(image, text, targets, alpha, update_momentum)}
