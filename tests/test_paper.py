"""Steps of experiments/paper.yaml: galleries, blind lists, rules, figures."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dataset.build import build_dataset
from evaluation.retrieval import evaluate
from experiments.baselines import apply_rule
from experiments.galleries import write_galleries
from inference import load_model


def load(path):
    return json.loads(path.read_text())


def scores(folder):
    return load(folder / "log.txt")


def test_galleries_are_evaluated_as_lists_of_their_own(call, files, shapes, tmp_path):
    model = load_model(files["retrieval"], "cpu", overrides=[f"image_root={shapes}"])
    expected = []
    for start in (0, 5):
        entries = load(shapes / "test.json")[start : start + 5]
        own = tmp_path / f"own{start}.json"
        own.write_text(json.dumps([{**e, "caption": e["caption"][:1]} for e in entries]))
        keys = {**model.config.to_dict(), "test_file": [str(own)]}
        dataset = build_dataset("retrieval", "test", keys)
        assert len(dataset.texts) == 5
        arguments = (model.model, dataset, model.tokenizer, model.config, model.device)
        expected.append(evaluate(*arguments, ks=[2, 4]))
    call(
        "experiments.galleries",
        *("--checkpoint", files["retrieval"], "--test_file", shapes / "test.json"),
        *("--size", 5, "--k_test", 2, 4, "--output_dir", tmp_path / "out"),
    )
    found = scores(tmp_path / "out")
    assert found.keys() == {f"test_{name}" for name in expected[0]}
    for name in expected[0]:
        assert found[f"test_{name}"] == pytest.approx(np.mean([e[name] for e in expected]))
    assert {"test_k2_r_mean", "test_r_mean", "test_itc_txt_r1"} <= found.keys()


def test_a_file_without_a_gallery_is_refused(shapes, tmp_path):
    assert "12 images" in refusal(write_galleries, shapes / "test.json", 13, tmp_path)


@pytest.mark.parametrize(("file", "key"), [("ve", "sentence"), ("vqa", "question")])
def test_blind_lists_keep_labels_and_lose_one_input(call, shapes, tmp_path, file, key):
    name = f"{file}_train.json"
    entries = load(shapes / name)
    for kind in ("image", "text"):
        call("experiments.blind", shapes / name, "--without", kind, "--output", tmp_path / kind)
        copies = load(tmp_path / kind / name)
        lost, kept = ("image", key) if kind == "image" else (key, "image")
        assert len({copy[lost] for copy in copies}) == 1
        assert [{**copy, lost: 0} for copy in copies] == [{**entry, lost: 0} for entry in entries]
        assert len({copy[kept] for copy in copies}) > 1
    picture = load(tmp_path / "image" / name)[0]["image"]
    with Image.open(picture if picture.endswith(".jpg") else f"{picture}.jpg") as image:
        assert image.getextrema() == ((128, 128),) * 3


def test_a_rule_takes_the_most_frequent_label_of_its_key():
    train = [("a", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 2), ("b", 2), ("c", 1)]
    test = [("a", 0), ("c", 0), ("d", 0)]
    assert apply_rule(train, test, lambda e: e[0], lambda e: e[1]) == [1, 1, 2]


def test_rules_on_one_input_know_no_more_than_chance(call, shapes, tmp_path):
    call("experiments.baselines", shapes, "--output_dir", tmp_path)
    found = scores(tmp_path)
    test = load(shapes / "ve_test.json")
    assert Counter(entry["label"] for entry in test).keys() and len(test) % 3 == 0
    for rule in ("majority", "text"):
        assert found[f"test_ve_{rule}"] == pytest.approx(100 / 3)
    refs = load(shapes / "grounding_test.json")
    assert refs and 0 < found["test_grounding_box_val_d"] < found["test_grounding_object_val_d"]


@pytest.mark.parametrize(
    ("figure", "task"), [(2, "pretrain"), (4, "retrieval"), (5, "vqa"), (6, "pretrain")]
)
def test_figures_show_the_first_entries(call, files, shapes, tmp_path, monkeypatch, figure, task):
    monkeypatch.setattr("experiments.figures.IMAGES", 2)
    drawn = []
    monkeypatch.setattr("visualize.draw.draw_panels", lambda rows, path: drawn.extend(rows))
    call(
        "experiments.figures",
        *(figure, "--checkpoint", files[task], "--data", shapes, "--output", tmp_path / "a.png"),
    )
    panels = [panel for row in drawn for panel in row]
    assert all(panel.image.shape == (48, 48, 3) for panel in panels)
    if figure == 6:
        assert len(drawn) == 2 and all(panel.right is None for panel in panels)
        assert len({panel.hottest for panel in drawn[0][1:]}) == 1
    else:
        assert len(panels) == 2 and all(panel.right in (True, False) for panel in panels)
    if figure == 4:
        assert all(len(panel.boxes) == 2 for panel in panels)
    if figure == 5:
        entries = load(shapes / "vqa_test.json")
        assert panels[0].title.startswith(entries[0]["question"])
