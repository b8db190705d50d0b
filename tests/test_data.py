"""Pre-training samples and batches, and retrieval test sets."""

import json

import pytest
import torch

from dataset.build import build_dataset
from dataset.loading import EpochBatches, TrainBatches
from models.tokenizer import build_tokenizer
from utils import InputError


@pytest.mark.parametrize("form", ["lists", "shards"])
def test_samples_depend_on_seed_epoch_and_index_alone(tiny_config, sharded, form):
    config = {**tiny_config, **({"train_file": [sharded]} if form == "shards" else {})}
    tokenizer = build_tokenizer(config["tokenizer"])

    def load(workers, seen):
        dataset = build_dataset("pretrain", "train", config, seed=3)
        options = {**config, "num_workers": workers}
        loader = TrainBatches(dataset, tokenizer, options, device=torch.device("cpu"), seed=3)
        loader.begin(1, seen)
        return list(loader)

    batches, rest = load(0, 0), load(2, 16)
    for one, other in zip(batches[2:], rest, strict=True):
        assert torch.equal(one.image, other.image) and torch.equal(one.text[0], other.text[0])
        assert one.files == other.files
    assert batches[0].image.dtype == torch.uint8 and batches[0].image.shape == (8, 3, 32, 32)
    dataset = build_dataset("pretrain", "train", config, seed=3)
    samples = [dataset[0] for dataset.epoch in (1, 2)]
    assert not torch.equal(samples[0].image, samples[1].image)


def test_processes_share_the_batches_of_one_process():
    def batches(batch_size, rank=0, world=1, start=0):
        sampler = EpochBatches(53, batch_size, seed=1, rank=rank, world_size=world)
        sampler.begin(4, start * batch_size * world)
        return list(sampler)

    whole = batches(8)
    parts = [batches(4, rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [
        sorted(batch) for batch in whole
    ]
    assert len({i for batch in whole for i in batch}) == 48
    assert batches(8, start=2) == whole[2:]
    with pytest.raises(InputError, match="lower batch_size"):
        EpochBatches(7, 4, seed=0, world_size=2)


@pytest.mark.parametrize("form", ["lists", "shards", "mixed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_and_workers_see_each_sample_once(
    tiny_config, sharded, monkeypatch, form, workers, processes
):
    lists = tiny_config["train_file"]
    train_file = {"lists": lists, "shards": [sharded], "mixed": [*lists, sharded]}[form]
    config = {
        **tiny_config,
        "train_file": train_file,
        "batch_size": 5,
        "num_workers": workers,
        "image_res": 16,
    }
    tokenizer = build_tokenizer(config["tokenizer"])
    seen = []
    monkeypatch.setattr("dataset.loading.world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr("dataset.loading.rank", lambda rank=rank: rank)
        dataset = build_dataset("pretrain", "train", config, seed=3)
        batches = TrainBatches(dataset, tokenizer, config, device=torch.device("cpu"), seed=3)
        batches.begin(2)
        files = [batch.files for batch in batches]
        assert len(files) == len(dataset) // (5 * processes) and all(
            len(batch) == 5 for batch in files
        )
        seen += [file for batch in files for file in batch]
    assert len(set(seen)) == len(seen) > len(dataset) - 5 * processes


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_only_pre_training_reads_shards(tiny_config, sharded, task):
    with pytest.raises(
        InputError,
        match=".tar: is a WebDataset shard; only train_file of pre-training",
    ):
        build_dataset(task, "train", {**tiny_config, "train_file": [sharded]})


def test_retrieval_test_set(tiny_config, shapes):
    dataset = build_dataset("retrieval", "test", tiny_config)
    entries = json.loads((shapes / "test.json").read_text())
    assert len(dataset) == len(entries) == 12
    assert [len(texts) for texts in dataset.img2txt] == [len(entry["caption"]) for entry in entries]
    assert all(
        dataset.txt2img[text] == image
        for image, texts in enumerate(dataset.img2txt)
        for text in texts
    )
    assert dataset[0].shape == (3, 32, 32)


def test_retrieval_entries_of_one_image_are_one_image(tiny_config, shapes, tmp_path):
    entries = json.loads((shapes / "test.json").read_text())
    entries[1]["caption"].append(entries[1]["caption"][0])  # an image may have a caption twice
    spellings = (
        lambda image: image,
        lambda image: f"./{image}",
        lambda image: str(shapes / image),
        lambda image: f"images/../{image}",
    )
    rounds = [
        [
            {"image": spelling(entry["image"]), "caption": [entry["caption"][i]]}
            for entry in entries
            if i < len(entry["caption"])
        ]
        for i, spelling in enumerate(spellings)
    ]
    files = {"grouped": entries, "first": rounds[0], "others": sum(rounds[1:], [])}
    paths = {name: tmp_path / f"{name}.json" for name in files}
    for name, path in paths.items():
        path.write_text(json.dumps(files[name]))
    for key in "test", "val":
        grouped, split = (
            build_dataset(
                "retrieval",
                key,
                {**tiny_config, f"{key}_file": [str(paths[name]) for name in names]},
            )
            for names in (["grouped"], ["first", "others"])
        )
        assert len(grouped) == len(split) == 12 and len(split.texts) == 37
        for of in "images", "texts", "img2txt", "txt2img":
            assert getattr(split, of) == getattr(grouped, of)
        assert all(torch.equal(grouped[i], split[i]) for i in range(12))
        assert split.where(11).startswith(f"{paths['first']}: entry 11 ")
