"""Command-line parsers of the task scripts and tools, and messages about wrong flags."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from utils import InputError

TIMEOUT = 1800  # seconds that a rank waits for other ranks

# help of flags that name a checkpoint, as models.weights.find_checkpoint takes it
CHECKPOINT_HELP = (
    "a .pth or .safetensors file, a run folder (its best epoch, or its last if there is no best),"
    " or a hub repository USER/NAME[@REVISION]"
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Show the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (None, "", argparse.SUPPRESS, []) or action.default is False
        return f"{action.help}" if hidden else f"{action.help} (default: %(default)s)"


class _ShowKeys(argparse.Action):
    """Print all configuration keys and exit."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        from configs.docs import list_keys

        print(list_keys(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """Parser that raises an InputError of one line, with a suggestion if possible.

    Args:
        description: Text above the flags.
        example: Arguments of an example to show.
        prog: Name of the program, by default as it was started.
    """

    def __init__(self, description: str | None, example: str = "", prog: str | None = None) -> None:
        spec = sys.modules["__main__"].__spec__  # set by python -m
        started = f"python {os.path.basename(sys.argv[0])}"
        if spec:
            started = f"python -m {spec.name.removesuffix('.__main__')}"
        name = prog or started
        example = example and f"example:\n  {name} {example}"
        super().__init__(prog=name, description=description, epilog=example, formatter_class=_Help)
        self._commands: argparse._SubParsersAction | None = None

    def add_set(self) -> None:
        """Add --set, which may be repeated."""
        self.add_argument(
            "--set",
            nargs="+",
            action="extend",
            default=[],
            metavar="KEY=VALUE",
            help="override configuration keys, such as scheduler.epochs=3",
        )

    def add_command(self, name: str, summary: str, example: str) -> "Parser":
        """Add a command, the first argument of the command line, and return its parser.

        The parsed arguments have its name as `command`.
        """
        self._commands = self._commands or self.add_subparsers(
            dest="command", required=True, metavar="COMMAND"
        )
        return self._commands.add_parser(name, help=summary, description=summary, example=example)

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message}; --help lists the flags")

    def parse_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse as ArgumentParser does. Raises InputError."""
        result, unknown = self.parse_known_args(args, namespace)
        parser = self._commands.choices[result.command] if self._commands else self
        if unknown:
            raise InputError(parser._describe_unknown(unknown))
        for text in getattr(result, "set", []):
            key, _, value = text.partition("=")
            action = parser._option_string_actions.get(f"--{key}")
            if action and not _find_key(key):
                value = "" if action.nargs in (0, "?") else f" {value}"
                raise InputError(
                    f"--set {text}: {key} is a flag, not a configuration key; write --{key}{value}"
                )
        return result

    def _describe_unknown(self, unknown: list[str]) -> str:
        flag, _, value = unknown[0].partition("=")
        if not flag.startswith("-"):
            return f"{flag}: unexpected argument; --help lists the flags"
        key = _find_key(flag.lstrip("-").replace("-", "_"))
        if key and "--set" in self._option_string_actions:
            follows = len(unknown) > 1 and not unknown[1].startswith("--")
            value = value or (unknown[1] if follows else "...")
            return f"{flag}: {key} is a configuration key, not a flag; write --set {key}={value}"
        actions = self._option_string_actions.items()
        visible = [name for name, action in actions if action.help != argparse.SUPPRESS]
        near = difflib.get_close_matches(flag, visible, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        return f"{flag}: there is no such flag; {hint}"


def _find_key(name: str) -> str:
    """Return the configuration key with a name, `optimizer.lr` for `lr`, or "" if there is none."""
    from configs.config import FIELDS, OTHER_NAMES, SECTIONS

    keys = (*FIELDS, *SECTIONS, *OTHER_NAMES)
    return next((key for key in keys if name in (key, key.rpartition(".")[2])), "")


def at_least(low: float, kind: type = int) -> Callable[[str], Any]:
    """Return an argparse type for numbers from `low` to sys.maxsize."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= sys.maxsize:
            raise argparse.ArgumentTypeError(f"{text} is out of range (minimum {low})")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def _parse_bool(text: str) -> bool:
    """Parse the optional value of a flag, such as the released --resume True."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def task_parser(description: str | None, config: str, example: str, trains: bool = True) -> Parser:
    """Return the parser of a task script.

    Args:
        description: Text above the flags.
        config: Default configuration, a path relative to the repository.
        example: Flags of the example.
        trains: Whether the task trains, else --evaluate is implied.
    """
    parser = Parser(description, f"--config {config} {example}")
    parser.set_defaults(evaluate=not trains, split=None, resume=False)
    _add_sources(parser, config, trains)
    shown = "evaluate only, without training" if trains else argparse.SUPPRESS
    parser.add_argument("--evaluate", action="store_true", help=shown)
    if trains:
        _add_training_flags(parser)
    parser.add_argument(
        "--allow_missing",
        action="store_true",
        help="keep initial weights for tensors that --checkpoint lacks",
    )
    parser.add_argument("--device", help="cuda, cuda:1, ... or cpu (default: cuda if available)")
    parser.add_argument("--seed", default=42, type=at_least(0), help="random seed")
    wait = "seconds that a rank waits for other ranks"
    parser.add_argument("--timeout", default=TIMEOUT, type=at_least(1, float), help=wait)
    parser.add_set()
    names = "--help_keys", "--help-keys"
    parser.add_argument(
        *names, action=_ShowKeys, nargs=0, help="list all configuration keys and exit"
    )
    # accepted for released command lines, without effect: the launcher decides
    for name in ("--world_size", "--dist_url", "--distributed", "--local_rank", "--local-rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def _add_sources(parser: Parser, config: str, trains: bool) -> None:
    """Add the flags of files and folders: configuration, output, weights and vocabulary."""
    start = "weights to start from" if trains else "weights to evaluate"
    folder = (
        f"folder for {'checkpoints, log' if trains else 'log'} and results. Default: output/NAME,"
        " where NAME is made from the path of the configuration file"
    )
    if trains:
        folder += (
            ". Default with --evaluate, if --checkpoint names a run: evaluation/ in the folder of"
            " this run"
        )
    texts = {
        "--config": (
            "FILE",
            f"YAML file (default: the configuration in --checkpoint, or else {config})",
        ),
        "--output_dir": (
            "DIR",
            folder,
        ),
        "--checkpoint": ("FILE", f"{start}: {CHECKPOINT_HELP}"),
        "--text_encoder": (
            "BERT",
            "BERT weights: hub name, folder, .bin, .safetensors, or random (default: the key"
            " text_encoder)",
        ),
        "--tokenizer": (
            "VOCAB",
            "vocabulary: file, folder or hub name (default: the key tokenizer, or else the"
            " vocabulary of text_encoder)",
        ),
    }
    for flag, (metavar, text) in texts.items():
        default = "" if flag == "--checkpoint" else None
        parser.add_argument(flag, metavar=metavar, default=default, help=text)


def _add_training_flags(parser: Parser) -> None:
    """Add the flags of tasks that train."""
    parser.add_argument(
        "--split", choices=["val", "test"], help="split to evaluate with --evaluate (default: all)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        type=_parse_bool,
        metavar="True",
        help="continue the run in --output_dir from its last checkpoint. To"
        " continue a run of another folder, add --checkpoint with a checkpoint of that run; only"
        " Pretrain.py can do this",
    )
