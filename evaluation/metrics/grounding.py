"""Accuracy of weakly supervised grounding."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from dataset.refer import box_iou, is_tested
from evaluation.metrics.finite import require_finite
from utils import InputError

RIGHT_IOU = 0.5  # least intersection over union of a right box

Id = Any  # an integer, or a string of one as in JSON
Boxes = Sequence[Sequence[float]]


def grounding_accuracy(
    cams: Mapping[Id, ArrayLike] | Iterable[tuple[Id, ArrayLike]],
    refs: Mapping[Id, Mapping[str, Any]],
    boxes: Mapping[Id, Sequence[float]],
    images: Mapping[Id, Mapping[str, Any]],
    detections: Mapping[Id, Boxes],
    *,
    alpha: float = 0.5,
) -> dict[str, float]:
    """Return the share of expressions whose best detected box is right, by split.

    A heat map is resized bicubically to its image. A detected box scores the sum of the map over
    its pixels, divided by (w * h)^alpha (Section 5, Visual Grounding). A box without pixels in the
    image loses to every other box. The first of several best boxes counts. It is right if its IoU
    with the box referred to is at least 0.5.

    Args:
        cams: Heat maps [h, w] of any size by ref_id, or pairs (ref_id, map), since a ref may have
            several expressions.
        refs: {ref_id: {image_id, split}}.
        boxes: {ref_id: [x, y, w, h]}, the box referred to.
        images: {image_id: {height, width}} in pixels.
        detections: {image_id: [[x, y, w, h, score], ...]}, the score unused.
        alpha: Exponent of the area of a box.

    Returns:
        Shares in [0, 1], for RefCOCO+ "val_d", "testA_d" and "testB_d". Splits without an
        expression are left out, and so is train.

    Raises:
        InputError: `refs` lacks a ref_id, or an image has no detected box.
        NotFinite: A map is not finite.
    """
    refs, boxes, images, detections = map(_by_id, (refs, boxes, images, detections))
    pairs: list[tuple[Id, Any]] = list(cams.items() if isinstance(cams, Mapping) else cams)
    # a sum is finite only if the whole map is
    sums = [torch.as_tensor(cam).double().sum().item() for _, cam in pairs]
    require_finite(sums, lambda index: f"heat map of ref_id {pairs[index][0]}")
    hits: dict[str, list[float]] = defaultdict(list)
    for ref_id, cam in ((int(key), cam) for key, cam in pairs):
        ref = _find_ref(refs, ref_id)
        if is_tested(ref):
            candidates, image = _candidates(detections, ref, ref_id), images[int(ref["image_id"])]
            scores = box_scores(cam, image["height"], image["width"], candidates, alpha=alpha)
            best = candidates[int(np.argmax(scores))]
            hits[ref["split"]].append(box_iou(best, boxes[ref_id]) >= RIGHT_IOU)
    return _mean_by_split(hits)


def chance_grounding(
    refs: Mapping[Id, Mapping[str, Any]],
    boxes: Mapping[Id, Sequence[float]],
    detections: Mapping[Id, Boxes],
    ref_ids: Iterable[Id] | None = None,
) -> dict[str, float]:
    """Return the expected `grounding_accuracy` of random detected boxes.

    Args:
        refs: As in `grounding_accuracy`.
        boxes: As in `grounding_accuracy`.
        detections: As in `grounding_accuracy`.
        ref_ids: The ref of each expression. By default every ref counts once.

    Raises:
        InputError: `refs` lacks a ref_id, or an image has no detected box.
    """
    refs, boxes, detections = map(_by_id, (refs, boxes, detections))
    shares: dict[str, list[float]] = defaultdict(list)
    for ref_id in refs if ref_ids is None else map(int, ref_ids):
        ref = _find_ref(refs, ref_id)
        if is_tested(ref):
            candidates = _candidates(detections, ref, ref_id)
            right = [box_iou(box, boxes[ref_id]) >= RIGHT_IOU for box in candidates]
            shares[ref["split"]].append(float(np.mean(right)))
    return _mean_by_split(shares)


def box_scores(
    cam: ArrayLike, height: int, width: int, boxes: Boxes, *, alpha: float = 0.5
) -> list[float]:
    """Return the score of each box of an image, as in `grounding_accuracy`.

    Args:
        cam: Heat map [h, w].
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        boxes: Boxes [x, y, w, h, ...] in pixels.
        alpha: Exponent of the area of a box.
    """
    small = torch.as_tensor(cam, dtype=torch.float32)[None, None]
    heat = F.interpolate(small, (height, width), mode="bicubic", align_corners=False)[0, 0]
    return [_box_score(heat, box, alpha) for box in boxes]


def _box_score(heat: Tensor, box: Sequence[float], alpha: float) -> float:
    """Return the sum of a map [H, W] inside a box [x, y, w, h, ...], divided by (w * h)^alpha."""
    x, y, w, h = box[:4]
    # a negative start would count from the far edge
    inside = heat[max(0, int(y)) : max(0, int(y + h)), max(0, int(x)) : max(0, int(x + w))]
    return inside.sum().item() / (w * h) ** alpha if inside.numel() else -float("inf")


def _by_id(mapping: Mapping[Id, Any]) -> dict[int, Any]:
    return {int(key): value for key, value in mapping.items()}


def _find_ref(refs: Mapping[int, Any], ref_id: int) -> Mapping[str, Any]:
    if ref_id not in refs:
        raise InputError(
            f"ref_id {ref_id} of test_file is not among the RefCOCO+ refs; correct test_file,"
            " refcoco_data or refer_dataset"
        )
    return refs[ref_id]


def _candidates(detections: Mapping[int, Any], ref: Mapping[str, Any], ref_id: int) -> Boxes:
    """Return the detected boxes of a ref's image. Raises InputError if there are none."""
    image_id = int(ref["image_id"])
    if not detections.get(image_id):
        raise InputError(
            f"det_file has no box for image {image_id} (ref_id {ref_id}, split {ref['split']});"
            " add detections for every image outside of the split train"
        )
    return detections[image_id]


def _mean_by_split(values: Mapping[str, list[float]]) -> dict[str, float]:
    """Return {"SPLIT_d": mean of a split's values}, val first."""
    splits = sorted(values, key=lambda split: (split != "val", split))
    return {f"{split}_d": float(np.mean(values[split])) for split in splits}
