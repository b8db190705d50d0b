"""Evaluation of every task and the metrics it reports."""
