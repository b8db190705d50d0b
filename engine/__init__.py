"""Training runs: processes, checkpoints, logs, precision."""
