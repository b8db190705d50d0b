"""Data sets by task and split, and the loaders that feed them."""
