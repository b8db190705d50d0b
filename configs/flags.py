"""The command-line flags that every task script has."""

import argparse

import torch

from utils import TIMEOUT


def _flag(text):
    """A boolean flag that may stand alone or carry a word, as the released --resume True."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def argument_parser(description, config, output_dir):
    """The flags that every task script has; config and output_dir are the task's defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=config)
    parser.add_argument("--output_dir", default=output_dir)
    parser.add_argument("--checkpoint", default="", help="start from the weights of this file")
    parser.add_argument("--text_encoder", help="BERT weights: hub name, folder, .bin, .safetensors, or random")
    parser.add_argument("--tokenizer", help="vocab file, folder or hub name; text_encoder's by default")
    parser.add_argument("--evaluate", action="store_true", help="evaluate and leave, no training")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, type=_flag,
        help="continue the run in output_dir exactly where it was saved (Pretrain.py: or the one saved in --checkpoint)",
    )  # fmt: skip
    parser.add_argument("--allow_missing", action="store_true", help="weights missing in --checkpoint stay as initialized")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", default=42, type=int)
    parser.add_argument("--timeout", default=TIMEOUT, type=float, help="seconds to wait for another process before giving up")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of the configuration")
    ignored = "accepted for released command lines, without effect: the launcher decides"
    for name in ("--world_size", "--dist_url", "--distributed", "--local_rank", "--local-rank"):
        parser.add_argument(name, help=ignored)
    return parser
