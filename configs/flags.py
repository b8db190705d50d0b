"""Command-line flags of all task scripts, and messages about wrong flags."""

import argparse
import difflib
import os
import sys

from utils import InputError

TIMEOUT = 1800  # seconds that a process waits for other ranks

# help of flags whose value models.weights.find_checkpoint takes
CHECKPOINT_HELP = (
    "a .pth or .safetensors file, a run folder (its best epoch, else its last), or a hub repository"
    " USER/NAME[@REVISION]"
)


class Help(argparse.RawDescriptionHelpFormatter):
    """Show the default of every flag that has one to show."""

    def _get_help_string(self, action):
        shown = (
            action.default not in (None, "", argparse.SUPPRESS, []) and action.default is not False
        )
        return f"{action.help} (default: %(default)s)" if shown else action.help


class Flags(argparse.ArgumentParser):
    """A parser whose errors are an InputError: one line, with the right spelling where there is one
    to guess.
    """

    def __init__(self, description, example="", prog=None):
        module = sys.modules["__main__"].__spec__  # of python -m
        name = (
            f"python -m {module.name.removesuffix('.__main__')}"
            if module
            else f"python {os.path.basename(sys.argv[0])}"
        )
        name, self._commands = prog or name, None
        example = example and f"example:\n  {name} {example}"
        super().__init__(prog=name, description=description, epilog=example, formatter_class=Help)

    def add_set(self):
        """Add --set, which may come more than once."""
        self.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="override keys of the configuration, such as scheduler.epochs=3",
        )

    def add_command(self, name, summary, example):
        """Return the Flags of a command, the first argument of the command line, which args.command
        holds.
        """
        self._commands = self._commands or self.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )
        return self._commands.add_parser(name, help=summary, description=summary, example=example)

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")

    def parse_args(self, args=None, namespace=None):
        """Parse as ArgumentParser does. Raises InputError."""
        result, unknown = self.parse_known_args(args, namespace)
        flags = self._commands.choices[result.command] if self._commands else self
        if unknown:
            raise InputError(flags._about_unknown(unknown))
        for text in getattr(result, "set", []):
            key, _, value = text.partition("=")
            action = flags._option_string_actions.get(f"--{key}")
            if action and not _spelling(key):
                value = "" if action.nargs in (0, "?") else f" {value}"
                raise InputError(
                    f"--set {text}: {key} is not a key of the configuration but a flag, write --{key}{value}"
                )
        return result

    def _about_unknown(self, unknown):
        flag, _, value = unknown[0].partition("=")
        if not flag.startswith("-"):
            return f"{flag}: not expected there; --help lists the flags"
        spelling = _spelling(flag.lstrip("-").replace("-", "_"))
        if "--set" in self._option_string_actions and spelling:
            value = value or (
                unknown[1] if len(unknown) > 1 and not unknown[1].startswith("--") else "..."
            )
            return (
                f"{flag}: not a flag but a key of the configuration, write --set {spelling}={value}"
            )
        visible = [
            name
            for name, action in self._option_string_actions.items()
            if action.help != argparse.SUPPRESS
        ]
        near = difflib.get_close_matches(flag, visible, 1)
        return f"{flag}: there is no such flag, " + (
            f"did you mean {near[0]}?" if near else "--help lists them"
        )


def _spelling(key):
    """Return key as --set takes it, optimizer.lr for lr and for itself; "" if it is not a key of
    the configuration.
    """
    # reads YAML, which most command lines do without
    from configs.schema import KEYS, OTHER_NAMES, SECTIONS

    return next(
        (
            name
            for name in (*KEYS, *SECTIONS, *OTHER_NAMES)
            if key in (name, name.rpartition(".")[2])
        ),
        "",
    )


def at_least(low, kind=int):
    """Return the type of a flag that takes a number of a kind, from `low` to what a machine word
    holds.
    """

    def parse(text):
        value = kind(text)
        if not low <= value <= sys.maxsize:
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be at least {low}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def _boolean(text):
    """Return the value of a boolean flag that may stand alone or carry a word, as the released
    --resume True.
    """
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def task_flags(description, config, example, trains=True):
    """Return the flags that every task script has; config is the task's default, example some more
    flags to show.

    trains: False for a task that has an evaluation alone; --evaluate goes without saying then.
    """
    flags = Flags(description, f"--config {config} {example}")
    flags.set_defaults(default_config=config, evaluate=not trains, split=None, resume=False)
    flags.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file, every key of which --set may override (default: what the "
        f"checkpoint of the task was trained with, else {config})",
    )
    flags.add_argument(
        "--output_dir",
        metavar="DIR",
        help="folder for checkpoints, log and results (default: output/ and the "
        "name of the configuration; of --evaluate, evaluation/ in the checkpoint's run)",
    )
    flags.add_argument(
        "--checkpoint",
        default="",
        metavar="FILE",
        help=f"weights to {'start from' if trains else 'evaluate'}: {CHECKPOINT_HELP}",
    )
    flags.add_argument(
        "--text_encoder",
        metavar="BERT",
        help="BERT weights: hub name, folder, .bin, .safetensors, or random",
    )
    flags.add_argument(
        "--tokenizer",
        metavar="VOCAB",
        help="vocab file, folder or hub name; text_encoder's by default",
    )
    shown = "evaluate and leave, no training" if trains else argparse.SUPPRESS
    flags.add_argument("--evaluate", action="store_true", help=shown)
    if trains:
        flags.add_argument(
            "--split", choices=["val", "test"], help="what --evaluate evaluates (default: both)"
        )
        flags.add_argument(
            "--resume",
            nargs="?",
            const=True,
            type=_boolean,
            metavar="True",
            help="continue the run in output_dir exactly where it was saved (Pretrain.py: or the one saved in --checkpoint)",
        )
    flags.add_argument(
        "--allow_missing",
        action="store_true",
        help="weights missing in --checkpoint stay as initialized",
    )
    flags.add_argument(
        "--device", help="cuda, cuda:1, ... or cpu; by default cuda where there is a GPU"
    )
    flags.add_argument("--seed", default=42, type=at_least(0), help="of everything random")
    flags.add_argument(
        "--timeout",
        default=TIMEOUT,
        type=at_least(1, float),
        help="seconds to wait for another process before giving up",
    )
    flags.add_set()
    # accepted for released command lines, without effect: the launcher decides
    for name in ("--world_size", "--dist_url", "--distributed", "--local_rank", "--local-rank"):
        flags.add_argument(name, help=argparse.SUPPRESS)
    return flags
