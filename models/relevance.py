"""Query-ad relevance: is an image with its words relevant to a query?"""

from models.bert import BertModel
from models.classification import Classifier
from models.head import Head


class Relevance(Classifier):
    """Two-way classification of an ad's image and "query [SEP] words of the ad": irrelevant 0,
    relevant 1.

    The classifier is the ITM head, which pre-training has taught whether an image and a text match.
    """

    head, build_head = "itm_head", Head

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertModel, tokenizer, classes=2)

    def predict(self, image, text):
        """image [B, 3, H, W], text with input_ids and attention_mask [B, L] -> logits [B, 2]."""
        return self.classify(image, text)

    def forward(self, image, text, targets, alpha=0.4, update_momentum=True):
        """The loss of a step: image [B, 3, H, W], text [B, L], targets [B] classes, alpha the
        weight of distillation.
        """
        return {"loss": self.distilled_loss(image, text, targets, alpha, update_momentum)}
