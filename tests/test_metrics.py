"""VQA accuracy, recall, box IoU and grounding accuracy against released numbers and by hand."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal

from evaluation.attributes import average_precisions
from evaluation.metrics import (
    box_iou,
    chance_grounding,
    chance_recall,
    count_vqa_formulas,
    grounding_accuracy,
    recall_at_k,
    vqa_accuracy,
)
from evaluation.relevance import roc_auc

VQA = json.loads((ROOT / "tests/golden/vqa_accuracy.json").read_text())
GROUNDING = json.loads((ROOT / "tests/golden/grounding.json").read_text())
PARTS = ("cams", "refs", "boxes", "images", "detections")


def accuracy(prediction, answers):
    """The accuracy of one prediction."""
    predictions = [{"question_id": 1, "answer": prediction}]
    return vqa_accuracy(predictions, [{"question_id": 1, "answer": answers}])["overall"]


# --------------------------------------------------------------------------------------------------
# scores that are not finite

PAIRS = range(4), [[i] for i in range(4)]
METRICS = {  # a metric of scores [4, 4], and the name of row 2 in its message
    "image to text": (lambda scores: recall_at_k(scores, np.zeros((4, 4)), *PAIRS), "image 2"),
    "text to image": (lambda scores: recall_at_k(np.zeros((4, 4)), scores, *PAIRS), "text 2"),
    "grounding": (
        lambda scores: grounding_accuracy(
            enumerate(scores.reshape(4, 2, 2)), *scene([[0, 0, 4, 4]], ["val"] * 4)[1:]
        ),
        "ref_id 2",
    ),
    "attributes": (lambda scores: average_precisions(scores, np.eye(4, dtype=int)), "box 2"),
    "relevance": (lambda scores: roc_auc([0, 1, 0, 1], scores[:, 1]), "pair 2"),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("metric", METRICS)
def test_scores_that_are_not_finite_are_refused_by_name(metric, value):
    measure, name = METRICS[metric]
    scores = np.ones((4, 4))
    measure(scores)
    scores[2, 1] = value
    assert name in refusal(measure, scores)


def test_a_metric_that_the_data_does_not_define_is_refused():
    scores = np.zeros((2, 0))
    assert "no image has a text" in refusal(recall_at_k, scores, scores.T, [], [[], []])
    assert "no image has a text" in refusal(chance_recall, 2, 0, [[], []])
    assert "all labels are equal" in refusal(roc_auc, [1, 1], [0.1, 0.2])


# --------------------------------------------------------------------------------------------------
# VQA


@pytest.mark.parametrize("form", ["answer", "answers"])
def test_vqa_accuracy_is_the_official_one(form):
    cases = VQA["cases"]
    predictions = [
        {"question_id": case["question_id"], "answer": case["prediction"]}
        for case in reversed(cases)
    ]
    annotations = [
        {
            "question_id": case["question_id"],
            "answer_type": case["answer_type"],
            form: case["answers"]
            if form == "answer"
            else [{"answer": answer} for answer in case["answers"]],
        }
        for case in cases
    ]
    result = vqa_accuracy(predictions, annotations)
    assert result["per_question"] == {case["question_id"]: case["accuracy"] for case in cases}
    assert result["overall"] == VQA["overall"]
    assert result["per_answer_type"] == VQA["per_answer_type"]


def test_vqa_annotations_may_lack_a_type():
    predictions = [{"question_id": i, "answer": "yes"} for i in range(3)]
    answers = [["yes"] * 10, ["no"] * 10, ["no"] * 10]
    annotations = [{"question_id": i, "answer": given} for i, given in enumerate(answers)]
    assert vqa_accuracy(predictions, annotations) == {
        "overall": 33.33,
        "per_answer_type": {},
        "per_question": {0: 100, 1: 0, 2: 0},
    }
    annotations[1]["answer_type"] = "yes/no"
    assert vqa_accuracy(predictions, annotations)["per_answer_type"] == {"yes/no": 0}


# a prediction and the one answer of all ten annotators, which are equal once they are normalized
EQUAL = [
    ("\tA  dog\n", "dog"),
    ("dont", "don't"),
    ("couldntve", "couldntve"),  # two apostrophes lack: not in the official list
    ("couldnt've", "couldn't've"),
    ("couldn'tve", "couldn't've"),
    ("somebodyll", "somebody'll"),
    ("somebody'd", "somebodyd"),
    ("y'alld've", "y'all'd've"),
    ("'ows'at", "'ow's'at"),
    ("ive", "ive"),  # the official list has a capital I, which no answer has by then
    ("its", "its"),
    ("Zero zebras", "0 zebras"),
    ("eleven", "eleven"),
    ("u.s.a.", "usa"),
    ("2.5 feet", "2.5 feet"),
    ("black/white", "black white"),
    ("black /white", "black white"),
    ("1,000,000", "1000000"),
    ("the", ""),
]
# answers lose their punctuation only if they differ
UNEQUAL = [
    ("t-shirt", ["t-shirt"] * 10, 0),
    ("t-shirt", ["t-shirt", "tee"] * 5, 100),
    ("a dog", ["a dog", "the dog"] * 5, 0),
]
# another number of answers than ten
OTHER_NUMBERS = [
    ("yes", ["yes"], 100),
    ("yes", ["no"], 0),
    ("yes", ["yes"] * 3, 100),
    ("yes", ["yes"] * 11, 100),
    ("yes", ["yes", "no"], 50),
    ("yes", ["yes", "no", "no", "no", "no"], 33.33),
    ("yes", ["yes", "yes", "no", "no"], 66.67),
    ("Yes", ["yes"], 100),
    ("yes", ["Yes."], 100),
    ("t-shirt", ["T-shirt"], 100),
    ("a dog", ["the dog", "dog", "Dog!"], 100),
]
# so many of ten agree: the average over leaving one out
AGREEING = [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)]


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        *(("cat", ["cat"] * n + ["dog"] * (10 - n), expected) for n, expected in AGREEING),
        *((prediction, [answer] * 10, 100) for prediction, answer in EQUAL),
        *UNEQUAL,
        *OTHER_NUMBERS,
    ],
)
def test_vqa_accuracy_of_a_prediction(prediction, answers, expected):
    given = list(answers)
    assert accuracy(prediction, given) == expected
    assert given == answers


@pytest.mark.parametrize(
    "answers, formula, capped",
    [
        (["yes"] * 10, "official", 0),
        (["Yes"] * 10, "official", 1),
        (["t-shirt"] * 10, "official", 1),
        (["t-shirt"] * 9 + ["tee"], "official", 0),
        (["dont"] * 9 + ["no"], "official", 1),
        (["cat"] * 4 + list("bcdefg"), "official", 0),
        (["cat"] * 3 + list("bcdefgh"), "official", 1),
        (["Yes"], "own", 0),
        (["the"], "own", 0),
        (["yes", "no"], "own", 1),
        (["a b"] * 3 + ["c"] * 2, "own", 0),
    ],
)
def test_formulas_and_questions_that_cannot_have_all_are_counted(answers, formula, capped):
    answers = [{"answer": answer} for answer in answers]
    counts = count_vqa_formulas([{"question_id": 1, "answers": answers}])
    assert counts == {formula: 1, "capped": capped}


def test_what_had_all_by_the_official_script_is_not_counted_as_capped():
    annotations = [
        {"question_id": 1, "answer": case["answers"]}
        for case in VQA["cases"]
        if case["accuracy"] == 100
    ]
    assert annotations and count_vqa_formulas(annotations) == {
        "official": len(annotations),
        "capped": 0,
    }


@pytest.mark.parametrize(
    "predicted, annotated, words",
    [
        ([7], [7, 8], "question 8 has no prediction"),
        ([7, 8, 9], [7, 8], "question 9 has no annotation"),
        ([7, 8, 8], [7, 8], "question 8 has more than one prediction"),
        ([7, 8], [7, 8, 7], "question 7 has more than one annotation"),
        ([], [], "no predictions and no annotations"),
    ],
)
def test_vqa_predictions_and_annotations_must_pair_up(predicted, annotated, words):
    predictions = [{"question_id": i, "answer": "yes"} for i in predicted]
    annotations = [{"question_id": i, "answer": ["yes"] * 10} for i in annotated]
    assert words in refusal(vqa_accuracy, predictions, annotations)


@pytest.mark.parametrize(
    "annotation",
    [
        {},
        {"answer": "yes"},
        {"answer": []},
        {"answer": [3]},
        {"answers": [{"text": "yes"}]},
        {"answers": None},
    ],
)
def test_vqa_annotation_without_answers_is_refused(annotation):
    given = [{"question_id": 5, "answer": "yes"}], [{"question_id": 5, **annotation}]
    assert refusal(vqa_accuracy, *given).startswith("question 5: its annotation")


# --------------------------------------------------------------------------------------------------
# grounding


@pytest.mark.parametrize("case", GROUNDING["iou"])
def test_box_iou_is_the_released_one(case):
    assert box_iou(case["box1"], case["box2"]) == pytest.approx(case["iou"], abs=1e-6)
    assert box_iou(case["box2"], case["box1"]) == pytest.approx(case["iou"], abs=1e-6)


@pytest.mark.parametrize(
    "a, b, iou",
    [
        ([0, 0, 10, 10], [9, 0, 10, 10], 0),
        ([0, 0, 10, 10], [0, 9, 10, 10], 0),
        ([0, 0, 10, 10], [8, 0, 10, 10], 20 / 180),
        ([3, 4, 10, 5], [3, 4, 10, 5], 1),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),
    ],
)
def test_overlap_of_one_pixel_counts_as_none(a, b, iou):
    assert box_iou(a, b) == iou
    assert type(box_iou(torch.tensor(a), np.array(b))) is float


def test_grounding_accuracy_is_the_released_one():
    assert grounding_accuracy(*(GROUNDING[part] for part in PARTS)) == GROUNDING["accuracy"]


def test_ids_may_be_integers_or_strings_and_maps_tensors():
    cams, *others = ({int(key): value for key, value in GROUNDING[part].items()} for part in PARTS)
    tensors = {key: torch.tensor(cam, dtype=torch.float64) for key, cam in cams.items()}
    for given in (tensors, {str(key): cam.numpy() for key, cam in tensors.items()}):
        assert grounding_accuracy(given, *others) == GROUNDING["accuracy"]


def scene(detections, splits=("val",), box=(0, 0, 4, 4)):
    """Refs 0, 1, ... each in an image 16 x 8 of its own, whose left half alone is hot."""
    refs = {i: {"image_id": 100 + i, "split": split} for i, split in enumerate(splits)}
    images = {100 + i: {"height": 8, "width": 16} for i in refs}
    cam = torch.zeros(4, 4)
    cam[:, :2] = 1
    cams = {i: cam for i in refs}
    return cams, refs, {i: list(box) for i in refs}, images, {100 + i: detections for i in refs}


SMALL, LARGE = [0, 0, 4, 4, 0.1], [0, 0, 14, 8, 0.9]


@pytest.mark.parametrize(
    "detections, alpha, found",
    [
        # alpha weighs the size of a box
        ([SMALL, LARGE], 1, SMALL),
        ([SMALL, LARGE], 0, LARGE),
        # a box that starts outside the image counts its inside
        ([[12, 4, 4, 4], [-1, -1, 5, 5]], 0.5, [-1, -1, 5, 5]),
    ],
)
def test_the_box_with_the_most_heat_is_found(detections, alpha, found):
    assert grounding_accuracy(*scene(detections, box=found[:4]), alpha=alpha) == {"val_d": 1}


def test_box_without_pixels_loses_even_to_a_negative_score():
    cams, *others = scene(
        [[0, 0, 0, 0], [20, 0, 4, 4], [-9, 0, 5, 5], [0.1, 0.1, 0.2, 0.2], [0, 0, 4, 4]]
    )
    cams[0] = -torch.ones(4, 4)
    assert grounding_accuracy(cams, *others) == {"val_d": 1}
    assert grounding_accuracy(*scene([[0, 0, 0, 0]])) == {"val_d": 0}


def test_only_splits_that_occur_are_reported():
    hit, miss = [0, 0, 4, 4], [12, 4, 4, 4]
    arguments = scene([hit], ("testB", "train", "val", "val"))
    arguments[4][103] = [miss]
    arguments[4][101] = []
    assert grounding_accuracy(*arguments) == {"val_d": 0.5, "testB_d": 1}
    assert list(grounding_accuracy(*arguments)) == ["val_d", "testB_d"]
    assert grounding_accuracy({}, *arguments[1:]) == {}
    assert grounding_accuracy(*scene([hit], ("test", "val"))) == {"val_d": 1, "test_d": 1}


def test_every_expression_of_a_ref_counts():
    cams, *others = scene([[0, 0, 4, 4], [12, 4, 4, 4]])
    right, wrong = cams[0], cams[0].flip(0, 1)
    expressions = [(0, right), ("0", wrong), (0, right), (0, right)]
    assert grounding_accuracy(expressions, *others) == {"val_d": 0.75}
    assert grounding_accuracy(iter(expressions), *others) == {"val_d": 0.75}


def test_chance_is_the_share_of_right_boxes():
    hit, miss = [0, 0, 4, 4, 0.5], [12, 4, 4, 4, 0.9]
    _, refs, boxes, _, detections = scene([hit, miss, miss, miss], ("val", "val", "testA", "train"))
    detections[101] = [hit]
    del detections[103]
    assert chance_grounding(refs, boxes, detections) == {"val_d": 0.625, "testA_d": 0.25}
    assert chance_grounding(refs, boxes, detections, ref_ids=[0, 0, 0, 1, "3"]) == {"val_d": 0.4375}
    strings = [
        {str(key): value for key, value in part.items()} for part in (refs, boxes, detections)
    ]
    assert chance_grounding(*strings) == {"val_d": 0.625, "testA_d": 0.25}


def test_image_without_detections_and_unknown_ref_are_refused():
    cams, refs, boxes, images, detections = scene([], ("val", "testA"))
    known = refs, boxes, images
    for call in (
        (grounding_accuracy, cams, *known, detections),
        (grounding_accuracy, cams, *known, {}),
        (chance_grounding, refs, boxes, detections),
    ):
        assert "det_file has no box for image 100 (ref_id 0, split val)" in refusal(*call)
    for call in (
        (grounding_accuracy, {9: cams[0]}, *known, detections),
        (chance_grounding, refs, boxes, detections, [9]),
    ):
        assert "ref_id 9 of test_file is not among the RefCOCO+ refs" in refusal(*call)


def test_recall_at_k_against_a_count_by_hand():
    # 3 images; image 0 has texts 0 and 1, image 1 text 2, image 2 none
    i2t = np.array([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [1.0, 1.0, 1.0]])
    t2i = np.array([[0.9, 0.1, 0.2], [0.1, 0.2, 0.3], [0.5, 0.4, 0.1]])
    result = recall_at_k(i2t, t2i, txt2img=[0, 0, 1], img2txt=[[0, 1], [2], []])
    assert result["txt_r1"] == 50.0 and result["txt_r5"] == 100.0
    assert result["img_r1"] == pytest.approx(100 / 3) and result["img_r5"] == 100.0
    assert result["txt_r_mean"] == pytest.approx((50 + 100 + 100) / 3)
    assert result["r_mean"] == pytest.approx((result["txt_r_mean"] + result["img_r_mean"]) / 2)


def test_ties_do_not_depend_on_order():
    rng, own = np.random.default_rng(0), list(range(20))
    scores, order = rng.integers(0, 3, (20, 20)).astype(float), rng.permutation(20)
    results = [
        recall_at_k(given, given.T, own, [[i] for i in own])
        for given in (scores, scores[order][:, order])
    ]
    assert results[0] == pytest.approx(results[1])


def test_constant_scores_have_the_recall_of_chance():
    img2txt = [[0, 1, 2], [3], [], [4, 5], *([i] for i in range(6, 16))]
    txt2img = [image for image, own in enumerate(img2txt) for _ in own]
    result = recall_at_k(np.zeros((14, 16)), np.zeros((16, 14)), txt2img, img2txt)
    for name, value in chance_recall(14, 16, img2txt).items():
        assert result[name] == pytest.approx(value), name


def test_recall_beyond_the_candidates_of_re_ranking():
    # of 16 images 4 are candidates, none of them the right one: it is one of 12 without a score
    scores = np.full((16, 16), -100.0)
    for query in range(16):
        scores[query, [(query + shift) % 16 for shift in range(1, 5)]] = 1.0
    result = recall_at_k(scores, scores, list(range(16)), [[i] for i in range(16)])
    assert result["img_r1"] == 0 and result["img_r5"] == pytest.approx(100 / 12)
    assert result["img_r10"] == pytest.approx(50)


def test_chance_is_that_of_a_random_ranking():
    chance = chance_recall(4, 12, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    assert chance["txt_r1"] == pytest.approx(25) and chance["img_r1"] == 25
    assert chance["img_r5"] == chance["txt_r10"] == 100  # of 12 texts only 9 are wrong
    # an image without text is not a query
    assert chance_recall(100, 2, [[0], [], [1]])["txt_r1"] == pytest.approx(50)
