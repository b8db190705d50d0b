"""Pre-training samples and batches, retrieval test sets, and metrics."""

import json

import numpy as np
import pytest
import torch

from dataset import build_dataset
from dataset.batches import EpochBatches, TrainBatches
from evaluation.metrics import chance_recall, recall_at_k
from models.tokenizer import build_tokenizer
from utils import InputError


def test_samples_depend_on_seed_epoch_and_index_alone(tiny_config):
    tokenizer = build_tokenizer(tiny_config["tokenizer"])
    batches = []
    for workers in (0, 2):
        dataset = build_dataset("pretrain", tiny_config, seed=3)
        loader = TrainBatches(dataset, tokenizer, {**tiny_config, "num_workers": workers}, torch.device("cpu"), seed=3)
        loader.begin(1)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.text[0], other.text[0])
        assert one.files == other.files
    assert batches[0][0].image.dtype == torch.uint8 and batches[0][0].image.shape == (8, 3, 32, 32)
    dataset.epoch = 2
    assert not torch.equal(dataset[0].image, build_dataset("pretrain", tiny_config, seed=3)[0].image)


def test_processes_share_the_batches_of_one_process():
    def batches(batch_size, rank=0, world=1, start=0):
        sampler = EpochBatches(53, batch_size, seed=1, rank=rank, world_size=world)
        sampler.begin(4, start * batch_size * world)
        return list(sampler)

    whole = batches(8)
    parts = [batches(4, rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]
    assert len({i for batch in whole for i in batch}) == 48
    assert batches(8, start=2) == whole[2:]
    with pytest.raises(InputError, match="lower batch_size"):
        EpochBatches(7, 4, seed=0, world_size=2)


@pytest.mark.parametrize("form", ["lists", "shards", "mixed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_workers_see_each_sample_once(tiny_config, sharded, monkeypatch, form, workers, processes):
    lists = tiny_config["train_file"]
    train_file = {"lists": lists, "shards": [sharded], "mixed": [*lists, sharded]}[form]
    config = {**tiny_config, "train_file": train_file, "batch_size": 5, "num_workers": workers, "image_res": 16}
    tokenizer = build_tokenizer(config["tokenizer"])
    seen = []
    monkeypatch.setattr("dataset.batches.world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr("dataset.batches.rank", lambda rank=rank: rank)
        dataset = build_dataset("pretrain", config, seed=3)
        batches = TrainBatches(dataset, tokenizer, config, torch.device("cpu"), seed=3)
        batches.begin(2)
        files = [batch.files for batch in batches]
        assert len(files) == len(dataset) // (5 * processes) and all(len(batch) == 5 for batch in files)
        seen += [file for batch in files for file in batch]
    assert len(set(seen)) == len(seen) > len(dataset) - 5 * processes


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_only_pre_training_reads_shards(tiny_config, sharded, task):
    with pytest.raises(InputError, match=f"00000.tar is a WebDataset shard; only pre-training.*{task} needs JSON lists"):
        build_dataset(f"{task}_train", {**tiny_config, "train_file": [sharded]})


def test_retrieval_test_set(tiny_config, shapes):
    dataset = build_dataset("retrieval_test", tiny_config)
    entries = json.loads((shapes / "test.json").read_text())
    assert len(dataset) == len(entries) == 12
    assert [len(texts) for texts in dataset.img2txt] == [len(entry["caption"]) for entry in entries]
    assert all(dataset.txt2img[text] == image for image, texts in enumerate(dataset.img2txt) for text in texts)
    assert dataset[0].shape == (3, 32, 32)


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
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (20, 20)).astype(float)
    own = list(range(20))
    order = rng.permutation(20)
    result = recall_at_k(scores, scores.T, own, [[i] for i in own])
    shuffled = scores[order][:, order]
    assert recall_at_k(shuffled, shuffled.T, own, [[i] for i in own]) == result
    constant = np.zeros((20, 20))
    assert recall_at_k(constant, constant, own, [[i] for i in own])["txt_r5"] == 0.0


def test_chance_is_that_of_a_random_ranking():
    chance = chance_recall(4, 12, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    assert chance["txt_r1"] == pytest.approx(25) and chance["img_r1"] == 25 and chance["img_r5"] == 100
    assert chance["txt_r10"] == 100  # of 12 texts only 9 are wrong
    assert chance_recall(100, 2, [[0], [], [1]])["txt_r1"] == pytest.approx(50)  # an image without text is no query
