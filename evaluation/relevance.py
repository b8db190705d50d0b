"""Query-ad relevance: ROC AUC of the probability that an ad is relevant."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import Dataset

from configs.config import Config, as_config
from dataset.relevance import SEPARATOR
from evaluation.classification import classify
from evaluation.metrics import require_finite
from evaluation.report import Report
from models.classification import Classifier
from models.tokenizer import Tokenizer
from utils import InputError


class Swapped(Dataset):
    """A ClassificationDataset in which each ad has the image or words of a distant ad of the file.

    Args:
        dataset: The ads.
        part: "image" or "words".
    """

    def __init__(self, dataset: Any, part: str) -> None:
        self.dataset, self.part = dataset, part
        self.collate, self.where = dataset.collate, dataset.where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        ad, distant = self.dataset[index], self.dataset[(index + len(self) // 2) % len(self)]
        if self.part == "image":
            return ad._replace(image=distant.image)
        query, _ = ad.sentence.split(SEPARATOR)
        _, words = distant.sentence.split(SEPARATOR)
        return ad._replace(sentence=query + SEPARATOR + words)


def roc_auc(labels: list[int], scores: np.ndarray) -> float:
    """Return the area under the ROC curve in percent.

    Args:
        labels: 0 and 1, [N].
        scores: Scores [N].

    Raises:
        InputError: Not both labels occur.
        NotFinite: A score is not finite.
    """
    require_finite(scores, "pair {} (counting from 0)".format)
    if len(set(labels)) < 2:
        raise InputError(
            "all labels are equal, so the ROC AUC is not defined; give pairs of both labels"
        )
    return 100 * float(roc_auc_score(labels, scores))


def evaluate(
    model: Classifier,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
    *,
    alone: bool = False,
) -> dict[str, float]:
    """Evaluate a relevance model.

    Args:
        model: The model.
        dataset: A ClassificationDataset of ads.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of a report of one line, None for no report.
        alone: Whether to also measure ads with the image or the words of another ad.

    Returns:
        The ROC AUC in percent, "auc". With `alone` also "auc_other_image" and "auc_other_words",
        where each ad has the image or the words of another ad.

    Raises:
        InputError: Not both labels occur.
        NotFinite: Logits are not finite.
    """
    config = as_config(config)

    def auc_of(data: Any) -> float:
        logits, targets = classify(model, data, tokenizer, config, device)
        return roc_auc(targets.tolist(), logits[:, 1] - logits[:, 0])

    metrics = {"auc": auc_of(dataset)}
    parts = ("image", "words") if alone else ()
    metrics |= {f"auc_other_{part}": auc_of(Swapped(dataset, part)) for part in parts}
    if report:
        swapped = [
            f", with the {part} of another ad {metrics[f'auc_other_{part}']:.2f}%" for part in parts
        ]
        print(
            f"relevance, {report.title}: ROC AUC {metrics['auc']:.2f}% on {len(dataset)} pairs"
            f" (chance 50.00%){''.join(swapped)}"
        )
    return metrics
