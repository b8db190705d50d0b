"""Write docs/config.md, the page of all configuration keys, from configs/config.py."""

import ast
import inspect
import textwrap

from configs.config import (
    BERT_FIELDS,
    BERT_REQUIRED,
    FIELDS,
    ROOT,
    BertConfig,
    Config,
    Field,
    OptimizerConfig,
    SchedulerConfig,
    Section,
)
from configs.tasks import TASKS

PAGE = ROOT / "docs/config.md"
HEADER = """\
# Configuration keys

<!-- written by `python -m configs.docs` -->

A configuration file is a YAML mapping of these keys. `--set key=value` overrides a key of the file.
Every file may have every key. The column "tasks" names the tasks that read a key. The word
"training" in this column marks keys that an evaluation does not read. Released files may write
`schedular` for `scheduler`, `batch_size_train` for `batch_size`, and `scheduler.lr` for
`optimizer.lr`.
"""


def find_docstrings(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return the docstring of each field of a section by the name of the key."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[f"{prefix}{field.target.id}"] = " ".join(ast.literal_eval(below.value).split())
    return found


MEANINGS = {
    **find_docstrings(Config),
    **find_docstrings(OptimizerConfig, "optimizer."),
    **find_docstrings(SchedulerConfig, "scheduler."),
    **find_docstrings(BertConfig, "bert_config."),
}


def describe_tasks(field: Field) -> str:
    """Return which tasks read a key."""
    names = field.tasks
    others = [task.name for task in TASKS.values() if task.name not in names]
    if field.training:
        others = [name for name in others if TASKS[name].trains]
    every = "all" if not others else f"all but {', '.join(others)}"
    shown = every if len(others) < 3 else ", ".join(names) or "none"
    return f"{shown} (training)" if field.training else shown


def describe_default(field: Field) -> str:
    """Return the default of a key as YAML."""
    match field.default:
        case None:
            return "required" if field.name in BERT_REQUIRED else "null"
        case bool():
            return str(field.default).lower()
        case tuple():
            return f"[{', '.join(field.default)}]"
        case "":
            return '""'
    return f"{field.default}"


def _bert_fields() -> dict[str, Field]:
    return {f"bert_config.{name}": field for name, field in BERT_FIELDS.items()}


def make_page() -> str:
    """Return the text of docs/config.md."""
    page = HEADER + "\n| key | values | default | tasks | meaning |\n"
    page += "| --- | --- | --- | --- | --- |\n"
    for name, field in FIELDS.items():
        cells = field.wanted, describe_default(field), describe_tasks(field), MEANINGS[name]
        page += f"| `{name}` | {' | '.join(cells)} |\n"
    page += "\n## bert_config\n\nA JSON file or a mapping of these keys, read by all tasks.\n\n"
    page += "| key | values | default | meaning |\n| --- | --- | --- | --- |\n"
    for name, field in _bert_fields().items():
        cells = field.wanted, describe_default(field), MEANINGS[name]
        page += f"| `{name}` | {' | '.join(cells)} |\n"
    return page


def list_keys() -> str:
    """Return the text of --help_keys."""
    text = ""
    for name, field in {**FIELDS, **_bert_fields()}.items():
        text += f"{name}: {field.wanted}\n"
        text += f"    default: {describe_default(field)}; tasks: {describe_tasks(field)}\n"
        text += textwrap.fill(MEANINGS[name], 96, initial_indent=" " * 4, subsequent_indent=" " * 4)
        text += "\n"
    return text


def main() -> None:
    """Write the page."""
    PAGE.write_text(make_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
