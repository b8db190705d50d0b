"""Experiments: rows of commands in a YAML file, their driver and their report."""
