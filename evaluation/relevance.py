"""Query-ad relevance: ROC AUC of the probability that an ad is relevant."""

from sklearn.metrics import roc_auc_score
from torch.utils.data import Dataset

from dataset.relevance import SEPARATOR
from evaluation.classification import classify
from evaluation.metrics import require_finite
from utils import InputError


class Swapped(Dataset):
    """A ClassificationDataset of ads in which each ad has the image, or the words, of one far from
    it in the file.
    """

    def __init__(self, dataset, part):
        self.dataset, self.part, self.collate, self.where = (
            dataset,
            part,
            dataset.collate,
            dataset.where,
        )

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        own, other = self.dataset[index], self.dataset[(index + len(self) // 2) % len(self)]
        if self.part == "image":
            return own._replace(image=other.image)
        query, words = (
            sample.sentence.split(SEPARATOR)[i] for i, sample in enumerate((own, other))
        )
        return own._replace(sentence=query + SEPARATOR + words)


def roc_auc(labels, scores):
    """Return the area under the ROC curve in percent.

    labels: 0 and 1. Raises InputError unless both occur, and NotFinite for a score.
    """
    require_finite(scores, "pair {} (counting from 0)".format)
    if len(set(labels)) < 2:
        raise InputError(
            "all labels are equal, so the ROC AUC is not defined: give pairs of both labels"
        )
    return 100 * float(roc_auc_score(labels, scores))


def evaluate(model, dataset, tokenizer, config, device, report=None, alone=False):
    """Return the ROC AUC on a ClassificationDataset of ads in percent, {"auc"}; report it in one
    line.

    alone: also "auc_other_image" and "auc_other_words", with the image or the words of another ad
    in place of the own: what the model makes of text alone and of image alone.
    """

    def auc_of(data):
        logits, targets = classify(model, data, tokenizer, config, device)
        return roc_auc(targets.tolist(), logits[:, 1] - logits[:, 0])

    metrics = {"auc": auc_of(dataset)}
    if alone:
        metrics |= {
            f"auc_other_{part}": auc_of(Swapped(dataset, part)) for part in ("image", "words")
        }
    if report:
        others = {
            name.removeprefix("auc_other_"): value
            for name, value in metrics.items()
            if name != "auc"
        }
        swapped = "".join(
            f", with the {part} of another ad {value:.2f}%" for part, value in others.items()
        )
        print(
            f"relevance, {report.title}: ROC AUC {metrics['auc']:.2f}% of {len(dataset)} pairs (chance 50.00%){swapped}"
        )
    return metrics
