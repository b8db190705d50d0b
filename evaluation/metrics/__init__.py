"""Metrics as pure functions. Scores that are not finite raise NotFinite."""

from dataset.refer import box_iou
from evaluation.metrics.finite import NotFinite, require_finite
from evaluation.metrics.grounding import box_scores, chance_grounding, grounding_accuracy
from evaluation.metrics.recall import chance_recall, recall_at_k
from evaluation.metrics.vqa import count_vqa_formulas, describe_vqa_formulas, vqa_accuracy

__all__ = [
    "NotFinite",
    "box_iou",
    "box_scores",
    "chance_grounding",
    "chance_recall",
    "count_vqa_formulas",
    "describe_vqa_formulas",
    "grounding_accuracy",
    "recall_at_k",
    "require_finite",
    "vqa_accuracy",
]
