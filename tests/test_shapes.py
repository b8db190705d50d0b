"""The built-in data set: determinism, splits, true captions, true and balanced task data, formats and errors."""
import filecmp
import json
import os
import pickle
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dataset.shapes import tasks, vocabulary, write_dataset
from dataset.shapes.__main__ import main
from dataset.shapes.captions import MAX_WORDS, NOISE_KINDS, NUMBERS, caption, noisy_caption, plural, write_captions
from dataset.shapes.scenes import (BACKGROUNDS, COLORS, CURTAIN, FILLS, POSITIONS, QUADRANTS, RGB, SHAPES, SIZES, SPLITS,
                                   combination_of, draw_scene, object_mask, outline, render, split_of)
from dataset.text import pre_caption
from evaluation.metrics import box_iou, chance_grounding
from utils import InputError, run_script

SMALL = {"train": 200, "val": 30, "test": 30, "noise": 0.25, "image_size": 64}
SAID_SHAPES = {form: name for name, nouns in SHAPES.items() for n in nouns for form in (n, plural(n))}
SAID_COLORS = {word: name for name, words in COLORS.items() for word in words}


def load(folder, name):
    return json.loads((folder / name).read_text())


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def spoken_objects(text):
    """The (color, shape) pairs that a caption names, each as often as it says."""
    colors, nouns = "|".join(SAID_COLORS), "|".join(sorted(SAID_SHAPES, key=len, reverse=True))
    adjectives = "|".join(word for table in (SIZES, FILLS) for words in table.values() for word in words)
    pattern = rf"\b(\w+) (?:(?:{adjectives}) )*(?:({colors}) ({nouns})|({nouns}) in ({colors}))\b"
    said = Counter()
    for count, color, noun, noun_first, color_last in re.findall(pattern, text):
        pair = SAID_COLORS[color or color_last], SAID_SHAPES[noun or noun_first]
        said[pair] += NUMBERS.index(count) if count in NUMBERS else 1
    return said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    assert write_dataset(str(folder), **SMALL)
    return folder


@pytest.fixture(scope="module")
def scenes(data):
    return {split: load(data, f"scenes_{split}.json") for split in SPLITS}


def test_same_seed_same_bytes_other_seed_others(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)     # the number of processes
    write_dataset(str(tmp_path / "again"), **SMALL)
    write_dataset(str(tmp_path / "other"), **{**SMALL, "seed": 1})
    names = files(data)
    assert files(tmp_path / "again") == names and not any(name.endswith(".tmp") for name in names)
    assert filecmp.cmpfiles(data, tmp_path / "again", names, shallow=False) == (names, [], [])
    same, differing, _ = filecmp.cmpfiles(data, tmp_path / "other", names, shallow=False)
    assert {"vocab.txt"} <= set(same) <= {"vocab.txt", "answer_list.json"}


def test_a_scene_does_not_depend_on_the_number_of_scenes(data, tmp_path):
    write_dataset(str(tmp_path / "few"), **{**SMALL, "train": 20})
    images = [f"images/train/{i:06d}.jpg" for i in range(20)]
    assert filecmp.cmpfiles(data, tmp_path / "few", images, shallow=False)[0] == images


def test_no_combination_in_two_splits(scenes):
    combinations = {split: [combination_of(s) for s in scenes[split]] for split in SPLITS}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(combinations[a]) & set(combinations[b])
    for split in ("val", "test"):
        assert len(set(combinations[split])) == SMALL[split]
    singles = Counter(split_of(((c, s),)) for c in COLORS for s in SHAPES)
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
    texts += [noisy_caption(rng, scenes["train"][i % 200], scenes["train"][0], kind)
              for i in range(400) for kind in NOISE_KINDS]
    for text in texts:
        words = pre_caption(text, 30).split()
        assert text == text.lower() and set(words) <= set(vocab) and 1 <= len(words) <= MAX_WORDS


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
        text, obj = caption(rng, scene, detail=9), scene["objects"][0]
        ground = text.rsplit(" on " if " on " in text else " against " if " against " in text else " with ", 1)[1]
        assert any(word in ground.split() for word in BACKGROUNDS[scene["background"]])
        assert any(place in text for place in POSITIONS[obj["position"]])
        assert any(word in text.split() for word in SIZES[obj["size"]])
        assert any(word in text.split() for word in FILLS[obj["fill"]])


def test_noise_share(scenes):
    rng, scene = random.Random(0), scenes["train"][0]
    kinds = Counter(c["noise"] for _ in range(300)
                    for c in write_captions(rng, scene, "train", 4, 0.3, scenes["train"]))
    assert 0.25 < 1 - kinds[None] / 1200 < 0.37
    assert all(kinds[kind] > 40 for kind in NOISE_KINDS)
    assert {c["noise"] for c in write_captions(rng, scene, "train", 20, 0, [scene])} == {None}


def test_boxes_hold_exactly_the_objects(scenes):
    for scene in scenes["train"][:60]:
        pixels = np.asarray(render(scene), dtype=int)
        drawn = np.abs(pixels - RGB[scene["background"]]).max(-1) > 8
        for obj in scene["objects"]:
            x, y, w, h = obj["box"]
            inside = drawn[y:y + h, x:x + w]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            drawn[y:y + h, x:x + w] = False
        assert not drawn.any()


@pytest.mark.parametrize("fill, low, high", [("solid", 0.99, 1.01), ("striped", 0.5, 0.85), ("outlined", 0.2, 0.85)])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_fills_differ(shape, fill, low, high):
    obj = {"shape": shape, "angle": 0, "box": [0, 0, 24, round(24 * max(y for _, y in outline(shape, 0)))]}
    area = [np.asarray(object_mask({**obj, "fill": f}, 3)).mean() for f in (fill, "solid")]
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
    assert write_dataset(str(tmp_path), **tiny)
    (tmp_path / "vqa.json").write_text("[]")
    stamp = (tmp_path / "images/train/000000.jpg").stat().st_mtime_ns
    assert not write_dataset(str(tmp_path), **tiny)
    assert (tmp_path / "images/train/000000.jpg").stat().st_mtime_ns == stamp
    assert write_dataset(str(tmp_path), **{**tiny, "train": 2})
    assert len(list((tmp_path / "images/train").iterdir())) == len(load(tmp_path, "pretrain.json")) == 2
    assert (tmp_path / "vqa.json").exists()


def test_an_interrupted_run_is_not_taken_for_finished(tmp_path, monkeypatch):
    tiny = {"train": 3, "val": 2, "test": 2}
    write_dataset(str(tmp_path), **tiny)
    with monkeypatch.context() as patch:
        patch.setattr("dataset.shapes.files.vocabulary", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_dataset(str(tmp_path), **{**tiny, "seed": 1})
    assert not (tmp_path / "pretrain.json").exists()
    assert write_dataset(str(tmp_path), **{**tiny, "seed": 1})


@pytest.mark.parametrize("wrong", [{"train": 0}, {"noise": 1.5}, {"image_size": 8}, {"captions": 0}, {"test": -1}])
def test_arguments_out_of_range(tmp_path, wrong):
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} "):
        write_dataset(str(tmp_path / "data"), **wrong)
    assert not (tmp_path / "data").exists()


def test_more_scenes_than_combinations(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.shapes.scenes.COUNT_WEIGHTS", (1, 0, 0, 0, 0))
    with pytest.raises(InputError, match="--test: only"):
        write_dataset(str(tmp_path / "data"), train=2, val=2, test=64)


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["shapes.py", *map(str, args)])
        run_script(main)
        return capsys.readouterr().out

    summary = f"vocabulary of {len(vocabulary())}"
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
        boxes = [o["box"] for o in draw_scene(random.Random(number), "train", image_size)["objects"]]
        for i, (x, y, w, h) in enumerate(boxes):
            assert x >= 0 and y >= 0 and x + w <= image_size and y + h <= image_size
            for u, v, a, b in boxes[:i]:
                assert x + w <= u or u + a <= x or y + h <= v or v + b <= y


# Downstream tasks. What is true is told anew from the sentence and the scene, not with the generator's functions.

SAID = {word: (key, name) for key, table in (("size", SIZES), ("fill", FILLS), ("color", COLORS))
        for name, words in table.items() for word in words} | {w: ("shape", name) for w, name in SAID_SHAPES.items()}
TASK_FILES = {"vqa_train.json": 3 * 200, "vqa_val.json": 60, "vqa_test.json": 60, "ve_train.json": 400, "ve_val.json": 60,
              "ve_test.json": 60, "nlvr_train.json": 800, "nlvr_dev.json": 60, "nlvr_test.json": 60}


def fitting(objects, text):
    """The objects that a phrase fits."""
    facts = [SAID[word] for word in text.split() if word in SAID]
    assert facts or re.search(r"\bobjects?\b", text), text
    return [o for o in objects if all(o[key] == name for key, name in facts)]


def true_answer(question, objects):
    """The answer to a question, after checking that it makes sense."""
    a, b = (re.fullmatch(pattern, question) for pattern in (
        r"(?:is there|can you see|how many) (.+?)(?: are there| do you see)?\?",
        r"(?:what (?:color|shape) (?:is|are) the|is the|are there more|are the) (.+?)(?:(?: big or small"
        r"|(?: bigger)? than (?:the )?(.+?)| and the (.+?) the same \w+))?\?"))
    if a:
        count = len(fitting(objects, a[1]))
        return str(count) if question.startswith("how many") else "yes" if count else "no"
    first, second = fitting(objects, b[1]), fitting(objects, b[2] or b[3]) if b[2] or b[3] else []
    if "more" in question:
        return "yes" if len(first) > len(second) else "no"
    if question.startswith("what color are"):
        assert len(first) > 1 and len({o["color"] for o in first}) == 1
        return first[0]["color"]
    assert len(first) == 1
    if "what" in question:
        return first[0]["color" if "color" in question else "shape"]
    if "big or small" in question:
        return {"large": "big", "small": "small"}[first[0]["size"]]
    assert len(second) == 1 and first != second
    if "bigger" in question:
        assert first[0]["size"] != second[0]["size"]
        return "yes" if first[0]["size"] == "large" else "no"
    key = question.rstrip("?").split()[-1]
    return "yes" if first[0][key] == second[0][key] else "no"


def true_label(entry, scene):
    """The label of a hypothesis on the picture it names."""
    negative = " no " in f" {entry['sentence']}"
    objects = scene["objects"]
    if "_covered" in entry["image"]:
        vertical, horizontal = scene["covered"].split()
        half = scene["image_size"] / 2
        objects = [o for o in objects if ((o["box"][0] + o["box"][2] / 2 < half) != (horizontal == "left"))
                   or ((o["box"][1] + o["box"][3] / 2 < half) != (vertical == "top"))]
        if not fitting(objects, entry["sentence"] + " object"):
            return "neutral"
    return "contradiction" if bool(fitting(objects, entry["sentence"] + " object")) == negative else "entailment"


def is_true(sentence, left, right):
    """Whether a statement holds for the objects of two images."""
    two = re.fullmatch(r"(?:one image has|there is) (.+?)(?: in one image)? and (?:the other one has )?(.+?)"
                       r"(?: in the other one)?", sentence)
    if two:
        return any(fitting(x, two[1]) and fitting(y, two[2]) for x, y in ((left, right), (right, left)))
    counts = [len(fitting(objects, sentence + " object")) for objects in (left, right)]
    number = re.search(r"(?:has|have|are|is|exactly|least) (one|two|three|four|five) (?!of)", sentence)
    number = number and NUMBERS.index(number[1])
    if "total" in sentence:
        return sum(counts) == number
    if "more" in sentence:
        return counts[0] > counts[1] if sentence.index("left") < sentence.index("right") else counts[1] > counts[0]
    if "at least" in sentence:
        return min(counts) >= number
    if "either" in sentence:    # or neither
        return counts == [0, 0]
    if "both" in sentence:
        return all(counts)
    if number:
        assert "exactly" in sentence
        return number in counts
    if "exactly" in sentence or "only" in sentence:
        return counts.count(0) == 1
    if "left" in sentence or "right" in sentence:
        return (counts["right" in sentence] == 0) == (" no " in sentence)
    assert "one of the images" in sentence and 0 in counts
    return any(counts)


@pytest.fixture(scope="module")
def many():
    return [draw_scene(random.Random(i), "train", 96) for i in range(1500)]


def test_task_files(data, scenes):
    for name, count in TASK_FILES.items():
        entries = load(data, name)
        assert len(entries) == count
        split = {"dev": "val"}.get(name[:-5].split("_")[1], name[:-5].split("_")[1])
        paths = [path for e in entries for path in e.get("images", [e.get("image")])]
        assert all(path.startswith((f"images/{split}/", f"images/{split}_covered/")) for path in paths)
        assert all((data / (path.removesuffix(".jpg") + ".jpg")).exists() for path in paths)
    for split in SPLITS:
        covered = [s["image"].replace("/", "_covered/").replace("images_covered", "images") for s in scenes[split]
                   if s["covered"]]
        assert files(data / f"images/{split}_covered") == [path.rsplit("/", 1)[1] for path in covered]
        assert len(covered) == pytest.approx(len(scenes[split]) / 2, abs=3)


def test_every_word_of_the_tasks_is_in_the_vocabulary(data):
    vocab = set((data / "vocab.txt").read_text().split("\n"))
    names = [*TASK_FILES, "grounding_train.json", "grounding_test.json"]
    texts = [e.get("question") or e.get("sentence") or e["text"] for name in names for e in load(data, name)]
    texts += [re.sub("{.*?}", "", text) for text in tasks.said_texts()] + load(data, "answer_list.json")
    for text in texts:
        assert set(pre_caption(text, 99).split()) <= vocab and len(text.split()) <= 16 and not re.search(r"\ba [aeiou]", text)


def test_answers_are_true_and_kinds_are_balanced(many):
    kinds = Counter()
    for i, scene in enumerate(many):
        questions = tasks.ask(random.Random(f"{i} ask"), scene, 3)
        assert len(questions) == 3
        for question, answer in questions:
            assert answer == true_answer(question, scene["objects"]), (question, scene["objects"])
            assert len(question.split()) <= 14
            kinds[next(w for w in ("how", "what color", "what shape", "big or", "more", "same", "bigger", "a")
                       if w in question)] += 1
    kinds["comparison"] = kinds.pop("more") + kinds.pop("same") + kinds.pop("bigger")
    assert len(kinds) == 6 and min(kinds.values()) > 0.8 * max(kinds.values())


def test_existence_counts_and_comparisons_are_balanced(many):
    for ask in (tasks.ask_existence, tasks.ask_comparison):
        forms = {}
        for i, scene in enumerate(many):
            question, answer = ask(random.Random(f"{i} ask"), scene["objects"])
            form = next(word for word in ("more", "color", "size", "bigger", "?") if word in question)
            forms.setdefault(form, Counter())[answer] += 1
        for answers in forms.values():
            assert abs(answers["yes"] - answers["no"]) < 3.5 * answers.total() ** 0.5
    numbers = Counter(tasks.ask_count(random.Random(f"{i} ask"), scene["objects"])[1] for i, scene in enumerate(many))
    assert set(numbers) == set("012345") and 0 < numbers["0"] < 0.15 * len(many) and numbers["1"] < 0.65 * len(many)


def test_annotators(data):
    rng, said = random.Random(0), {}
    for answer in tasks.MISTAKEN:
        for _ in range(60):
            answers = Counter(tasks.annotate(rng, answer))
            assert answers.total() == 10 and 6 <= answers[answer] <= 10
            said.setdefault(answer, Counter()).update(answers)
    assert set(said["cyan"]) == {"cyan", "turquoise", "blue", "green"} and set(said["0"]) == {"0", "1"}
    assert {"large"} < set(said["big"]) and {"disc"} < set(said["circle"]) and {"little", "tiny"} < set(said["small"])
    known = load(data, "answer_list.json")
    assert len(known) == len(set(known)) and set(tasks.MISTAKEN) <= set(known)
    assert {a for e in load(data, "vqa_train.json") for a in e["answer"]} <= set(known)


def test_vqa_files(data, scenes):
    ids = []
    for split in SPLITS:
        objects = {s["image"]: s["objects"] for s in scenes[split]}
        for e in load(data, f"vqa_{split}.json"):
            assert list(e) == ["image", "question", "question_id", "dataset", "answer", "answer_type"]
            answer = true_answer(e["question"], objects[e["image"]])
            assert Counter(e["answer"]).most_common(1)[0][0] == answer and e["dataset"] == "vqa"
            assert e["answer_type"] == ("yes/no" if answer in ("yes", "no") else "number" if answer in "012345" else "other")
            ids.append(e["question_id"])
    assert len(set(ids)) == len(ids)


def test_entailment(data, scenes):
    for split in SPLITS:
        entries, counts = load(data, f"ve_{split}.json"), Counter()
        for i, entry in enumerate(entries):
            assert list(entry) == ["image", "sentence", "label"]
            assert entry["label"] == true_label(entry, scenes[split][i // 2]), (entry, scenes[split][i // 2])
            counts[entry["label"], " no " in f" {entry['sentence']}"] += 1
        assert len(counts) == 6 and max(counts.values()) - min(counts.values()) <= 3
        assert Counter("_covered" in e["image"] for e in entries)[True] == pytest.approx(len(entries) / 2, abs=6)


def test_curtains_hide_a_quadrant_and_nothing_else(scenes):
    assert not set(CURTAIN) & set(RGB.values())
    for scene in [s for s in scenes["train"] if s["covered"]][:40]:
        plain, covered = (np.asarray(render(scene, cover), dtype=int) for cover in (None, scene["covered"]))
        x, y = (32 * half for half in QUADRANTS[scene["covered"]])
        colors = covered[y:y + 32, x:x + 32].reshape(-1, 3)
        assert all((np.minimum(*CURTAIN) <= color).all() and (color <= np.maximum(*CURTAIN)).all() for color in colors)
        covered[y:y + 32, x:x + 32] = plain[y:y + 32, x:x + 32]
        assert (covered == plain).all()


def test_statements(data, scenes, many):
    entries = []
    for split, name in zip(SPLITS, ("train", "dev", "test")):
        objects = {s["image"]: s["objects"] for s in scenes[split]}
        found = load(data, f"nlvr_{name}.json")
        assert all(list(e) == ["images", "sentence", "label"] and e["label"] in ("True", "False") for e in found)
        entries += [(e["sentence"], *(objects[path] for path in e["images"]), e["label"] == "True") for e in found]
        labels = {}
        for e in found:
            assert e["images"][0] != e["images"][1]
            labels.setdefault(e["sentence"], Counter())[e["label"]] += 1
        assert all(counts["True"] == counts["False"] for counts in labels.values())     # the sentence tells nothing
    index = tasks.index_scenes(many)
    for i in range(600):
        sentence, pairs = tasks.state(random.Random(i), many, index)
        entries += [(sentence, *(many[number]["objects"] for number in pair), label) for label, pair in pairs.items()]
    for sentence, left, right, label in entries:
        assert is_true(sentence, left, right) == label, (sentence, left, right)
    numeric = [s for s, *_ in entries if re.search("total|more|least|exactly (?!one of)", s)]
    assert 0.25 < len(numeric) / len(entries) < 0.35


def test_no_statement_where_all_scenes_are_alike(many):
    alike = [many[0], many[0]]
    assert tasks.state(random.Random(0), alike, tasks.index_scenes(alike)) is None


def test_references_fit_one_object_and_name_no_place(data, scenes):
    with open(data / "refcoco+/refs(unc).p", "rb") as file:
        refs = pickle.load(file)
    instances, detections = load(data, "refcoco+/instances.json"), load(data, "refcoco+/dets.json")
    images, boxes = ({e["id"]: e for e in instances[key]} for key in ("images", "annotations"))
    categories = {c["id"]: c["name"] for c in instances["categories"]}
    by_path = {s["image"]: s for split in SPLITS for s in scenes[split]}
    places = {w for table in (POSITIONS, ("left", "right", "above", "below", "over", "under", "next")) for t in table
              for w in t.split()}
    sentences = []
    for ref in refs:
        image, box = images[ref["image_id"]], boxes[ref["ann_id"]]
        scene = by_path[image["file_name"]]
        assert (image["width"], image["height"]) == (64, 64) and box["image_id"] == ref["image_id"]
        assert len(scene["objects"]) > 1 and ref["sent_ids"] == [s["sent_id"] for s in ref["sentences"]]
        for sentence in ref["sentences"]:
            assert sentence["tokens"] == sentence["sent"].split() and not places & set(sentence["tokens"])
            target, = fitting(scene["objects"], sentence["sent"] + " object")
            assert target["box"] == box["bbox"] and target["shape"] == categories[ref["category_id"]]
            sentences.append((ref["split"] == "train", {"image": ref["file_name"], "text": sentence["sent"],
                                                        "ref_id": ref["ref_id"]}))
        split = "testA" if target["shape"] in ("circle", "heart", "moon") else "testB"
        assert ref["split"] == (split if "/test/" in ref["file_name"] else ref["file_name"].split("/")[1])
    assert len({ref["ref_id"] for ref in refs}) == len(refs)
    for name, train in (("train", True), ("test", False)):
        assert load(data, f"grounding_{name}.json") == [entry for of_train, entry in sentences if of_train == train]
    chance = chance_grounding({r["ref_id"]: r for r in refs if r["split"] != "train"},
                              {r["ref_id"]: boxes[r["ann_id"]]["bbox"] for r in refs}, detections)
    assert set(chance) == {"val_d", "testA_d", "testB_d"} and all(0.14 < share < 0.25 for share in chance.values())


@pytest.mark.parametrize("image_size", [48, 96, 224])
def test_every_object_is_detected_once(image_size):
    for number in range(100):
        scene = draw_scene(random.Random(number), "test", image_size)
        found = tasks.detect(random.Random(number), scene)
        assert [box[4] for box in found] == sorted((box[4] for box in found), reverse=True)
        for obj in scene["objects"]:
            hits = [box for box in found if box_iou(box[:4], obj["box"]) >= 0.5]
            assert len(hits) == 1 and box_iou(hits[0][:4], obj["box"]) > 0.7
        assert 3 <= len(found) - len(scene["objects"]) <= 4
        assert all(min(box) >= 0 and max(box[0] + box[2], box[1] + box[3]) <= image_size + 0.02 for box in found)


def test_identical_objects_are_not_referred_to(many):
    scene = next(s for s in many if len(s["objects"]) == 2)
    twin = scene["objects"][0]
    assert tasks.refer(random.Random(0), [twin, dict(twin)], twin) == []


@pytest.mark.parametrize("image_size", [48, 64])
def test_two_scenes_a_split_are_enough(tmp_path, image_size):
    write_dataset(str(tmp_path), train=2, val=2, test=2, image_size=image_size)
    assert len(load(tmp_path, "vqa_train.json")) == 6 and len(load(tmp_path, "ve_test.json")) == 4
