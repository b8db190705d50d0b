"""What VE.py and NLVR.py share: sentences about one image or two, and their classes."""

import functools

import numpy as np
import torch

from engine import autocast
from evaluation.divide import divide, gather
from evaluation.metrics import require_finite

NAMES = {"ve": "visual entailment", "nlvr": "NLVR2"}


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(batch, alpha=alpha, update_momentum=update_momentum)


@torch.no_grad()
def classify(model, dataset, tokenizer, config, device):
    """Return the logits [N, classes], float32, and targets [N] of a ClassificationDataset, arrays
    on all processes.

    Raises NotFinite.
    """
    model.eval()
    found, collate = {}, functools.partial(dataset.collate, tokenizer=tokenizer)
    with autocast(config, device):
        for indices, batch in divide(dataset, config, device, "sentences", collate):
            logits = model.predict(*batch.image, batch.text).float().cpu().numpy()
            found.update(zip(indices, zip(logits, batch.targets.tolist())))
    logits, targets = map(np.array, zip(*gather(found)))
    require_finite(logits, dataset.where)
    return logits, targets


def evaluate(model, dataset, tokenizer, config, device, report=None):
    """Return the accuracy on a ClassificationDataset in percent, {"acc"}; report it in one line."""
    logits, targets = classify(model, dataset, tokenizer, config, device)
    accuracy = 100 * float(np.mean(logits.argmax(axis=1) == targets))
    if report:
        chance = 100 / model.classes
        print(
            f"{NAMES[model.task]}, {report.title}: accuracy {accuracy:.2f}% of {len(targets)} sentences (chance {chance:.1f}%)"
        )
    return {"acc": accuracy}
