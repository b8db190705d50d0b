"""Data sets by task and split, and the loaders that feed them: what dataset/build.py has.

It is imported when it is used, so that the commands of this folder answer --help and a mistyped
flag before torch is loaded.
"""

import importlib


def __getattr__(name):
    return getattr(importlib.import_module("dataset.build"), name)
