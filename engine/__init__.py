"""Training and what a run needs around it: processes, checkpoints, logs, precision."""
