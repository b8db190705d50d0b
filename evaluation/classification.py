"""Visual entailment and NLVR2: the class of a sentence about one image or two; accuracy."""

import functools
from typing import Any

import numpy as np
import torch

from configs.config import Config, as_config
from configs.tasks import TASKS
from engine.precision import autocast
from evaluation.distributed import iter_rank_share, merge_results
from evaluation.metrics import require_finite
from evaluation.report import Report
from models.classification import Classifier
from models.tokenizer import Tokenizer


@torch.no_grad()
def classify(
    model: Classifier, dataset: Any, tokenizer: Tokenizer, config: Config, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits and targets of a ClassificationDataset, on all ranks.

    Returns:
        Logits [N, classes], float32, and targets [N].

    Raises:
        NotFinite: Logits are not finite.
    """
    model.eval()
    results: dict[int, tuple[np.ndarray, int]] = {}
    collate = functools.partial(dataset.collate, tokenizer=tokenizer)
    with autocast(config, device):
        for indices, batch in iter_rank_share(dataset, config, device, "sentences", collate):
            logits = model.predict(*batch.image, batch.text).float().cpu().numpy()
            rows = zip(logits, batch.targets.tolist(), strict=True)
            results.update(zip(indices, rows, strict=True))
    logits, targets = map(np.array, zip(*merge_results(results), strict=True))
    require_finite(logits, dataset.where)
    return logits, targets


def evaluate(
    model: Classifier,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
) -> dict[str, float]:
    """Evaluate a model of visual entailment or NLVR2.

    Args:
        model: The model.
        dataset: A ClassificationDataset.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of a report of one line, None for no report.

    Returns:
        The accuracy in percent, "acc".

    Raises:
        NotFinite: Logits are not finite.
    """
    logits, targets = classify(model, dataset, tokenizer, as_config(config), device)
    accuracy = 100 * float(np.mean(logits.argmax(axis=1) == targets))
    if report:
        chance = 100 / model.classes
        print(
            f"{TASKS[model.task].title}, {report.title}: accuracy {accuracy:.2f}% of"
            f" {len(targets)} sentences (chance {chance:.1f}%)"
        )
    return {"acc": accuracy}
