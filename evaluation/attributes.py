"""Zero-shot attributes in boxes (OVAD): the similarity of a box's image with prompts that name an
attribute, and precision.
"""

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from dataset.attributes import FREQUENCIES
from dataset.text import SHORT_TOKENS, tokenize
from engine import autocast
from evaluation.divide import divide, gather
from evaluation.metrics import require_finite
from models.contrastive import feature_similarity

TEMPLATES = {  # of a prompt set: for what an object is, for what it has
    "the": (
        ("the {value} {noun}", "the {noun} is {value}"),
        ("the {value} {type} {noun}", "the {noun} has {value} {type}"),
    ),
    "a": (
        ("a {value} {noun}", "a {noun} is {value}"),
        ("a {value} {type} {noun}", "a {noun} has {value} {type}"),
    ),
    "none": (("{value} {noun}",), ("{value} {type} {noun}",)),
    "photo": (
        (
            "a photo of a {value} {noun}",
            "a photo of a {noun} which is {value}",
            "a photo of the {value} {noun}",
            "a photo of the {noun} which is {value}",
        ),
        (
            "a photo of a {value} {type} {noun}",
            "a photo of an {noun} which has {value} {type}",
            "a photo of the {value} {type} {noun}",
            "a photo of the {noun} which has {value} {type}",
        ),
    ),
}
PROMPT_SETS = {name: (name,) for name in TEMPLATES} | {"all": ("a", "the", "none")}
MORE_VALUES = {  # that stand for an attribute of these values, as in OVAD
    ("young", "baby"): ["kid", "kids", "child", "toddler", "boy", "girl"],
    ("adult", "old", "aged"): ["teen", "elder"],
}
TOP = 5  # best and worst attributes of each box in result/attributes.json


def prompts_of(attribute, prompts="the", noun=""):
    """Return the prompts of an Attribute: for each of its values every template of a set, a key of
    PROMPT_SETS.
    """
    has, values = attribute.is_has_att == "has", attribute.values
    words = {"type": attribute.type.replace(" tone", ""), "noun": noun}
    return [
        template.format(value=value, **words).strip()
        for value in values + MORE_VALUES.get(tuple(values), [])
        for name in PROMPT_SETS[prompts]
        for template in TEMPLATES[name][has]
    ]


def attribute_scores(similarities, counts, score="mean"):
    """Return scores [B, A], the mean or max over an attribute's prompts, at least 0.

    similarities [B, P]: with the prompts of all attributes; counts: how many prompts each has.
    """
    parts = similarities.split(counts, dim=1)
    return torch.stack(
        [part.mean(dim=1) if score == "mean" else part.amax(dim=1) for part in parts], dim=1
    ).clamp(min=0)


def average_precisions(scores, labels):
    """Return each attribute's average precision over the boxes labeled 1 or 0, in percent; None
    without a positive.

    scores, labels: arrays [N, A], labels 1, 0 or -1 for unlabeled. Raises NotFinite.
    """
    require_finite(scores, "box {} (counting from 0)".format)
    precisions = []
    for score, label in zip(np.transpose(scores), np.transpose(labels)):
        known = label >= 0
        positive = (label == 1).any()
        precisions.append(
            100 * float(average_precision_score(label[known], score[known])) if positive else None
        )
    return precisions


def mean_precisions(precisions, attributes):
    """Return the mean over all attributes with an average precision, over frequency sets and over
    parent types, by name.
    """
    groups = {"all": [], **{name: [] for name in FREQUENCIES}}
    for value, attribute in zip(precisions, attributes):
        if value is not None:
            for name in ("all", attribute.freq_set, attribute.parent_type):
                groups.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items() if values}


def chance_precisions(dataset):
    """Return the average precisions on an AttributeTestSet where all scores are equal, shares of
    positives; its attributes.
    """
    labels = np.array([box.labels for box in dataset.entries])
    return average_precisions(np.zeros(labels.shape), labels), dataset.attributes


@torch.no_grad()
def score_boxes(model, dataset, tokenizer, config, device, prompts="the", noun="", score="mean"):
    """Return the scores [N, A] of the N boxes of an AttributeTestSet, an array, on all processes.

    Raises NotFinite.
    """
    model.eval()
    texts = [prompts_of(attribute, prompts, noun) for attribute in dataset.attributes]
    counts, found = [len(own) for own in texts], {}
    with autocast(config, device):
        text = tokenize(sum(texts, []), tokenizer, config["max_tokens"] or SHORT_TOKENS).to(device)
        text_feat = model.encode_text(text)[1]
        for indices, image in divide(dataset, config, device, "boxes"):
            similarities = feature_similarity(model.encode_image(image)[1], text_feat)
            found.update(zip(indices, attribute_scores(similarities, counts, score).cpu().numpy()))
    scores = np.stack(gather(found))
    require_finite(scores, dataset.where)
    return scores


def evaluate(model, dataset, tokenizer, config, device, report=None, **how):
    """Return the mean average precision in percent: "map" over all attributes, "map_NAME" of
    frequency sets and parent types.

    how: as score_boxes takes it. Report a table beside chance and result/attributes.json.
    """
    scores = score_boxes(model, dataset, tokenizer, config, device, **how)
    attributes, labels = dataset.attributes, np.array([box.labels for box in dataset.entries])
    precisions = average_precisions(scores, labels)
    means = mean_precisions(precisions, attributes)
    if report:
        chance, _ = chance_precisions(dataset)
        print(
            f"zero-shot attributes, {report.title}: {len(labels)} boxes, {len(attributes)} attributes, "
            f"{len(attributes) - precisions.count(None)} with a positive; mean average precision, percent"
        )
        by_chance = mean_precisions(chance, attributes)
        print(f"{'':24}{'mAP':>9}{'chance':>9}")
        for name, value in means.items():
            print(f"{name:24}{value:9.2f}{by_chance[name]:9.2f}")
        report.write(
            "attributes.json",
            {
                "image_root": dataset.roots["image_root"],
                **how,
                "map": means,
                "chance": by_chance,
                "attributes": [
                    {
                        "id": attribute.id,
                        "name": attribute.name,
                        "average_precision": precision,
                        "chance": share,
                    }
                    for attribute, precision, share in zip(attributes, precisions, chance)
                ],
                "boxes": [extremes(box, row) for box, row in zip(dataset.entries, scores)],
            },
        )
    return {"map" if name == "all" else f"map_{name}": value for name, value in means.items()}


def extremes(box, scores):
    """Return a Box with its best and worst attributes, [index, score, label] each, as
    result/attributes.json has it.
    """
    order = np.argsort(-scores, kind="stable").tolist()

    def listed(indices):
        return [[i, round(float(scores[i]), 4), box.labels[i]] for i in indices]

    return {
        "image": box.image,
        "box": box.pixels,
        "best": listed(order[:TOP]),
        "worst": listed(order[: -TOP - 1 : -1]),
    }
