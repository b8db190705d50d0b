"""Weakly supervised grounding: the detected box with the most Grad-CAM heat (Section 5)."""

import functools
from typing import Any

import numpy as np
import torch

from configs.config import Config, as_config
from engine.precision import autocast
from evaluation.distributed import iter_rank_share, merge_results
from evaluation.metrics import chance_grounding, grounding_accuracy
from evaluation.report import Report
from models.contrastive import ContrastiveModel
from models.gradcam import text_gradcam
from models.tokenizer import Tokenizer


def heat_maps(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device,
    *,
    mode: str = "itm",
    block_num: int | None = None,
) -> list[tuple[int, np.ndarray]]:
    """Return (ref_id, heat map [h, w]) of every expression of a GroundingTestSet, on all ranks.

    Args:
        model: A retrieval model.
        dataset: The data set.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        mode: "itm" for matching on the cross-attention of a multimodal layer, the mean over the
            tokens; "itc" for similarity on the self-attention of a ViT block.
        block_num: The layer, None for the usual one.
    """
    model.eval()
    results: dict[int, tuple[int, np.ndarray]] = {}
    collate = functools.partial(dataset.collate, tokenizer=tokenizer)
    for indices, batch in iter_rank_share(dataset, config, device, "expressions", collate):
        with autocast(config, device):
            maps = text_gradcam(model, batch.image, batch.text, mode, block_num).cpu().numpy()
        results.update(zip(indices, zip(batch.ref_ids, maps, strict=True), strict=True))
    return merge_results(results)


def evaluate(
    model: ContrastiveModel,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
    *,
    mode: str = "itm",
    block_num: int | None = None,
) -> dict[str, float]:
    """Evaluate a retrieval model on referring expressions.

    The report is a line for each split, with the accuracy of a random detected box.

    Args:
        model: The model.
        dataset: A GroundingTestSet.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of the report, None for no report.
        mode: As in `heat_maps`.
        block_num: As in `heat_maps`.

    Returns:
        The accuracy of each split of the refs in percent, "val_d" and so on.

    Raises:
        NotFinite: A heat map is not finite.
    """
    config = as_config(config)
    maps = heat_maps(model, dataset, tokenizer, config, device, mode=mode, block_num=block_num)
    shares = grounding_accuracy(maps, *dataset.refer, dataset.detections)
    metrics = {name: 100 * share for name, share in shares.items()}
    if report:
        chance = chance_metrics(dataset)
        for name, value in metrics.items():
            print(
                f"grounding, {report.title}: {name.removesuffix('_d')} {value:.2f}% (a random box:"
                f" {chance[name]:.1f}%)"
            )
    return metrics


def chance_metrics(dataset: Any) -> dict[str, float]:
    """Return the expected accuracy of random boxes for a GroundingTestSet, by split in percent."""
    refer, ref_ids = dataset.refer, [entry.ref_id for entry in dataset.entries]
    shares = chance_grounding(refer.refs, refer.boxes, dataset.detections, ref_ids)
    return {name: 100 * share for name, share in shares.items()}
