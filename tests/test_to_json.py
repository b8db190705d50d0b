"""python -m dataset.to_json: tables as people have them -> the lists that training reads."""

import importlib
import json
import re
import shlex
import sys

import pytest

from conftest import ROOT, exit_status, log
from dataset import to_json

IMAGES = ("a.jpg", "b.jpg", "c.jpg", "sub/d.jpg")


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Converts a table given as bytes or text; returns (exit status, what is printed, train.json, test.json, skipped.txt)."""
    for name in IMAGES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()

    def call(table, *flags, name="captions.csv"):
        path, out = tmp_path / name, tmp_path / "out"
        path.write_bytes(table if isinstance(table, bytes) else table.encode())
        argv = ["to_json", path, "--image_root", tmp_path / "photos", "--output", out, *flags]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        status = exit_status(to_json.main)
        files = [(out / file).read_text(encoding="utf-8") if (out / file).exists() else None
                 for file in ("train.json", "test.json", "skipped.txt")]  # fmt: skip
        printed = "".join(capsys.readouterr()).replace(f"{tmp_path}/", "")
        train, test = (file and json.loads(file) for file in files[:2])
        return status, printed, train, test, files[2] and files[2].replace(f"{tmp_path}/", "")

    return call


ROWS = [{"image": "a.jpg", "caption": ['A "big" dog, running', "zwei Hunde"]}, {"image": "b.jpg", "caption": ["été 10:30"]}]
BIG = '"A ""big"" dog, running"'
JSON_BIG = json.dumps(ROWS[0]["caption"][0])
TABLES = {
    "CSV": f"path,text\na.jpg,{BIG}\nb.jpg,été 10:30\na.jpg,zwei Hunde\n",
    "of Excel": f"\ufeffFile Name;Id;Caption\r\na.jpg;1;{BIG}\r\nb.jpg;2;été 10:30\r\na.jpg;3;zwei Hunde\r\n;;\r\n",
    "UTF-16 TSV": f"image\ttitle\tcaption\r\na.jpg\t\t{BIG}\r\nb.jpg\t-\tété 10:30\r\na.jpg\t\tzwei Hunde".encode("utf-16"),
    "bars": f"image_name| number| comment\na.jpg| 0| {BIG}\na.jpg| 1| zwei Hunde\nb.jpg| 0| été 10:30\n",
    "JSON lines": '{"file": "a.jpg", "text": [%s, "zwei\\nHunde"]}\r\n\n{"file": "b.jpg", "text": "été 10:30"}\n' % JSON_BIG,
    "JSON list": '[{"img": "./a.jpg", "caption": [%s, "zwei Hunde"]},\n{"img": "b.jpg", "caption": "été 10:30"}]' % JSON_BIG,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_give_the_same_list(convert, name):
    assert convert(TABLES[name])[0] == 0
    _, _, train, test, skipped = convert(TABLES[name])  # a second time over the first
    assert train == ROWS and test is skipped is None


def test_columns_may_be_named(convert):
    table = "id,alt,where,what\n1,x,a.jpg,a dog\n"
    status, printed, train, *_ = convert(table, "--path", "where", "--text", "what")
    assert status == 0 and train == [{"image": "a.jpg", "caption": ["a dog"]}]
    assert "images from column 'where', captions from column 'what'" in printed
    status, printed, *_ = convert(table)
    assert status == 2 and "none of the columns 'id', 'alt', 'where', 'what' is called path" in printed and "--path" in printed
    status, printed, *_ = convert(table, "--path", "absent")
    assert status == 2 and "is called absent" in printed


def test_held_out_images_are_drawn_once_and_have_lists_of_captions(convert):
    table = "path,text\n" + "".join(f"{name},{word}\n" for word in ("one", "two") for name in IMAGES)
    _, printed, train, test, _ = convert(table, "--test", 2)
    assert "train.json: 2 images, 4 captions" in printed and "test.json: 2 images, 4 captions" in printed
    assert sorted(entry["image"] for entry in train + test) == list(IMAGES)
    assert all(entry["caption"] == ["one", "two"] for entry in train + test)
    assert convert(table, "--test", 2)[2:4] == (train, test)
    assert any(convert(table, "--test", 2, "--seed", seed)[3] != test for seed in range(1, 6))
    assert convert(table)[3] is None  # what was held out before is trained on now
    status, printed, *_ = convert(table, "--test", 4)
    assert status == 2 and "--test 4: there are 4 images" in printed


def test_rows_that_cannot_be_used_are_named_by_line(convert):
    table = ('path,text\na.jpg,"two\nlines"\nabsent.jpg,x\nb.jpg,a, b\n,x\nb.jpg, \nb.jpg,?!\nphotos\\b.jpg,x\n\nsub\\d.jpg,d\n'
             "sub,folder\nc.jpg\na\0.jpg,x\n")  # fmt: skip
    status, printed, train, _, skipped = convert(table)
    assert status == 0 and train == [{"image": "a.jpg", "caption": ["two lines"]}, {"image": "sub/d.jpg", "caption": ["d"]}]
    lines = [line.split(": ", 1) for line in skipped.splitlines()]
    assert [place for place, _ in lines] == [f"captions.csv line {n}" for n in (4, 5, 6, 7, 8, 9, 12, 13, 14)]
    assert lines[0][1].startswith("image photos/absent.jpg does not exist") and "3 columns, but line 1 has 2" in lines[1][1]
    assert "'path' is empty" in lines[2][1] and "'text' is empty" in lines[3][1] and "'text' is empty" in lines[4][1]
    assert "left out, 9 rows (out/skipped.txt lists all)" in printed and printed.count("captions.csv line") == to_json.SHOWN
    assert convert("path,text\na.jpg,fine\n")[4] is None
    table = '{"path": "a.jpg", "text": "a"}\n{"path": 5}\n{"path"\n[]\n{"path": "b.jpg", "text": []}\n' + '{"path":' + "[" * 10**5
    _, printed, train, _, skipped = convert(table)
    assert len(train) == 1 and [line.split(":")[0][-1] for line in skipped.splitlines()] == ["2", "3", "4", "5", "6"]


@pytest.mark.parametrize("table, words", {
    "path,text\nx.jpg,a\ny.jpg,b\n": ("line 2", "photos/x.jpg does not exist", "none of the 2 rows"),
    "a.jpg,a dog\nb.jpg,a cat\n": ("'a.jpg', 'a dog'", "line 1 of a CSV or TSV file names the columns"),
    "path,text\n": ("no rows",), "": ("no rows",),
    'path,text\na.jpg,fine\nb.jpg,"a dog\nc.jpg,a cat\n': ("line 3", "double quote"),
    "path,text\na.jpg,fine\nb.jpg,été\n".encode("cp1252"): ("line 3", "not utf-8", "--encoding cp1252"),
}.items())  # fmt: skip
def test_tables_of_which_nothing_can_be_used_are_refused(convert, table, words):
    status, printed, train, *_ = convert(table)
    assert status == 2 and train is None and printed.startswith("error: captions.csv") and printed.count("\n") == 1
    assert all(word in printed for word in words)


def test_other_encodings(convert, tmp_path):
    table = "path,text\nb.jpg,été\n".encode("cp1252")
    assert convert(table, "--encoding", "cp1252")[2] == [{"image": "b.jpg", "caption": ["été"]}]
    assert "--encoding: unknown encoding: klingon" in convert(table, "--encoding", "klingon")[1]


def test_the_lines_of_the_readme_lead_from_photos_to_pictures(shapes, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "photos").symlink_to(shapes)
    entries = json.loads((shapes / "pretrain.json").read_text())
    rows = [f'{entry["image"]},"{text}"\n' for entry in entries for text in entry["caption"]]
    (tmp_path / "captions.csv").write_text("".join(["path,text\n", *rows]))
    monkeypatch.chdir(tmp_path)
    section = re.search("## Train on my data.*?\n## ", (ROOT / "README.md").read_text(), re.S)[0]
    for line in re.findall("^    python (.*)", section, re.M):
        line = line.replace("--test 100", "--test 8").replace("PHOTO.jpg", entries[0]["image"])
        line += " --set scheduler.epochs=1 num_workers=0" * line.startswith("Pretrain.py")
        name, *flags = shlex.split(line.removeprefix("-m "))
        monkeypatch.setattr(sys, "argv", [name, *flags])
        assert exit_status(importlib.import_module(name.removesuffix(".py")).main) == 0, line
    assert log(tmp_path / "output/small")[-1]["test_txt_r10"] > 0
    assert all((tmp_path / name).stat().st_size > 10000 for name in ("output/small/retrieval.png", "heat.png"))
