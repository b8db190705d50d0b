"""The training loop and what a run needs around it: saving and resuming, records, processes, fine-tuning."""

from engine.loop import Run, autocast, compile_layers, iterate, train

__all__ = ["Run", "autocast", "compile_layers", "iterate", "train"]
