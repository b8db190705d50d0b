"""Zero-shot attributes in boxes (OVAD): similarity with prompts, average precision."""

from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from configs.config import Config, as_config
from dataset.attributes import FREQUENCIES, Attribute, Box
from dataset.text import SHORT_TOKENS, tokenize
from engine.precision import autocast
from evaluation.distributed import iter_rank_share, merge_results
from evaluation.metrics import require_finite
from evaluation.report import Report
from models.contrastive import ContrastiveModel, feature_similarity
from models.tokenizer import Tokenizer

TEMPLATES = {  # templates of a prompt set: for attributes that an object is, and that it has
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
MORE_VALUES = {  # more words for an attribute with these values, as in OVAD
    ("young", "baby"): ["kid", "kids", "child", "toddler", "boy", "girl"],
    ("adult", "old", "aged"): ["teen", "elder"],
}
TOP = 5  # best and worst attributes of each box in result/attributes.json


def prompts_of(attribute: Attribute, prompts: str = "the", noun: str = "") -> list[str]:
    """Return an attribute's prompts: every template of a set with every value.

    Args:
        attribute: The attribute.
        prompts: A key of PROMPT_SETS.
        noun: Noun for every object.
    """
    has, values = attribute.is_has_att == "has", attribute.values
    words = {"type": attribute.type.replace(" tone", ""), "noun": noun}
    return [
        template.format(value=value, **words).strip()
        for value in values + MORE_VALUES.get(tuple(values), [])
        for name in PROMPT_SETS[prompts]
        for template in TEMPLATES[name][has]
    ]


def attribute_scores(similarities: Tensor, counts: list[int], score: str = "mean") -> Tensor:
    """Return scores [B, A], the mean or max over an attribute's prompts, at least 0.

    Args:
        similarities: Similarities with the prompts of all attributes, [B, P].
        counts: Number of prompts of each attribute.
        score: "mean" or "max".
    """
    parts = similarities.split(counts, dim=1)
    scores = [part.mean(dim=1) if score == "mean" else part.amax(dim=1) for part in parts]
    return torch.stack(scores, dim=1).clamp(min=0)


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Return each attribute's average precision in percent, None without a positive.

    Args:
        scores: Scores [N, A] of N boxes.
        labels: 1, 0, or -1 for unlabeled, [N, A]. Unlabeled boxes do not count.

    Raises:
        NotFinite: A score is not finite.
    """
    require_finite(scores, "box {} (counting from 0)".format)
    precisions: list[float | None] = []
    for score, label in zip(np.transpose(scores), np.transpose(labels), strict=True):
        if (label == 1).any():
            known = label >= 0
            precisions.append(100 * float(average_precision_score(label[known], score[known])))
        else:
            precisions.append(None)
    return precisions


def mean_precisions(
    precisions: list[float | None], attributes: list[Attribute]
) -> dict[str, float]:
    """Return the mean average precision over all attributes, frequency sets and parent types."""
    groups: dict[str, list[float]] = {"all": [], **{name: [] for name in FREQUENCIES}}
    for value, attribute in zip(precisions, attributes, strict=True):
        if value is not None:
            for name in ("all", attribute.freq_set, attribute.parent_type):
                groups.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items() if values}


def chance_precisions(dataset: Any) -> tuple[list[float | None], list[Attribute]]:
    """Return the average precisions of equal scores, and the attributes."""
    labels = np.array([box.labels for box in dataset.entries])
    return average_precisions(np.zeros(labels.shape), labels), dataset.attributes


@torch.no_grad()
def score_boxes(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
    *,
    prompts: str = "the",
    noun: str = "",
    score: str = "mean",
) -> np.ndarray:
    """Return the scores [N, A] of the N boxes of an AttributeTestSet, on all ranks.

    Args:
        model: A model with the contrastive projections.
        dataset: The data set.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        prompts: As in `prompts_of`.
        noun: As in `prompts_of`.
        score: As in `attribute_scores`.

    Raises:
        NotFinite: A score is not finite.
    """
    model.eval()
    texts = [prompts_of(attribute, prompts, noun) for attribute in dataset.attributes]
    counts, results = [len(own) for own in texts], {}
    with autocast(config, device):
        text = tokenize(sum(texts, []), tokenizer, config.max_tokens or SHORT_TOKENS).to(device)
        text_feat = model.encode_text(text)[1]
        for indices, image in iter_rank_share(dataset, config, device, "boxes"):
            similarities = feature_similarity(model.encode_image(image)[1], text_feat)
            rows = attribute_scores(similarities, counts, score).cpu().numpy()
            results.update(zip(indices, rows, strict=True))
    scores = np.stack(merge_results(results))
    require_finite(scores, dataset.where)
    return scores


def evaluate(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
    **options: str,
) -> dict[str, float]:
    """Evaluate attributes of boxes zero-shot.

    The report is a table beside chance, and result/attributes.json.

    Args:
        model: A model with the contrastive projections.
        dataset: An AttributeTestSet.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of the report, None for no report.
        options: `prompts`, `noun` and `score` of `score_boxes`.

    Returns:
        The mean average precision in percent: "map" over all attributes, "map_NAME" of frequency
        sets and parent types.

    Raises:
        NotFinite: A score is not finite.
    """
    scores = score_boxes(model, dataset, tokenizer, as_config(config), device, **options)
    attributes, labels = dataset.attributes, np.array([box.labels for box in dataset.entries])
    precisions = average_precisions(scores, labels)
    means = mean_precisions(precisions, attributes)
    if report:
        write_report(report, dataset, scores, precisions, options)
    return {"map" if name == "all" else f"map_{name}": value for name, value in means.items()}


def write_report(
    report: Report,
    dataset: Any,
    scores: np.ndarray,
    precisions: list[float | None],
    options: dict[str, str],
) -> None:
    """Print the means beside chance, and write result/attributes.json.

    Args:
        report: Destination of the report.
        dataset: The AttributeTestSet.
        scores: Scores of its boxes [N, A].
        precisions: Average precision of each attribute.
        options: Options of `score_boxes`.
    """
    boxes, attributes = dataset.entries, dataset.attributes
    chance, _ = chance_precisions(dataset)
    means = mean_precisions(precisions, attributes)
    mean_chance = mean_precisions(chance, attributes)
    print(
        f"zero-shot attributes, {report.title}: {len(boxes)} boxes, {len(attributes)} attributes"
        f" ({len(attributes) - precisions.count(None)} with a positive); mean average precision in"
        " percent"
    )
    print(f"{'':24}{'mAP':>9}{'chance':>9}")
    for name, value in means.items():
        print(f"{name:24}{value:9.2f}{mean_chance[name]:9.2f}")
    rows = zip(attributes, precisions, chance, strict=True)
    content = {
        "image_root": dataset.roots["image_root"],
        **options,
        "map": means,
        "chance": mean_chance,
        "attributes": [
            {"id": a.id, "name": a.name, "average_precision": precision, "chance": share}
            for a, precision, share in rows
        ],
        "boxes": [extremes(box, row) for box, row in zip(boxes, scores, strict=True)],
    }
    report.write("attributes.json", content)


def extremes(box: Box, scores: np.ndarray) -> dict[str, Any]:
    """Return a box with its best and worst attributes, as result/attributes.json has it.

    Args:
        box: The box.
        scores: Its scores [A].

    Returns:
        The image, the box, and [index, score, label] of the best and of the worst attributes.
    """
    order = np.argsort(-scores, kind="stable").tolist()

    def listed(indices: list[int]) -> list[list[Any]]:
        return [[i, round(float(scores[i]), 4), box.labels[i]] for i in indices]

    return {
        "image": box.image,
        "box": box.pixels,
        "best": listed(order[:TOP]),
        "worst": listed(order[: -TOP - 1 : -1]),
    }


def chance_metrics(dataset: Any) -> dict[str, float]:
    """Return the mean average precision of equal scores for an AttributeTestSet."""
    means = mean_precisions(*chance_precisions(dataset))
    return {"map" if name == "all" else f"map_{name}": share for name, share in means.items()}
