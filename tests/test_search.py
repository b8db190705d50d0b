"""tools.search: an index that equals its folders, results of the evaluation, bad input."""

import base64
import contextlib
import functools
import html
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, exit_status, limit, refusal
from filelock import FileLock
from PIL import Image

from dataset.build import build_dataset
from dataset.shapes.scenes import draw_scene, render
from evaluation import retrieval
from inference import index as indexing
from inference import load_model
from inference.index import (
    FEATURES,
    IMAGES,
    INDEX,
    Index,
    Row,
    find_images,
    hash_picture,
    near_copies,
    read_index,
    search,
)
from tools import search as tool
from tools.export import export_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(files):
    """A folder of checkpoints of tiny random models, TASK.pth."""
    return files["retrieval"].parent


@pytest.fixture
def run(run_main):
    """Runs the tool; returns (exit status, stdout, stderr)."""
    return functools.partial(run_main, "tools.search")


@pytest.fixture
def index(run, checkpoints, tmp_path):
    """Indexes folders (and flags) into tmp_path / name; returns what the tool prints."""

    def call(*folders, name="index", checkpoint="retrieval.pth"):
        status, out, err = run(
            "index", *folders, "--checkpoint", checkpoints / checkpoint, "--output", tmp_path / name
        )
        assert status == 0 and out.count("\n") == 1, err
        return err + out

    return call


def draw_photo(path, seed):
    """Writes a JPEG file of 500 x 375 pixels, a scene of shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render(draw_scene(random.Random(seed), "train", 96)).resize((500, 375)).save(path, quality=90)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of photos, two folders deep."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(60):
        draw_photo(folder / f"{number % 3}/{number % 2}/{number:02d}.jpg", number)
    return folder


def assert_same(left, right):
    """Asserts that two indexes are equal, apart from the rounding of other batches."""
    assert left._replace(features=None) == right._replace(features=None)
    assert np.allclose(left.features.astype(np.float32), right.features, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# results


@pytest.mark.parametrize("k", [0, 12])
def test_a_text_finds_what_the_retrieval_evaluation_reports(
    index, checkpoints, shapes, tmp_path, monkeypatch, k
):
    index(shapes / "images/test")
    model, found = load_model(checkpoints / "retrieval.pth", "cpu"), read_index(tmp_path / "index")
    dataset = build_dataset("retrieval", "test", model.config)
    encode = retrieval.encode_images

    def encode_in_float16(
        *args, **options
    ):  # as the index has them, so that no tie is broken differently
        embeds, features = encode(*args, **options)
        return embeds, features.half().float()

    monkeypatch.setattr(retrieval, "encode_images", encode_in_float16)
    rankings = {}
    report = SimpleNamespace(title="", write=lambda _, content: rankings.update(content))
    metrics = retrieval.evaluate(
        model.model, dataset, model.tokenizer, model.config, CPU, report, ks=[k or 4]
    )
    ranks = []
    for text, image in enumerate(dataset.txt2img):
        hits = search(found, model, dataset.texts[text], k=12, rerank=k)
        best = [hit.path for hit in hits]
        assert len(best) == 12
        ranks.append(best.index(str(dataset.files(image)[0])))
        expected = [
            str(shapes / result["image"]) for result in rankings["text_to_image"][text]["results"]
        ]
        assert not k or best[: len(expected)] == expected
    prefix = "" if k else "itc_"
    for cut in (1, 5, 10):
        assert np.mean(np.array(ranks) < cut) * 100 == pytest.approx(metrics[f"{prefix}img_r{cut}"])


def test_query_prints_paths_with_scores_and_reads_only_candidates(
    run, index, checkpoints, photos, tmp_path
):
    index(photos)
    model, found = load_model(checkpoints / "retrieval.pth", "cpu"), read_index(tmp_path / "index")
    command = ["query", tmp_path / "index", "a red circle", "-k", 3, "--rerank", 5]
    status, out, err = run(*command)
    ranked = model.rank(found.paths, "a red circle", k=3, rerank=5, image_features=found.features)
    best = [found.paths[i] for i, _ in ranked]
    probs = model.match(best, "a red circle").tolist()
    lines = [line.split(None, 2) for line in out.splitlines()]
    assert status == 0 and err.splitlines()[-1].split() == ["ITM", "ITC", "image"]
    sim = model.similarity(found.features, "a red circle") / model.model.temp.item()
    itc = [sim.softmax(dim=0)[found.paths.index(path)].item() for path in best]
    assert lines == [
        [f"{prob:.1%}", f"{share:.1%}", path]
        for prob, share, path in zip(probs, itc, best, strict=True)
    ]
    rows = [json.loads(line) for line in run(*command, "--json")[1].splitlines()]
    assert [row["path"] for row in rows] == best and [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["match"] for row in rows] == pytest.approx(probs, abs=1e-5)
    assert rows[0]["query"] == "a red circle" and -1 < rows[0]["similarity"] < 1
    assert [row["itc"] for row in rows] == pytest.approx(itc, abs=1e-5)
    assert run(*command, "--threshold", sorted(probs)[1] - 1e-6)[1].count(".jpg") >= 2
    assert run(*command, "--threshold", 1.1)[1] == ""
    gone = Path(best[0])
    moved = gone.rename(tmp_path / "moved.jpg")
    try:
        left = [hit.path for hit in search(found, model, "a red circle", k=3, rerank=5)]
        assert str(gone) not in left and left[0] == best[1]
    finally:
        moved.rename(gone)
    indexing.write_index(tmp_path / "index", found._replace(left=7))
    status, again, err = run(*command)
    assert status == 0 and again == out and "7 images are not indexed" in err


def test_several_queries_of_a_file_are_those_of_single_ones(run, index, photos, tmp_path):
    index(photos / "0")
    texts = ["a red circle", "a star"]
    (tmp_path / "queries.txt").write_text("\n".join([*texts, "", " "]))
    command = ["query", tmp_path / "index", "-k", 2]
    single = [run("query", tmp_path / "index", text, "-k", 2)[1] for text in texts]
    _, out, _ = run(*command, "--queries", tmp_path / "queries.txt")
    assert out == "".join(f"{text}:\n{hits}\n" for text, hits in zip(texts, single, strict=True))
    _, out, _ = run(*command, "--queries", tmp_path / "queries.txt", "--json")
    assert [json.loads(line)["query"] for line in out.splitlines()] == [
        text for text in texts for _ in range(2)
    ]


def test_an_example_finds_itself_and_with_a_text_both_count(
    run, index, checkpoints, photos, tmp_path
):
    index(photos)
    model, found = load_model(checkpoints / "retrieval.pth", "cpu"), read_index(tmp_path / "index")
    status, out, _ = run("query", tmp_path / "index", "--image", found.paths[7], "-k", 1)
    match, score, path = out.split()
    assert status == 0 and match == "-" and path == found.paths[7]
    sim = model.similarity(found.features, found.features[7:8])[:, 0] / model.model.temp.item()
    assert float(score[:-1]) == pytest.approx(100 * sim.softmax(dim=0)[7].item(), abs=0.11)
    text = model.embed_texts("a red circle")
    both = torch.tensor(found.features).float() @ (model.embed_images(found.paths[7]) + text) / 2
    best = search(found, model, "a red circle", image=found.paths[7], k=4, rerank=0)
    assert [hit.path for hit in best] == [found.paths[i] for i in both.topk(4).indices]
    ranked = search(found, model, "a red circle", image=found.paths[7], k=4, rerank=4)
    assert {hit.path for hit in ranked} == {hit.path for hit in best}
    assert all(0 < hit.match < 1 for hit in ranked)


def test_near_copies_are_those_of_a_plain_search(monkeypatch):
    monkeypatch.setattr(indexing, "ROWS", 7)
    values = np.random.default_rng(0).integers(0, 256, (50, 2), np.uint8)
    hashes = [row.tobytes().hex() for row in values]
    rows = [Row(str(number), 0, 0, value) for number, value in enumerate(hashes)]
    found = Index(rows, np.zeros((50, 4)), "", "", "", {}, 0)
    bits, group = np.unpackbits(values, axis=1), list(range(50))
    equal = (bits[:, None] == bits).mean(axis=2)
    for i in range(1, 50):
        j = equal[i, :i].argmax()
        group[i] = group[j] if equal[i, j] >= 0.8 else i
    expected = [
        [str(i) for i in range(50) if group[i] == first]
        for first in sorted(set(group))
        if group.count(first) > 1
    ]
    groups = near_copies(found, 0.8, CPU)
    assert len(expected) > 3 and [[copy.path for copy in members] for members in groups] == expected
    for first, *others in groups:
        assert first.likeness == 1
        for path, likeness in others:
            assert likeness == equal[int(path), : int(path)].max() >= 0.8


def test_duplicates_lists_copies_of_a_photo_and_no_other_one(run, index, picture, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    wide, high = picture.size
    for number in range(12):  # parts of the picture that share no pixel
        x, y = number % 4 * wide // 4, number // 4 * high // 3
        part = picture.crop((x, y, x + wide // 4, y + high // 3)).resize((400, 300))
        part.save(folder / f"{number:02d}.jpg", quality=95)
    original = Image.open(folder / "03.jpg")
    original.resize((200, 150)).save(folder / "smaller.png")
    original.save(folder / "coarse.jpg", quality=30)
    original.crop((8, 6, 392, 294)).save(folder / "trimmed.jpg")
    original.point(lambda value: min(255, value * 1.1)).save(folder / "lighter.jpg")
    index(folder)
    copies = {"03.jpg", "smaller.png", "coarse.jpg", "trimmed.jpg", "lighter.jpg"}
    status, out, err = run("duplicates", tmp_path / "index", "--html", tmp_path / "page.html")
    assert status == 0 and {Path(line.split()[1]).name for line in out.splitlines() if line} == (
        copies
    )
    assert re.fullmatch("1 groups of 5 images", err.splitlines()[-1])
    _, out, _ = run("duplicates", tmp_path / "index", "--json")
    (group,) = map(json.loads, out.splitlines())
    assert {Path(copy["path"]).name for copy in group} == copies
    assert all(copy["likeness"] > 0.75 for copy in group)
    text = (tmp_path / "page.html").read_text()
    links = [urllib.parse.urlsplit(link).path for link in re.findall('href="([^"]*)"', text)]
    assert {Path(link).name for link in links} == copies and text.count("<main>") == 1


def test_the_bits_of_a_hash_are_those_of_the_cosine_transform():
    gray = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    value = hash_picture(torch.from_numpy(gray).expand(3, 32, 32))
    n, k = np.arange(32), np.arange(12)[:, None]
    waves = np.cos(np.pi * (n + 0.5) * k / 32) * np.where(k, 1, 0.5**0.5)
    values = waves @ gray.astype(float) @ waves.T
    assert bytes.fromhex(value) == np.packbits(values > np.median(values)).tobytes()


def test_the_example_of_the_docs_runs(index, photos, tmp_path, capsys):
    index(photos / "0", name="photos")
    page = (ROOT / "docs/inference.md").read_text().partition("### Search in Python")[2]
    code = page.split("```python\n")[1].split("```")[0]
    exec(code.replace('"output/photos"', repr(str(tmp_path / "photos"))), {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "20 (20, 8)"
    assert [line.split()[0].endswith(".jpg") for line in lines[-4:]] == [True] * 3 + [False]


# --------------------------------------------------------------------------------------------------
# indexing


def slowly(load, *arguments):
    time.sleep(0.03)
    return load(*arguments)


def test_killed_twice_changed_and_thinned_it_equals_one_made_in_one_go(
    index, photos, checkpoints, tmp_path, monkeypatch
):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("a", "0/b", "0/1/c"):
        (folder / f"{name}.jpg").write_bytes(b"no image")
    monkeypatch.setattr(indexing, "SAVE_EVERY", 0)
    argv = [
        "search",
        "index",
        folder,
        "--checkpoint",
        checkpoints / "retrieval.pth",
        "--output",
        tmp_path / "index",
        "--set",
        "batch_size_test=1",
        "num_workers=1",
    ]

    def index_slowly():
        os.dup2(os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", closefd=False),
            os.fdopen(2, "w", closefd=False),
        )
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        load = functools.partial(slowly, indexing.load_image)
        monkeypatch.setattr(indexing, "load_image", load)
        os._exit(exit_status(tool.main))

    rng, done = random.Random(0), 0
    for signum in (signal.SIGKILL, signal.SIGTERM):
        process = multiprocessing.get_context("fork").Process(target=index_slowly)
        process.start()
        while (
            not (tmp_path / "index" / INDEX).exists()
            or len(read_index(tmp_path / "index").paths) < done + 12
        ):
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signum)
        process.join()
        assert process.exitcode == (-signum if signum == signal.SIGKILL else 128 + signum)
        state = read_index(tmp_path / "index")
        assert done < len(state.paths) < 60 and state.left
        done = len(state.paths)
    assert (
        "SIGTERM" in (tmp_path / "output").read_text()
        and "repeat the command to continue" in (tmp_path / "output").read_text()
    )

    every = sorted(folder.rglob("*[0-9].jpg"))
    indexed = [Path(path) for path in state.paths]
    changed, removed = indexed[:10] + every[-10:], every[1::6]
    for number, path in enumerate(set(changed) - set(removed)):
        draw_photo(path, 1000 + number)
    for path in removed:
        path.unlink()
    kept = len(set(indexed) - set(changed) - set(removed))
    gone = len(set(indexed) & set(removed))
    assert kept > 5 and gone
    out = index(folder, "--prune")
    assert f"50 images, {kept} unchanged, {50 - kept} embedded" in out and f"{gone} removed" in out
    index(folder, name="anew")
    assert_same(read_index(tmp_path / "index"), read_index(tmp_path / "anew"))
    again = index(folder)
    assert "50 images, 50 unchanged, 0 embedded, 0 removed" in again
    assert again.count("not an image") == 3


def test_what_cannot_be_used_is_named_and_tried_again(index, photos, checkpoints, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos / "0", folder / "good")
    Image.new("1", (20000, 10000)).save(folder / "huge.png")
    (folder / "empty.jpg").touch()
    (folder / "text.gif").write_text("not an image")
    (folder / "cut.jpg").write_bytes((photos / "0/0/00.jpg").read_bytes()[:3000])
    (folder / "line\nbreak.jpg").write_text("")
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    (folder / "notes.txt").write_text("nothing to see")
    out = index(folder)
    assert (
        "20 images, 0 unchanged, 20 embedded" in out
        and out.count("left out ") == 7
        and "1 .txt" in out
    )
    expected = {
        "huge.png": "too large (Image size (200000000 pixels)",
        "empty.jpg": "empty file",
        "text.gif": "not an image",
        "cut.jpg": "broken image",
        "line\\nbreak.jpg'": "empty file",
        "dangling.jpg": "No such file",
    }
    for name, problem in expected.items():
        assert f"{name}: {problem}" in out
    (folder / "dangling.jpg").unlink()
    draw_photo(folder / "dangling.jpg", 1)
    assert "21 images, 20 unchanged, 1 embedded" in index(folder)


def test_indexing_adds_and_prune_removes(run, index, photos, checkpoints, tmp_path):
    folder = shutil.copytree(photos / "0", tmp_path / "mine")
    (folder / "IMG_1.HEIC").touch()
    assert "1 .heic" in index(folder)
    assert "40 images, 20 unchanged, 20 embedded" in index(photos / "1")
    (folder / "0/00.jpg").unlink()
    both = read_index(tmp_path / "index")
    assert "40 images, 40 unchanged, 0 embedded" in index(folder) and "0 removed" in index(
        photos / "1"
    )
    assert_same(read_index(tmp_path / "index"), both)
    assert "39 images, 39 unchanged, 0 embedded, 1 removed" in index(
        folder, photos / "1", "--prune"
    )
    assert "20 images, 20 unchanged, 0 embedded, 19 removed" in index(photos / "1", "--prune")
    index(photos / "1", name="anew")
    assert_same(read_index(tmp_path / "index"), read_index(tmp_path / "anew"))


def test_a_change_is_seen_by_its_date_alone(index, photos, tmp_path):
    first, second = (Image.open(photos / f"0/0/{name}.jpg") for name in ("00", "06"))
    (tmp_path / "photos").mkdir()
    first.save(tmp_path / "photos/a.bmp")
    index(tmp_path / "photos")
    before = read_index(tmp_path / "index")
    second.save(tmp_path / "photos/a.bmp")
    assert "1 images, 0 unchanged, 1 embedded" in index(tmp_path / "photos")
    after = read_index(tmp_path / "index")
    assert before.rows[0].size == after.rows[0].size
    assert not np.array_equal(before.features, after.features)


def test_every_image_at_any_depth_is_found_once(photos, tmp_path):
    folder = tmp_path / "photos"
    picture = Image.open(photos / "0/0/00.jpg").resize((8, 8))
    names = [
        "z.JPG",
        "a/b/c/d/e.png",
        "a/b.webp",
        "ä ö/ü.tif",
        "a.bmp",
        "b.ppm",
        "c.gif",
        "d.jpeg",
        "e.jfif",
    ]
    for name in [*names, ".hidden.jpg", ".hidden/a.jpg", "a/.hidden.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, {".jfif": "JPEG", ".ppm": "PPM"}.get(Path(name).suffix))
    for name in ("IMG.HEIC", "a/b/img.heic", "noextension", ".hidden.heic"):
        (folder / name).touch()
    (tmp_path / "other").mkdir()
    picture.save(tmp_path / "other/f.jpg")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "a/loop").symlink_to(folder)
    (folder / b"latin-\xfc.jpg".decode("utf-8", "surrogateescape")).write_bytes(
        (folder / "z.JPG").read_bytes()
    )
    found, problems, others = find_images([folder, folder / "a", tmp_path / "other"])
    expected = {str(folder / name) for name in [*names, "linked/f.jpg", "latin-\udcfc.jpg"]}
    assert set(found) == expected and list(found) == sorted(found) and not problems
    assert others == {".heic": 2, "": 1}
    assert found[str(folder / "z.JPG")] == (
        (folder / "z.JPG").stat().st_size,
        (folder / "z.JPG").stat().st_mtime_ns,
    )


def test_an_exported_checkpoint_is_the_same_one_and_another_precision_too(
    run, index, photos, checkpoints, tmp_path
):
    index(photos / "0")
    export_file(checkpoints / "retrieval.pth", tmp_path / "model.safetensors")
    status, out, err = run(
        "index",
        photos / "0",
        "--checkpoint",
        tmp_path / "model.safetensors",
        "--output",
        tmp_path / "index",
        "--set",
        "precision=bf16",
    )
    assert status == 0 and "20 unchanged, 0 embedded" in out
    found = read_index(tmp_path / "index")
    assert (
        found.checkpoint == str(tmp_path / "model.safetensors")
        and found.config["precision"] == "bf16"
    )
    (tmp_path / "model.safetensors").unlink()
    status, _, err = run("query", tmp_path / "index", "a star")
    assert (
        status == 2
        and "its checkpoint" in err
        and "does not exist; give its path with --checkpoint" in err
    )
    assert (
        run("query", tmp_path / "index", "a star", "--checkpoint", checkpoints / "retrieval.pth")[0]
        == 0
    )


def test_an_index_ranks_as_its_checkpoint_was_measured(run, index, photos, checkpoints, tmp_path):
    content = torch.load(checkpoints / "retrieval.pth", weights_only=True)
    content["ranking"] = {"by": "itc", "k": 3, "itc": 30.0, "itm": 20.0}
    torch.save(content, tmp_path / "measured.pth")
    index(photos / "0", checkpoint=tmp_path / "measured.pth")
    command = ["query", tmp_path / "index", "a star"]
    _, out, err = run(*command)
    assert {line.split()[0] for line in out.splitlines()} == {"-"} and "30.0%" in err
    assert run(*command, "--rerank", 3)[1] != out
    index(photos / "0", name="plain")
    _, out, err = run("query", tmp_path / "plain", "a star")
    assert "-" not in out.split()[0] and "better" not in err


# --------------------------------------------------------------------------------------------------
# standard output


def test_a_text_of_unknown_words_has_a_note_and_a_ranking(run, index, photos, tmp_path):
    index(photos / "0")
    for text, notes in (("赤いパンダ", 1), ("a 赤いパンダ", 0), ("a red circle", 0)):
        status, out, err = run("query", tmp_path / "index", text, "-k", 3)
        assert (
            status == 0
            and out.count("\n") == 3
            and err.count("note: ") == notes
            and err.count("赤いパンダ") == notes
        )


@pytest.mark.parametrize("command", ["index", "query", "duplicates", "--help"])
def test_standard_output_may_be_closed(
    run, index, photos, checkpoints, tmp_path, monkeypatch, capsys, command
):
    index(photos / "0")
    shutil.copy(photos / "0/0/00.jpg", tmp_path / "copy.jpg")
    index(tmp_path)
    arguments = {
        "index": [photos / "0", "--checkpoint", checkpoints / "retrieval.pth", "--output"],
    }.get(command, [])
    arguments += [tmp_path / "index"] * (command != "--help") + ["a star"] * (command == "query")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        patch.setattr(sys, "argv", ["search", command, *map(str, arguments)])
        assert exit_status(tool.main) == 0
        assert os.path.samestat(os.fstat(writer), os.stat(os.devnull))  # later output is dropped
    assert "rror" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# the page


def test_the_page_opens_from_disk_whatever_the_paths(run, index, photos, tmp_path):
    folder, source = tmp_path / "photos", photos / "0/0/00.jpg"
    names = [
        "a b.jpg",
        'it\'s "quoted".jpg',
        "ä ö/ü ß.jpg",
        "line\nbreak.jpg",
        "<b>&amp;.jpg",
        "100%23#?.jpg",
        "日本.jpg",
        b"latin-\xfc.jpg".decode("utf-8", "surrogateescape"),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)
    rotated = Image.Exif()
    rotated[0x112] = 6
    Image.open(source).save(folder / "turned.jpg", exif=rotated)
    index(folder)
    status, out, _ = run(
        "query", tmp_path / "index", "a <i>star</i> & more", "--html", tmp_path / "page.html"
    )
    assert status == 0 and len(out.splitlines()) == 9 and "line\\nbreak.jpg" in out
    text = (tmp_path / "page.html").read_text()
    links, pictures = (re.findall(f'{name}="([^"]*)"', text) for name in ("href", "src"))
    paths = {os.fsdecode(urllib.parse.unquote_to_bytes(link[len("file://") :])) for link in links}
    assert paths == {str(folder / name) for name in [*names, "turned.jpg"]}
    assert "http" not in text and not {"b", "i", "script", "link"} & {*re.findall(r"<(\w+)", text)}
    assert "a <i>star</i> & more" in html.unescape(text) and "<b>&amp;.jpg" in html.unescape(text)
    data = [io.BytesIO(base64.b64decode(picture.partition("base64,")[2])) for picture in pictures]
    assert len(data) == 9 and {Image.open(file).size for file in data} == {(480, 360), (360, 480)}


# --------------------------------------------------------------------------------------------------
# bad input


HUGE = Image.new("1", (20000, 10000))
BAD = {
    "no such folder": ("index {}/nowhere", "nowhere: No such file or directory"),
    "a file": ("index {}/text.txt", "text.txt: Not a directory"),
    "an empty folder": (
        "index {}/photos {}/empty",
        "empty: no .* image in this folder or below it",
    ),
    "other files": (
        "index {}/others",
        "others: no .* image in this folder or below it .*other files: 1 .*, 1 ",
    ),
    "no checkpoint": ("index {}/photos --checkpoint no.pth", "no.pth does not exist"),
    "another task": (
        "index {}/photos --checkpoint {}/vqa.pth",
        "vqa.pth is a checkpoint of task vqa, which lacks this method",
    ),
    "another checkpoint": (
        "index {}/photos --checkpoint {}/pretrain.pth",
        "the index was made with another model than .*pretrain.pth; .*retrieval.pth",
    ),
    "another folder": ("index {}/photos --output {}/photos", "photos: has files but no index"),
    "unwritable": (
        "index {}/photos --output {}/text.txt/index",
        "text.txt/index: cannot write there",
    ),
    "key": ("index {}/photos --set image_rse=3", "image_rse"),
    "flag": ("query {}/index star --htlm a.html", "did you mean --html"),
    "command": ("search {}/index star", "invalid choice: 'search'"),
    "unreadable queries": ("query {}/index --queries {}/photos", "photos: cannot be read"),
    "a text and queries": ("query {}/index star --queries {}/text.txt", "neither TEXT nor"),
    "no index": ("query {}/photos star", "photos: no index there"),
    "index is a file": ("query {}/text.txt star", "text.txt: no index there"),
    "no JSON": ("query {}/nojson star", "nojson/index.json: .*remove .*nojson and index"),
    "other JSON": (
        "index {}/photos --output {}/otherjson",
        "otherjson/index.json: .*remove .*otherjson and index",
    ),
    "other type": ("query {}/othertype star", "othertype/index.json: .*checkpoint"),
    "other configuration": (
        "index {}/photos --output {}/otherconfig",
        "otherconfig/index.json: config: exif",
    ),
    "other path": (
        "index {}/photos --output {}/otherpath",
        "otherpath: the index is damaged .*remove it and index",
    ),
    "other hash": (
        "duplicates {}/otherhash",
        "otherhash: the index is damaged .*remove it and index",
    ),
    "other features": (
        "query {}/otherfeatures star",
        "otherfeatures: the index is damaged .*remove it and index",
    ),
    "damaged index": (
        "query {}/damaged star",
        "damaged: the index is damaged .*remove it and index",
    ),
    "nothing to search": ("query {}/index", "give a text, an image or both"),
    "blank text": ("query {}/index ?!", "nothing is left of it"),
    "empty text": ("query {}/index ''", "nothing is left of it"),
    "no such example": ("query {}/index --image no.jpg", "no.jpg: does not exist"),
    "text as example": ("query {}/index --image {}/text.txt", "text.txt: not an image"),
    "200 megapixels": (
        "query {}/index --image {}/huge.png",
        "huge.png: too large .Image size .200000000 pixels",
    ),
    "other weights": (
        "query {}/index star --checkpoint {}/pretrain.pth",
        "the index was made with another model",
    ),
    "k": ("query {}/index star -k 0", "argument -k: 0 is out of range"),
    "page": ("query {}/index star --html {}/nowhere/page.html", "page.html: cannot write there"),
    "threshold": (
        "duplicates {}/index --threshold 2",
        "--threshold 2.0 is out of range",
    ),
    "all gone": ("query {}/gone star", "the images of all hits are missing"),
    "none usable": (
        "index {}/broken --output {}/new",
        "none of 1 images can be used, for example .*broken/a.jpg: not an image",
    ),
}


@pytest.fixture(scope="module")
def folder(checkpoints, photos, tmp_path_factory):
    """A folder with an index and what is wrong with the rest."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("retrieval", "pretrain", "vqa"):
        (folder / f"{name}.pth").symlink_to(checkpoints / f"{name}.pth")
    (folder / "photos").symlink_to(photos / "0")
    (folder / "empty").mkdir()
    (folder / "others").mkdir()
    for name in ("a.HEIC", "b"):
        (folder / "others" / name).touch()
    (folder / "text.txt").write_text("a text")
    (folder / "broken").mkdir()
    (folder / "broken/a.jpg").write_text("a text")
    HUGE.save(folder / "huge.png")
    model = load_model(folder / "retrieval.pth", "cpu")
    indexing.update_index(
        folder / "index",
        indexing.open_index(folder / "index"),
        model,
        find_images([folder / "photos"])[0],
    )
    gone = read_index(folder / "index")
    for name in ("gone", "damaged", "nojson", "otherjson"):
        shutil.copytree(folder / "index", folder / name)
    rows = [row._replace(path=f"/nowhere{row.path}") for row in gone.rows]
    indexing.write_index(folder / "gone", gone._replace(rows=rows))
    (folder / "damaged" / FEATURES).write_bytes((folder / "index" / FEATURES).read_bytes()[:200])
    (folder / "nojson" / INDEX).write_text("{")
    (folder / "otherjson" / INDEX).write_text("{}")
    config = {**gone.config, "exif": 5}
    for name, index in {
        "othertype": gone._replace(checkpoint=5),
        "otherconfig": gone._replace(config=config),
        "otherpath": gone._replace(rows=[row._replace(path=5) for row in gone.rows]),
        "otherhash": gone._replace(rows=[row._replace(hash="ab") for row in gone.rows]),
        "otherfeatures": gone._replace(features=gone.features[:, :4]),
    }.items():
        (folder / name).mkdir()
        indexing.write_index(folder / name, index)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_the_index_intact(run, folder, case):
    line, message = BAD[case]
    arguments = [argument.strip("'").format(folder, folder) for argument in line.split()]
    if arguments[0] == "index":
        arguments += [] if "--output" in line else ["--output", folder / "index"]
        arguments += [] if "--checkpoint" in line else ["--checkpoint", folder / "retrieval.pth"]
    before = contents(folder / "index")
    status, _, err = run(*arguments)
    last = err.splitlines()[-1]
    assert status == 2 and last.startswith("error: ") and re.search(message, last), err
    assert contents(folder / "index") == before


def test_a_folder_without_permission_is_one_line(photos):
    folder = Path(tempfile.mkdtemp())  # below that of pytest only its owner can look
    try:
        folder.chmod(0o755)
        shutil.copytree(photos / "0", folder / "photos")
        (folder / "photos/0").chmod(0)
        if os.geteuid() == 0:
            os.seteuid(65534)
        found, problems, _ = find_images([folder / "photos"])
        assert len(found) == 10 and problems == [(str(folder / "photos/0"), "Permission denied")]
        message = refusal(find_images, [folder / "photos/0"])
        assert "photos/0: Permission denied" in message
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (folder / "photos/0").chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_write_that_is_killed_leaves_one_of_the_two_indexes(
    index, photos, tmp_path, monkeypatch, renames
):
    index(photos / "0")
    folder = tmp_path / "index"
    before, replace, calls = read_index(folder), os.replace, []

    def stop(source, target):  # of the renames after index.json
        if Path(target).name in (FEATURES, IMAGES):
            calls.append(target)
            if len(calls) > renames:
                raise KeyboardInterrupt
        replace(source, target)

    after = before._replace(rows=before.rows[:5], features=before.features[:5], left=1)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        indexing.write_index(folder, after)
    assert_same(read_index(folder), after)
    assert_same(indexing.open_index(folder), after)  # finishes the renames
    assert not list(folder.glob(f".*.{FEATURES}")) and not list(folder.glob(f".*.{IMAGES}"))
    assert_same(read_index(folder), after)


def test_a_reader_finds_one_index_while_another_is_written(index, photos, tmp_path, monkeypatch):
    index(photos / "0")
    whole, load = read_index(tmp_path / "index"), np.load
    part = whole._replace(rows=whole.rows[:5], features=whole.features[:5])

    def load_late(*arguments, **options):
        monkeypatch.undo()
        indexing.write_index(tmp_path / "index", part)
        return load(*arguments, **options)

    monkeypatch.setattr(np, "load", load_late)
    assert_same(read_index(tmp_path / "index"), part)


def test_a_full_disk_leaves_the_index_as_it_was(run, index, photos, checkpoints, tmp_path):
    index(photos / "0")
    before = contents(tmp_path / "index")
    limit(1000)
    try:
        status, _, err = run(
            "index",
            photos,
            "--checkpoint",
            checkpoints / "retrieval.pth",
            "--output",
            tmp_path / "index",
        )
    finally:
        limit(None)
    assert status == 1 and "index.json: File too large; the previous index is untouched" in err
    assert contents(tmp_path / "index") == before
    assert "60 images, 20 unchanged" in index(photos)


def test_of_two_indexings_at_once_the_second_is_refused(
    run, photos, checkpoints, tmp_path, monkeypatch
):
    monkeypatch.setattr("engine.output_dir.LOCK_TIMEOUT", 0.3)
    (tmp_path / "index").mkdir()
    flags = ["--checkpoint", checkpoints / "retrieval.pth", "--output", tmp_path / "index"]
    with FileLock(tmp_path / "index/.lock"):
        status, _, err = run("index", photos, *flags)
    assert status == 2 and "another process is writing there" in err
