"""Explanations of a model's decisions, and their pictures."""
