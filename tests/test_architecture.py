"""visualize.architecture: the numbers of a configuration, and the objectives that are on."""

import re

import pytest
from conftest import ROOT, exit_status

from configs.load import load_config
from visualize.architecture import FILL, draw_architecture

FILE = "configs/Pretrain.yaml"


@pytest.fixture
def texts(tmp_path):
    """Draws the paper's configuration with overrides; returns the texts of the picture."""

    def draw(*overrides):
        draw_architecture(load_config(FILE, overrides), tmp_path / "a.svg")
        return texts_of(tmp_path / "a.svg")

    return draw


def texts_of(path):
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.S)


def test_the_picture_of_the_documentation_is_up_to_date(texts):
    drawn = texts_of(ROOT / "docs/architecture.svg")
    assert len(drawn) > 25 and drawn == texts(), (
        f"draw it again: python -m visualize.architecture --config {FILE}"
        " --output docs/architecture.svg"
    )


KEYS = {
    "image_res=384": ("384 × 384 pixels", "24 × 24 patches"),
    "patch_size=32": ("8 × 8 patches of 32²",),
    "vision_depth=5": ("ViT, 5 layers",),
    "vision_heads=6": ("6 heads",),
    "embed_dim=99": ("projected to 99",),
    "temp=0.08": ("temperature 0.08",),
    "queue_size=1024": ("1,024 image",),
    "momentum=0.9": ("0.9 m + 0.1 θ",),
    "alpha=0.3": ("α 0.3",),
    "mlm_probability=0.3": ("30% masked",),
    "max_tokens=40": ("at most 40 tokens",),
    "bert_config.fusion_layer=4": ("BERT layers 1 to 4", "BERT layers 5 to 12"),
    "bert_config.num_attention_heads=8": ("width 768, 8 heads",),
    "bert_config.vocab_size=5000": ("5,000",),
}


@pytest.mark.parametrize("override", KEYS)
def test_numbers_come_from_the_configuration(texts, override):
    usual, drawn = "\n".join(texts()), "\n".join(texts(override))
    for words in KEYS[override]:
        assert words in drawn and words not in usual


def test_widths_and_bars_are_those_of_the_encoders(tmp_path):
    def bars(*overrides):
        draw_architecture(load_config(FILE, overrides), tmp_path / "a.svg")
        edges = [edge for _, edge in FILL.values()]
        drawn = (tmp_path / "a.svg").read_text()
        return sum(drawn.count(f'style="fill: {edge}"') for edge in edges)

    overrides = "vision_width=384", "bert_config.encoder_width=384", "bert_config.hidden_size=96"
    draw_architecture(load_config(FILE, overrides), tmp_path / "a.svg")
    drawn = texts_of(tmp_path / "a.svg")
    assert "width 384" in drawn and "width 96, 12 heads" in drawn
    assert bars() - bars("vision_depth=5") == 7
    assert bars() - bars("bert_config.num_hidden_layers=8") == 4


def test_only_the_objectives_that_are_on_are_drawn(texts):
    def parts(*overrides):
        drawn = "\n".join(texts(*overrides))
        words = "ITC", "Queues", "ITM", "hard negatives", "MLM", "masked"
        return {word for word in words if word in drawn}, drawn.count("soft targets")

    assert parts() == ({"ITC", "Queues", "ITM", "hard negatives", "MLM", "masked"}, 2)
    assert parts("objectives=[itc]") == ({"ITC", "Queues"}, 1)
    assert parts("objectives=[itm, mlm]") == ({"ITM", "MLM", "masked"}, 1)
    assert parts("objectives=[itm]") == ({"ITM"}, 0)
    assert parts("distill=[mlm]")[1] == 1 and parts("distill=false")[1] == 0
    assert "hard negatives" not in parts("hard_negatives=false")[0]


def test_the_command_writes_pictures_and_refuses_in_one_line(call, tmp_path, capsys):
    def run(name, *flags):
        status = exit_status(
            lambda: call("visualize.architecture", "--output", tmp_path / name, *flags)
        )
        return status, capsys.readouterr()

    assert run("a.png", "--config", "configs/small.yaml")[0] == 0  # vocab_size is auto
    assert (tmp_path / "a.png").stat().st_size > 10_000
    (tmp_path / "bare.yaml").write_text("image_res: 64\ntext_encoder: random\n")
    for name, flags, word in (
        ("a.txt", (), "a.txt"),
        ("absent/a.svg", (), "absent"),
        ("a.svg", ("--config", "absent.yaml"), "absent.yaml"),
        ("a.svg", ("--config", tmp_path / "bare.yaml"), "bert_config"),
    ):
        status, printed = run(name, *flags)
        assert status == 2 and printed.err.count("\n") == 1 and word in printed.err
