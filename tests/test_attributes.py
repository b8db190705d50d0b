"""Zero-shot attributes in boxes: prompts, scores and precisions of OVAD, boxes, Attributes.py as a
whole, bad input.
"""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, log
from helpers.launch import launch
from helpers.tasks import data_of
from helpers.training import command_line
from PIL import Image

from configs.config import as_config
from dataset.attributes import Attribute
from dataset.build import build_dataset
from dataset.images import from_pillow
from evaluation.attributes import (
    attribute_scores,
    average_precisions,
    evaluate,
    mean_precisions,
    prompts_of,
    score_boxes,
)
from models import build_model
from models.tokenizer import load_tokenizer

GOLDEN = json.loads((ROOT / "tests/golden/attributes.json").read_text())


@pytest.fixture
def config(tiny_config, shapes):
    return {**tiny_config, **data_of("Attributes", shapes), "batch_size_test": 5}


@pytest.fixture
def evaluated(config, run_script):
    """Runs Attributes.py on a checkpoint with some keys changed; returns (exit status, errors and
    notes on stderr).
    """

    def start(checkpoint, **keys):
        return run_script("Attributes", "--checkpoint", checkpoint, **{**config, **keys})

    return start


# --------------------------------------------------------------------------------------------------
# what OVAD computes


@pytest.mark.parametrize("case", GOLDEN["prompts"])
def test_prompts_are_those_of_ovad(case):
    prompts, _, noun = case.partition("|")
    attributes = [Attribute(**fields) for fields in GOLDEN["attributes"]]
    assert [prompts_of(attribute, prompts, noun) for attribute in attributes] == GOLDEN["prompts"][
        case
    ]


def test_of_a_type_the_word_tone_is_not_said():
    hair = Attribute(0, "hair tone:light", "hair tone", "tone", "head", "has")
    assert prompts_of(hair) == ["the light hair", "the  has light hair"]


def test_precisions_are_those_of_ovad():
    similarities = torch.tensor(GOLDEN["scores"])  # one prompt for each attribute
    scores = attribute_scores(similarities, [1] * similarities.shape[1]).numpy()
    precisions = average_precisions(scores, np.array(GOLDEN["labels"]))
    assert precisions == pytest.approx(GOLDEN["average_precision"])
    means = mean_precisions(precisions, [Attribute(**fields) for fields in GOLDEN["attributes"]])
    assert means == pytest.approx(GOLDEN["mean_average_precision"])


def test_scores_are_the_mean_or_the_largest_over_an_attribute_s_prompts_and_at_least_0():
    similarities = torch.tensor([[0.5, 0.1, -0.25], [-0.5, 0.25, 0.75]])
    mean, largest = (attribute_scores(similarities, [2, 1], score) for score in ("mean", "max"))
    assert torch.allclose(mean, torch.tensor([[0.3, 0], [0, 0.75]]))
    assert torch.equal(largest, torch.tensor([[0.5, 0], [0.25, 0.75]]))


# --------------------------------------------------------------------------------------------------
# boxes


def boxes_file(shapes, folder, change):
    """The path of the shapes' file of attributes after change(its content)."""
    content = json.loads((shapes / "attributes.json").read_text())
    change(content)
    (folder / "boxes.json").write_text(json.dumps(content))
    return [str(folder / "boxes.json")]


def test_boxes_are_cropped_at_whole_pixels_and_resized_bilinearly(config, shapes, tmp_path):
    def change(content):
        content["annotations"] = content["annotations"][:3]
        content["annotations"][0] |= {"bbox": [3.9, 5.2, 40.7, 21.99], "area": 50}
        content["annotations"][1]["area"] = 49.9

    dataset = build_dataset(
        "attributes", "test", {**config, "test_file": boxes_file(shapes, tmp_path, change)}
    )
    crop = Image.open(shapes / "images/attributes/000000.jpg").convert("RGB").crop((3, 5, 43, 26))
    assert len(dataset) == 2 and dataset.entries[1].pixels[:2] == (0, 48)
    assert torch.equal(dataset[0], from_pillow(crop.resize((32, 32), Image.Resampling.BILINEAR)))


def test_labels_are_in_the_order_of_the_attributes_ids(config, shapes, tmp_path):
    plain = build_dataset("attributes", "test", config)
    changed = boxes_file(shapes, tmp_path, lambda content: content["attributes"].reverse())
    assert (
        build_dataset("attributes", "test", {**config, "test_file": changed}).attributes
        == plain.attributes
    )


BAD = {  # what changes, what the message says
    "too few labels": (
        lambda c: c["annotations"][2]["att_vec"].pop(),
        "annotation 2 .*26 labels for 27 attributes",
    ),
    "another label": (
        lambda c: c["annotations"][1].update(att_vec=[2] * 27),
        r"value 2.*annotations\[1\].att_vec",
    ),
    "box outside": (
        lambda c: c["annotations"][3].update(bbox=[49, 48, 48, 48]),
        "annotation 3 .*of its image of 96 x 96",
    ),
    "box before 0": (
        lambda c: c["annotations"][0].update(bbox=[-0.5, 0, 8, 8]),
        "annotation 0 .*outside of its image",
    ),
    "box without pixels": (
        lambda c: c["annotations"][0].update(bbox=[0, 0, 0.9, 80]),
        "annotation 0 .*is narrower or lower than one pixel",
    ),
    "no such image": (
        lambda c: c["annotations"][0].update(image_id=77),
        "no image has the id 77",
    ),
    "neither is nor has": (
        lambda c: c["attributes"][4].update(is_has_att="was"),
        r"'was'.*attributes\[4\].is_has_att",
    ),
    "another set": (
        lambda c: c["attributes"][0].update(freq_set="rare"),
        r"'rare'.*attributes\[0\].freq_set",
    ),
    "no type in the name": (
        lambda c: c["attributes"][0].update(name="red"),
        r"attributes\[0\].name",
    ),
    "small boxes alone": (
        lambda c: [box.update(area=9) for box in c["annotations"]],
        "no annotation with an area of 50",
    ),
    "no positive label": (
        lambda c: [box.update(att_vec=[0, -1, 0] * 9) for box in c["annotations"]],
        "no att_vec has a 1",
    ),
    "image id twice": (
        lambda c: c["images"][1].update(id=c["images"][0]["id"]),
        "image 0 occurs twice",
    ),
    "attribute id twice": (
        lambda c: c["attributes"][1].update(id=c["attributes"][0]["id"]),
        "attribute 0 occurs twice",
    ),
    "another image": (
        lambda c: c["images"][0].update(height=200),
        "000000.jpg: wrong size.*annotation 0",
    ),
    "image of another size": (
        lambda c: [
            c["images"][0].update(width=200),
            c["annotations"][0].update(bbox=[90, 0, 48, 48]),
        ],
        "000000.jpg: wrong size.*annotation 0",
    ),
    "no image": (
        lambda c: c["images"][0].update(file_name="absent.jpg"),
        "absent.jpg does not exist",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(evaluated, pretrained, shapes, tmp_path, case):
    change, words = BAD[case]
    status, text = evaluated(pretrained, test_file=boxes_file(shapes, tmp_path, change))
    (line,) = re.findall("^error: .*$", text, re.M)
    assert status == 2 and text.endswith(f"{line}\n")
    assert re.search(words, line), line
    assert not (tmp_path / "out/log.txt").exists()


def test_a_checkpoint_without_projections_is_refused(evaluated, config, tmp_path):
    torch.save({"model": build_model("vqa", config).state_dict()}, tmp_path / "vqa.pth")
    status, text = evaluated(tmp_path / "vqa.pth")
    assert status == 2 and "_proj, which the evaluation of this task needs" in text
    assert "of a task that trains it" in text


# --------------------------------------------------------------------------------------------------
# the script


def test_several_processes_evaluate_as_one_and_the_boxes_are_drawn(
    call, config, pretrained, tmp_path, capsys
):
    arguments = command_line(config, tmp_path / "out", tmp_path)
    call("Attributes", *arguments, "--checkpoint", pretrained)
    text = capsys.readouterr().out
    assert "12 boxes, 27 attributes" in text and "chance" in text
    (entry,) = log(tmp_path / "out")
    result = json.loads((tmp_path / "out/result/attributes.json").read_text())
    precisions = [of["average_precision"] for of in result["attributes"]]
    known = [precision for precision in precisions if precision is not None]
    assert entry["test_map"] == result["map"]["all"] == pytest.approx(np.mean(known))
    assert {"test_map_head", "test_map_appearance", "test_map_layout"} <= entry.keys()
    assert len(result["boxes"]) == 12
    arguments = command_line(config, tmp_path / "two", tmp_path)
    two = launch("Attributes.py", *arguments, "--checkpoint", pretrained)
    assert two.returncode == 0, two.stderr
    assert log(tmp_path / "two")[0] == pytest.approx(entry)
    call("tools.visualize", "--run", tmp_path / "two")
    assert (tmp_path / "two/attributes.png").stat().st_size > 10_000


def test_every_flag_reaches_the_scores(config, call, monkeypatch):
    torch.manual_seed(0)
    model, tokenizer = build_model("attributes", config).eval(), load_tokenizer(config)[0]
    dataset, seen = build_dataset("attributes", "test", config), []
    text = tokenizer(["the red circle"], return_tensors="pt")
    monkeypatch.setattr(
        model,
        "encode_image",
        lambda image: (None, model.encode_text(text)[1].expand(len(image), -1)),
    )
    given = model, dataset, tokenizer, as_config(config), torch.device("cpu")
    monkeypatch.setattr(
        "engine.run.run_task", lambda *args, **options: seen.append(score_boxes(*given, **options))
    )
    for flags in ([], ["--prompts", "photo"], ["--noun", "object"], ["--score", "max"]):
        call("Attributes", *flags)
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_scores_labels_and_boxes_belong_together(config, monkeypatch):
    """A model whose image feature is near the prompts of exactly the box's attributes has a
    precision of 100.
    """
    model, tokenizer = build_model("attributes", config), load_tokenizer(config)[0]
    dataset = build_dataset("attributes", "test", config)
    counts = torch.tensor([len(prompts_of(attribute)) for attribute in dataset.attributes])
    seen = iter(
        torch.tensor([box.labels for box in dataset.entries])
        .float()
        .repeat_interleave(counts, dim=1)
    )
    monkeypatch.setattr(model, "encode_text", lambda text: (None, torch.eye(len(text.input_ids))))
    monkeypatch.setattr(
        model, "encode_image", lambda image: (None, torch.stack([next(seen) for _ in image]))
    )
    assert evaluate(model, dataset, tokenizer, config, torch.device("cpu"))["map"] == 100
