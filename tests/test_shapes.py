"""The built-in data set: determinism, splits, true captions, formats and errors."""
import filecmp
import json
import os
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dataset import shapes
from dataset.text import pre_caption
from utils import InputError, run_script

SMALL = {"train": 200, "val": 30, "test": 30, "noise": 0.25, "image_size": 64}
SAID_SHAPES = {form: name for name, nouns in shapes.SHAPES.items() for n in nouns for form in (n, shapes.plural(n))}
SAID_COLORS = {word: name for name, words in shapes.COLORS.items() for word in words}


def load(folder, name):
    return json.loads((folder / name).read_text())


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def spoken_objects(text):
    """The (color, shape) pairs that a caption names, each as often as it says."""
    colors, nouns = "|".join(SAID_COLORS), "|".join(sorted(SAID_SHAPES, key=len, reverse=True))
    adjectives = "|".join(word for table in (shapes.SIZES, shapes.FILLS) for words in table.values() for word in words)
    pattern = rf"\b(\w+) (?:(?:{adjectives}) )*(?:({colors}) ({nouns})|({nouns}) in ({colors}))\b"
    said = Counter()
    for count, color, noun, noun_first, color_last in re.findall(pattern, text):
        pair = SAID_COLORS[color or color_last], SAID_SHAPES[noun or noun_first]
        said[pair] += shapes.NUMBERS.index(count) if count in shapes.NUMBERS else 1
    return said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    assert shapes.write_dataset(str(folder), **SMALL)
    return folder


@pytest.fixture(scope="module")
def scenes(data):
    return {split: load(data, f"scenes_{split}.json") for split in shapes.SPLITS}


def test_same_seed_same_bytes_other_seed_others(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # the number of processes
    shapes.write_dataset(str(tmp_path / "again"), **SMALL)
    shapes.write_dataset(str(tmp_path / "other"), **{**SMALL, "seed": 1})
    names = files(data)
    assert files(tmp_path / "again") == names and not any(name.endswith(".tmp") for name in names)
    assert filecmp.cmpfiles(data, tmp_path / "again", names, shallow=False) == (names, [], [])
    same, differing, _ = filecmp.cmpfiles(data, tmp_path / "other", names, shallow=False)
    assert same == ["vocab.txt"]


def test_a_scene_does_not_depend_on_the_number_of_scenes(data, tmp_path):
    shapes.write_dataset(str(tmp_path / "few"), **{**SMALL, "train": 20})
    images = [f"images/train/{i:06d}.jpg" for i in range(20)]
    assert filecmp.cmpfiles(data, tmp_path / "few", images, shallow=False)[0] == images


def test_no_combination_in_two_splits(scenes):
    combinations = {split: [shapes.combination_of(s) for s in scenes[split]] for split in shapes.SPLITS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(combinations[a]) & set(combinations[b])
    for split in ("val", "test"):
        assert len(set(combinations[split])) == SMALL[split]
    singles = Counter(shapes.split_of(((c, s),)) for c in shapes.COLORS for s in shapes.SHAPES)
    assert singles["val"] >= 3 and singles["test"] >= 3


def test_annotation_formats(data, scenes):
    pretrain, pairs = load(data, "pretrain.json"), load(data, "retrieval_train.json")
    assert len(pretrain) == SMALL["train"] and set(pretrain[0]) == {"image", "caption"}
    for name, split in (("pretrain", "train"), ("val", "val"), ("test", "test")):
        entries = load(data, f"{name}.json")
        assert [e["image"] for e in entries] == [f"images/{split}/{i:06d}.jpg" for i in range(SMALL[split])]
        assert all(len(set(e["caption"])) == 4 for e in entries)
        assert [e["caption"] for e in entries] == [[c["caption"] for c in s["captions"]] for s in scenes[split]]
        with Image.open(data / entries[-1]["image"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    clean = [(s["image"], c["caption"]) for s in scenes["train"] for c in s["captions"] if c["noise"] is None]
    assert [(p["image"], p["caption"]) for p in pairs] == clean
    assert len({p["image_id"] for p in pairs}) == len({p["image"] for p in pairs})


def test_every_word_is_in_the_vocabulary(data, scenes):
    vocab = (data / "vocab.txt").read_text().split("\n")[:-1]
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(vocab) == len(set(vocab)) and set("az09") | {"##a", "##z", "##9"} <= set(vocab)
    rng = random.Random(0)
    texts = [c["caption"] for split in scenes.values() for s in split for c in s["captions"]]
    texts += [shapes.noisy_caption(rng, scenes["train"][i % 200], scenes["train"][0], kind)
              for i in range(400) for kind in shapes.NOISE_KINDS]
    for text in texts:
        words = pre_caption(text, 30).split()
        assert text == text.lower() and set(words) <= set(vocab) and 1 <= len(words) <= shapes.MAX_WORDS


def test_captions_are_true_unless_flagged(scenes):
    for split in scenes:
        for scene in scenes[split]:
            truth = Counter((o["color"], o["shape"]) for o in scene["objects"])
            for entry in scene["captions"]:
                said = spoken_objects(entry["caption"])
                if entry["noise"] is None:
                    assert said and said <= truth, entry
                if split != "train":
                    assert entry["noise"] is None and said == truth, entry
                if entry["noise"] == "wrong":
                    assert not said <= truth, entry
                if entry["noise"] == "missing":
                    assert not said, entry


def test_optional_facts_are_true(scenes):
    rng = random.Random(0)
    for scene in (s for s in scenes["train"] if len(s["objects"]) == 1):
        text, obj = shapes.caption(rng, scene, detail=9), scene["objects"][0]
        ground = text.rsplit(" on " if " on " in text else " against " if " against " in text else " with ", 1)[1]
        assert any(word in ground.split() for word in shapes.BACKGROUNDS[scene["background"]])
        assert any(place in text for place in shapes.POSITIONS[obj["position"]])
        assert any(word in text.split() for word in shapes.SIZES[obj["size"]])
        assert any(word in text.split() for word in shapes.FILLS[obj["fill"]])


def test_noise_share(scenes):
    rng, scene = random.Random(0), scenes["train"][0]
    kinds = Counter(c["noise"] for _ in range(300)
                    for c in shapes.write_captions(rng, scene, "train", 4, 0.3, scenes["train"]))
    assert 0.25 < 1 - kinds[None] / 1200 < 0.37
    assert all(kinds[kind] > 40 for kind in shapes.NOISE_KINDS)
    assert {c["noise"] for c in shapes.write_captions(rng, scene, "train", 20, 0, [scene])} == {None}


def test_boxes_hold_exactly_the_objects(scenes):
    for scene in scenes["train"][:60]:
        pixels = np.asarray(shapes.render(scene), dtype=int)
        drawn = np.abs(pixels - shapes.RGB[scene["background"]]).max(-1) > 8
        for obj in scene["objects"]:
            x, y, w, h = obj["box"]
            inside = drawn[y:y + h, x:x + w]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            drawn[y:y + h, x:x + w] = False
        assert not drawn.any()


@pytest.mark.parametrize("fill, low, high", [("solid", 0.99, 1.01), ("striped", 0.5, 0.85), ("outlined", 0.2, 0.85)])
@pytest.mark.parametrize("shape", list(shapes.SHAPES))
def test_fills_differ(shape, fill, low, high):
    obj = {"shape": shape, "angle": 0, "box": [0, 0, 24, round(24 * max(y for _, y in shapes.outline(shape, 0)))]}
    area = [np.asarray(shapes.object_mask({**obj, "fill": f}, 3)).mean() for f in (fill, "solid")]
    assert low < area[0] / area[1] < high


def test_relations_agree_with_boxes(scenes):
    axis = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {name for s in scenes["train"] for _, name, _ in s["relations"]} == set(axis)
    for scene in scenes["train"]:
        for i, name, j in scene["relations"]:
            k, sign = axis[name]
            a, b = scene["objects"][i]["box"], scene["objects"][j]["box"]
            assert sign * (2 * a[k] + a[k + 2] - 2 * b[k] - b[k + 2]) > 0
            assert [j, opposite[name], i] in scene["relations"]


def test_finished_data_is_kept_and_other_arguments_rebuild(tmp_path):
    tiny = {"train": 3, "val": 2, "test": 2}
    assert shapes.write_dataset(str(tmp_path), **tiny)
    (tmp_path / "vqa.json").write_text("[]")
    stamp = (tmp_path / "images/train/000000.jpg").stat().st_mtime_ns
    assert not shapes.write_dataset(str(tmp_path), **tiny)
    assert (tmp_path / "images/train/000000.jpg").stat().st_mtime_ns == stamp
    assert shapes.write_dataset(str(tmp_path), **{**tiny, "train": 2})
    assert len(list((tmp_path / "images/train").iterdir())) == len(load(tmp_path, "pretrain.json")) == 2
    assert (tmp_path / "vqa.json").exists()


def test_an_interrupted_run_is_not_taken_for_finished(tmp_path, monkeypatch):
    tiny = {"train": 3, "val": 2, "test": 2}
    shapes.write_dataset(str(tmp_path), **tiny)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "vocabulary", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            shapes.write_dataset(str(tmp_path), **{**tiny, "seed": 1})
    assert not (tmp_path / "pretrain.json").exists()
    assert shapes.write_dataset(str(tmp_path), **{**tiny, "seed": 1})


@pytest.mark.parametrize("wrong", [{"train": 0}, {"noise": 1.5}, {"image_size": 8}, {"captions": 0}, {"test": -1}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} "):
        shapes.write_dataset(str(tmp_path / "data"), **wrong)
    assert not (tmp_path / "data").exists()


def test_more_scenes_than_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNT_WEIGHTS", (1, 0, 0, 0, 0))
    with pytest.raises(InputError, match="--test: only"):
        shapes.write_dataset(str(tmp_path / "data"), train=2, val=2, test=64)


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["shapes.py", *map(str, args)])
        run_script(shapes.main)
        return capsys.readouterr().out

    summary = f"vocabulary of {len(shapes.vocabulary())}"
    tiny = ("--output", tmp_path / "data", "--train", 4, "--val", 2, "--test", 2)
    assert summary in run(*tiny) and "already there" in run(*tiny)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for output in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(SystemExit) as exit_:
            run("--output", output)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert files(tmp_path / "mine") == ["notes.txt"]


@pytest.mark.parametrize("image_size", [48, 77, 96, 224])
def test_objects_lie_within_the_image_and_apart(image_size):
    for number in range(200):
        boxes = [o["box"] for o in shapes.draw_scene(random.Random(number), "train", image_size)["objects"]]
        for i, (x, y, w, h) in enumerate(boxes):
            assert x >= 0 and y >= 0 and x + w <= image_size and y + h <= image_size
            for u, v, a, b in boxes[:i]:
                assert x + w <= u or u + a <= x or y + h <= v or v + b <= y
