"""Whatever the documentation names exists: files, links, flags, keys, targets of make, tests."""

import ast
import re

import pytest
from conftest import ROOT

from configs.config import BERT_FIELDS
from configs.config import FIELDS as KEYS
from configs.docs import MEANINGS, PAGE, list_keys, make_page
from configs.load import load_config
from dataset.text import SHORT_TOKENS

PAGES = [
    path
    for folder in (".", "docs", "tests", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]
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
    "--repo-type",
    "--include",
    "--local-dir",
    "--logdir",
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


@pytest.fixture
def named(page):
    """Finds a pattern in the code of a page: indented or fenced blocks and text in backticks."""
    text = page.read_text()
    pieces = re.findall(r"(?:^    .*\n?)+|`[^`\n]+`", text, re.M)
    pieces += re.findall(r"^```.*?^```", text, re.M | re.S)
    return lambda pattern: {name for piece in pieces for name in re.findall(pattern, piece, re.M)}


def test_files_exist(named):
    folders = "|".join(FOLDERS)
    files = named(rf"(?<![\w/.])(?:{folders})/[\w./*-]*\w\.(?:py|yaml|json|md|sh|pt)")
    files |= named(r"(?<![\w/.])[A-Z]\w+\.py")
    for module in named(r"python -m ((?:dataset|models|experiments|examples|tools)\.\w+)"):
        files.add(f"{module.replace('.', '/')}.py")
    missing = {
        name
        for name in files - {"configs/Rating.yaml"}  # of a task that extend.md adds
        if not list(ROOT.glob(name)) and not (ROOT / name.removesuffix(".py")).is_dir()
    }
    assert not missing


def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text) + re.findall(r' src="([^"]+)"', text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if path.suffix == ".md" else []
        assert not anchor or anchor in {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        }, target


def test_flags_exist(named):
    code = "".join(path.read_text() for path in [*SOURCES, ROOT / "tests/chaos.py"])
    known = set(re.findall(r"\"(--[\w-]+)\"", code))
    assert not named(r"(?<![\w-])--[a-z][\w-]*") - known - OTHERS


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


def test_targets_of_make_exist(named):
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][\w-]*)(?: \S+)?:|\b(paper-\w+)", makefile, re.M)
    assert not named(r"^ *make ([a-z][\w-]*)") - {name for pair in targets for name in pair}


def test_tests_exist(page):
    paths = (ROOT / "tests").glob("test_*.py")
    tests = {path.name: re.findall(r"^def (test_\w+)", path.read_text(), re.M) for path in paths}
    known = {name for names in tests.values() for name in names} | KEYS.keys()
    metrics = {"test_acc", "test_map", "test_map_head", "test_auc"}
    text = page.read_text()
    recalls = set(re.findall(r"`(test_(?:itc_|k\d+_)?(?:txt|img)_r(?:\d+|_mean))`", text))
    assert not set(re.findall(r"`(test_\w+)`", text)) - known - metrics - recalls
    for file, name in re.findall(r"tests/(test_\w+\.py)::`(test_\w+)`", text):
        assert name in tests[file]


def test_messages_of_the_page_on_troubles_exist():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    tables = re.findall(r"^\| message or symptom \|.*\n(?:\|.*\n)+", page, re.M)
    shown = [
        message
        for table in tables
        for row in table.splitlines()[2:]
        for message in re.findall("`([^`]+)`", row.split(" | ")[0])
        if not message.startswith(("make ", "python ", ".venv"))
    ]
    texts = [text for path in SOURCES for text in literals(ast.parse(path.read_text()))]
    pieces = [(message, piece) for message in shown for piece in message.split("...")]
    absent = {m for m, piece in pieces if not any(piece.strip() in text for text in texts)}
    assert len(shown) > 80 and not absent


def literals(tree):
    """The constant parts of the texts in a module."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_page_of_keys_is_up_to_date():
    assert PAGE.read_text() == make_page(), "write it again: python -m configs.docs"
    names = [line.partition(":")[0] for line in list_keys().splitlines() if line[0] != " "]
    assert names == [*KEYS, *(f"bert_config.{name}" for name in BERT_FIELDS)]
    assert all(MEANINGS[name].endswith(".") for name in names)


def test_the_picture_of_the_architecture_has_the_numbers_of_its_configuration():
    config = load_config(ROOT / "configs/Pretrain.yaml")
    bert, side = config.bert, config.resolution // config.patch_size
    fusion, size = bert.fusion_layer, f"width {bert.hidden_size}, {bert.num_attention_heads} heads"
    picture = (ROOT / "docs/architecture.svg").read_text()
    assert re.findall(r"<text[^>]*>([^<]*\d[^<]*)</text>", picture) == [
        f"{config.resolution} × {config.resolution} pixels",
        f"{side} × {side} patches of {config.patch_size}²",
        f"[CLS], at most {SHORT_TOKENS} tokens",
        f"MLM: {config.mlm_probability:.0%} masked",
        f"ViT, {config.vision_depth} layers",
        f"width {config.vision_width}",
        f"{config.vision_heads} heads",
        *(f"BERT layers 1 to {fusion}", size),
        *(f"BERT layers {fusion + 1} to {bert.num_hidden_layers}", size),
        f"[CLS] projected to {config.embed_dim}, temperature {config.temp:g}",
        f"{bert.vocab_size:,}",
        f"m ← {config.momentum:g} m + {1 - config.momentum:.3g} θ",
        f"{config.queue_size:,} image and",
        *[f"α {config.alpha:g}"] * 2,
    ]
