"""Configuration files: keys, tasks, loading and command lines."""
