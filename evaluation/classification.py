"""What VE.py and NLVR.py share: sentences about one image or two, and their classes."""

import functools

import torch

from engine import autocast
from evaluation.divide import divide, gather

NAMES = {"ve": "visual entailment", "nlvr": "NLVR2"}


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(*batch.image, batch.text, targets=batch.targets, alpha=alpha, update_momentum=update_momentum)


@torch.no_grad()
def classify(model, dataset, tokenizer, config, device, measure):
    """Return measure(logits [B, classes], targets [B]), a value for each sample, of a whole ClassificationDataset in order."""
    model.eval()
    found, collate = {}, functools.partial(dataset.collate, tokenizer=tokenizer)
    with autocast(config, device):
        for indices, batch in divide(dataset, config, device, "sentences", collate):
            found.update(zip(indices, measure(model.predict(*batch.image, batch.text), batch.targets)))
    return gather(found)


def evaluate(model, dataset, tokenizer, config, device, report=None):
    """Return the accuracy on a ClassificationDataset in percent, {"acc"}; report it in one line."""

    def measure(logits, targets):
        return (logits.argmax(dim=1) == targets).tolist()

    right = classify(model, dataset, tokenizer, config, device, measure)
    accuracy = 100 * sum(right) / len(right)
    if report:
        chance = 100 / model.classes
        print(f"{NAMES[model.task]}, {report.title}: accuracy {accuracy:.2f}% of {len(right)} sentences (chance {chance:.1f}%)")
    return {"acc": accuracy}
