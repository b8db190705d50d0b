"""examples/visualization.ipynb: its cells run on a checkpoint of pre-training, with and without one
of VQA.
"""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT
from helpers.tasks import data_of
from PIL import Image

from inference import load_model
from models import build_model
from models.tokenizer import load_tokenizer

NOTEBOOK = json.loads((ROOT / "examples/visualization.ipynb").read_text(encoding="utf-8"))


@pytest.fixture
def execute(whole, tmp_path, monkeypatch, capsys):
    """Executes the cells as Jupyter does, in a folder that looks like the repository.

    Returns (variables, printed text).
    """
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name in "examples", "output":
        (tmp_path / name).mkdir()
    (tmp_path / "inference").symlink_to(ROOT / "inference")
    (tmp_path / "output/quickstart").symlink_to(whole)
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))

    def run():
        variables = {}
        for cell in NOTEBOOK["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), variables)
        plt.close("all")
        return variables, capsys.readouterr().out

    return run


def test_the_cells_show_what_the_model_computes(execute, whole, tmp_path):
    variables, printed = execute()
    model = load_model(whole, "cpu")
    photos, captions = variables["photos"], variables["captions"]
    assert os.getcwd() == str(tmp_path) and len(photos) == len(captions) > 6
    assert torch.equal(variables["similarity"], model.similarity(photos[:6], captions[:6]))
    assert torch.equal(variables["match"], model.match(photos[:6], captions[:6]))
    assert variables["ranking"] == model.rank(photos, captions[0], k=5)
    assert variables["words"] == model.fill_in(photos[0], captions[0])
    assert variables["heat"].verdict in printed and "make shapes" in printed
    for name in "heat.png", "similarity.png":
        assert Image.open(tmp_path / name).width > 300


def test_with_a_checkpoint_of_vqa_it_answers(execute, tiny_config, shapes, tmp_path):
    config = {**tiny_config, **data_of("VQA", shapes)}
    tokenizer, config = load_tokenizer(config)
    model = build_model("vqa", config, tokenizer)
    (tmp_path / "output/shapes/VQA").mkdir(parents=True)
    checkpoint = {"model": model.state_dict(), "config": model.config.to_dict()}
    torch.save(checkpoint, tmp_path / "output/shapes/VQA/checkpoint_best.pth")
    variables, printed = execute()
    (best, _), *_ = variables["answers"]
    assert (
        best in json.loads((shapes / "answer_list.json").read_text()) and f"('{best}'," in printed
    )
    assert "make shapes" not in printed and (tmp_path / "answer.png").exists()


def test_the_repository_has_no_outputs():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert NOTEBOOK["nbformat"] == 4 and len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
