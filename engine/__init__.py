"""The training loop and what a run needs around it: saving and resuming, records, processes,
fine-tuning.
"""

from engine.device import autocast, compile_layers
from engine.loop import Run, iterate, train

__all__ = ["Run", "autocast", "compile_layers", "iterate", "train"]
