"""docs/extend.md: its new task runs, and its extension points have the signatures of the code."""

import importlib
import inspect
import json
import re
import sys
from types import ModuleType

import pytest
from chaos import assert_same_run
from conftest import ROOT, log
from helpers.training import command_line, signal_at

import configs.tasks
import engine.trainer
from configs.tasks import TASKS, detect_task
from dataset.build import build_dataset
from engine.launch import Interrupted
from inference import load_model
from models import build_model
from models.pretrain import Pretrain
from models.retrieval import Retrieval

PAGE = (ROOT / "docs/extend.md").read_text()
SECTION = PAGE.partition("## Add a task")[2]
MODULES = ("dataset.rating", "models.rating", "evaluation.rating")


def test_extension_points_have_the_signatures_of_the_code():
    section = PAGE.partition("## Extension points")[2].partition("## Recipes")[0]
    methods = re.findall(r"^\|[^|]*\| `Pretrain\.(\w+)\((.*?)\)`", section, re.M)
    functions = re.findall(r"\| `(\w+)\((.*?)\)` in `(\S+)\.py`", section)
    assert len(methods) == 13 and len(functions) == 3
    points = [(getattr(Pretrain, name), shown) for name, shown in methods]
    for name, shown, file in functions:
        module = importlib.import_module(file.replace("/", ".").removesuffix(".__init__"))
        points.append((getattr(module, name), shown))
    for function, shown in points:
        parameters = dict(inspect.signature(function).parameters)
        parameters.pop("self", None)
        assert shown.replace("*, ", "") == ", ".join(
            "**" * (value.kind is value.VAR_KEYWORD) + name for name, value in parameters.items()
        )
    callers = set(re.findall(r"(Pretrain|Retrieval)\.(\w+)", section))
    assert all(hasattr({"Pretrain": Pretrain, "Retrieval": Retrieval}[c], n) for c, n in callers)


@pytest.fixture
def rating(shapes, tiny_config, tmp_path, monkeypatch):
    """Add the page's task. Return the configuration of a tiny model on rated captions of shapes."""
    *codes, row = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    for name, code in zip(MODULES, codes, strict=True):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(code, vars(module))
    monkeypatch.setitem(TASKS, "rating", eval(row, vars(configs.tasks)))
    config = tiny_config
    for key, name in (("train", "pretrain"), ("val", "val"), ("test", "test")):
        entries = [
            {"image": entry["image"], "sentence": entry["caption"][0], "target": i % 5 / 4}
            for i, entry in enumerate(json.loads((shapes / f"{name}.json").read_text()))
        ]
        (tmp_path / f"{key}.json").write_text(json.dumps(entries))
        config = {**config, f"{key}_file": str(tmp_path / f"{key}.json")}
    return config


@pytest.fixture
def script(rating, pretrained, tmp_path, monkeypatch):
    """Run the page's script from pre-trained weights: the one of VE with other names."""
    source = (ROOT / "VE.py").read_text()
    source = source.replace('"ve"', '"rating"').replace("VE.yaml", "Rating.yaml")
    program = {"__name__": "Rating", "__doc__": "Rating."}
    exec(source, program)

    def call(output_dir, *flags, checkpoint=pretrained):
        argv = ["Rating.py", *command_line(rating, output_dir, tmp_path)]
        argv += ["--checkpoint", checkpoint, *flags]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        program["main"]()

    return call


def test_a_new_task_trains_resumes_and_is_evaluated(script, tmp_path, monkeypatch, capsys):
    script(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine.trainer, "train_step", signal_at(4)(engine.trainer.train_step))
        script(tmp_path / "parts")
    script(tmp_path / "parts", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first, last = log(tmp_path / "whole")
    assert {"train_loss", "val_close"} <= first.keys() & last.keys()
    assert "best epoch by val_close" in capsys.readouterr().out
    script(tmp_path / "out", "--evaluate", "--split", "test", checkpoint=tmp_path / "whole")
    (entry,) = log(tmp_path / "out")
    assert entry["test_close"] == {**first, **last}["test_close"]


def test_a_new_task_is_known_from_python(script, rating, tmp_path):
    assert len(build_dataset("rating", "val", rating)) == 8
    assert detect_task(build_model("rating", rating).state_dict()) == "rating"
    script(tmp_path / "run", "--set", "scheduler.epochs=1")
    model = load_model(tmp_path / "run")
    assert model.task == "rating" and not model.report.new
