import io
import json
import multiprocessing
import os
import pickle

import pytest

from conftest import refusal
from dataset import annotations
from dataset.annotations import check_entry, load_annotations, read_json_list
from dataset.caption import CaptionDataset
from dataset.samples import check_images


TRICKY = [
    {"image": "a/1.jpg", "caption": "plain"},
    {"image": "b/ü 猫.jpg", "caption": ["first", "日本語 😀", ""], "image_id": 3, "score": -1.25e-7},
    {"caption": 'quotes " and \\ and } ], { [ inside', "image": "c/\t\n.jpg", "nested": {"a": [[1, 2], {"b": []}]}},
    {"image": "\udce9.jpg", "caption": ["e\u0301 \u2028 \u0000"], "flag": True, "none": None, "big": 10**40},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ALBEF_CACHE", str(folder))
    return folder


def write(path, entries, **options):
    path.write_text(json.dumps(entries, **options), encoding="utf-8")
    return str(path)


def as_pairs(entries):
    return [(entry["image"], [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"])
            for entry in entries]


def contents(loaded):
    return [(loaded.image(i), loaded.captions(i)) for i in range(len(loaded))]


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}, {"separators": (" \r\n,\t", " :")}])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_reader_gives_what_json_load_gives_wherever_chunks_end(tmp_path, monkeypatch, chunk, options):
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    entries = TRICKY * 3
    path = write(tmp_path / "list.json", entries, **options)
    assert list(read_json_list(path)) == list(enumerate(entries))


def test_reader_accepts_unescaped_unicode_and_white_space_around_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK", 3)
    path = tmp_path / "list.json"
    path.write_text("\ufeff \n [\n" + json.dumps(TRICKY[1], ensure_ascii=False) + " \n ] \n\n ", encoding="utf-8")
    assert list(read_json_list(path)) == [(0, TRICKY[1])]


@pytest.mark.parametrize("batch", [1, 1 << 16])
def test_loaded_lists_equal_the_json_of_all_files_in_order(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(annotations, "_BATCH", batch)
    one_caption = [{"image": f"{i}.jpg", "caption": "word " * i} for i in range(5)]
    files = [write(tmp_path / "1.json", TRICKY), write(tmp_path / "2.json", one_caption)]
    loaded = load_annotations(files)
    assert len(loaded) == 9
    assert contents(loaded) == as_pairs(TRICKY + one_caption)
    assert contents(load_annotations(files[1])) == as_pairs(one_caption)
    assert loaded.where(3).startswith(f"{files[0]}: entry 3 ")
    assert loaded.where(4).startswith(f"{files[1]}: entry 0 ")
    for outside in -1, 9:
        with pytest.raises(IndexError):
            loaded.image(outside)


def test_half_a_surrogate_pair_in_a_caption_becomes_a_character_that_tokenizers_accept(tmp_path):
    path = write(tmp_path / "list.json", [{"image": "a.jpg", "caption": "cut emoji \ud83d"}])
    assert load_annotations(path).captions(0) == ["cut emoji ?"]


def test_offsets_beyond_4_gib_take_8_bytes(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "list.json", TRICKY)
    load_annotations(path)
    small, = cache.iterdir()
    small_bytes = small.stat().st_size
    small.unlink()
    monkeypatch.setattr(annotations, "_UINT32_END", 50)
    loaded = load_annotations(path)
    large, = cache.iterdir()
    assert large.stat().st_size >= small_bytes + 4 * 10
    assert contents(loaded) == as_pairs(TRICKY)


def test_cache_holds_little_more_than_the_strings(tmp_path, cache):
    entries = [{"image": f"cc12m/{i:05d}/{i:09d}.jpg", "caption": f"a caption of usual length, number {i}"}
               for i in range(2000)]
    load_annotations(write(tmp_path / "list.json", entries))
    file, = cache.iterdir()
    assert file.stat().st_size < 1.3 * sum(len(entry["image"] + entry["caption"]) for entry in entries)


def test_cache_is_used_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "list.json", TRICKY)
    load_annotations(path)
    with monkeypatch.context() as patch:
        patch.delattr(annotations, "_build_cache")
        assert contents(load_annotations(path)) == as_pairs(TRICKY)
    write(tmp_path / "list.json", TRICKY[:2])
    assert contents(load_annotations(path)) == as_pairs(TRICKY[:2])
    same_size = [{**entry, "image": entry["image"].replace("jpg", "png")} for entry in TRICKY[:2]]
    write(tmp_path / "list.json", same_size)
    os.utime(path, ns=(1, 1))
    assert contents(load_annotations(path)) == as_pairs(same_size)


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-9], lambda content: content[::-1]])
def test_damaged_cache_is_built_again(tmp_path, cache, damage):
    path = write(tmp_path / "list.json", TRICKY)
    load_annotations(path)
    file, = cache.iterdir()
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(content))
    assert contents(load_annotations(path)) == as_pairs(TRICKY)


def test_cache_goes_to_the_temporary_folder_when_its_own_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("ALBEF_CACHE", str(tmp_path / "occupied" / "cache"))
    monkeypatch.setattr(annotations.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    path = write(tmp_path / "list.json", TRICKY)
    assert contents(load_annotations(path)) == as_pairs(TRICKY)
    assert len(list((tmp_path / "tmp").glob("*/annotations-*.bin"))) == 1
    monkeypatch.setattr(annotations.tempfile, "gettempdir", lambda: str(tmp_path / "occupied"))
    assert "ALBEF_CACHE" in refusal(load_annotations, path)


def test_processes_that_start_together_build_and_share_one_cache(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "list.json", TRICKY * 500)
    context = multiprocessing.get_context("fork")
    barrier, builds, results = context.Barrier(3), context.Value("i"), context.Queue()
    build = annotations._build_cache

    def counted_build(*arguments):
        with builds.get_lock():
            builds.value += 1
        build(*arguments)

    def load_when_all_are_ready():
        barrier.wait()
        results.put(contents(load_annotations(path)))

    monkeypatch.setattr(annotations, "_build_cache", counted_build)
    workers = [context.Process(target=load_when_all_are_ready) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [as_pairs(TRICKY * 500)] * 3
    assert builds.value == 1
    assert len(list(cache.iterdir())) == 1


def test_processes_that_cannot_lock_all_build_a_complete_cache(tmp_path, monkeypatch, cache):
    path = write(tmp_path / "list.json", TRICKY)
    build = annotations._build_cache

    def built_by_another_meanwhile(*arguments):
        build(*arguments)
        build(*arguments)

    def no_locks(*arguments):
        raise OSError("no locks available")

    monkeypatch.setattr(annotations, "_build_cache", built_by_another_meanwhile)
    monkeypatch.setattr(annotations.fcntl, "flock", no_locks)
    assert contents(load_annotations(path)) == as_pairs(TRICKY)
    assert len(list(cache.iterdir())) == 1


def test_pickle_reopens_the_cache_instead_of_carrying_it(tmp_path):
    entries = [{"image": f"{i}.jpg", "caption": "a b c d e f"} for i in range(1000)]
    loaded = load_annotations(write(tmp_path / "list.json", entries))
    pickled = pickle.dumps(loaded)
    assert len(pickled) < 1000
    assert contents(pickle.loads(pickled)) == as_pairs(entries)


@pytest.mark.parametrize("text, expected", [
    ("", "is empty"),
    (" \n ", "is empty"),
    ("[]", "is an empty list"),
    ("[ \n ]", "is an empty list"),
    ('"text"', "is not a JSON list"),
    ('{"image": "a"}\n{"image": "b"}\n', "jq -s"),
    ('[{"image": "a"}, 17]', "entry 1 (counting from 0) is 17, not an object"),
    ('[{"image": "a"}, ["b"]]', "entry 1 (counting from 0) is ['b'], not an object"),
    ('[{"image": "a"},\n {"image" "b"}]', "line 2 column 11 (Expecting ':' delimiter); correct it"),
    ('[{"image": "a"},\n {"image": "b"}\n {"image": "c"}]', "line 3 column 2 (Expecting ',' or ']'); correct it"),
    ('[{"image": "a"}, {"image": bad, "caption": "long enough"}]', "line 1 column 28 (Expecting value); correct it"),
    ('[{"image": "a"}]\n[{"image": "b"}]', "line 2 column 1 (Extra data after the list); correct it"),
    ('[{"image": "a"},\n {"image": "b', "line 2 column 12 (Unterminated string starting at); the file seems cut short"),
    ('[{"image": "a"}, {"image": "b"', "column 31 (Expecting ',' delimiter); the file seems cut short"),
    ('[{"image": "a"}, ', "the file seems cut short"),
    ('[{"image": "a"}\n', "line 2 column 1 (Expecting ',' or ']'); the file seems cut short"),
    ("[", "the file seems cut short"),
])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_files_that_are_no_list_of_objects_are_refused(tmp_path, monkeypatch, chunk, text, expected):
    monkeypatch.setattr(annotations, "_CHUNK", chunk)
    path = tmp_path / "bad.json"
    path.write_text(text)
    message = refusal(lambda: list(read_json_list(path)))
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_a_mistake_is_reported_without_reading_the_rest_of_the_file(monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK", 64)
    file = io.StringIO('[{"image": oops, "caption": "a"}' + ', {"image": "a", "caption": "a"}' * 1000 + "]")
    refusal(list, annotations._decode_list(file, "bad.json"))
    assert file.tell() <= 128


@pytest.mark.parametrize("bad, expected", [
    ({"caption": "a"}, "has no 'image', a string; it has ['caption']"),
    ({"image": "a.jpg", "captions": ["a"]}, "has no 'caption', a string or a non-empty list of strings"),
    ({"image": None, "caption": "a"}, "'image' is None, but must be a string"),
    ({"image": ["a.jpg"], "caption": "a"}, "'image' is ['a.jpg'], but"),
    ({"image": "a.jpg", "caption": []}, "'caption' is [], but must be a string or a non-empty list of strings"),
    ({"image": "a.jpg", "caption": ["a", 3]}, "'caption' is ['a', 3], but"),
    ({"image": "a.jpg", "caption": {"text": "line\nbreak"}}, "'caption' is {"),
])
def test_entries_without_image_or_caption_are_refused_by_number(tmp_path, cache, bad, expected):
    files = [write(tmp_path / "good.json", TRICKY), write(tmp_path / "bad.json", TRICKY + [bad])]
    message = refusal(load_annotations, files)
    assert message.startswith(f"{files[1]}: entry 4 (counting from 0)")
    assert expected in message
    assert not list(cache.iterdir())


def test_check_entry_knows_the_keys_of_other_tasks():
    keys = {"question": str, "question_id": (int, str), "answer": list}
    check_entry({"question": "what", "question_id": 3, "answer": ["yes"]}, keys, "vqa.json", 5)
    message = refusal(check_entry, {"question": "what", "question_id": 3.5, "answer": ["yes"]}, keys, "vqa.json", 5)
    assert message == "vqa.json: entry 5 (counting from 0): 'question_id' is 3.5, but must be an integer or a string"


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    missing = str(tmp_path / "missing.json")
    for function in load_annotations, lambda path: list(read_json_list(path)):
        message = refusal(function, missing)
        assert message.startswith(f"{missing}: cannot read this annotation file (No such file or directory); ")
    assert f"{tmp_path}: cannot read this annotation file (Is a directory)" in refusal(load_annotations, tmp_path)
    latin = tmp_path / "latin.json"
    latin.write_bytes('[{"image": "caf\xe9.jpg", "caption": "a"}]'.encode("latin-1"))
    assert f"{latin}: this annotation file is not UTF-8" in refusal(load_annotations, latin)
    assert "train_file" in refusal(load_annotations, [])


def test_missing_images_are_reported_with_entry_and_share(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(8):
        (root / f"{i}.jpg").touch()
    files = [write(tmp_path / "1.json", [{"image": str(root / "0.jpg"), "caption": "absolute"}]),
             write(tmp_path / "2.json", [{"image": f"{i}.jpg", "caption": "a"} for i in range(10)])]
    loaded = load_annotations(files)

    def pairs(annotations, image_root):
        return CaptionDataset(annotations, image_root, None, seed=0, max_tokens=25)

    message = refusal(check_images, pairs(loaded, str(root)))
    assert message.startswith(f"{files[1]}: entry 8 (counting from 0): image {root / '8.jpg'} does not exist")
    assert "(2 of the 10 images checked are missing, 20.0%)" in message and "correct image_root" in message
    assert "(1 of the 2 images checked" in refusal(check_images, pairs(loaded, str(root)), 2)
    (root / "8.jpg").touch()
    (root / "9.jpg").touch()
    check_images(pairs(loaded, str(root)))
    check_images(pairs(load_annotations(files[0]), None))
    message = refusal(check_images, pairs(loaded, str(tmp_path / "elsewhere")))
    assert message.startswith(f"image_root: folder {tmp_path / 'elsewhere'} does not exist")
