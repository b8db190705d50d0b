"""load_model: what scripts compute on the same checkpoint, for images and texts of any kind, number
and order; bad input.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from conftest import ROOT, TASKS, refusal
from PIL import Image

from configs.config import as_config
from dataset.build import build_dataset
from dataset.transforms import normalize
from evaluation.grounding import heat_maps
from evaluation.metrics import box_scores
from evaluation.retrieval import encode_images, encode_texts
from evaluation.vqa import answer_all
from inference import Inference, load_model
from inference.index import search
from inference.inputs import UnknownWords
from inference.model import BLOCK, best_rectangle, most_similar
from models.contrastive import NO_CANDIDATE, feature_similarity
from tools import export
from tools.export import export_file
from visualize.explain import explain_class, split_words

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 5])
def batch_size(request, models):
    for model in models.values():
        model.batch_size = request.param
    yield
    for model in models.values():
        model.batch_size = 4


def close(left, right):
    return np.allclose(np.asarray(left), np.asarray(right), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_similarity_match_and_rank_are_those_of_the_evaluation(models, task, batch_size):
    model = models[task]
    dataset = build_dataset("retrieval", "test", model.config)
    config = msgspec.structs.replace(model.config, batch_size_test=4)
    texts = dataset.texts
    images = [str(dataset.files(i)[0]) for i in range(len(dataset))]
    embeds, image_feat = encode_images(model.model, dataset, config, CPU, keep=True)
    text_embeds, text_feat, mask = encode_texts(model.model, texts, model.tokenizer, config, CPU)
    sim = feature_similarity(image_feat, text_feat)
    i2t, t2i = model.model.rerank(embeds, image_feat, text_embeds, text_feat, mask, 3)
    all_pairs = model.model.rerank(embeds, image_feat, text_embeds, text_feat, mask, 10**6)[0]

    order = np.random.default_rng(0).permutation(len(images))
    mixed = [images[i] for i in order]
    assert sim.std() > 0.01 and all_pairs.std() > 0.01
    assert close(model.similarity(mixed, texts), sim[order])
    assert close(model.similarity(images[2], texts[5]), sim[2, 5]) and close(
        model.similarity(images, texts[5]), sim[:, 5]
    )
    assert close(
        model.similarity(model.embed_images(images).numpy(), model.embed_texts(texts[5])), sim[:, 5]
    )
    probs = model.match(mixed, texts)
    one = model.match(images[2], texts[5])
    assert close(probs[order.tolist().index(2), 5], one) and 0 < one < 1
    assert probs.std() > 5e-4 and close(probs, model.match(images, texts)[order])

    for of, expected, queries in (("images", t2i[:, order], texts), ("texts", i2t[order], mixed)):
        rows = model.rank(mixed, texts, k=3, of=of)
        assert len(rows) == len(queries)
        for row, scores in zip(rows, expected, strict=True):
            assert len(row) == 3 == (scores > NO_CANDIDATE).sum()
            logits = [scores[i] for i, _ in row]
            assert logits == sorted(logits, reverse=True)
    for number, (text, row) in enumerate(zip(texts, model.rank(mixed, texts, k=3), strict=True)):
        assert close([probs[i, number] for i, _ in row], [score for _, score in row])
        assert model.rank(mixed, text, k=3) == [(i, pytest.approx(p, abs=1e-5)) for i, p in row]


@torch.no_grad()
def test_match_is_the_probability_of_the_matching_head(models, photos):
    model = models["retrieval"]
    image = normalize(
        torch.stack(
            [model.transform(torch.from_numpy(np.array(Image.open(photos[0]))).permute(2, 0, 1))]
        )
    )
    phrase = split_words("a red circle", model.model, model.tokenizer)
    (text_embeds, _), (image_embeds, _) = (
        model.model.encode_text(phrase.tokens),
        model.model.encode_image(image),
    )
    fused = model.model.fuse(text_embeds, phrase.tokens.attention_mask, image_embeds)
    assert close(
        model.match(photos[0], "A red circle!"), model.model.itm_logits(fused).softmax(dim=1)[0, 1]
    )


def test_a_method_called_on_one_rank_of_a_job_neither_divides_nor_waits(
    models, photos, monkeypatch
):
    calls = {
        "retrieval": lambda model: model.rank(photos, ["a red circle", "a star"], k=3, rerank=3),
        "pretrain": lambda model: model.embed_images(photos),
        "ve": lambda model: model.entails(photos[0], "a red circle"),
    }
    expected = {task: call(models[task]) for task, call in calls.items()}
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(
        "torch.distributed.all_reduce", mock.Mock(side_effect=AssertionError("waits"))
    )
    for task, call in calls.items():
        found = call(models[task])
        assert torch.equal(found, expected[task]) if task == "pretrain" else found == expected[task]


def test_rank_reads_only_the_candidates_where_features_are_given(models, photos):
    model = models["retrieval"]
    texts = ["a red circle", "two blue squares", "a green star"]
    images, features = photos * 2, model.embed_images(photos * 2)
    expected = model.rank(images, texts, k=2, rerank=4)
    candidates = {i for row in model.rank(images, texts, k=4, rerank=0) for i, _ in row}
    gone = [path if i in candidates else "gone.jpg" for i, path in enumerate(images)]
    assert "gone.jpg" in gone
    found = model.rank(gone, texts, k=2, rerank=4, image_features=features)
    assert [[i for i, _ in row] for row in found] == [[i for i, _ in row] for row in expected]
    assert close([[s for _, s in row] for row in found], [[s for _, s in row] for row in expected])
    by_similarity = model.rank(
        None, "a red circle", k=5, rerank=0, image_features=features.numpy().astype(np.float16)
    )
    sim = model.similarity(features, "a red circle") / model.model.temp.item()
    values = sim.softmax(dim=0).topk(5).values
    assert np.allclose([score for _, score in by_similarity], values, atol=2e-3)
    assert "re-ranking needs images and texts" in refusal(
        lambda: model.rank(None, "a star", image_features=features)
    )


@pytest.mark.parametrize("of", ["images", "texts"])
def test_rank_scores_as_many_candidates_as_rerank_says_and_the_others_follow_by_similarity(
    models, photos, of
):
    model, texts = (
        models["retrieval"],
        ["a red circle", "two blue squares", "a green star", "a pink moon", "a cross", "a heart"],
    )
    by_similarity = model.rank(photos, texts, k=6, rerank=0, of=of)
    for found, similar in zip(
        model.rank(photos, texts, k=6, rerank=2, of=of), by_similarity, strict=True
    ):
        assert {i for i, _ in found[:2]} == {i for i, _ in similar[:2]} and found[2:] == similar[2:]
        assert not close([s for _, s in found[:2]], [s for _, s in similar[:2]])
    first = {i for i, _ in model.rank(photos, texts[0], k=2, rerank=0)}
    readable = [path if i in first else "gone.jpg" for i, path in enumerate(photos)]
    assert (
        len(
            model.rank(readable, texts[0], k=6, rerank=2, image_features=model.embed_images(photos))
        )
        == 6
    )


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_what_a_validation_measured_to_be_better_ranks_unless_told_otherwise(
    files, photos, tmp_path, by
):
    ranking = {"by": by, "k": 3, "itc": 30.0, "itm": 20.0}
    content = torch.load(files["retrieval"], weights_only=True)
    for broken in ({**ranking, "by": "luck"}, {"by": by}, by):
        torch.save({**content, "ranking": broken}, tmp_path / "bad.pth")
        assert "bad.pth: the entry 'ranking'" in refusal(load_model, tmp_path / "bad.pth", "cpu")
    torch.save({**content, "ranking": ranking}, tmp_path / "model.pth")
    export_file(tmp_path / "model.pth", tmp_path / "model.safetensors")
    args = ["export", "--checkpoint", tmp_path / "model.pth", "--output", f"{tmp_path}/folder/"]
    with mock.patch("sys.argv", list(map(str, args))):
        export.main()
    plain, text = load_model(files["retrieval"], "cpu"), "a red circle"
    assert plain.ranking is None and plain.default_rerank == 3
    default = {"itc": 0, "itm": 3}[by]
    for name in ("model.pth", "model.safetensors", "folder"):
        model = load_model(tmp_path / name, "cpu")
        assert msgspec.to_builtins(model.ranking) == ranking and model.default_rerank == default
        assert model.rank(photos, text) == plain.rank(photos, text, rerank=default)
        assert model.rank(photos, text, rerank=3) == plain.rank(photos, text, rerank=3)


def test_probabilities_of_similarities_are_the_softmax_over_all_candidates(models, monkeypatch):
    monkeypatch.setattr("inference.model.BLOCK", 7)
    queries, candidates = torch.randn(3, 8), torch.randn(20, 8)
    sim, expected = queries @ candidates.T, queries @ candidates.T / models["retrieval"].model.temp
    probs = models["retrieval"].similarity_probs(sim[:, :5], queries, candidates)
    assert close(probs, expected.softmax(dim=1)[:, :5].detach())


def test_most_similar_goes_block_by_block(tmp_path):
    random = np.random.default_rng(0)
    np.save(
        tmp_path / "features.npy", random.standard_normal((2 * BLOCK + 500, 4)).astype(np.float16)
    )
    features = np.load(tmp_path / "features.npy", mmap_mode="r")
    queries = random.standard_normal((50, 4)).astype(np.float32)
    values, best = most_similar(queries, features, 3)
    expected = torch.from_numpy(queries) @ torch.from_numpy(features.astype(np.float32)).T
    assert torch.equal(best, expected.topk(3).indices) and close(values, expected.topk(3).values)
    assert torch.equal(most_similar(queries, torch.from_numpy(np.array(features)), 3)[1], best)


@torch.no_grad()
@pytest.mark.parametrize("listed", [True, False])
def test_answers_are_those_of_vqa(models, shapes, listed, batch_size):
    model = models["vqa"]
    paths = {
        "test_file": [str(shapes / "vqa_test.json")],
        "vqa_root": str(shapes),
        "answer_list": str(shapes / "answer_list.json") if listed else None,
        "batch_size_test": 7,
    }
    config = as_config({**model.config.to_dict(), **paths})
    dataset = build_dataset("vqa", "test", config)
    expected = answer_all(model.model, dataset, model.tokenizer, config, CPU)
    images = [dataset.files(i)[0] for i in range(len(dataset))][::-1]
    questions = [dataset.entry(i).question for i in range(len(dataset))][::-1]
    found = model.answer(images, questions, paths["answer_list"])
    assert [row[0][0] for row in found] == expected[::-1]
    for row in found:
        assert sum(p for _, p in row) == pytest.approx(1) if listed else 0 < row[0][1] < 1
        assert [p for _, p in row] == sorted((p for _, p in row), reverse=True) and len(row) == (
            3 if listed else 1
        )
    alone = model.answer(images[0], questions[0], paths["answer_list"])
    assert [text for text, _ in alone] == [text for text, _ in found[0]]
    assert close([p for _, p in alone], [p for _, p in found[0]])
    if listed:
        given = json.loads((shapes / "answer_list.json").read_text())
        first, _ = model.answer(images[0], questions[:2], given)
        assert [text for text, _ in first] == [text for text, _ in alone] and close(
            [p for _, p in first], [p for _, p in alone]
        )


@torch.no_grad()
@pytest.mark.parametrize("task, method", [("ve", "entails"), ("nlvr", "true_of")])
def test_classes_are_those_of_the_evaluation(models, shapes, task, method, batch_size):
    model = models[task]
    dataset = build_dataset(
        task, "test", {**model.config.to_dict(), "test_file": [str(shapes / f"{task}_test.json")]}
    )
    samples = list(dataset)
    batch = dataset.collate(samples, model.tokenizer)
    expected = model.model.predict(*map(normalize, batch.image), batch.text).softmax(dim=1)
    images = [sample.files if task == "nlvr" else sample.files[0] for sample in samples]
    sentences = [dataset.entry(i).sentence for i in range(len(samples))]
    found, alone = (
        getattr(model, method)(images, sentences),
        getattr(model, method)(images[1], sentences[1]),
    )
    if task == "ve":
        assert list(found[0]) == ["contradiction", "neutral", "entailment"]
        found, alone = [list(row.values()) for row in found], list(alone.values())
    else:
        expected = expected[:, 1]
    assert close(found, expected) and close(alone, expected[1])


@pytest.mark.parametrize("mode", ["itm", "itc"])
def test_ground_ranks_boxes_by_the_maps_of_the_evaluation(models, shapes, mode, batch_size):
    model = models["retrieval"]
    paths = {
        "test_file": [str(shapes / "grounding_test.json")],
        "refcoco_data": str(shapes),
        "batch_size_test": 1,
        "det_file": str(shapes / "refcoco+/dets.json"),
    }
    dataset = build_dataset("grounding", "test", {**model.config.to_dict(), **paths})
    config = as_config({**model.config.to_dict(), **paths})
    maps = heat_maps(model.model, dataset, model.tokenizer, config, CPU, mode=mode)
    images = [dataset.files(i)[0] for i in range(len(dataset))]
    texts = [dataset.entry(i).text for i in range(len(dataset))]
    boxes = [dataset.detections[dataset.refer.refs[ref_id]["image_id"]] for ref_id, _ in maps]
    found = model.ground(images, texts, boxes, mode=mode)
    for row, (_, heat), own, image in zip(found, maps, boxes, images, strict=True):
        expected = box_scores(heat, *Image.open(image).size[::-1], own)
        assert close(sorted(expected, reverse=True), [score for _, score in row])
        assert own[int(np.argmax(expected))] == row[0][0]
    ((box, score),) = model.ground(images[0], texts[0], mode=mode)
    assert {type(value) for value in (*box, score)} == {float}  # not of numpy
    assert score >= found[0][0][1] * 0.5 and box[2] > 0 and box[3] > 0


def test_the_best_rectangle_is_that_of_a_search():
    heat = np.random.default_rng(1).random((4, 5)) ** 4
    rectangles = [
        (
            heat[t:b, left:r].sum() / ((b - t) * (r - left)) ** 0.5,
            [20 * left, 30 * t, 20 * (r - left), 30 * (b - t)],
        )
        for t in range(4)
        for b in range(t + 1, 5)
        for left in range(5)
        for r in range(left + 1, 6)
    ]
    assert best_rectangle(heat, 120, 100) == pytest.approx(max(rectangles)[1])


@pytest.mark.parametrize("task", TASKS)
def test_heat_maps_are_those_of_visualize(models, photos, tmp_path, task):
    model, text = models[task], "a red circle"
    item = photos[:2] if "nlvr" in task else photos[0]
    heat, (first, second) = (
        model.heat_map(item, text),
        model.heat_map([item, item], [text, "a blue star"]),
    )
    assert heat.words == text.split() and heat.by_word.shape[-3:] == (3, 2, 2)
    assert np.array_equal(first.by_word, heat.by_word)
    assert ("answer" in heat.verdict) == (task == "vqa")
    if task != "vqa":  # whose map, of random weights, may be zero for every text
        assert not np.array_equal(second.whole, heat.whole)
        image = normalize(
            torch.stack(
                [
                    model.transform(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1))
                    for path in ([item] if isinstance(item, str) else item)
                ]
            )
        )
        maps = explain_class(
            task, model.model, image, split_words(text, model.model, model.tokenizer)
        )
        assert close(maps.whole.squeeze(0), heat.whole) and close(
            maps.by_word.squeeze(0), heat.by_word
        )
        assert maps.verdict == heat.verdict
    heat.draw(tmp_path / "heat.png")
    assert Image.open(tmp_path / "heat.png").size[0] > 500


def test_pseudo_targets(models, photos):
    words = models["pretrain"].fill_in(photos[0], "a red circle")
    assert [word for word, _ in words] == ["a", "red", "circle"] and all(
        len(candidates) == 5 for _, candidates in words
    )
    assert models["pretrain"].fill_in(photos[:2], "a red circle")[0] == words


def test_images_of_any_kind_are_the_same(models, photos):
    model, picture = models["retrieval"], Image.open(photos[0])
    array = np.array(picture)
    kinds = [picture, array, torch.from_numpy(array).permute(2, 0, 1), Path(photos[0])]
    expected = model.embed_images(photos[0])
    assert expected.shape == (8,) and expected.norm().item() == pytest.approx(1)
    assert close(model.embed_images(kinds), expected.expand(4, -1))
    assert close(model.embed_images(np.stack([array, array])), expected.expand(2, -1))
    assert close(
        model.embed_images(array[..., 0]),
        model.embed_images(picture.getchannel("R").convert("RGB")),
    )
    assert close(model.embed_images(photos, workers=1), model.embed_images(iter(photos)))
    palette = picture.convert("P")
    palette.info["transparency"] = 0
    assert close(
        model.embed_images(palette), model.embed_images(picture.convert("P").convert("RGB"))
    )
    assert palette.info["transparency"] == 0  # the user's picture stays as it is


def test_threads_share_a_model(models, photos):
    model, texts = models["retrieval"], ["a red circle", "two blue squares " * 9] * 200
    calls = [
        lambda: model.heat_map(photos[0], "a red circle").by_word,
        lambda: model.match(photos[:3], texts[:2]),
        lambda: model.heat_map(photos[1], "a star", mode="itc").whole,
        lambda: model.embed_texts(texts),
    ]
    expected = [call() for call in calls]

    def repeat(number):
        return [calls[number]() for _ in range(12)]

    with ThreadPoolExecutor(len(calls)) as pool:
        assert close(
            pool.submit(model.embed_images, photos, workers=1).result(), model.embed_images(photos)
        )
        for results, alone in zip(pool.map(repeat, range(len(calls))), expected, strict=True):
            assert all(close(result, alone) for result in results)


# the process also has a worker of its own, which cleans up at the end
EFFECTS = """
import multiprocessing, os, signal, sys, time, warnings
import matplotlib, torch, PIL.Image, ruamel.yaml, timm
from torch.utils.data._utils import signal_handling

def state():
    os.umask(mask := os.umask(0))
    return {"umask": mask, "filters": list(warnings.filters), "environment": dict(os.environ),
            "hooks": (sys.excepthook, sys.stdout), "grad": torch.is_grad_enabled(),
            "signals": [signal.getsignal(s) for s in signal.valid_signals()],
            "SIGCHLD": signal_handling._SIGCHLD_handler_set,
            "matplotlib": {k: matplotlib.rcParams._get(k) for k in matplotlib.rcParams},
            "others": (os.getcwd(), torch.get_num_threads(), PIL.Image.MAX_IMAGE_PIXELS)}

def wait(pipe):
    signal.signal(signal.SIGTERM, lambda *_: (print("cleaned up", flush=True), os._exit(0)))
    pipe.send(1)
    time.sleep(60)

os.umask(0o027)
here, there = multiprocessing.Pipe()
multiprocessing.get_context("fork").Process(target=wait, args=(there,), daemon=True).start()
here.recv()
checkpoint, image, folder = sys.argv[1:]
before = state()
from inference import load_model
model = load_model(checkpoint, "cpu")
model.embed_texts(["a red circle"] * 9)
model.embed_images([image] * 2, workers=1)
os.umask(0o077)  # later than the import
model.heat_map(image, "a red circle").draw(folder + "/heat.png")
os.umask(0o027)
after = state()
mode = os.stat(folder + "/heat.png").st_mode & 0o777
print([key for key in before if before[key] != after[key]], oct(mode), flush=True)
"""


def test_importing_and_using_a_model_changes_nothing_in_the_process(files, photos, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TOKENIZERS_PARALLELISM", None)
    command = [sys.executable, "-c", EFFECTS, str(files["retrieval"]), photos[0], str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[] 0o600", "cleaned up"], done.stderr
    assert not done.stderr


def test_sources_and_precision(files, models, photos, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    content = torch.load(files["retrieval"], weights_only=True)
    torch.save(content, run / "checkpoint_best.pth")
    torch.save(
        {**content, "model": {**content["model"], "temp": torch.tensor(0.4)}},
        run / "checkpoint_last.pth",
    )
    model = load_model(run, device="cpu", precision="bf16")
    assert model.model.temp != 0.4 and not model.model.training and model.config.precision == "bf16"
    half, full = model.embed_images(photos), models["retrieval"].embed_images(photos)
    assert (
        half.dtype == torch.float32
        and not torch.equal(half, full)
        and torch.allclose(half, full, atol=0.1)
    )
    torch.save(content["model"], tmp_path / "bare.pth")
    (tmp_path / "config.yaml").write_text(json.dumps(content["config"]))
    bare = load_model(tmp_path / "bare.pth", "cpu", config=tmp_path / "config.yaml")
    assert torch.equal(bare.embed_images(photos), full)


HUGE = Image.new("1", (20000, 10000))
BAD = {
    "missing file": (lambda m, f: load_model("no.pth"), "no.pth does not exist"),
    "text file": (lambda m, f: load_model("README.md"), "README.md is not a checkpoint"),
    "empty folder": (
        lambda m, f: load_model("configs/shapes"),
        "configs/shapes: the folder has no weight file",
    ),
    "device": (
        lambda m, f: load_model(f["ve"], device="tpu9"),
        "is not supported",
    ),
    "precision": (
        lambda m, f: load_model(f["ve"], precision="fp8"),
        "it must be one of fp32, bf16",
    ),
    "other task": (
        lambda m, f: m["ve"].rank(["a.jpg"], "a"),
        "rank: .*ve.pth is a checkpoint of task ve,.*checkpoint of pretrain or retrieval",
    ),
    "answer": (lambda m, f: m["pretrain"].answer("a.jpg", "a"), "checkpoint of vqa"),
    "empty text": (
        lambda m, f: m["retrieval"].embed_texts(["a", " ?! "]),
        "text ' \\?! ': nothing is left",
    ),
    "no texts": (lambda m, f: m["retrieval"].embed_texts([]), "no texts given"),
    "no images": (lambda m, f: m["retrieval"].embed_images([]), "no images given"),
    "number": (lambda m, f: m["retrieval"].embed_texts([3]), "3 is not a text"),
    "missing image": (lambda m, f: m["ve"].entails("no.jpg", "a"), "no.jpg: does not exist"),
    "not an image": (
        lambda m, f: m["retrieval"].embed_images(["README.md"]),
        "README.md: not an image",
    ),
    "object": (lambda m, f: m["retrieval"].embed_images([3]), "image 0: .*expected str"),
    "floats": (
        lambda m, f: m["retrieval"].embed_images(np.zeros((8, 8, 3))),
        "image 0: float64 .* give a uint8 array",
    ),
    "200 megapixels": (
        lambda m, f: m["retrieval"].embed_images(HUGE),
        "image 0: too large .20000 x 10000 pixels",
    ),
    "one image": (lambda m, f: m["nlvr"].true_of("a.jpg", "a"), "takes two images"),
    "pairs": (
        lambda m, f: m["ve"].entails(["a.jpg"] * 2, ["a"] * 3),
        "2 images and 3 texts are not pairs",
    ),
    "itc of VE": (
        lambda m, f: m["ve"].heat_map("a.jpg", "a", mode="itc"),
        "mode itc needs a similarity",
    ),
    "of": (
        lambda m, f: m["retrieval"].rank(["a.jpg"], ["a"], of="text"),
        "of is 'text'; .* 'images' or 'texts'",
    ),
    "answers": (lambda m, f: m["vqa"].answer("a.jpg", "a", "no.json"), "no.json"),
    "features of others": (
        lambda m, f: m["retrieval"].rank(["a.jpg"] * 2, "a", image_features=np.zeros((3, 8))),
        "2 images have 3 features",
    ),
    "mode": (
        lambda m, f: m["retrieval"].ground("a.jpg", "a", mode="gradcam"),
        "mode is 'gradcam'; .* itm or itc",
    ),
    "configuration": (
        lambda m, f: load_model(f["ve"], config="/dev/null"),
        "/dev/null: not a regular file",
    ),
}
NAN = float("nan")


def closed():
    picture = Image.new("RGB", (8, 8))
    picture.close()
    return picture


IMAGES = {
    "closed": closed(),
    "no rows": np.zeros((0, 8, 3), np.uint8),
    "no pixels": Image.new("RGB", (0, 0)),
    "tensor without pixels": torch.zeros(3, 0, 8, dtype=torch.uint8),
    "a row": np.zeros(8, np.uint8),
    "a value": np.zeros((), np.uint8),
    "None": None,
    "device": "/dev/null",
}
BAD |= {
    f"image: {name}": (
        lambda m, f, image=image: m["retrieval"].heat_map(image, "a"),
        "image 0|/dev/null",
    )
    for name, image in IMAGES.items()
}
BOXES = (
    [[1, 2, 3, 0]],
    [[NAN, 0, 1, 1]],
    [[0, 0, np.inf, 1]],
    [[0, 0, NAN, 1]],
    [["0", "0", "1", "1"]],
    [1, 2, 3, 4],
    [None],
    [[1, 2, 3]],
)
BAD |= {
    f"boxes {boxes}": (
        lambda m, f, boxes=boxes: m["retrieval"].ground("a.jpg", "a", boxes=boxes),
        "box ",
    )
    for boxes in BOXES
}
BAD["boxes for another number of pairs"] = (
    lambda m, f: m["retrieval"].ground(["a.jpg"] * 2, "a", []),
    "0 lists of boxes for 2",
)
BAD |= {
    f"rank {numbers}": (
        lambda m, f, numbers=numbers: m["retrieval"].rank("a.jpg", "a", **numbers),
        "k=.* rerank=",
    )
    for numbers in ({"k": 0}, {"k": -1}, {"rerank": -1})
}
BAD |= {
    f"answers {answers}": (
        lambda m, f, answers=answers: m["vqa"].answer("a.jpg", "what?", answers),
        "answer .* is not a text",
    )
    for answers in (["a", 5], [1, 2], [None])
}
for name, values in {"NaN": np.full((2, 8), NAN), "infinite": np.full((2, 8), -np.inf)}.items():
    BAD[f"features to rank: {name}"] = (
        lambda m, f, values=values: m["retrieval"].rank(None, "a", rerank=0, image_features=values),
        "features|image 0",
    )
    BAD[f"features: {name}"] = (
        lambda m, f, values=values: m["retrieval"].similarity(values, "a"),
        "features|image|index 0",
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(models, files, case):
    function, message = BAD[case]
    assert re.search(message, refusal(function, models, files))


def test_texts_of_unknown_words_are_warned_of(models, photos):
    model = models["retrieval"]
    for call in (
        lambda text: model.embed_texts(["a red circle", text]),
        lambda text: model.rank(photos[:2], text, k=1),
        lambda text: model.heat_map(photos[0], text),
        lambda text: model.similarity(photos[0], text),
    ):
        with pytest.warns(UnknownWords, match="赤い"):
            call("赤い パンダ")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call("a 赤い circle")


def test_without_a_momentum_model_there_are_no_pseudo_targets(files, photos, tmp_path):
    content = torch.load(files["pretrain"], weights_only=True)
    content["model"] = {
        name: value for name, value in content["model"].items() if "_m." not in name
    }
    torch.save(content, tmp_path / "base.pth")
    assert "no momentum model" in refusal(
        load_model(tmp_path / "base.pth", "cpu").fill_in, photos[0], "a red circle"
    )


@pytest.fixture
def python(files, shapes, tmp_path, monkeypatch):
    """Runs a page's Python with the tiny checkpoints and the shapes in place of what it names;
    returns its lines of code.
    """

    def run(page):
        text = (ROOT / page).read_text().partition("\n## Search in folders")[0]
        code = "\n".join(block.split("```")[0] for block in text.split("```python\n")[1:])
        for name, path in NAMES.items():
            assert page != "docs/inference.md" or name in code
            code = code.replace(f'"{name}"', f'"{files.get(path) or path}"')
        monkeypatch.chdir(tmp_path)
        (tmp_path / "photos").symlink_to(shapes / "images/test")
        exec(code, {})
        return [line for line in code.splitlines() if line]

    return run


NAMES = {
    "weights/flickr30k.pth": "retrieval",
    "weights/refcoco.pth": "retrieval",
    "weights/vqa.pth": "vqa",
    "output/VE": "ve",
    "output/NLVR": "nlvr",
    "weights/ALBEF.pth": "pretrain",
    "photo.jpg": "photos/000000.jpg",
    "other.jpg": "photos/000001.jpg",
}


def test_the_examples_of_the_docs_run(python, capsys, tmp_path):
    python("docs/inference.md")
    assert len(capsys.readouterr().out.splitlines()) > 10 and (tmp_path / "heat.png").exists()
    methods = {
        name for name, value in vars(Inference).items() if callable(value) and name[0] != "_"
    }
    page = (ROOT / "docs/inference.md").read_text().partition("## Methods")[2]
    assert len(methods) == 15 and all(f".{name}(" in page for name in methods)


def test_the_docs_have_the_signatures_of_the_code():
    page = (ROOT / "docs/inference.md").read_text()
    shown = re.findall(r"^(?:\| `|    )(\w+)(\(.*\))(?:` \||  ?->)", page, re.M)
    assert len(shown) == 14
    for name, arguments in shown:
        function = {"load_model": load_model, "search": search}.get(name)
        signature = inspect.signature(function or getattr(Inference, name))
        parameters = [
            parameter.replace(annotation=inspect.Parameter.empty)
            for parameter in signature.parameters.values()
            if parameter.name != "self"
        ]
        plain = str(inspect.Signature(parameters)).replace("'", '"')
        assert arguments == plain, name


def test_the_example_of_the_readme_has_five_lines_and_prints_a_similarity_and_a_match(
    python, files, shapes, tmp_path, capsys
):
    (tmp_path / "output/quickstart").mkdir(parents=True)
    (tmp_path / "output/quickstart/checkpoint_last.pth").symlink_to(files["pretrain"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shapes").symlink_to(shapes)
    assert len(python("README.md")) <= 5
    similarity, match = map(float, capsys.readouterr().out.split())
    assert -1 <= similarity <= 1 and 0 <= match <= 1
