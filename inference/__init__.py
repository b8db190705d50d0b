"""A trained model in Python: `from inference import load_model` (docs/inference.md)."""

from inference.model import HeatMap, Inference, load_model

__all__ = ["HeatMap", "Inference", "load_model"]
