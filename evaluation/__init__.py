"""Evaluation, one module a task: `evaluate` returns metrics by name and prints a report."""
