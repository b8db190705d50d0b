"""Commands beside the tasks: `python -m tools.NAME`."""
