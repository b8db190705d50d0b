"""What VE.py and NLVR.py share: sentences about one image or two, and their classes."""

import functools

import torch

from engine import autocast
from evaluation.divide import divided, gathered
from utils import is_main


def step(model, batch, alpha, update_momentum):
    """The losses of a batch by name."""
    return model(*batch.image, batch.text, targets=batch.targets, alpha=alpha, update_momentum=update_momentum)


@torch.no_grad()
def evaluate(model, dataset, tokenizer, config, device):
    """Accuracy on a ClassificationDataset in percent, as {"acc"}; and the number of sentences."""
    model.eval()
    right, collate = {}, functools.partial(dataset.collate, tokenizer=tokenizer)
    with autocast(config, device):
        for numbers, batch in divided(dataset, config, device, "sentences", collate):
            logits = model.predict(*batch.image, batch.text)
            right.update(zip(numbers, (logits.argmax(dim=1) == batch.targets).tolist()))
    right = gathered(right)
    return {"acc": 100 * sum(right) / len(right)}, len(right)


def show(task, classes):
    """The function that prints what evaluate found, as run_task takes it; task: what to call it."""

    def line(output_dir, title, split, epoch, metrics, count, dataset):
        if is_main():
            print(f"{task}, {title}: accuracy {metrics['acc']:.2f}% of {count} sentences (chance {100 / classes:.1f}%)")

    return line
