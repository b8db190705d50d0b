"""python -m tools.to_json: Parquet tables in the form of Hugging Face data sets."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dataset.build import build_dataset

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def picture(shade, kind="JPEG"):
    """The bytes of an image."""
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 90, 200 - shade)).save(data, kind)
    return data.getvalue()


PICTURES = [picture(20 * i) for i in range(6)]


def embedded(*numbers):
    """The image column of a Hugging Face data set."""
    rows = [{"bytes": PICTURES[i], "path": f"{i}.jpg"} for i in numbers]
    return pyarrow.array(rows, IMAGE)


@pytest.fixture
def convert(tmp_path, monkeypatch, run_main):
    """Convert tables {file name: {column: values}} into the folder out.

    Returns (exit status, printed text, the lists by split, lines of skipped.txt).
    """
    monkeypatch.chdir(tmp_path)

    def call(tables, *flags):
        for name, columns in tables.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table(columns), name, row_group_size=2)
        status, *said = run_main("tools.to_json", *tables, "--output", "out", "--overwrite", *flags)
        lists = {path.stem: json.loads(path.read_text()) for path in Path("out").glob("*.json")}
        skipped = Path("out/skipped.txt")
        lines = skipped.read_text().splitlines() if skipped.exists() else []
        return status, "".join(said), lists, lines

    return call


def contents(entries, root=""):
    """[(bytes of the image, captions)] of the entries of a list."""
    return [(Path(root, entry["image"]).read_bytes(), entry["caption"]) for entry in entries]


def test_a_data_set_with_splits_becomes_lists_that_train(convert, tiny_config):
    captions = [[f"a {i}", f"the {i}"] for i in range(6)]
    columns = {"image": embedded(*range(6)), "caption": captions, "img_id": list("abcdef")}
    splits = ["train", "test", "train", "val", "train", "train"]
    status, printed, lists, skipped = convert({"TEST-00000.parquet": {**columns, "split": splits}})
    assert status == 0 and not skipped, printed
    assert "out/train.json: 4 images, 8 captions" in printed
    rows = list(zip(PICTURES, captions, strict=True))
    assert {split: contents(entries) for split, entries in lists.items()} == {
        split: [row for row, named in zip(rows, splits, strict=True) if named == split]
        for split in ("train", "val", "test")
    }
    files = {f"{split}_file": [f"out/{split}.json"] for split in lists}
    config = {**tiny_config, **files, "image_root": ""}
    dataset = build_dataset("pretrain", "train", config)
    assert len(dataset) == 4 and dataset[0].image.shape == (3, 32, 32)
    assert len(build_dataset("retrieval", "test", config)) == 1


CAPTIONS = {
    "a text": {"image": embedded(0, 1), "text": ["one", "two"]},
    "lists": {"image": embedded(0, 1), "captions": [["one"], ["two"]]},
    "an image in two rows": {"image": embedded(0, 1, 0), "caption": ["one", "two", "one"]},
    "bytes": {"id": [5, 6], "jpg": pyarrow.array(PICTURES[:2]), "caption": ["one", "two"]},
    "paths beside bytes": {"path": ["x", "y"], "image": embedded(0, 1), "text": ["one", "two"]},
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_images_and_captions_of_every_form_give_the_same_list(convert, name):
    status, printed, lists, _ = convert({"data.parquet": CAPTIONS[name]})
    assert status == 0, printed
    expected = [(PICTURES[0], ["one"]), (PICTURES[1], ["two"])]
    assert contents(lists["train"]) == expected and list(lists) == ["train"]


def test_numbered_columns_are_captions_of_one_image(convert):
    columns = {"image": embedded(0, 1), "caption_0": ["one", "two"], "caption_1": ["uno", None]}
    _, printed, lists, _ = convert({"data.parquet": columns})
    expected = [(PICTURES[0], ["one", "uno"]), (PICTURES[1], ["two"])]
    assert contents(lists["train"]) == expected
    assert "columns 'caption_0', 'caption_1'" in printed
    _, _, lists, _ = convert({"data.parquet": columns}, "--text", "caption_0")
    assert contents(lists["train"]) == [(PICTURES[0], ["one"]), (PICTURES[1], ["two"])]


def test_columns_may_be_named_and_paths_start_from_the_image_root(convert, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(PICTURES[0])
    columns = {"where": ["a.jpg", "b.jpg"], "what": ["one", "two"], "image": embedded(4, 5)}
    flags = "--path", "where", "--text", "what", "--image_root", "photos"
    _, _, lists, skipped = convert({"data.parquet": columns}, *flags)
    assert lists == {"train": [{"image": "a.jpg", "caption": ["one"]}]}
    assert len(skipped) == 1 and skipped[0].startswith("data.parquet row 2: image photos/b.jpg")
    rows = pyarrow.array([{"bytes": None, "path": "a.jpg"}], IMAGE)
    _, _, lists, _ = convert({"data.parquet": {"image": rows, "text": ["one"]}}, *flags[-2:])
    assert lists == {"train": [{"image": "a.jpg", "caption": ["one"]}]}
    tables = {"data.parquet": {"image": embedded(0), "text": ["one"]}}
    _, _, lists, _ = convert(tables, "--image_root", "out/images")
    assert contents(lists["train"], "out/images") == [(PICTURES[0], ["one"])]
    assert "/" not in lists["train"][0]["image"]


def test_tables_of_both_kinds_may_be_joined(convert, run_main, tmp_path):
    convert({"x.parquet": {"image": embedded(0), "text": ["one"]}})
    (tmp_path / "a.jpg").write_bytes(PICTURES[1])
    (tmp_path / "captions.csv").write_text("path,text\na.jpg,two\n")
    assert run_main("tools.to_json", "x.parquet", "captions.csv", "--output", "both")[0] == 0
    entries = json.loads(Path("both/train.json").read_text())
    assert contents(entries) == [(PICTURES[0], ["one"]), (PICTURES[1], ["two"])]


def test_the_names_of_files_are_splits_and_images_can_be_held_out(convert):
    def table(*numbers):
        return {"image": embedded(*numbers), "text": [f"a {i}" for i in numbers]}

    parts = {
        "train-00000-of-00002.parquet": table(0, 1),
        "train-00001-of-00002.parquet": table(2, 3),
        "validation-00000-of-00001.parquet": table(4),
    }
    _, _, lists, _ = convert({**parts, "default/test/0000.parquet": table(5)})
    expected = {"train": range(4), "val": [4], "test": [5]}
    assert {split: contents(entries) for split, entries in lists.items()} == {
        split: [(PICTURES[i], [f"a {i}"]) for i in numbers] for split, numbers in expected.items()
    }
    Path("out/test.json").unlink()
    _, _, lists, _ = convert(parts, "--test", 1)
    assert {split: len(entries) for split, entries in lists.items()} == {
        "train": 3,
        "val": 1,
        "test": 1,
    }


def test_rows_that_cannot_be_used_are_named_and_formats_kept(convert):
    data = [picture(9, "PNG"), b"no image", b"", PICTURES[0][:30], PICTURES[1], PICTURES[2]]
    rows = pyarrow.array([{"bytes": content, "path": None} for content in data], IMAGE)
    columns = {"image": rows, "text": ["one", "a", "b", "c", " ?!", "d"]}
    splits = ["train"] * 5 + ["other"]
    status, _, lists, skipped = convert({"data.parquet": {**columns, "split": splits}})
    assert status == 0 and contents(lists["train"]) == [(data[0], ["one"])]
    assert Path(lists["train"][0]["image"]).suffix == ".png"
    assert [line.split(": ")[0] for line in skipped] == [
        f"data.parquet row {i}" for i in (*range(2, 7),)
    ]
    words = "'image'", "'text'", "'other'"
    assert [word in skipped[i] for word, i in zip(words, (1, 3, 4), strict=True)] == [True] * 3


def test_bad_input_is_one_line(convert, tmp_path, monkeypatch):
    good = {"image": embedded(0), "text": ["one"]}

    def refused(tables, *flags):
        status, printed, *_ = convert(tables, *flags)
        assert status == 2 and printed.count("\n") == 1 and printed.startswith("error: ")
        return printed

    assert "'id', 'text'" in refused({"data.parquet": {"id": [1], "text": ["a"]}})
    assert "--text" in refused({"data.parquet": {"image": embedded(0), "label": [3]}})
    assert "absent" in refused({"data.parquet": good}, "--path", "absent")
    assert "--encoding" in refused({"data.parquet": good}, "--encoding", "cp1252")
    assert "first of 1 problems" in refused({"data.parquet": {"image": embedded(0), "text": [""]}})
    assert "no rows" in refused(
        {"data.parquet": {"image": embedded(), "text": pyarrow.array([], "string")}}
    )
    (tmp_path / "bad.parquet").write_bytes(b"PAR1, not really" * 9)
    assert "bad.parquet" in refused({}, "bad.parquet")
    (tmp_path / "folder.parquet").mkdir()
    assert "folder.parquet" in refused({}, "folder.parquet")
    convert({"data.parquet": good})
    content = bytearray((tmp_path / "data.parquet").read_bytes())
    content[4:40] = b"\xff" * 36
    (tmp_path / "cut.parquet").write_bytes(content)
    assert "cut.parquet" in refused({}, "cut.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refused({"data.parquet": good})
