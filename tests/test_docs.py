"""Whatever the documentation names exists: files, links, flags, keys, targets of make, tests."""

import re

import pytest
from conftest import ROOT

from configs.config import BERT_FIELDS
from configs.config import FIELDS as KEYS
from configs.docs import MEANINGS, PAGE, list_keys, make_page

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)
]
FOLDERS = (
    "configs",
    "models",
    "dataset",
    "optim",
    "scheduler",
    "engine",
    "evaluation",
    "visualize",
    "benchmarks",
    "scripts",
    "experiments",
    "tests",
    "docs",
    "inference",
    "examples",
    "tools",
)
OTHERS = {  # flags of other programs
    "--nproc_per_node",
    "--nnodes",
    "--max-restarts",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
    "--nodes",
    "--signal",
    "--ntasks-per-node",
    "--check",
    "--help",
    "--shm-size",
}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def code(text):
    """Return the code of a page: indented or fenced blocks and text in backticks."""
    blocks = re.findall(r"(?:^    .*\n?)+", text, re.M) + re.findall(
        r"^```.*?^```", text, re.M | re.S
    )
    return [*blocks, *re.findall(r"`([^`\n]+)`", text)]


def test_files_exist(page):
    named = set()
    for piece in code(page.read_text()):
        named |= set(
            re.findall(
                rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w\.(?:py|yaml|json|md|sh|pt)", piece
            )
        )
        named |= set(re.findall(r"(?<![\w/.])[A-Z]\w+\.py", piece))
        named |= {
            f"{name.replace('.', '/')}.py"
            for name in re.findall(
                r"python -m ((?:dataset|models|experiments|examples|tools)\.\w+)", piece
            )
        }
    missing = {
        name
        for name in named - {"configs/Rating.yaml"}  # of a task that extend.md adds
        if not list(ROOT.glob(name)) and not (ROOT / name.removesuffix(".py")).is_dir()
    }
    assert not missing


def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if path.suffix == ".md" else []
        assert not anchor or anchor in {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }, target


def test_flags_exist(page):
    known = set(
        re.findall(
            r"\"(--[\w-]+)\"",
            "".join(path.read_text() for path in [*SOURCES, ROOT / "tests/chaos.py"]),
        )
    )
    named = {
        flag
        for piece in code(page.read_text())
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", piece)
    }
    assert not named - known - OTHERS


def test_keys_exist(page):
    text, known = page.read_text(), set(KEYS) | {key.partition(".")[0] for key in KEYS}
    known |= {f"bert_config.{name}" for name in BERT_FIELDS}
    tables = re.findall(r"^\| key \|.*\n(?:\|.*\n)+", text, re.M)
    named = {
        key
        for table in tables
        for row in table.splitlines()[2:]
        for key in re.findall(r"`([\w.]+)`", row.split("|")[1])
    }
    for line in re.findall(r"--set ((?:[\w.]+=\S+[ `]*)+)", text):
        named |= {
            key
            for key in re.findall(r"([\w.]+)=", line)
            if not key.startswith("bert_config.") and key != "key"
        }
    assert not named - known


def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*)(?: \S+)?:", makefile, re.M)) | set(
        re.findall(r"\b(?:paper-\w+)", makefile)
    )
    named = {
        name
        for piece in code(page.read_text())
        for name in re.findall(r"^ *make ([a-z][\w-]*)", piece, re.M)
    }
    assert not named - targets


def test_tests_exist(page):
    known = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M):
            known.setdefault(name, set()).add(f"tests/{path.name}")
    text = page.read_text()
    metrics = {"test_acc", "test_map", "test_map_head", "test_auc"}
    assert not set(re.findall(r"`(test_\w+)`", text)) - known.keys() - KEYS.keys() - metrics
    assert not [
        pair
        for pair in re.findall(r"(tests/test_\w+\.py)::`(test_\w+)`", text)
        if pair[0] not in known.get(pair[1], ())
    ]


def test_the_page_of_keys_is_up_to_date():
    assert PAGE.read_text() == make_page(), "write it again: python -m configs.docs"
    names = [line.partition(":")[0] for line in list_keys().splitlines() if line[0] != " "]
    assert names == [*KEYS, *(f"bert_config.{name}" for name in BERT_FIELDS)]
    assert all(MEANINGS[name].endswith(".") for name in names)
