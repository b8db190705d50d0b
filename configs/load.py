"""Load, override and save configuration files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from configs.config import (
    BERT_FIELDS,
    Config,
    as_config,
    check_values,
    checked,
    complete,
    find_file,
    flatten,
    read_bert_values,
)
from utils import InputError, atomic_write, read_regular


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file and apply overrides.

    Args:
        path: File, relative to the working directory or else to the repository.
        overrides: Values of `--set`, as `override` takes them.

    Raises:
        InputError: The file cannot be read, or a key or value is not accepted.
    """
    try:
        content = read_regular(find_file(path))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}; name a YAML file") from None
    config = parse_yaml(content, path)
    if not isinstance(config, dict):
        raise InputError(
            f"{path}: not a mapping of keys to values; write lines such as batch_size: 8"
        )
    if "tokenizer" in config:
        config["tokenizer"] = beside(path, config["tokenizer"])
    return override(config, overrides, path)


def override(
    config: Config | Mapping[str, Any], overrides: Iterable[str], where: str | Path
) -> Config:
    """Return a checked and completed configuration with key=value overrides.

    Args:
        config: Configuration, which is not changed.
        overrides: Texts such as `batch_size=8`. Dots reach into optimizer, scheduler and
            bert_config.
        where: Source of the configuration, for messages.

    Raises:
        InputError: A key or value is not accepted.
    """
    values = config.to_dict() if isinstance(config, Config) else config
    flat = flatten(values, str(where))
    for text in overrides:
        shown, changed = parse_override(text)
        if text.startswith("bert_config."):
            bert = changed["bert_config"]
            check_values(bert, BERT_FIELDS, shown)
            changed = {"bert_config": read_bert_values(flat.get("bert_config") or {}) | bert}
        else:
            changed = checked(changed, shown)
        flat |= changed
    return complete(flat, str(where))


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """Parse a key=value override.

    Returns:
        The override's name in messages, and its values by key.

    Raises:
        InputError: The text is not an override.
    """
    shown = f"--set {' '.join(text.split())}"
    path, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"{shown}: the value is missing; write key=value")
    value = parse_yaml(value, shown)
    section, _, name = path.partition(".")
    if section == "bert_config":
        return shown, {"bert_config": {name: value}}
    return shown, flatten({path: value}, shown)


def beside(path: str | Path, name: Any) -> Any:
    """Return the path of the file `name` in the folder of a configuration if it exists there.

    Otherwise return the name.
    """
    bare = isinstance(name, str) and name and Path(name).name == name
    file = Path(path).with_name(name) if bare else None
    return str(file) if file and file.is_file() else name


def require(config: Config, *keys: str) -> None:
    """Raise InputError if the configuration lacks a key that the task needs."""
    for key in keys:
        if getattr(config, key) is None:
            raise InputError(
                f"the configuration lacks the key {key}; add it to the file or pass --set {key}=..."
            )


def save_interval(value: str | int) -> tuple[float, int]:
    """Return save_every as (minutes, iterations). One of them is 0, or both if it is off."""
    if isinstance(value, int):
        return 0, value
    number, unit = value.split()
    return (float(number), 0) if unit.startswith("minute") else (0, int(number))


def parse_yaml(content: str | bytes, where: str | Path) -> Any:
    """Return the value of YAML text.

    Args:
        content: Text to parse.
        where: Source of the text, for messages.

    Raises:
        InputError: The text is not valid YAML.
    """
    try:
        return YAML(typ="safe").load(content)
    # impossible dates and characters raise errors other than YAMLError
    except Exception as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        parts = (getattr(error, name, None) for name in ("context", "problem"))
        problem = ", ".join(filter(None, parts)) or str(error)
        problem = " ".join(problem.split())
        raise InputError(f"{where}{line}: not valid YAML ({problem}); correct it") from None


def save_config(config: Config | dict, output_dir: str | Path) -> None:
    """Write the complete configuration, bert_config included, to config.yaml."""
    yaml = YAML(typ="safe")
    yaml.width = 2**31 - 1  # folding a long string may lose a blank
    with atomic_write(Path(output_dir) / "config.yaml", "w") as file:
        yaml.dump(as_config(config).to_dict(), file)
