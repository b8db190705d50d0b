"""The built-in data set: the same bytes again, disjoint splits, true and balanced texts, files that
the tasks read, errors.
"""

import json
import random
import re
import sys
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT, exit_status, refusal
from PIL import Image

from configs.load import load_config
from dataset.build import build_dataset
from dataset.refer import box_iou
from dataset.shapes import (
    attributes,
    captions,
    grounding,
    nlvr,
    relevance,
    ve,
    vqa,
    words,
)
from dataset.shapes.__main__ import main
from dataset.shapes.files import draw_split, vocabulary, write_dataset
from dataset.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    CURTAIN,
    POSITIONS,
    QUADRANTS,
    SHAPES,
    SPLITS,
    combination_of,
    draw_mask,
    draw_scene,
    outline,
    render,
)
from dataset.text import pre_caption
from evaluation.metrics import chance_grounding
from utils import cores

TINY = {"train": 3, "val": 2, "test": 2, "image_size": 48}
# every word for a size, fill, color or shape -> (which of these, its name)
SAID = {
    word: (key, name)
    for key, table in words.TABLES.items()
    for name in table
    for word in words.WORDS.get(name, (name,))
}
SAID |= {words.plural(noun): fact for noun, fact in SAID.items() if fact[0] == "shape"}


@pytest.fixture(scope="module")
def scenes():
    return {
        split: draw_split(
            split, 200 if split == "train" else 30, 64, per_image=4, noise=0.25, seed=0
        )
        for split in SPLITS
    }


@pytest.fixture(scope="module")
def many():
    return [draw_scene(random.Random(i), "train", 96) for i in range(600)]


def load(folder, name):
    return json.loads((folder / name).read_text())


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# --------------------------------------------------------------------------------------------------
# files


def test_same_arguments_give_the_same_bytes_on_any_number_of_processes(
    shapes, tmp_path, monkeypatch
):
    arguments = load(shapes, "shapes.json")
    del arguments["version"], arguments["complete"]
    # not that of `shapes`
    monkeypatch.setattr("dataset.shapes.files.process_count", lambda tasks: 0 if cores() > 1 else 2)
    write_dataset(tmp_path, **arguments)
    assert contents(tmp_path) == contents(shapes)
    drawn, other = (
        [
            combination_of(scene)
            for scene in draw_split("val", 8, 48, per_image=3, noise=0.1, seed=seed)
        ]
        for seed in (0, 1)
    )
    assert (
        drawn == [combination_of(scene) for scene in load(shapes, "scenes_val.json")]
        and drawn != other
    )


def test_images_show_the_scenes_with_and_without_curtain(shapes):
    for scene in load(shapes, "scenes_train.json"):
        covered = shapes / ve.covered_image(scene["image"])
        assert covered.exists() == bool(scene["covered"])
        for path, cover in ((shapes / scene["image"], None), (covered, scene["covered"]))[
            : 1 + covered.exists()
        ]:
            with Image.open(path) as image:
                error = np.abs(
                    np.asarray(image) - np.asarray(render(scene, cover), dtype=int)
                ).mean()
                assert image.format == "JPEG" and error < 8


def test_finished_data_is_kept_and_interrupted_data_is_made_anew(tmp_path, monkeypatch):
    assert write_dataset(tmp_path, **TINY | {"train": 4})
    (tmp_path / "mine.json").write_text("[]")
    before = contents(tmp_path)
    assert (
        f"{tmp_path}: " in (said := refusal(lambda: write_dataset(tmp_path, **TINY)))
        and "other values of train" in said
    )
    assert contents(tmp_path) == before
    with monkeypatch.context() as patch:
        patch.setattr(
            "dataset.shapes.files.vocabulary", lambda: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path, **TINY, overwrite=True)
    assert (
        not (tmp_path / "pretrain.json").exists() and not (tmp_path / "refcoco+/dets.json").exists()
    )
    assert write_dataset(tmp_path, **TINY)
    assert (
        len(list((tmp_path / "images/train").iterdir()))
        == len(load(tmp_path, "pretrain.json"))
        == 3
    )
    assert (tmp_path / "mine.json").read_text() == "[]"
    (tmp_path / "images/train/000000.jpg").unlink()
    assert not write_dataset(tmp_path, **TINY)
    assert not (tmp_path / "images/train/000000.jpg").exists()


@pytest.mark.parametrize(
    "config, names",
    [
        ("Pretrain", {"pretrain_train": 48, "pretrain_test": 12}),
        ("NLVR_pretrain", {"nlvr_pretrain_train": 48}),
        ("Retrieval", {"retrieval_train": None, "retrieval_val": 8, "retrieval_test": 12}),
        ("VQA", {"vqa_train": None, "vqa_val": None, "vqa_test": None}),
        ("VE", {"ve_train": None, "ve_val": None, "ve_test": None}),
        ("NLVR", {"nlvr_train": 192, "nlvr_val": 16, "nlvr_test": 24}),
        ("Grounding", {"grounding_train": None, "grounding_val": None, "grounding_test": None}),
        ("Attributes", {"attributes_test": 12}),
        ("Relevance", {"relevance_train": 96, "relevance_val": 16, "relevance_test": 24}),
    ],
)
def test_every_task_reads_its_files(shapes, tmp_path, config, names):
    text = (ROOT / f"configs/shapes/{config}.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("data/shapes", str(shapes)))
    for name, count in names.items():
        dataset = build_dataset(*name.rsplit("_", 1), load_config(tmp_path / "config.yaml"))
        assert dataset[len(dataset) - 1] is not None and count in (None, len(dataset))


def test_every_word_is_in_the_vocabulary(scenes):
    vocab = vocabulary()
    assert vocab[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and {
        "a",
        "##z",
        "9",
        "?",
    } <= set(vocab)
    assert len(vocab) == len(set(vocab))
    texts = [text for task in (captions, vqa, ve, nlvr) for text in task.TEXTS]
    texts += [c["caption"] for split in scenes.values() for s in split for c in s["captions"]]
    texts += [
        captions.noisy_caption(random.Random(i), scenes["train"][i % 200], scenes["train"][0], kind)
        for i in range(100)
        for kind in captions.NOISE_KINDS
    ]
    for task, key in (
        (vqa, "question"),
        (ve, "sentence"),
        (nlvr, "sentence"),
        (grounding, "text"),
        (relevance, "query"),
        (relevance, "text"),
    ):
        texts += [entry[key] for entries in task.annotations(scenes, 0)[:2] for entry in entries]
    texts += vqa.annotations(scenes, 0)[-1]
    texts += re.split(
        "[:/]",
        "/".join(
            of["name"].split(":")[1] for of in attributes.annotations(scenes, 0)[0]["attributes"]
        ),
    )
    for text in texts:
        said = pre_caption(re.sub("{.*?}", "", text), 99).split()
        assert (
            set(said) <= set(vocab) and text == text.lower() and not re.search(r"\ba [aeiou]", text)
        ), text
        assert len(said) <= captions.MAX_WORDS


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"noise": 1.5}, {"image_size": 8}, {"captions": 0}, {"test": -1}]
)
def test_arguments_out_of_range(tmp_path, wrong):
    assert f"--{next(iter(wrong))} " in refusal(lambda: write_dataset(tmp_path / "data", **wrong))
    assert not (tmp_path / "data").exists()


def test_more_scenes_than_combinations(monkeypatch):
    monkeypatch.setattr("dataset.shapes.scenes.COUNT_WEIGHTS", (1, 0, 0, 0, 0))
    assert refusal(lambda: draw_split("test", 64, 48, per_image=1, noise=0, seed=0)).startswith(
        "--test: found only"
    )


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(output):
        monkeypatch.setattr(
            sys,
            "argv",
            ["shapes", "--output", str(output), "--train", "2", "--val", "2", "--test", "2"],
        )
        return exit_status(main), *capsys.readouterr()

    assert run(tmp_path / "data")[0] == 0 and "(already there)" in run(tmp_path / "data")[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/shapes.json").write_text('{"circle": 1}')  # a file of another program
    for output in (tmp_path / "mine", tmp_path / "mine/notes.txt", tmp_path / "other"):
        status, _, error = run(output)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert contents(tmp_path / "mine") == {"notes.txt": b"keep"}


# --------------------------------------------------------------------------------------------------
# scenes


def test_no_combination_is_in_two_splits(scenes):
    found = {split: [combination_of(scene) for scene in scenes[split]] for split in SPLITS}
    assert not any(set(found[a]) & set(found[b]) for a, b in combinations(SPLITS, 2))
    assert all(len(set(found[split])) == 30 for split in ("val", "test"))


@pytest.mark.parametrize("image_size", [48, 77, 224])
def test_objects_lie_within_the_image_and_apart(image_size):
    for i in range(200):
        boxes = [o["box"] for o in draw_scene(random.Random(i), "train", image_size)["objects"]]
        assert all(min(x, y) >= 0 and max(x + w, y + h) <= image_size for x, y, w, h in boxes)
        for (x, y, w, h), (u, v, a, b) in combinations(boxes, 2):
            assert x + w <= u or u + a <= x or y + h <= v or v + b <= y


def test_boxes_hold_exactly_the_objects(scenes):
    for scene in scenes["train"][:40]:
        drawn = (
            np.abs(np.asarray(render(scene), dtype=int) - BACKGROUNDS[scene["background"]]).max(-1)
            > 8
        )
        for x, y, w, h in (o["box"] for o in scene["objects"]):
            inside = drawn[y : y + h, x : x + w]
            assert inside[[0, -1]].any(1).all() and inside[:, [0, -1]].any(0).all()
            drawn[y : y + h, x : x + w] = False
        assert not drawn.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_fills_differ(shape):
    box = [0, 0, 24, round(24 * max(y for _, y in outline(shape, 0)))]
    solid, striped, outlined = (
        np.asarray(draw_mask({"shape": shape, "angle": 0, "box": box, "fill": fill}, 3)).mean()
        for fill in ("solid", "striped", "outlined")
    )
    assert 0.5 < striped / solid < 0.85 and 0.2 < outlined / solid < 0.85


def test_positions_and_relations_agree_with_boxes(scenes):
    axes = {
        "left of": (0, -1, "right of"),
        "right of": (0, 1, "left of"),
        "above": (1, -1, "below"),
        "below": (1, 1, "above"),
    }
    assert {name for scene in scenes["train"] for _, name, _ in scene["relations"]} == set(axes)
    for scene in scenes["train"]:
        for x, y, w, h, position in ((*o["box"], o["position"]) for o in scene["objects"]):
            column, row = (
                0 if v < 0.37 else 2 if v > 0.63 else 1
                for v in ((x + w / 2) / 64, (y + h / 2) / 64)
            )
            expected = f"{('top', '', 'bottom')[row]} {('left', '', 'right')[column]}".strip()
            assert position == (expected or "center")
        for i, name, j in scene["relations"]:
            axis, sign, opposite = axes[name]
            a, b = scene["objects"][i]["box"], scene["objects"][j]["box"]
            assert sign * (2 * a[axis] + a[axis + 2] - 2 * b[axis] - b[axis + 2]) > 0
            assert [j, opposite, i] in scene["relations"]


# --------------------------------------------------------------------------------------------------
# captions


def spoken_objects(text):
    """The (color, shape) pairs that a caption names, each as often as it says."""
    said, pairs, number = text.replace(",", "").split(), Counter(), 1
    for i, word in enumerate(said):
        number = (
            words.NUMBERS.index(word)
            if word in words.NUMBERS
            else 1
            if word in ("a", "an", "the")
            else number
        )
        if SAID.get(word, ("",))[0] == "shape":
            near = [said[i - 1], *(said[i + 2 : i + 3] if said[i + 1 : i + 2] == ["in"] else [])]
            for color in (SAID[w][1] for w in near if SAID.get(w, ("",))[0] == "color"):
                pairs[color, SAID[word][1]] += number
    return pairs


def test_captions_are_true_unless_flagged(scenes):
    for split, scene in ((name, scene) for name in SPLITS for scene in scenes[name]):
        truth = Counter((o["color"], o["shape"]) for o in scene["objects"])
        assert len({entry["caption"] for entry in scene["captions"]}) == 4
        for entry in scene["captions"]:
            said = spoken_objects(entry["caption"])
            if entry["noise"] is None:
                assert (said and said <= truth) if split == "train" else said == truth, entry
            if entry["noise"] == "wrong":
                assert not said <= truth, entry
            if entry["noise"] == "missing":
                assert not said, entry
        assert split == "train" or not any(entry["noise"] for entry in scene["captions"])
    _, pairs, *_ = captions.annotations(scenes, 0)
    assert [p["caption"] for p in pairs] == [
        c["caption"] for s in scenes["train"] for c in s["captions"] if not c["noise"]
    ]


def test_optional_facts_are_true(scenes):
    rng = random.Random(0)
    for scene in (s for s in scenes["train"] if len(s["objects"]) == 1):
        text, (obj,) = captions.caption(rng, scene, detail=9), scene["objects"]
        *_, ground = re.split(" on | against | with ", text)
        assert any(
            word in ground.split()
            for word in words.WORDS.get(scene["background"], [scene["background"]])
        )
        assert any(place in text for place in words.WORDS[obj["position"]])
        assert all(
            any(SAID.get(word) == (key, obj[key]) for word in text.split())
            for key in ("size", "fill")
        )


def test_noise_share(scenes):
    rng, scene = random.Random(0), scenes["train"][0]
    kinds = Counter(
        c["noise"]
        for _ in range(300)
        for c in captions.write_captions(
            rng, scene, "train", count=4, noise=0.3, others=scenes["train"]
        )
    )
    assert 0.25 < 1 - kinds[None] / 1200 < 0.37 and all(
        kinds[kind] > 40 for kind in captions.NOISE_KINDS
    )
    assert {
        c["noise"]
        for c in captions.write_captions(rng, scene, "train", count=20, noise=0, others=[scene])
    } == {None}


# --------------------------------------------------------------------------------------------------
# the other tasks: what is true is found anew from the sentence and the scene, not with the
# generator's functions


def fitting(objects, text):
    """The objects that a phrase fits."""
    facts = [SAID[word] for word in text.split() if word in SAID]
    assert facts or re.search(r"\bobjects?\b", text), text
    return [o for o in objects if all(o[key] == name for key, name in facts)]


def true_answer(question, objects):
    """The answer to a question, after checking that it makes sense."""
    a, b = (
        re.fullmatch(pattern, question)
        for pattern in (
            r"(?:is there|can you see|how many) (.+?)(?: are there| do you see)?\?",
            r"(?:what (?:color|shape) is the|is the|are there more|are the) (.+?)"
            r"(?:(?: big or small|(?: bigger)? than (?:the )?(.+?)"
            r"| and the (.+?) the same \w+))?\?",
        )
    )
    if a:
        count = len(fitting(objects, a[1]))
        return str(count) if question.startswith("how many") else "yes" if count else "no"
    first, second = fitting(objects, b[1]), fitting(objects, b[2] or b[3]) if b[2] or b[3] else []
    if "more" in question:
        return "yes" if len(first) > len(second) else "no"
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


def test_questions_have_two_scenes_with_different_true_answers(many):
    forms = {
        word: Counter()
        for word in ("how", "what color", "what shape", "big or", "more", "same", "bigger", "a")
    }
    index, asked_in_all = words.index_scenes(many), 0
    for i, scene in enumerate(many):
        questions = vqa.ask(random.Random(f"{i} ask"), scene, 3, many, index)
        asked_in_all += len(questions)
        for question, pair in questions:
            assert pair[0][0] is scene and pair[0][1] != pair[1][1]
            for asked, answer in pair:
                assert answer == true_answer(question, asked["objects"]), (question, asked)
                forms[next(word for word in forms if word in question)][answer] += 1
    assert asked_in_all > 2.9 * len(many)
    for form in ("more", "same", "bigger", "a"):
        assert set(forms[form]) == {"yes", "no"} and forms[form]["yes"] == forms[form]["no"]
    numbers = forms["how"]
    assert 0 < numbers["0"] < 0.2 * numbers.total() and len(numbers) > 4
    assert numbers["1"] < 0.5 * numbers.total()
    kinds = [forms[form].total() for form in ("how", "what color", "what shape", "big or", "a")]
    kinds.append(sum(forms[form].total() for form in ("more", "same", "bigger")))
    assert min(kinds) > 0.4 * max(kinds)


def test_a_question_that_only_one_scene_answers_is_not_asked(many):
    alone = [many[0]]
    for i in range(20):
        assert vqa.ask(random.Random(i), alone[0], 3, alone, words.index_scenes(alone)) == []


def test_annotators_agree_mostly_and_the_answer_list_has_what_they_say(scenes):
    rng, said = random.Random(0), {}
    for answer in vqa.MISTAKEN:
        for _ in range(60):
            answers = Counter(vqa.annotate(rng, answer))
            assert answers.total() == 10 and 6 <= answers[answer] <= 10
            said.setdefault(answer, Counter()).update(answers)
    assert set(said["cyan"]) == {"cyan", "turquoise", "blue", "green"} and set(said["0"]) == {
        "0",
        "1",
    }
    assert (
        {"large"} < set(said["big"])
        and {"disc"} < set(said["circle"])
        and {"little", "tiny"} < set(said["small"])
    )
    *files, known = vqa.annotations(scenes, 0)
    assert len(known) == len(set(known)) and set(vqa.MISTAKEN) <= set(known)
    assert {answer for entry in files[0] for answer in entry["answer"]} <= set(known)
    ids = [entry["question_id"] for entries in files for entry in entries]
    assert len(ids) == len(set(ids))
    kinds = {"yes": "yes/no", "no": "yes/no"} | dict.fromkeys("012345", "number")
    for entry in (entry for entries in files for entry in entries):
        ((answer, _),) = Counter(entry["answer"]).most_common(1)
        assert entry["answer_type"] == kinds.get(answer, "other")


def true_label(entry, scene):
    """The label of a hypothesis on the picture it names."""
    hypothesis = re.fullmatch(
        r"(?:.+, and )?the (.+?)(?: in this scene)? is (an?|no) (.+)", entry["sentence"]
    )
    subject, negative, predicate = hypothesis[1], hypothesis[2] == "no", hypothesis[3]
    vertical, horizontal = scene["covered"].split()
    half = scene["image_size"] / 2
    visible = [
        o
        for o in scene["objects"]
        if ((o["box"][0] + o["box"][2] / 2 < half) != (horizontal == "left"))
        or ((o["box"][1] + o["box"][3] / 2 < half) != (vertical == "top"))
    ]
    assert len(fitting(scene["objects"], subject)) == 1
    named = fitting(visible, subject)
    if not named:
        return "neutral"
    return "contradiction" if bool(fitting(named, predicate)) == negative else "entailment"


def test_each_hypothesis_has_three_pictures_and_labels(scenes):
    for split, entries in zip(SPLITS, ve.annotations(scenes, 0), strict=True):
        assert len(entries) > len(scenes[split]) / 2
        used = Counter()
        for triple in zip(*[iter(entries)] * 3, strict=True):
            assert len({entry["sentence"] for entry in triple}) == 1
            assert {entry["label"] for entry in triple} == set(ve.LABELS[True])
            for entry in triple:
                scene = scenes[split][int(entry["image"][-6:])]
                assert entry["label"] == true_label(entry, scene), (entry, scene)
                used[entry["label"], entry["image"]] += 1
        assert max(used.values()) <= 8
        assert {" no " in entry["sentence"] for entry in entries} == {True, False}


def test_a_curtain_hides_an_object_and_leaves_one(scenes):
    for scene in scenes["train"]:
        visible = ve.visible_objects(scene, scene["covered"])
        assert not scene["covered"] or 0 < len(visible) < len(scene["objects"])
    assert sum(bool(scene["covered"]) for scene in scenes["train"]) > 100


def test_curtains_hide_a_quadrant_and_nothing_else(scenes):
    assert not set(CURTAIN) & {*COLORS.values(), *BACKGROUNDS.values()}
    for scene in [s for s in scenes["train"] if s["covered"]][:12]:
        plain, covered = (
            np.asarray(render(scene, cover), dtype=int) for cover in (None, scene["covered"])
        )
        x, y = (32 * half for half in QUADRANTS[scene["covered"]])
        colors = covered[y : y + 32, x : x + 32]
        assert (np.minimum(*CURTAIN) <= colors).all() and (colors <= np.maximum(*CURTAIN)).all()
        covered[y : y + 32, x : x + 32] = plain[y : y + 32, x : x + 32]
        assert (covered == plain).all()


def is_true(sentence, left, right):
    """Whether a statement holds for the objects of two images."""
    two = re.fullmatch(
        r"(?:one image has|there is) (.+?)(?: in one image)? and (?:the other one has )?(.+?)"
        r"(?: in the other one)?",
        sentence,
    )
    if two:
        return any(
            fitting(x, two[1]) and fitting(y, two[2]) for x, y in ((left, right), (right, left))
        )
    counts = [len(fitting(objects, sentence + " object")) for objects in (left, right)]
    number = re.search(
        r"(?:has|have|are|is|exactly|least) (one|two|three|four|five) (?!of)", sentence
    )
    number = number and words.NUMBERS.index(number[1])
    if "total" in sentence:
        return sum(counts) == number
    if "more" in sentence:
        return (
            counts[0] > counts[1]
            if sentence.index("left") < sentence.index("right")
            else counts[1] > counts[0]
        )
    if "at least" in sentence:
        return min(counts) >= number
    if "either" in sentence:  # or neither
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


def test_statements_are_true_as_labeled_and_tell_nothing_alone(scenes):
    sentences = []
    for split, entries in zip(SPLITS, nlvr.annotations(scenes, 0), strict=True):
        objects, labels = {scene["image"]: scene["objects"] for scene in scenes[split]}, {}
        for entry in entries:
            left, right = entry["images"]
            assert (
                left != right
                and str(is_true(entry["sentence"], objects[left], objects[right])) == entry["label"]
            ), entry
            labels.setdefault(entry["sentence"], Counter())[entry["label"]] += 1
        assert all(counts["True"] == counts["False"] for counts in labels.values())
        sentences += [entry["sentence"] for entry in entries]
    assert (
        0.25
        < np.mean([bool(re.search("total|more|least|exactly (?!one of)", s)) for s in sentences])
        < 0.35
    )
    alike = [scenes["val"][0]] * 2
    assert nlvr.state(random.Random(0), alike, nlvr.index_scenes(alike)) is None


def test_references_fit_one_object_and_name_no_place(scenes):
    train, test, refs, instances, detections = grounding.annotations(scenes, 0)
    images, boxes = (
        {entry["id"]: entry for entry in instances[key]} for key in ("images", "annotations")
    )
    by_path = {scene["image"]: (split, scene) for split in SPLITS for scene in scenes[split]}
    places = {
        word for place in (*POSITIONS, "above below over under next") for word in place.split()
    }
    expressions = {"train": [], "test": []}
    for ref in refs:
        image, box = images[ref["image_id"]], boxes[ref["ann_id"]]
        split, scene = by_path[image["file_name"]]
        assert box["image_id"] == ref["image_id"] and len(scene["objects"]) > 1
        for sentence in ref["sentences"]:
            assert not places & set(sentence["tokens"])
            (target,) = fitting(scene["objects"], sentence["sent"] + " object")
            assert target["box"] == box["bbox"]
            expressions["train" if split == "train" else "test"].append(
                {"image": ref["file_name"], "text": sentence["sent"], "ref_id": ref["ref_id"]}
            )
        curved = "testA" if target["shape"] in ("circle", "heart", "moon") else "testB"
        assert ref["split"] == (curved if split == "test" else split)
    assert (train, test) == (expressions["train"], expressions["test"])
    targets = {ref["ref_id"]: boxes[ref["ann_id"]]["bbox"] for ref in refs}
    chance = chance_grounding({ref["ref_id"]: ref for ref in refs}, targets, detections)
    assert set(chance) == {"val_d", "testA_d", "testB_d"} and all(
        0.14 < share < 0.25 for share in chance.values()
    )
    twin = scenes["train"][0]["objects"][0]
    assert grounding.refer(random.Random(0), [twin, dict(twin)], twin) == []


@pytest.mark.parametrize("image_size", [48, 224])
def test_every_object_is_detected_once(image_size):
    for i in range(60):
        scene = draw_scene(random.Random(i), "test", image_size)
        found = grounding.detect(random.Random(i), scene)
        assert [box[4] for box in found] == sorted((box[4] for box in found), reverse=True)
        for obj in scene["objects"]:
            (hit,) = [box for box in found if box_iou(box[:4], obj["box"]) >= 0.5]
            assert box_iou(hit[:4], obj["box"]) > 0.7
        assert 3 <= len(found) - len(scene["objects"]) <= 4
        assert all(
            min(box) >= 0 and max(box[0] + box[2], box[1] + box[3]) <= image_size + 0.02
            for box in found
        )


# --------------------------------------------------------------------------------------------------
# attributes


def test_a_box_shows_the_attributes_that_it_is_labeled_with(shapes):
    content = load(shapes, "attributes.json")
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = [attribute["name"].split(":") for attribute in content["attributes"]]
    open_labels = [label == -1 for box in content["annotations"] for label in box["att_vec"]]
    assert 0.05 < np.mean(open_labels) < 0.2
    for box in content["annotations"]:
        x, y, w, h = box["bbox"]
        with Image.open(shapes / files[box["image_id"]]) as image:
            pixels = np.asarray(image.crop((x, y, x + w, y + h)), dtype=int)
        said = {
            kind: value.split("/")[0]
            for (kind, value), label in zip(names, box["att_vec"], strict=True)
            if label == 1
        }
        own = {
            kind: sum(
                label == 1
                for (other, _), label in zip(names, box["att_vec"], strict=True)
                if other == kind
            )
            for kind, _ in names
        }
        assert max(own.values()) == 1
        background = BACKGROUNDS.get(said.get("background"), np.median(pixels, axis=(0, 1)))
        drawn = np.abs(pixels - background).max(axis=2) > 60
        assert 0 < drawn.mean() < 0.1
        rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
        if "color" in said and said.get("pattern") == "solid":
            assert min(np.abs(pixels[drawn] - COLORS[said["color"]]).max(axis=1)) < 60
        if "size" in said:
            assert (max(np.ptp(rows), np.ptp(columns)) + 1 > 0.75 * w / 4) == (
                said["size"] == "big"
            )
        if "left" in said.get("position", ""):
            assert columns.mean() < w / 2
        if "bottom" in said.get("position", ""):
            assert rows.mean() > h / 2


# --------------------------------------------------------------------------------------------------
# relevance


def test_an_ad_is_relevant_if_its_picture_or_its_title_has_what_is_asked_for_but_never_both(scenes):
    def spoken(text):
        """The objects named in a text, as facts."""
        return [
            dict(SAID[word] for word in phrase.split() if word in SAID)
            for phrase in re.split(" on | against | with a ", text)[:1]
        ]

    def has(objects, facts):
        return any(facts.items() <= obj.items() for obj in objects)

    entries, reasons = relevance.annotations(scenes, 0)[0], Counter()
    by_image = {scene["image"]: scene["objects"] for scene in scenes["train"]}
    for entry in entries:
        (facts,) = spoken(entry["query"])
        shown, named = has(by_image[entry["image"]], facts), has(spoken(entry["text"]), facts)
        assert facts and (shown, named) == (
            entry["reason"] == "image",
            entry["reason"] == "text",
        ), entry
        assert entry["label"] == int(shown or named)
        reasons[entry["reason"]] += 1
    assert (
        0.17 < reasons["image"] / len(entries) < 0.33
        and 0.17 < reasons["text"] / len(entries) < 0.33
    )


def test_words_alone_tell_no_more_relevant_ads_than_those_that_say_it(scenes):
    """Among ads whose title does not have it, words that occur in relevant ones occur as often in
    irrelevant ones.
    """
    counts = {0: Counter(), 1: Counter()}
    for seed in range(20):
        for entry in relevance.annotations(scenes, seed)[0]:
            if entry["reason"] != "text":
                query, title = entry["query"].split(), entry["text"].split()
                counts[entry["label"]].update(
                    ["ads", *title, *{"same " * (word in title) for word in query}]
                )
    for word, count in counts[0].items():
        if count > 1000:
            ratio = counts[1][word] / counts[1]["ads"] / (count / counts[0]["ads"])
            assert 0.85 < ratio < 1.15, word
