"""python -m tools.to_json: conversion of tables, folders and official files into lists."""

import importlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, exit_status, log, refusal

from dataset.build import build_dataset
from dataset.entries import read_json_list
from dataset.official import recognize
from tools import to_json

IMAGES = ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg")


@pytest.fixture
def convert(tmp_path, run_main):
    """Convert a table, given as bytes or text, into a new folder.

    Returns (exit status, printed text, train.json, test.json, skipped.txt).
    """
    for name in IMAGES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()

    def call(table, *flags, name="captions.csv"):
        path, out = tmp_path / name, tmp_path / "out"
        path.write_bytes(table if isinstance(table, bytes) else table.encode())
        shutil.rmtree(out, ignore_errors=True)
        arguments = [path, "--image_root", tmp_path / "photos", "--output", out, *flags]
        status, *said = run_main("tools.to_json", *arguments)
        files = [
            (out / file).read_text(encoding="utf-8") if (out / file).exists() else None
            for file in ("train.json", "test.json", "skipped.txt")
        ]
        printed = "".join(said).replace(f"{tmp_path}/", "")
        train, test = (file and json.loads(file) for file in files[:2])
        return status, printed, train, test, files[2] and files[2].replace(f"{tmp_path}/", "")

    return call


ROWS = [
    {"image": "a.jpg", "caption": ['A "big" dog, running', "zwei Hunde"]},
    {"image": "b.jpg", "caption": ["été 10:30"]},
]
BIG = '"A ""big"" dog, running"'
JSON_BIG = json.dumps(ROWS[0]["caption"][0])
TABLES = {
    "CSV": f"\npath,text\na.jpg,{BIG}\nb.jpg,été 10:30\na.jpg,zwei Hunde\n",
    "of Excel": f"\ufeffFile Name;Id;Caption\r\na.jpg;1;{BIG}\r\nb.jpg;2;été 10:30\r\n"
    "a.jpg;3;zwei Hunde\r\n;;\r\n",
    "UTF-16 TSV": (
        f"image\ttitle\tcaption\r\na.jpg\t\t{BIG}\r\nb.jpg\t-\tété 10:30\r\na.jpg\t\tzwei Hunde"
    ).encode("utf-16"),
    "bars": f"image_name| number| comment\na.jpg| 0| {BIG}\na.jpg| 1| zwei Hunde\n"
    "b.jpg| 0| été 10:30\n",
    "JSON lines": f'{{"file": "a.jpg", "text": [{JSON_BIG}, "zwei\\nHunde"]}}\r\n\n'
    '{"file": "b.jpg", "text": "été 10:30"}\n',
    "JSON list": f'[{{"img": "./a.jpg", "caption": [{JSON_BIG}, "zwei Hunde"]}},\n'
    '{"img": "b.jpg", "caption": "été 10:30"}]',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_give_the_same_list(convert, name):
    status, printed, train, test, skipped = convert(TABLES[name])
    assert (
        status == 0
        and train == ROWS
        and test is skipped is None
        and "ordinary characters" not in printed
    )


def test_columns_may_be_named(convert):
    table = "id,alt,where,what\n1,x,a.jpg,a dog\n"
    status, printed, train, *_ = convert(table, "--path", "where", "--text", "what")
    assert status == 0 and train == [{"image": "a.jpg", "caption": ["a dog"]}]
    assert "images from column 'where', captions from column 'what'" in printed
    status, printed, *_ = convert(table)
    assert (
        status == 2
        and "none of the columns 'id', 'alt', 'where', 'what' is called path or" in printed
        and "--path" in printed
    )
    status, printed, *_ = convert(table, "--path", "absent")
    assert status == 2 and "is called absent" in printed


def test_held_out_images_are_drawn_once_and_have_lists_of_captions(convert):
    table = "path,text\n" + "".join(
        f"{name},{word}\n" for word in ("one", "two") for name in IMAGES
    )
    _, printed, train, test, _ = convert(table, "--test", 2)
    assert (
        "train.json: 2 images, 4 captions" in printed
        and "test.json: 2 images, 4 captions" in printed
    )
    assert sorted(entry["image"] for entry in train + test) == list(IMAGES)
    assert all(entry["caption"] == ["one", "two"] for entry in train + test)
    assert convert(table, "--test", 2)[2:4] == (train, test)
    assert any(convert(table, "--test", 2, "--seed", seed)[3] != test for seed in range(1, 6))
    status, printed, *_ = convert(table, "--test", 4)
    assert status == 2 and "--test 4: the sources have only 4 images" in printed


def test_val_and_test_have_images_of_their_own(convert, tmp_path):
    def val():
        return json.loads((tmp_path / "out/val.json").read_text())

    # two spellings of a path are one image
    rows = [(name, word) for word in ("one", "two") for name in IMAGES]
    rows += [(tmp_path / "photos" / name, "three") for name in IMAGES]
    table = "path,text\n" + "".join(f"{name},{word}\n" for name, word in rows)
    alone = convert(table, "--test", 1)[3]
    for seed in range(6):
        flags = ("--test", 1, "--val", 1, "--seed", seed)
        status, printed, train, test, _ = convert(table, *flags)
        entries = train + test + val()
        assert status == 0 and sorted(entry["image"] for entry in entries) == sorted(IMAGES)
        assert all(entry["caption"] == ["one", "two", "three"] for entry in entries)
        assert "val.json: 1 images, 3 captions" in printed
        held_out = val()
        assert convert(table, *flags)[2:4] == (train, test) and val() == held_out
        assert seed or test == alone  # --val draws from the images that --test leaves
    assert convert(table, "--val", 3)[3] is None and len(val()) == 3
    status, printed, *_ = convert(table, "--test", 2, "--val", 2)
    assert status == 2 and "--test 2 --val 2" in printed and not (tmp_path / "out").exists()


@pytest.fixture
def broken(shapes, tmp_path):
    """Make files in the folder photos: a good image, and three that cannot be used."""
    good = (shapes / "images/train/000000.jpg").read_bytes()
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    contents = {"a.jpg": good, "b.jpg": good[:-200], "c.jpg": b"<html>", "sub/d.jpg": b""}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {"b.jpg": "broken image", "c.jpg": "not an image", "sub/d.jpg": "empty file"}


@pytest.mark.parametrize("workers", [1, 3])
def test_check_leaves_rows_of_broken_images_out(convert, broken, workers):
    table = "path,text\nb.jpg,one\na.jpg,two\nc.jpg,three\nsub/d.jpg,four\nb.jpg,five\n"
    assert len(convert(table)[2]) == 4
    status, printed, train, _, skipped = convert(table, "--check", "--workers", workers)
    assert status == 0 and train == [{"image": "a.jpg", "caption": ["two"]}]
    assert len(skipped.splitlines()) == 3 and "left out: 3 items" in printed
    for line, (name, problem) in zip(skipped.splitlines(), broken.items(), strict=True):
        assert line.startswith(f"image photos/{name}: {problem}")
    # held-out images are usable
    assert convert(table, "--check", "--test", 1)[0] == 2
    table = "path,text\n" + "".join(f"{name},x\n" for name in broken)
    status, printed, *files = convert(table, "--check")
    assert status == 2 and files == [None, None, None] and "photos/b.jpg: broken" in printed


def test_rows_that_cannot_be_used_are_named_by_line(convert):
    table = (
        'path,text\na.jpg,"two\nlines"\nabsent.jpg,x\nb.jpg,a, b\n,x\nb.jpg, \nb.jpg,?!\n'
        "photos\\b.jpg,x\n\nsub\\d.jpg,d\nsub,folder\nc.jpg\na\0.jpg,x\n"
    )
    status, printed, train, _, skipped = convert(table)
    assert status == 0 and train == [
        {"image": "a.jpg", "caption": ["two lines"]},
        {"image": "sub/d.jpg", "caption": ["d"]},
    ]
    lines = [line.split(": ", 1) for line in skipped.splitlines()]
    assert [place for place, _ in lines] == [
        f"captions.csv line {n}" for n in (4, 5, 6, 7, 8, 9, 12, 13, 14)
    ]
    assert (
        lines[0][1].startswith("image photos/absent.jpg does not exist")
        and "3 columns, but line 1 has 2" in lines[1][1]
    )
    assert (
        "'path' is empty" in lines[2][1]
        and "'text' is empty" in lines[3][1]
        and "'text' is empty" in lines[4][1]
    )
    assert (
        "left out: 9 items (out/skipped.txt lists all)" in printed
        and printed.count("captions.csv line") == to_json.SHOWN
    )
    table = (
        '{"path": "a.jpg", "text": "a"}\n{"path": 5}\n{"path"\n[]\n{"path": "b.jpg", "text": []}\n'
        + '{"path":'
        + "[" * 10**5
    )
    _, printed, train, _, skipped = convert(table)
    assert len(train) == 1 and [line.split(":")[0][-1] for line in skipped.splitlines()] == [
        "2",
        "3",
        "4",
        "5",
        "6",
    ]


@pytest.mark.parametrize(
    "table, words",
    {
        "path,text\nx.jpg,a\ny.jpg,b\n": (
            "line 2",
            "photos/x.jpg does not exist",
            "first of 2 problems",
        ),
        "a.jpg,a dog\nb.jpg,a cat\n": (
            "'a.jpg', 'a dog'",
            "line 1 holds the names of the columns",
        ),
        "path,text\n": ("no rows",),
        "": ("no rows",),
        "path,text\na.jpg,fine\nb.jpg,été\n".encode("cp1252"): (
            "line 3",
            "not utf-8",
            "--encoding cp1252",
        ),
    }.items(),
)
def test_tables_of_which_nothing_can_be_used_are_refused(convert, table, words):
    status, printed, train, *_ = convert(table)
    assert (
        status == 2
        and train is None
        and printed.startswith("error: captions.csv")
        and printed.count("\n") == 1
    )
    assert all(word in printed for word in words)


def test_other_encodings(convert, tmp_path):
    table = "path,text\nb.jpg,été\n".encode("cp1252")
    assert convert(table, "--encoding", "cp1252")[2] == [{"image": "b.jpg", "caption": ["été"]}]
    assert "--encoding: unknown encoding: klingon" in convert(table, "--encoding", "klingon")[1]


STRAY = {
    # table: captions of the images, numbers of the lines that are left out
    "TSV": (
        'path\tcaption\na.jpg\t"star of tomorrow\nb.jpg\ta tv of 32"\nc.jpg\tplain\n',
        {"a.jpg": '"star of tomorrow', "b.jpg": 'a tv of 32"', "c.jpg": "plain"},
        [],
    ),
    "to the end": (
        'path,text\na.jpg,fine\nb.jpg,"a dog\nc.jpg,a cat\n',
        {"a.jpg": "fine", "b.jpg": '"a dog', "c.jpg": "a cat"},
        [],
    ),
    "a missing image between": (
        'path,text\na.jpg,"a dog\nx.jpg,a cat"\nb.jpg,b\n',
        {"a.jpg": '"a dog', "b.jpg": "b"},
        [3],
    ),
    "delimiters": (
        'path,text\na.jpg,"one, two\nb.jpg,three"\nc.jpg,c\n',
        {"b.jpg": 'three"', "c.jpg": "c"},
        [2],
    ),
    "in between": (
        'path,text\na.jpg,"big" dog\nb.jpg,"a ""big"", fat dog"\nc.jpg,32" tv\n',
        {"a.jpg": '"big" dog', "b.jpg": 'a "big", fat dog', "c.jpg": '32" tv'},
        [],
    ),
    "of inches": (
        'id\tpath\ttext\n1\ta.jpg\t"24\n2\tb.jpg\t"32\n3\tc.jpg\t40"\n',
        {"a.jpg": '"24', "b.jpg": '"32', "c.jpg": '40"'},
        [],
    ),
    "several lines": (
        'path,text\na.jpg,"one, two\nthree, four\n\nfive"\nb.jpg,b\n',
        {"a.jpg": "one, two three, four five", "b.jpg": "b"},
        [],
    ),
}


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_quote_costs_no_other_row(convert, name):
    table, captions, left_out = STRAY[name]
    status, printed, train, _, skipped = convert(table)
    assert status == 0 and {entry["image"]: entry["caption"][0] for entry in train} == captions
    assert [
        int(re.search(r" line (\d+)", line)[1]) for line in (skipped or "").splitlines()
    ] == left_out
    assert ("ordinary characters" in printed) == (name not in ("delimiters", "several lines"))


@pytest.fixture
def run(call):
    """Runs the tool; returns its exit status."""
    return lambda *arguments: exit_status(lambda: call("tools.to_json", *arguments))


def test_an_earlier_conversion_stays_unless_told_otherwise(convert, tmp_path, run, capsys):
    convert("path,text\na.jpg,a\nb.jpg,b\nx.jpg,x\n", "--test", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in before} == {"train.json", "test.json", "skipped.txt"}
    (tmp_path / "captions.csv").write_text("path,text\na.jpg,new\n")
    command = [
        tmp_path / "captions.csv",
        "--image_root",
        tmp_path / "photos",
        "--output",
        tmp_path / "out",
    ]
    assert run(*command) == 2 and str(tmp_path / "out/train.json") in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(*command, "--overwrite") == 0
    printed = capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert json.loads(after.pop("train.json")) == [{"image": "a.jpg", "caption": ["new"]}]
    assert after == {path.name: data for path, data in before.items() if path.name != "train.json"}
    assert all(
        str(tmp_path / "out" / name) in printed
        for name in ("train.json", "test.json", "skipped.txt")
    )


def test_a_folder_of_images_with_text_files(convert, tmp_path, monkeypatch, run):
    files = {
        "a.txt": "a dog\n",
        "b.json": '{"caption": ["b", "c"], "url": "x"}',
        "c.json": '{"caption": null}',
        "e.txt": "?",
        "f.heic": "",
        "f.txt": "a fox",
        "g.txt": "a goat",
        "clip.mov": "",
        "sub/d.txt": "a cat",
        "sub/d.json": "broken",
        "0_stats.json": "{}",
        "readme.md": "",
        ".e.jpg": "",
    }
    for name, text in files.items():
        (tmp_path / "photos" / name).write_text(text)
    shutil.copy(tmp_path / "photos" / "a.jpg", tmp_path / "photos" / "g.jfif")
    os.mkfifo(tmp_path / "photos" / "sub/e.txt")  # open() would wait for a writer
    (tmp_path / "photos" / "sub/e.jpg").touch()
    monkeypatch.chdir(tmp_path)
    for root, prefix in ("photos", ""), ("", "photos/"):
        assert run("photos", "--image_root", root, "--output", f"out{root}") == 0
        entries = {
            entry["image"]: entry["caption"]
            for entry in json.loads(Path(f"out{root}/train.json").read_text())
        }
        assert entries == {
            f"{prefix}a.jpg": ["a dog"],
            f"{prefix}b.jpg": ["b", "c"],
            f"{prefix}g.jfif": ["a goat"],
            f"{prefix}sub/d.jpg": ["a cat"],
        }
        skipped = Path(f"out{root}/skipped.txt").read_text().splitlines()
        assert [line.split(":")[0] for line in skipped] == [
            "photos/c.jpg",
            "photos/e.txt",
            "photos/f.txt",
            "photos/sub/e.jpg",
        ]
    for source in "configs", "photos/sub/e.txt", "/dev/zero":
        assert run(source, "--output", "none") == 2
    for flag in "--path", "--text", "--encoding":
        assert run("photos", flag, "utf-8", "--output", "none") == 2


def test_own_captions_train_retrieval_and_pre_training(shapes, tiny_config, tmp_path, run):
    root = shapes / "images/train"
    images = sorted(path.name for path in root.iterdir())[:8]
    rows = [f"{name},{text} circle\n" for name in images for text in ("a red", "the blue")]
    (tmp_path / "my.csv").write_text("".join(["path,text\n", *rows]))
    assert run(tmp_path / "my.csv", "--image_root", root, "--output", tmp_path, "--test", 2) == 0
    files = {f"{split}_file": [str(tmp_path / f"{split}.json")] for split in ("train", "test")}
    config = {**tiny_config, **files, "image_root": str(root)}
    assert len(build_dataset("pretrain", "train", config)) == 6
    dataset = build_dataset("retrieval", "train", config)
    samples = [dataset[i] for i in range(6)]
    assert len({sample.image_id for sample in samples}) == 6
    assert {sample.caption for sample in samples} <= {"a red circle", "the blue circle"}
    assert len(build_dataset("retrieval", "test", config)) == 2


# --------------------------------------------------------------------------------------------------
# official files


def vqa(kind, subtype="train2014", **rows):
    return {
        "info": {},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {},
        "data_subtype": subtype,
        **rows,
    }


QUESTIONS = [{"image_id": 7, "question": f"Is it {i}?", "question_id": 7000 + i} for i in range(2)]
ANSWERS = [
    {
        "question_id": 7000 + i,
        "image_id": 7,
        "question_type": "is it",
        "answer_type": "yes/no",
        "multiple_choice_answer": "a",
        "answers": [
            {"answer": f"a{i}", "answer_confidence": "yes", "answer_id": k} for k in range(10)
        ],
    }
    for i in reversed(range(2))
]
COCO_IMAGE = "train2014/COCO_train2014_000000000007.jpg"
ANSWERED = [
    {
        "image": COCO_IMAGE,
        "question": f"Is it {i}?",
        "question_id": 7000 + i,
        "dataset": "vqa",
        "answer": [f"a{i}"] * 10,
        "answer_type": "yes/no",
    }
    for i in range(2)
]
STATEMENT = {
    "sentence": "Two dogs.",
    "label": "True",
    "synset": "dog",
    "query": "dogs0",
    "validation": {},
}
HYPOTHESIS = {
    "annotator_labels": ["neutral"],
    "captionID": "47.jpg#4",
    "pairID": "47.jpg#4r1n",
    "sentence1": "A dog.",
    "sentence2": "A pet.",
    "gold_label": "entailment",
    "Flickr30K_ID": "47",
}


def lines(*rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def captions(name, count=2):
    return {
        "info": {},
        "licenses": [],
        "images": [{"id": 5, "file_name": name, "height": 1, "width": 1}],
        "annotations": [{"image_id": 5, "id": i, "caption": "A dog."} for i in range(count)],
    }


def karpathy(split, number):
    sentences = [{"tokens": ["a"], "raw": f"A {split}.", "imgid": number, "sentid": 9}] * 2
    return {
        "filepath": "val2014",
        "filename": f"COCO_val2014_{number:012d}.jpg",
        "imgid": number,
        "cocoid": 50 + number,
        "sentids": [9],
        "split": split,
        "sentences": sentences,
    }


SPLITS = ("train", "restval", "val", "test")
# files -> lists; the task that reads them, and the key of its image folder
OFFICIAL = {
    "COCO": (
        {"captions_val2017.json": captions("000000000005.jpg")},
        {"val": [{"image": "val2017/000000000005.jpg", "caption": ["A dog."] * 2}]},
        "retrieval",
    ),
    "COCO 2014": (
        {"captions.json": captions("COCO_train2014_000000000005.jpg", 1)},
        {
            "train": [
                {
                    "image": "train2014/COCO_train2014_000000000005.jpg",
                    "caption": "A dog.",
                    "image_id": 5,
                }
            ]
        },
        "retrieval",
    ),
    "Karpathy": (
        {
            "dataset_coco.json": {
                "images": [karpathy(split, i) for i, split in enumerate(SPLITS)],
                "dataset": "coco",
            }
        },
        {
            "train": [
                {
                    "image": f"val2014/COCO_val2014_{i:012d}.jpg",
                    "caption": f"A {SPLITS[i]}.",
                    "image_id": 50 + i,
                }
                for i in (0, 0, 1, 1)
            ],
            "val": [{"image": "val2014/COCO_val2014_000000000002.jpg", "caption": ["A val."] * 2}],
            "test": [
                {"image": "val2014/COCO_val2014_000000000003.jpg", "caption": ["A test."] * 2}
            ],
        },
        "retrieval",
    ),
    "VQA": (
        {
            "q.json": vqa("q", questions=QUESTIONS),
            "a.json": vqa("a", annotations=ANSWERS),
            "t.json": vqa("q", "test-dev2015", questions=QUESTIONS[:1]),
        },
        {
            "train": ANSWERED,
            "test": [
                {
                    "image": "test2015/COCO_test2015_000000000007.jpg",
                    "question": "Is it 0?",
                    "question_id": 7000,
                    "dataset": "vqa",
                }
            ],
        },
        "vqa",
    ),
    "NLVR2": (
        {
            "train.json": lines({**STATEMENT, "identifier": "train-10-1-0", "directory": 54}),
            "dev.json": lines({**STATEMENT, "identifier": "dev-850-0-0", "label": "False"}),
        },
        {
            "train": [
                {
                    "images": [f"images/train/54/train-10-1-img{i}.png" for i in (0, 1)],
                    "sentence": "Two dogs.",
                    "label": "True",
                }
            ],
            "val": [
                {
                    "images": [f"dev/dev-850-0-img{i}.png" for i in (0, 1)],
                    "sentence": "Two dogs.",
                    "label": "False",
                }
            ],
        },
        "nlvr",
    ),
    "SNLI-VE": (
        {"snli_ve_dev.jsonl": lines(HYPOTHESIS, {**HYPOTHESIS, "Flickr30K_ID": "48.jpg"})},
        {
            "val": [
                {"image": name, "sentence": "A pet.", "label": "entailment"}
                for name in ("47", "48")
            ]
        },
        "ve",
    ),
}


@pytest.fixture
def official(tmp_path, monkeypatch, run):
    """Write official files and convert them. Return (exit status, the lists by split)."""
    monkeypatch.chdir(tmp_path)

    def call(files, *flags):
        for name, content in files.items():
            Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
        shutil.rmtree("out", ignore_errors=True)
        status = run(*files, "--image_root", "photos", "--output", "out", *flags)
        return status, {
            path.stem: json.loads(path.read_text()) for path in Path("out").glob("*.json")
        }

    return call


def images_of(lists):
    entries = [entry for entries in lists.values() for entry in entries]
    return {image for entry in entries for image in entry.get("images", [entry.get("image")])}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_become_the_lists_of_their_task(official, capsys, shapes, tiny_config, name):
    files, expected, task = OFFICIAL[name]
    status, lists = official(files)
    assert status == 0 and lists == expected
    images = images_of(lists)
    assert (
        f"{len(images)} of {len(images)} images are not in --image_root photos"
        in capsys.readouterr().out
    )
    for image in images:
        path = Path("photos", image if task != "ve" else f"{image}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shapes / "images/train/000000.jpg", path)
    for split in lists:  # the script reads them
        config = {
            **tiny_config,
            f"{split}_file": [f"out/{split}.json"],
            "image_root": "photos",
            "vqa_root": "photos",
        }
        assert len(build_dataset(task, split, config)) == len(expected[split])
    for image in list(Path("photos").rglob("*.*")):
        image.rename(Path("photos", image.name))
    status, lists = official(files)
    assert status == 0 and images_of(lists) == {Path(image).name for image in images}
    assert "--image_root" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["Karpathy", "VQA", "NLVR2", "SNLI-VE"])
def test_check_of_official_files_leaves_entries_of_broken_images_out(official, shapes, name):
    files, _, task = OFFICIAL[name]
    complete = official(files)[1]
    images = sorted(images_of(complete))
    paths = [Path("photos", image if task != "ve" else f"{image}.jpg") for image in images]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shapes / "images/train/000000.jpg", path)
    assert official(files, "--check") == (0, complete)
    paths[0].write_bytes(b"")
    status, lists = official(files, "--check")
    assert status == 0
    for split, entries in complete.items():
        left = [entry for entry in entries if images[0] not in images_of({split: [entry]})]
        assert lists.get(split, []) == left
    assert Path("out/skipped.txt").read_text() == f"image {paths[0]}: empty file\n"


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_script_that_gets_an_official_file_names_the_command(tmp_path, name):
    files, _, _ = OFFICIAL[name]
    for file, content in files.items():
        path = tmp_path / file
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        message = refusal(read_json_list, path)
        assert message.startswith(f"{path}: ") and recognize(path.read_bytes()).title in message
        assert "python -m tools.to_json" in message and "jq" not in message


def test_one_wrong_row_of_an_official_file_costs_one(official):
    rows = [{**STATEMENT, "identifier": f"dev-{i}-0-0"} for i in range(3)]
    status, lists = official(
        {"dev.json": lines(*rows[:2]) + "{broken\n" + lines({**rows[2], "label": "maybe"}, rows[2])}
    )
    assert status == 0 and len(lists["val"]) == 3
    skipped = Path("out/skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in skipped] == ["dev.json line 3", "dev.json line 4"]
    status, lists = official(
        {"snli_ve_test.jsonl": lines(HYPOTHESIS, {**HYPOTHESIS, "gold_label": "-"})}
    )
    assert (
        status == 0
        and len(lists["test"]) == 1
        and "snli_ve_test.jsonl line 2" in Path("out/skipped.txt").read_text()
    )
    content = captions("a.jpg")
    content["annotations"] += [
        {"image_id": 9, "id": 1, "caption": "b"},
        {"image_id": 5, "id": 2, "caption": "?!"},
    ]
    status, lists = official({"captions.json": content})
    assert (
        status == 0
        and len(lists["train"]) == 2
        and len(Path("out/skipped.txt").read_text().splitlines()) == 2
    )


def test_questions_and_annotations_are_joined_by_question_and_image(official, capsys):
    answers = [{**ANSWERS[0], "image_id": 8}, ANSWERS[1]]
    questions = [*QUESTIONS, {**QUESTIONS[0], "question_id": 1}]
    files = {"q.json": vqa("q", questions=questions), "a.json": vqa("a", annotations=answers)}
    status, lists = official(files)
    assert status == 0 and lists == {"train": ANSWERED[:1]}
    skipped = Path("out/skipped.txt").read_text().splitlines()
    assert ["7001" in skipped[0], "question 1 " in skipped[1]] == [True, True] and len(skipped) == 2
    assert (
        official({"a.json": vqa("a", annotations=ANSWERS)})[0] == 2
        and "train2014" in capsys.readouterr().err
    )
    files["a.json"] = vqa("a", "val2014", annotations=ANSWERS)
    assert official(files)[0] == 2 and "val2014" in capsys.readouterr().err


def test_official_captions_can_be_held_out_and_other_files_not(official, capsys):
    content = captions("a.jpg") | {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (5, 6, 7)]
    }
    content["annotations"] += [{"image_id": i, "id": i, "caption": "b"} for i in (6, 7)]
    status, lists = official({"captions.json": content}, "--test", 1)
    assert status == 0 and len(lists["test"]) == 1 and isinstance(lists["test"][0]["caption"], list)
    assert len(images_of(lists)) == 3
    for name in "Karpathy", "VQA", "NLVR2":
        for flag in "--test", "--val":
            assert official(OFFICIAL[name][0], flag, 1)[0] == 2
            assert flag in capsys.readouterr().err
    assert (
        official(OFFICIAL["COCO"][0], "--text", "caption")[0] == 2
        and "--text" in capsys.readouterr().err
    )
    assert official({**OFFICIAL["COCO"][0], **OFFICIAL["SNLI-VE"][0]})[0] == 2
    assert "one kind" in capsys.readouterr().err
    Path("photos").mkdir()
    Path("photos/a.jpg").touch()
    assert official({**OFFICIAL["COCO"][0], "my.csv": "path,text\na.jpg,a\n"})[0] == 2
    assert official({"captions.json": json.dumps(captions("a.jpg"))[:-30]})[0] == 2


def test_other_objects_are_not_taken_for_official_files():
    others = [
        {},
        [],
        5,
        {"images": [], "annotations": []},
        {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1}]},
        {"image": "a", "sentence": "b", "label": "True"},
        {"path": "a.jpg", "caption": "b"},
        vqa("q", questions=QUESTIONS) | {"data_type": "abstract_v002"},
    ]
    for content in others:
        assert (
            recognize(json.dumps(content).encode()) is None
            and recognize(lines(content, content).encode()) is None
        )
    for data in (b"", b"\xff", b"{", b'{"a": ' * 5000, b"path,text\n"):
        assert recognize(data) is None


def test_the_lines_of_the_page_lead_from_photos_to_pictures(shapes, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").symlink_to(shapes)
    entries = json.loads((shapes / "pretrain.json").read_text())
    rows = [f'{entry["image"]},"{text}"\n' for entry in entries for text in entry["caption"]]
    (tmp_path / "captions.csv").write_text("".join(["path,text\n", *rows]))
    monkeypatch.chdir(tmp_path)
    section = re.search("## Your own data.*?\n## ", (ROOT / "docs/data.md").read_text(), re.S)[0]
    # the other ways need weights of the hub
    first, from_scratch = section.split("**A released")[0], section.split("**From scratch**")[1]
    for line in re.findall("^    python (.*)", first + from_scratch, re.M):
        line = line.replace("--val 100 --test 100", "--val 4 --test 8")
        line = line.replace("PHOTO.jpg", entries[0]["image"])
        line += " --set scheduler.epochs=1 num_workers=0" * line.startswith("Pretrain.py")
        name, *flags = shlex.split(line.removeprefix("-m "))
        monkeypatch.setattr(sys, "argv", [name, *flags])
        assert exit_status(importlib.import_module(name.removesuffix(".py")).main) == 0, line
    assert log(tmp_path / "output/mine")[-1]["test_txt_r10"] > 0
    assert all(
        (tmp_path / name).stat().st_size > 10000
        for name in ("output/mine/retrieval.png", "heat.png", "found.html")
    )
