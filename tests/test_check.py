"""python -m tools.check: what it finds, counts and says of good and of faulty data."""

import argparse
import contextlib
import itertools
import json
import os

import pytest
from helpers.files import write_tar
from ruamel.yaml import YAML

from configs.config import ANNOTATION_KEYS, as_config
from configs.tasks import find_task
from dataset.pool import in_processes
from engine.run import build_datasets
from tools import check
from utils import InputError, TrainingStopped

GOOD = "images/train/000000.jpg"


@pytest.fixture
def run(tiny_config, tmp_path, run_main):
    """Check the tiny configuration with changed keys for a task.

    Return (exit status, printed text, report).
    """

    def call(*flags, task="pretrain", **keys):
        YAML(typ="safe").dump(
            {**tiny_config, "test_file": None, "batch_size": 1, **keys}, tmp_path / "config.yaml"
        )
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        arguments = [task, tmp_path / "config.yaml", "--workers", 1, "--output", report, *flags]
        status, out, err = run_main("tools.check", *arguments)
        assert not err or status == 2
        return status, out + err, json.loads(report.read_text()) if report.exists() else None

    return call


@pytest.fixture
def write(tmp_path):
    """Writes a list and returns its path."""

    def call(entries, name="list.json"):
        (tmp_path / name).write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return str(tmp_path / name)

    return call


def pairs(count, **changes):
    """Entries, each with its own caption; changes: _3={...} updates entry 3."""
    entries = [{"image": GOOD, "caption": f"a red circle {i}"} for i in range(count)]
    for name, change in changes.items():
        entries[int(name[1:])].update(change)
    return entries


def problems_of(report):
    return [(problem["entry"], problem["problem"]) for problem in report["problems"]]


# task: names of its lists to train, validate and test on
TASKS = {
    "pretrain": ("pretrain", None, "test"),
    "nlvr_pretrain": ("pretrain", None, None),
    "retrieval": ("retrieval_train", "val", "test"),
    "vqa": ("vqa_train", "vqa_test", "vqa_test"),
    "ve": ("ve_train", "ve_test", "ve_test"),
    "nlvr": ("nlvr_train", "nlvr_test", "nlvr_test"),
    "grounding": ("grounding_train", None, "grounding_test"),
    "relevance": ("relevance_train", "relevance_test", "relevance_test"),
}


def keys_of(task, shapes):
    """Return the configuration keys of a task's files."""
    names = zip(("train_file", "val_file", "test_file"), TASKS[task], strict=True)
    return {key: name and str(shapes / f"{name}.json") for key, name in names} | {
        "vqa_root": str(shapes),
        "refcoco_data": str(shapes),
        "det_file": str(shapes / "refcoco+/dets.json"),
        "answer_list": str(shapes / "answer_list.json"),
    }


@pytest.mark.parametrize("task", TASKS)
def test_good_data_of_every_task(run, shapes, task):
    keys = keys_of(task, shapes)
    status, out, report = run(task=task, **keys)
    assert status == 0 and "No problems." in out and report["problems"] == []
    files = [(key, keys[key]) for key in ("train_file", "val_file", "test_file") if keys[key]]
    assert [(of["key"], of["file"]) for of in report["files"]] == files
    for of in report["files"]:
        entries = json.loads(open(of["file"]).read())
        images = {image for entry in entries for image in entry.get("images", [entry.get("image")])}
        assert of["entries"] == len(entries) and of["images"] == of["looked_at"] == len(images)
        assert of["unusable"] == {} and of["wrong"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_what_is_approved_the_script_takes_and_nothing_else(run, shapes, tiny_config, task):
    """Check every list of every task as the training file and as the test file."""
    splits = {"train", *find_task(task).files}
    files = sorted({name for names in TASKS.values() for name in names if name})
    arguments = argparse.Namespace(evaluate=False, split=None, seed=0)
    for split, name in itertools.product(splits & {"train", "test"}, files):
        keys = dict.fromkeys(ANNOTATION_KEYS) | keys_of(task, shapes)
        keys[f"{split}_file"] = str(shapes / f"{name}.json")
        # test_good_data_of_every_task decodes the images
        status, *_ = run("--images", 0, task=task, **keys)
        refused = contextlib.nullcontext() if status == 0 else pytest.raises(InputError)
        with refused:
            build_datasets(find_task(task), arguments, as_config({**tiny_config, **keys}))


def test_what_concerns_a_whole_list_is_found(run, shapes, write):
    entries = [
        entry
        for entry in json.loads((shapes / "relevance_test.json").read_text())
        if entry["label"]
    ]
    status, out, report = run(
        task="relevance", **keys_of("relevance", shapes) | {"test_file": write(entries)}
    )
    assert status == 1 and report["count"] == 1 and "all labels are 1" in out
    train = [{"image": GOOD, "caption": ["red"], "image_id": 1}, {"image": GOOD, "caption": "red"}]
    status, out, report = run(task="retrieval", train_file=write(train))
    assert status == 1 and problems_of(report)[0][0] == 1 and report["files"][0]["wrong"] == 1


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_less_than_one_batch_is_found(run, write, task):
    assert run(task=task, train_file=write(pairs(3)), batch_size=3)[0] == 0
    status, out, _ = run(task=task, train_file=write(pairs(3)), batch_size=4)
    assert status == 1 and "batch_size" in out


def test_what_the_task_does_not_read_is_not_looked_at(run, write):
    keys = {
        "vqa_root": "absent",
        "answer_list": "absent.json",
        "refcoco_data": "absent",
    }
    assert run(train_file=write(pairs(2)), **keys)[0] == 0
    assert run(task="nlvr_pretrain", train_file=write(pairs(2)), test_file="absent.json")[0] == 0


def test_boxes_with_attributes_are_read_and_their_images_looked_at(run, shapes, write):
    content = json.loads((shapes / "attributes.json").read_text())
    status, out, report = run(task="attributes", test_file=str(shapes / "attributes.json"))
    (of,) = report["files"]
    assert status == 0 and (of["entries"], of["images"], of["looked_at"]) == (12, 3, 3)
    content["images"][1]["file_name"] = "absent.jpg"
    assert "absent.jpg: does not exist" in run(task="attributes", test_file=write(content))[1]
    content["annotations"][5]["att_vec"] = []
    status, out, report = run(task="attributes", test_file=write(content))
    assert (
        status == 1
        and report["count"] == 1
        and "annotation 5" in out
        and "0 labels for 27 attributes" in out
    )


def test_wrong_entries_are_all_found(run, write):
    entries = pairs(
        9,
        _1={"caption": None},
        _2={"caption": 5},
        _3={"image": None},
        _4={"caption": "?!"},
        _5={"caption": ["fine", "\u200b"]},
    )
    del entries[6]["caption"]
    entries[7] = "text"
    status, out, report = run(
        train_file=[write(entries), write(pairs(1, _0={"image": "absent.jpg"}), "other.json")]
    )
    assert status == 1 and "entries: 9" in out
    assert sorted(entry for entry, _ in problems_of(report)) == [*range(8)]
    assert report["files"][0]["wrong"] == 7
    assert report["files"][0]["looked_at"] == 1 and report["files"][1]["unusable"] == {"missing": 1}
    assert (
        f"{report['files'][0]['file']}: entry 6 (counting from 0): Object missing required field"
        " 'caption'" in out
    )
    assert "absent.jpg: does not exist" in out and report["count"] == 8


def test_many_problems_are_all_in_the_report(run, write):
    status, out, report = run(
        train_file=write(pairs(50, **{f"_{i}": {"caption": ""} for i in range(45)}))
    )
    assert status == 1 and report["count"] == len(report["problems"]) == 45
    assert (
        "45 problems" in out
        and out.count("is empty after clean-up") == check.SHOWN
        and "and 25 more" in out
    )


@pytest.mark.parametrize(
    "task, change, problem",
    [
        ("vqa", {"dataset": []}, "'dataset'"),
        ("vqa", {"dataset": "vg", "answer": "a"}, "vg_root"),
        ("ve", {"label": "maybe"}, "'label'"),
        ("nlvr", {"images": [GOOD]}, "'images'"),
        ("grounding", {"text": 1}, "'text'"),
    ],
)
def test_wrong_entries_of_the_tasks(run, shapes, write, task, change, problem):
    entries = json.loads((shapes / f"{task}_train.json").read_text())[:5]
    entries[2] |= change
    status, _, report = run(task=task, train_file=write(entries), vqa_root=str(shapes))
    [(entry, found)] = problems_of(report)
    assert status == 1 and entry in (2, None) and problem in found


def test_questions_to_test_on(run, shapes, write):
    entries = json.loads((shapes / "vqa_test.json").read_text())[:6]
    entries[0]["answer"], entries[1]["answer"] = ["Yes"] * 10, ["Yes"]
    entries[3]["question_id"] = entries[1]["question_id"]
    entries[5]["image"] = "absent.jpg"
    del entries[4]["answer"]
    status, out, report = run(
        task="vqa", train_file=None, val_file=write(entries), vqa_root=str(shapes)
    )
    problems = dict(problems_of(report))
    assert status == 1 and problems.keys() == {5, None}
    assert (
        report["files"][0]["vqa_formulas"] == {"official": 4, "own": 1, "capped": 1}
        and "vqa_formulas: official 4" in out
    )
    assert (
        "entry 3" in problems[None]
        and "question_id" in problems[None]
        and "absent.jpg" in problems[5]
    )
    entries[3]["question_id"], entries[5]["image"] = -1, entries[0]["image"]
    for entry in entries:
        entry.pop("answer", None)
    assert (
        "leave val_file out"
        in run(task="vqa", train_file=None, val_file=write(entries), vqa_root=str(shapes))[1]
    )


def test_expressions_to_test_on(run, shapes, write):
    first, second, *entries = json.loads((shapes / "grounding_test.json").read_text())
    keys = {"task": "grounding", "train_file": None}
    refer = {"refcoco_data": str(shapes), "det_file": str(shapes / "refcoco+/dets.json")}
    for change, words in (
        ({"ref_id": None}, "'ref_id'"),
        ({"ref_id": 10**6}, "entry 1"),
        ({"image": GOOD}, "but the image of ref_id"),
    ):
        test_file = write([first, {**second, **change}, *entries])
        ((_, problem),) = problems_of(run(**keys, test_file=test_file, **refer)[2])
        assert words in problem
    ((_, problem),) = problems_of(run(**keys, test_file=write([first, second, *entries]))[2])
    assert "lacks the key refcoco_data" in problem


def test_files_that_cannot_be_read_do_not_end_the_check(run, write, tmp_path):
    broken = write(json.dumps(pairs(3))[:-20], "broken.json")
    files = [
        broken,
        str(tmp_path / "absent.json"),
        write("{}", "object.json"),
        write([{"a": 1}], "keys.json"),
        write(pairs(2)),
    ]
    (tmp_path / "latin.json").write_bytes('[{"image": "a", "caption": "é"}]'.encode("latin-1"))
    status, out, report = run(train_file=[*files, str(tmp_path / "latin.json")])
    assert status == 1 and report["count"] == 5 and report["files"][-1]["wrong"] == 0
    for words in (
        "broken.json: invalid JSON at line 1",
        "absent.json: cannot read",
        "object.json: holds a JSON object",
        "keys.json: entry 0",
        "latin.json: this annotation file is not UTF-8",
    ):
        assert words in out


def test_images_are_counted_by_fault(run, write, tmp_path, shapes):
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    names = [GOOD, "page.jpg", "empty.jpg", "a\0.jpg", GOOD]
    folders = [shapes, *[tmp_path] * 3, shapes]
    entries = [
        {"image": str(folder / name), "caption": "red"}
        for folder, name in zip(folders, names, strict=True)
    ]
    status, out, report = run(train_file=write(entries))
    of = report["files"][0]
    assert status == 1 and of["images"] == of["looked_at"] == 4
    assert of["unusable"] == {"not an image": 1, "empty file": 1, "unreadable": 1}
    assert [entry for entry, _ in problems_of(report)] == [1, 2, 3]
    assert "a\\x00.jpg: unreadable" in out


@pytest.mark.parametrize("count, looked_at", [(3, [0, 5, 10]), (1, [0]), (11, [*range(11)])])
def test_evenly_spaced_images_are_looked_at(run, write, count, looked_at):
    # of every image that an entry names once more, and of those that only wrong entries name,
    # nothing is seen
    entries = [{"image": f"absent{i}.jpg", "caption": "red"} for i in range(11)]
    wrong = [{"image": "other.jpg", "caption": None}, {"image": "absent0.jpg", "caption": "red"}]
    status, _, report = run(
        "--images", count, train_file=write([*entries[:4], *wrong, *entries[4:]])
    )
    missing = [
        problem.split(":")[0] for _, problem in problems_of(report) if "does not exist" in problem
    ]
    assert [os.path.basename(name) for name in missing] == [f"absent{i}.jpg" for i in looked_at]
    assert report["files"][0]["images"] == 11


def test_retrieval_entries_that_are_joined_are_counted(run, write, shapes):
    captions = [
        {"image": image, "caption": ["red"]}
        for image in (GOOD, f"./{GOOD}", str(shapes / GOOD), "images/train/000001.jpg")
    ]
    status, out, report = run(test_file=write(captions, "test.json"))
    of = report["files"][-1]
    assert status == 0 and (of["entries"], of["images"]) == (4, 2)


def test_a_missing_image_folder_is_one_problem(run, write):
    status, out, report = run(train_file=write(pairs(2)), image_root="absent")
    assert status == 1 and report["count"] == 1
    assert "image_root: folder absent does not exist" in out
    assert report["files"][0]["looked_at"] == 0


@pytest.mark.parametrize(
    "task, keys, problem",
    [
        ("vqa", {"answer_list": ["a", "a"]}, "answers.json has 'a' 2 times"),
        ("grounding", {"refcoco_data": "absent"}, "instances.json into"),
        ("grounding", {"det_file": "absent"}, "det_file"),
    ],
)
def test_other_files_of_a_task_are_read(run, shapes, write, task, keys, problem):
    if "answer_list" in keys:
        keys = {"answer_list": write(keys["answer_list"], "answers.json")}
    status, _, report = run(task=task, **{**keys_of(task, shapes), "val_file": None, **keys})
    assert status == 1 and problem in str(report["problems"])


@pytest.mark.parametrize(
    "keys, problem",
    [
        ({"tokenizer": "absent.txt"}, "absent.txt"),
        ({"tokenizer": None}, "tokenizer"),
        ({"bert_config": None}, "bert_config"),
        ({"max_tokens": 1000}, "max_position_embeddings"),
    ],
)
def test_the_vocabulary_is_loaded(run, write, monkeypatch, keys, problem):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, report = run(train_file=write(pairs(2)), **keys)
    assert status == 1 and report["count"] == 1 and problem in report["problems"][0]["problem"]


SAMPLES = {  # of a shard: its captions and whether its image is good
    "a": (("txt", b"a red circle"), True),
    "b": (("json", b'{"caption": ["a \\u044f", "red"]}'), True),
    "c": (("json", b'{"caption": 5}'), True),
    "d": (("txt", b"red"), False),
    "e": (("txt", b"red"), None),
    "f": (("txt", b"?!"), True),
}


def test_shards(run, tmp_path, shapes):
    image = (shapes / GOOD).read_bytes()
    members = []
    for key, ((suffix, caption), good) in SAMPLES.items():
        if good is not None:
            members.append((f"{key}.jpg", image if good else b"<html>"))
        members.append((f"{key}.{suffix}", caption))
    write_tar(tmp_path / "0.tar", members)
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:3000])
    assert "of pre-training" in run(task="retrieval", train_file=str(tmp_path / "0.tar"))[1]
    status, out, report = run(train_file=[str(tmp_path / "{1..2}.tar"), str(tmp_path / "0.tar")])
    assert status == 1 and "2.tar does not exist (1 of the 2" in out
    assert report["files"][0]["looked_at"] == 6
    status, out, report = run(train_file=str(tmp_path / "*.tar"))
    of = report["files"][0]
    assert status == 1 and (of["shards"], of["entries"], of["wrong"]) == (1, 6, 1)
    assert of["looked_at"] == 6 and of["unusable"] == {"not an image": 1, "wrong sample": 2}
    assert [entry for entry, _ in problems_of(report)] == [None, "c", "d", "e", "f"]
    assert "1.tar: not a complete tar file" in out and "0.tar: sample e: no image" in out
    (tmp_path / "1.tar").unlink()
    of = run("--images", 2, train_file=str(tmp_path / "*.tar"))[2]["files"][0]
    assert (of["entries"], of["looked_at"]) == (6, 2)


def test_wrong_command_lines_and_configurations(run, write, run_main):
    assert run(train_file=None)[0] == 2
    assert run(task="nlvr_pretrain", train_file=None, test_file=write(pairs(2)))[0] == 2
    status, out, _ = run(task="small.yaml", train_file=write(pairs(2)))
    assert status == 2 and "retrieval" in out
    assert run("--set", "quue_size=3", train_file=write(pairs(2)))[0] == 2
    assert run("--workers", 0)[0] == 2
    assert run("--output", "absent/report.json", train_file=write(pairs(2)))[0] == 2
    status, _, err = run_main("tools.check", "vqa", "absent.yaml")
    assert status == 2 and "absent.yaml" in err


def leave(_):
    os._exit(1)


def test_a_process_that_dies_is_named_with_its_images():
    with in_processes(1) as jobs, pytest.raises(TrainingStopped, match="a.jpg.*--workers"):
        list(jobs(leave, [("a.jpg", 0), ("b.jpg", 1)]))


def test_results_come_in_order_and_few_items_are_taken_ahead():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    with in_processes(2) as jobs:
        for i, result in enumerate(jobs(abs, items())):
            assert result == i and len(taken) <= i + 9


def test_a_key_of_set_that_the_task_does_not_read_is_refused(run, shapes):
    status, out, report = run("--set", "eos=[SEP]x", task="ve", **keys_of("ve", shapes))
    assert status == 2 and "eos" in out and report is None
