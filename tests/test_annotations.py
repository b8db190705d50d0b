"""Annotation files: reading JSON lists of any layout, the store of their entries, and what is
refused.
"""

import functools
import json
import multiprocessing
import os
import pickle
import re
import signal
import tarfile
from unittest import mock

import pytest
from conftest import refusal

from dataset import cache, store
from dataset import entries as entries_module
from dataset.base import check_images
from dataset.caption import CaptionDataset, Pair
from dataset.entries import check_entry, read_json, read_json_list
from dataset.nlvr import Statement
from dataset.retrieval import CaptionedImage, RetrievalPair
from dataset.store import Entries
from dataset.ve import Entailment
from dataset.vqa import Question, TrainingQuestion
from utils import InputError, TrainingStopped

TRICKY = [
    {"image": "a/1.jpg", "caption": "plain"},
    {
        "image": "b/ü 猫.jpg",
        "caption": ["first", "日本語 😀", ""],
        "image_id": 3,
        "score": -1.25e-7,
    },
    {
        "caption": 'quotes " and \\ and } ], { [ inside',
        "image": "c/\t\n.jpg",
        "nested": {"a": [[1, 2], {"b": []}]},
    },
    {
        "image": "\udce9.jpg",
        "caption": ["e\u0301 \u2028 \u0000"],
        "flag": True,
        "none": None,
        "big": 10**40,
    },
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALBEF_CACHE", str(folder))
    return folder


def write(path, entries, **options):
    path.write_text(json.dumps(entries, **options), encoding="utf-8")
    return str(path)


def as_pairs(entries):
    return [
        (
            entry["image"],
            [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"],
        )
        for entry in entries
    ]


def load(*files):
    return Entries(files, Pair)


def contents(loaded):
    return [(entry.image, entry.texts) for entry in loaded]


def stores(folder):
    return [path.name for path in folder.glob("Pair-*")]


def test_cache_holds_little_more_than_the_strings(tmp_path, folder):
    entries = [
        {"image": f"cc12m/{i:05d}/{i:09d}.jpg", "caption": f"a caption of usual length, number {i}"}
        for i in range(2000)
    ]
    load(write(tmp_path / "list.json", entries))
    strings = sum(len(entry["image"] + entry["caption"]) for entry in entries)
    assert sum((folder / name).stat().st_size for name in stores(folder)) < 1.3 * strings


def test_cache_is_used_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "list.json", TRICKY)
    load(path)
    with monkeypatch.context() as patch:
        patch.delattr(store, "read_entries")
        assert contents(load(path)) == as_pairs(TRICKY)
    write(tmp_path / "list.json", TRICKY[:2])
    assert contents(load(path)) == as_pairs(TRICKY[:2])
    same_size = [{**entry, "image": entry["image"].replace("jpg", "png")} for entry in TRICKY[:2]]
    write(tmp_path / "list.json", same_size)
    os.utime(path, ns=(1, 1))
    assert contents(load(path)) == as_pairs(same_size)


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[:-9],
    "gone": lambda content: None,
    "zeros": lambda content: bytes(len(content)),
    "flips": lambda content: bytes(byte ^ 4 for byte in content),
    "last_block": lambda content: (
        content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    ),
    "swapped": lambda content: content[8:16] + content[:8] + content[16:],
}


@pytest.mark.parametrize("file", ["*.index", "*.jsonl"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_cache_is_built_again(tmp_path, folder, file, damage):
    path = write(tmp_path / "list.json", TRICKY)
    kept = pickle.dumps(load(path))
    (store,) = folder.glob(file)
    # a spawned worker opens the same files as the run
    for again in lambda: load(path), lambda: pickle.loads(kept):
        content = store.read_bytes()
        store.unlink()
        if (damaged := damage(content)) is not None:
            store.write_bytes(damaged)
        assert contents(again()) == as_pairs(TRICKY)
        assert store.read_bytes() == content


@pytest.mark.parametrize("file", ["*.index", "*.jsonl"])
def test_a_cache_that_is_damaged_during_the_run_is_built_again(tmp_path, folder, file):
    path = write(tmp_path / "list.json", TRICKY)
    opened, late = load(path), load(path)
    (store,) = folder.glob(file)
    with open(store, "r+b") as mapped:
        mapped.write(bytes(store.stat().st_size))
    assert contents(opened) == as_pairs(TRICKY)
    write(tmp_path / "list.json", TRICKY[:2])
    # the entries have changed since the start of the run
    with pytest.raises(TrainingStopped, match=re.escape(path)):
        contents(late)
    os.remove(path)
    with pytest.raises(TrainingStopped, match=re.escape(path)):
        contents(late)


def test_the_cache_depends_on_the_form_and_the_clean_up(tmp_path, folder, monkeypatch):
    class OtherPair(Pair):
        score: float = 0.0

    OtherPair.__name__ = "Pair"
    path = write(tmp_path / "list.json", TRICKY[:2])
    assert contents(load(path)) == as_pairs(TRICKY[:2])
    before = stores(folder)
    assert [entry.score for entry in Entries([path], OtherPair)] == [0, -1.25e-7]
    assert len(stores(folder)) == 2 and not set(before) & set(stores(folder))
    load(path)
    assert sorted(stores(folder)) == sorted(before)
    monkeypatch.setattr(store, "pre_caption", write)  # a function of another module
    assert contents(load(path)) == as_pairs(TRICKY[:2])
    assert len(stores(folder)) == 2 and not set(before) & set(stores(folder))


def test_what_is_outdated_or_incomplete_in_the_cache_is_removed(tmp_path, folder, monkeypatch):
    def kill(_):
        os.kill(os.getpid(), signal.SIGKILL)

    other, path = write(tmp_path / "other.json", TRICKY), write(tmp_path / "list.json", TRICKY)
    load(other)
    kept = set(stores(folder))
    (folder / ".mine.tmp").touch()
    with monkeypatch.context() as patch:
        patch.setattr("utils.os.fsync", kill)
        process = multiprocessing.get_context("fork").Process(target=load, args=(path,))
        process.start()
        process.join()
    assert any(file.name.endswith(".tmp") for file in folder.glob(".Pair-*"))
    for length in 1, 2, 3:
        write(tmp_path / "list.json", TRICKY[:length])
        assert contents(load(path)) == as_pairs(TRICKY[:length])
        assert kept < set(stores(folder)) and len(stores(folder)) == 4
    assert {file.name for file in folder.glob(".*")} == {".lock", ".mine.tmp"}


def test_a_cache_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "list.json", TRICKY)
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("ALBEF_CACHE", str(tmp_path / "occupied" / "cache"))
    assert "ALBEF_CACHE" in refusal(load, path)


def test_a_cache_folder_that_everyone_can_write_is_refused(folder):
    for mode in 0o700, 0o755, 0o770:  # a folder that the user names may be shared with a group
        assert cache.cache_folder() == str(folder)
        folder.chmod(mode)
    folder.chmod(0o777)
    assert str(folder) in refusal(cache.cache_folder)


def test_a_full_disk_is_named(tmp_path, folder, monkeypatch):
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    path = write(tmp_path / "list.json", TRICKY)
    with monkeypatch.context() as patch:
        patch.setattr("utils.os.fsync", full)
        message = refusal(load, path)
    assert message.startswith(f"{folder}: cannot write the cache (No space left on device)")
    assert "ALBEF_CACHE" in message


def test_processes_that_start_together_build_and_share_one_cache(tmp_path, monkeypatch, folder):
    path = write(tmp_path / "list.json", TRICKY * 500)
    context = multiprocessing.get_context("fork")
    barrier, builds, results = context.Barrier(3), context.Value("i"), context.Queue()
    read = store.read_entries

    def counted_read(*arguments):
        with builds.get_lock():
            builds.value += 1
        return read(*arguments)

    def load_when_all_are_ready():
        barrier.wait()
        results.put(contents(load(path)))

    monkeypatch.setattr(store, "read_entries", counted_read)
    workers = [context.Process(target=load_when_all_are_ready) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [as_pairs(TRICKY * 500)] * 3
    assert builds.value == 1 and len(stores(folder)) == 2


def test_processes_that_cannot_lock_all_build_a_complete_cache(tmp_path, monkeypatch, folder):
    path = write(tmp_path / "list.json", TRICKY)
    build = store._build

    def built_by_another_meanwhile(*arguments, **options):
        build(*arguments, **options)
        build(*arguments, **options)

    monkeypatch.setattr(store, "_build", built_by_another_meanwhile)
    no_locks = mock.Mock(side_effect=OSError("no locks available"))
    monkeypatch.setattr("filelock._unix.fcntl.flock", no_locks)
    assert contents(load(path)) == as_pairs(TRICKY)
    assert len(stores(folder)) == 2


def test_pickle_reopens_the_cache_instead_of_carrying_it(tmp_path):
    entries = [{"image": f"{i}.jpg", "caption": "a b c d e f"} for i in range(1000)]
    loaded = load(write(tmp_path / "list.json", entries))
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 1000
    os.remove(tmp_path / "list.json")
    assert contents(pickle.loads(pickled)) == as_pairs(entries)
    for outside in -1, 1000:
        with pytest.raises(IndexError):
            loaded[outside]


def test_shards_in_the_place_of_lists_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(__file__, "a.txt")
    message = refusal(read_json_list, tmp_path / "a.tar")
    assert (
        message.startswith(f"{tmp_path / 'a.tar'}: ")
        and "shard" in message
        and "train_file" in message
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("[]", "is an empty list"),
        ("[ \n ]", "is an empty list"),
        ('"text"', "is not a JSON list"),
        ("path,caption\na.jpg,a red circle\n", "tools.to_json"),
        ('{"image": "a"}\n{"image": "b"}\n', "jq -s"),
        (
            '[{"image": "a"},\n {"image" "b"}]',
            "line 2 column 11 (Expecting ':' delimiter); correct it",
        ),
        (
            '[{"image": "a"},\n {"image": "b"}\n {"image": "c"}]',
            "line 3 column 2 (Expecting ',' delimiter); correct it",
        ),
        (
            '[{"image": "a"}, {"image": bad, "caption": "long enough"}]',
            "line 1 column 28 (Expecting value); correct it",
        ),
        (
            '[{"image": "a"}]\n[{"image": "b"}]',
            "line 2 column 1 (Extra data); correct it",
        ),
        (
            '[{"image": "a"},\n {"image": "b',
            "line 2 column 12 (Unterminated string starting at), the file seems cut short",
        ),
        (
            '[{"image": "a"}, {"image": "b"',
            "column 31 (Expecting ',' delimiter), the file seems cut short",
        ),
        ('[{"image": "a"}, ', "the file seems cut short"),
        (
            '[{"image": "a"}\n',
            "line 2 column 1 (Expecting ',' delimiter), the file seems cut short",
        ),
        ("[", "the file seems cut short"),
    ],
)
def test_files_that_are_no_list_are_refused(tmp_path, text, expected):
    path = tmp_path / "bad.json"
    path.write_text(text)
    message = refusal(load, path)
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.parametrize(
    "bad, form, words",
    [
        (17, Pair, "Expected 'object', got 'int' in 17"),
        (["b"], Pair, "Expected 'object', got 'array'"),
        (
            {"caption": "a"},
            Pair,
            "missing required field 'image' in {'caption': 'a'}",
        ),
        (
            {"image": "a", "captions": ["a"]},
            Pair,
            "missing required field 'caption'",
        ),
        (
            {"image": None, "caption": "a"},
            Pair,
            "Expected 'str', got 'null' - at 'image'",
        ),
        (
            {"image": ["a.jpg"], "caption": "a"},
            Pair,
            "Expected 'str', got 'array' - at 'image'",
        ),
        ({"image": "a", "caption": []}, Pair, "of length >= 1 - at 'caption'"),
        (
            {"image": "a", "caption": ["a", None]},
            Pair,
            "got 'null' - at 'caption[1]'",
        ),
        (
            {"image": "a", "caption": {"text": "line\nbreak"}},
            Pair,
            "Expected 'str | array', got 'object'",
        ),
        (
            {"image": "a", "caption": ["a", 5]},
            RetrievalPair,
            "got 'int' - at 'caption[1]'",
        ),
        (
            {"image": "a", "caption": "b", "image_id": [1]},
            RetrievalPair,
            "got 'array' - at 'image_id'",
        ),
        (
            {"image": "a", "caption": "?!", "image_id": 1},
            RetrievalPair,
            "'?!' is empty after clean-up",
        ),
        (
            {"image": "a", "caption": "b"},
            CaptionedImage,
            '"caption": list of texts} for each image',
        ),
        (
            {"images": ["a"], "sentence": "b", "label": "True"},
            Statement,
            "of length >= 2 - at 'images'",
        ),
        (
            {"image": "a", "sentence": "b", "label": "a\nb"},
            Entailment,
            "contradiction or neutral or entailment",
        ),
        (
            {"image": "a", "question": "b", "question_id": 3.5},
            Question,
            "Expected 'int | str', got 'float'",
        ),
        (
            {"image": "a", "question": "b", "dataset": "vqa", "answer": "c"},
            TrainingQuestion,
            "'answer' is 'c'",
        ),
        (
            {"image": "a", "question": "b", "dataset": "x", "answer": "c"},
            TrainingQuestion,
            "value 'x'",
        ),
        (
            {"image": "a", "question": "b", "dataset": "\ud800", "answer": ["c"]},
            TrainingQuestion,
            "surrogates not allowed",
        ),
    ],
)
def test_entries_of_another_form_are_refused_by_number_field_and_form(tmp_path, bad, form, words):
    with pytest.raises(InputError) as caught:
        check_entry(bad, form, "list.json", 5)
    message = str(caught.value)
    assert (
        message.startswith("list.json: entry 5 (counting from 0): ")
        and words in message
        and form.wanted in message
    )
    assert "\n" not in message


@pytest.mark.parametrize("odd", [1, 3, 4])
@pytest.mark.parametrize("with_id", [True, False])
def test_all_entries_of_a_retrieval_list_have_an_image_id_or_none(tmp_path, odd, with_id):
    entries = [
        {"image": f"{i}.jpg", "caption": ["a", "b"]} | ({"image_id": i} if with_id else {})
        for i in range(5)
    ]
    path = write(tmp_path / "list.json", entries)
    groups = [entry.group for entry in Entries([path], RetrievalPair)]
    assert groups == ([*range(5)] if with_id else [f"{i}.jpg" for i in range(5)])
    entries[odd] = {"image": "a.jpg", "caption": "c"} | ({} if with_id else {"image_id": 7})
    with pytest.raises(InputError) as caught:
        Entries([write(tmp_path / "mixed.json", entries)], RetrievalPair)
    assert f"mixed.json: entry {odd} " in str(caught.value) and "'image_id'" in str(caught.value)


def test_captions_of_one_path_are_of_one_group_without_ids(tmp_path):
    entries = [
        {"image": name, "caption": "c"} for name in ("sub/a.jpg", "./sub/../sub//a.jpg", "a.jpg")
    ]
    first, same, other = (
        entry.group for entry in Entries([write(tmp_path / "list.json", entries)], RetrievalPair)
    )
    assert first == same != other


@pytest.mark.parametrize("block", [0, 1 << 16])
def test_a_wrong_entry_is_found_in_its_file_and_nothing_is_cached(
    tmp_path, folder, monkeypatch, block
):
    monkeypatch.setattr(entries_module, "_BLOCK", block)
    files = [
        write(tmp_path / "good.json", TRICKY),
        write(tmp_path / "bad.json", [*TRICKY, {"image": "a.jpg"}]),
    ]
    assert refusal(load, files[1]).startswith(f"{files[1]}: entry 4 (counting from 0): ")
    assert not stores(folder)
    assert refusal(load, *files).startswith(f"{files[1]}: entry 4 (counting from 0): ")


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    missing = str(tmp_path / "missing.json")
    fifo = tmp_path / "fifo.json"  # open() would wait for a writer
    os.mkfifo(fifo)
    for path in fifo, "/dev/zero":
        for function in (
            load,
            read_json_list,
            lambda path: read_json(path, list, "name a file"),
        ):
            assert refusal(function, path).startswith(f"{path}: ")
    for function in load, read_json_list:
        message = refusal(function, missing)
        assert message.startswith(f"{missing}: cannot read this file (No such file or directory); ")
    assert f"{tmp_path}: cannot read this file (Is a directory)" in refusal(load, tmp_path)
    latin = tmp_path / "latin.json"
    latin.write_bytes('[{"image": "caf\xe9.jpg", "caption": "a"}]'.encode("latin-1"))
    assert f"{latin}: this annotation file is not UTF-8" in refusal(load, latin)
    latin.write_bytes(b'[{"image": "a.jpg", "caption": "a", "unread": "caf\xe9"}]')
    assert f"{latin}: this annotation file is not UTF-8" in refusal(load, latin)
    assert "train_file" in refusal(load)


def test_missing_images_are_reported_with_entry_and_share(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.jpg").touch()
    files = [
        write(tmp_path / "1.json", [{"image": str(root / "0.jpg"), "caption": "absolute"}]),
        write(tmp_path / "2.json", [{"image": f"{i}.jpg", "caption": "a"} for i in range(10)]),
    ]
    loaded = load(*files)

    def pairs(entries, image_root):
        return CaptionDataset(entries, {"image_root": image_root}, None, seed=0)

    message = refusal(check_images, pairs(loaded, str(root)))
    assert message.startswith(
        f"{files[1]}: entry 8 (counting from 0): image {root / '8.jpg'} does not exist"
    )
    assert (
        "(2 of 10 checked images are missing, 20.0%)" in message and "correct image_root" in message
    )
    assert "(1 of 2 checked images" in refusal(
        functools.partial(check_images, sample=2), pairs(loaded, str(root))
    )
    (root / "8.jpg").touch()
    (root / "9.jpg").touch()
    check_images(pairs(loaded, str(root)))
    check_images(pairs(load(files[0]), None))
    message = refusal(check_images, pairs(loaded, str(tmp_path / "elsewhere")))
    assert message.startswith(f"image_root: folder {tmp_path / 'elsewhere'} does not exist")
