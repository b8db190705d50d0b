"""Sequential pre-training data: every sample once an epoch, on any processes and data workers, and from any point on."""

import collections
import functools
import itertools
import json
import random

import pytest
import torch
from torch.utils.data import DataLoader

from conftest import refusal
from dataset import stream as streams
from dataset.annotations import load_annotations
from dataset.batches import Phase, continued
from dataset.caption import CaptionDataset, Sample
from dataset.shards import count_shards
from dataset.stream import Stream, remaining
from dataset.transforms import test_transform as resize, train_transform
from models.tokenizer import build_tokenizer
from test_shards import picture, write_shard, write_tar

SIZES = (7, 1, 30, 0, 12)
ENTRIES = 25
TOTAL = sum(SIZES) + ENTRIES
Worker = collections.namedtuple("Worker", "id num_workers")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Uneven shards and a JSON list of images: 75 samples."""
    folder = tmp_path_factory.mktemp("data")
    ends = list(itertools.accumulate(SIZES, initial=0))
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        write_shard(folder / f"{number}.tar", range(start, end))
    entries = []
    for number in range(ENTRIES):
        (folder / f"{number}.png").write_bytes(picture(1000 + number, "PNG"))
        entries.append({"image": f"{number}.png", "caption": [f"one {number}", f"two {number}"]})
    (folder / "list.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(streams, "UNIT", 8)


@pytest.fixture
def make(data):
    """Makes a Stream of the data: of the parts of it that are named, with the layout (batch size, processes, lanes)."""
    annotations = load_annotations([str(data / "list.json")])
    shards = count_shards([str(data / f"{number}.tar") for number in range(len(SIZES))], processes=1)

    def stream(layout, rank=0, buffer=10, parts=("lists", "shards"), transform=resize(8), seed=3):
        captions = CaptionDataset(annotations, str(data), transform, seed, 25) if "lists" in parts else None
        batch_size, world_size, lanes = layout
        shards_or_none = shards if "shards" in parts else []
        return Stream(captions, shards_or_none, transform, seed, 25, buffer, batch_size, rank, world_size, lanes)

    return stream


def load(stream):
    """The batches of a process, as a DataLoader makes them of its data workers: one of each worker in turn."""
    lanes = []
    for worker in range(stream.layout.lanes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(streams, "get_worker_info", lambda: Worker(worker, stream.layout.lanes))
            samples, size = list(stream), stream.layout.batch_size
        lanes.append([samples[start : start + size] for start in range(0, len(samples), size)])
    batches = [batch for turn in itertools.zip_longest(*lanes) for batch in turn if batch is not None]
    assert len(batches) == stream.batches and all(len(batch) == size for batch in batches)
    return batches


def run(make, layout, epoch=0, history=(), batches=None, **options):
    """Samples of all processes, each a list of its first `batches` batches (default all) after the history."""
    ranks = []
    for rank in range(layout[1]):
        stream = make(layout, rank, **options)
        stream.begin(epoch, history)
        ranks.append(load(stream)[:batches])
    return ranks


def files(ranks):
    return [sample.file for batches in ranks for batch in batches for sample in batch]


# ---------------------------------------------------------------------------------------------------------------------
# an epoch


@pytest.mark.parametrize("parts", [("shards",), ("lists",), ("lists", "shards")])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_an_epoch_has_every_sample_once(make, parts, buffer):
    total = sum(SIZES) * ("shards" in parts) + ENTRIES * ("lists" in parts)
    everything = set(files(run(make, (1, 1, 1), parts=parts)))
    assert len(everything) == total
    for world_size, lanes, batch_size in [(1, 1, 4), (2, 1, 3), (3, 2, 2), (4, 2, 2), (2, 3, 5), (1, 20, 3)]:
        ranks = run(make, (batch_size, world_size, lanes), parts=parts, buffer=buffer)
        found = files(ranks)
        assert len(found) == len(set(found)) == total // (batch_size * world_size) * batch_size * world_size
        assert set(found) <= everything and {len(batches) for batches in ranks} == {total // (batch_size * world_size)}


def test_every_epoch_has_an_order_of_its_own(make):
    first, second, again = (files(run(make, (5, 1, 2), epoch)) for epoch in (0, 1, 0))
    assert first == again != second and len(set(first)) == len(set(second)) == TOTAL
    assert files(run(make, (5, 1, 2), seed=4)) != first
    # lists and shards are mixed, and so are the samples of a window and of a list's neighbors
    assert len({"json" if file.endswith(".png") else "tar" for file in first[:40]}) == 2
    in_order = files(run(make, (5, 1, 2), buffer=1))
    assert in_order != first and sorted(in_order) == sorted(first)
    numbers = [int(file.rpartition("/")[2][:-4]) for file in in_order if file.endswith(".png")]
    assert sum(b - a == 1 for a, b in itertools.pairwise(numbers)) < ENTRIES // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_batches_of_the_lanes_in_turn(make, workers, shapes):
    tokenizer = build_tokenizer(str(shapes / "vocab.txt"))
    stream = make((4, 2, max(1, workers)), rank=1, transform=train_transform(8, 0.2))
    collate = functools.partial(stream.collate, tokenizer=tokenizer)
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=collate)
    for epoch, skip in [(0, 0), (0, 3), (1, 4)]:
        stream.begin(epoch, [Phase(skip, 4, 2, max(1, workers))])
        found, expected = list(loader), load(stream)
        assert len(found) == TOTAL // 8 - skip
        for batch, samples in zip(found, expected, strict=True):
            assert batch.files == [sample.file for sample in samples]
            assert torch.equal(batch.image, torch.stack([sample.image for sample in samples]))
            assert batch.image.dtype == torch.uint8 and batch.image.shape == (4, 3, 8, 8)
            assert (batch.idx == -1).all() and len(batch.text[0]) == 4 and batch.skipped == []


def test_data_workers_must_be_as_many_as_lanes(make):
    stream = make((4, 1, 2))
    stream.begin(0)
    with pytest.raises(ValueError, match="2 lanes is read by 1"):
        next(iter(stream))


def test_content_does_not_depend_on_the_layout(make):
    def contents(layout, epoch=0, history=()):
        ranks = run(make, layout, epoch, history, transform=train_transform(8, 0.2))
        return {sample.file: sample for batches in ranks for batch in batches for sample in batch}

    one = contents((1, 1, 1))
    assert {caption.split()[0] for caption in (sample.caption for sample in one.values())} == {"caption", "one", "two"}
    for other in (contents((5, 3, 2)), contents((2, 2, 1), history=[Phase(4, 3, 2, 2)])):
        for file, sample in other.items():
            assert torch.equal(sample.image, one[file].image) and sample.caption == one[file].caption


def test_content_changes_from_epoch_to_epoch(tmp_path):
    shards = count_shards([write_shard(tmp_path / "x.tar", range(1))])
    stream = Stream(None, shards, train_transform(8, 0.2), 0, 25, 10, 1, 0, 1, 1)
    images = []
    for epoch in range(3):
        stream.begin(epoch)
        ((sample,),) = load(stream)
        images.append(sample.image)
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[1], images[2])


def test_fewer_samples_than_a_batch_are_refused(make):
    assert refusal(make, (40, 2, 1)) == ("train_file has 75 entries, less than one batch of 40 on each of 2 processes: lower "
                                         "batch_size")


# ---------------------------------------------------------------------------------------------------------------------
# continuing


@pytest.mark.parametrize("layout", [(4, 1, 1), (3, 2, 2), (2, 3, 3)])
def test_the_same_layout_continues_as_if_never_interrupted(make, layout):
    whole = run(make, layout, epoch=2)
    for done in range(len(whole[0]) + 1):
        rest = run(make, layout, 2, [Phase(done, *layout)])
        for before, after in zip(whole, rest, strict=True):
            for one, other in zip(before[done:], after, strict=True):
                assert [sample.file for sample in one] == [sample.file for sample in other]
                assert all(torch.equal(a.image, b.image) for a, b in zip(one, other))
    # interrupted twice, and once before anything was done with other processes
    halves = [Phase(2, *layout), Phase(0, 1, 1, 1), Phase(1, *layout)]
    assert files(run(make, layout, 2, halves)) == files([batches[3:] for batches in whole])


@pytest.mark.parametrize("first, second", list(itertools.permutations([(4, 1, 1), (3, 2, 2), (1, 4, 3), (5, 2, 4)], 2)))
def test_another_layout_continues_with_what_was_not_seen(make, first, second):
    epoch, everything = 1, set(files(run(make, (1, 1, 1))))
    done = files(run(make, first, epoch, batches=4))
    history = [Phase(4, *first)]
    done += files(run(make, second, epoch, history, batches=2))
    history = continued(history, Phase(2, *second))
    # at last on one process with batches of 1, so that nothing is left over
    rest = files(run(make, (1, 1, 2), epoch, history))
    assert sorted(done + rest) == sorted(everything)
    back = files(run(make, first, epoch, history))
    assert len(back) == len(rest) // (first[0] * first[1]) * first[0] * first[1]
    assert not set(back) & set(done) and len(set(back)) == len(back)


def test_any_history_of_any_shards_leaves_what_was_not_seen(monkeypatch):
    """As above for many random sizes, layouts and histories, without reading files."""
    monkeypatch.setattr(streams, "read_shard", lambda path, numbers: ({"__key__": number} for number in numbers))
    monkeypatch.setattr(Stream, "_decode", lambda self, shard, key: Sample(None, "", -1, (shard, str(key))))
    rng = random.Random(0)
    for trial in range(40):
        shards = [(str(number), rng.choice([0, 1, rng.randrange(60)])) for number in range(rng.randrange(1, 12))]
        entries, buffer = rng.choice([0, rng.randrange(50)]), rng.choice([1, 7, 30, 500])

        def make(layout, rank):
            return Stream(range(entries), shards, None, trial, 25, buffer, layout[0], rank, layout[1], layout[2])

        total, seen, history = entries + sum(count for _, count in shards), [], []
        for _ in range(rng.randrange(1, 5) if total else 0):
            batch_size = rng.randint(1, min(12, total))
            world_size = rng.choice([number for number in (1, 2, 3, 4) if number * batch_size <= total])
            layout = (batch_size, world_size, rng.randint(1, 4))
            batches = rng.randint(0, (total - len(seen)) // (batch_size * world_size))
            seen += files(run(make, layout, 3, history, batches))
            history = continued(history, Phase(batches, *layout))
            assert len(seen) == sum(phase.batches * phase.batch_size * phase.world_size for phase in history)
        if total:
            seen += files(run(make, (1, 1, 2), 3, history))
        assert len(seen) == len(set(seen)) == total


def test_parts_are_sorted_segments():
    parts = remaining(torch.tensor([[0, 100], [200, 300]]).numpy(), Phase(3, 5, 2, 2), seed=0, epoch=0, buffer=20)
    assert (parts[:, 0] < parts[:, 1]).all() and (parts[1:, 0] > parts[:-1, 1]).all()
    assert (parts[:, 1] - parts[:, 0]).sum() == 200 - 30
    assert remaining(parts, Phase(17, 10, 1, 3), seed=0, epoch=0, buffer=20).shape == (0, 2)


def test_resuming_reads_no_more_than_the_present_window(make, monkeypatch):
    read = []
    original = streams.read_shard

    def counted(path, numbers):
        for sample in original(path, numbers):
            read.append(sample)
            yield sample

    monkeypatch.setattr(streams, "read_shard", counted)
    stream = make((5, 1, 1), parts=("shards",), buffer=10)
    stream.begin(0, [Phase(7, 5, 1, 1)])
    next(iter(stream))
    assert len(read) == 10


def test_more_batches_than_the_data_has_are_refused(make):
    for history in ([Phase(30, 5, 1, 1)], [Phase(30, 4, 1, 1)], [Phase(3, 4, 1, 1), Phase(13, 5, 1, 1)]):
        stream = make((5, 1, 1))
        message = refusal(stream.begin, 0, history)
        assert "too few samples" in message and "restore the data" in message


def test_a_fully_used_epoch_has_no_batches_left(make):
    for layout in ((5, 1, 1), (5, 1, 2), (3, 1, 1)):
        assert files(run(make, layout, 0, [Phase(15, 5, 1, 1)])) == []


# ---------------------------------------------------------------------------------------------------------------------
# samples that cannot be used


@pytest.fixture
def broken(tmp_path):
    """A Stream of one window of 12 samples, 6 of which cannot be used."""
    (tmp_path / "good.png").write_bytes(picture(1, "PNG"))
    entries = [("good.png", "a"), ("missing.png", "a"), ("good.png", "?!")]
    (tmp_path / "list.json").write_text(json.dumps([{"image": image, "caption": caption} for image, caption in entries]))
    members = [(f"{number}.jpg", picture(number)) for number in range(9)]
    texts = {2: b"", 4: b'{"caption": null}'}
    members[6] = ("6.jpg", picture(6)[:200])
    members[8] = ("8.exe", b"")
    members = [member for number, image in enumerate(members)
               for member in (image, (f"{number}.json" if number == 4 else f"{number}.txt", texts.get(number, b"a caption")))]
    shards = count_shards([write_tar(tmp_path / "x.tar", members)], processes=1)
    captions = CaptionDataset(load_annotations([str(tmp_path / "list.json")]), str(tmp_path), resize(8), 0, 25)
    return Stream(captions, shards, resize(8), 0, 25, 100, 1, 0, 1, 1), shards[0][0]


def test_samples_that_cannot_be_used_are_replaced_and_counted(broken):
    stream, shard = broken
    stream.begin(0)
    samples = [sample for (sample,) in load(stream)]
    good = {f"{shard}/{number}" for number in (0, 1, 3, 5, 7)}
    assert len(samples) == 12 and {sample.file for sample in samples if not sample.skipped} > good
    assert sum(bool(sample.skipped) for sample in samples) == 6
    assert all(sample.image.shape == (3, 8, 8) and sample.caption for sample in samples)
    reasons = " | ".join(reason for sample in samples for reason in sample.skipped)
    for reason in (f"{shard}: sample 2: a caption is empty", f"{shard}: sample 4: 'caption' in its .json is None",
                   f"{shard}: sample 6: ", f"{shard}: sample 8: no image", "missing.png", "entry 2 (counting from 0): a "):
        assert reason in reasons
    again = [sample for (sample,) in load(stream)]
    assert [(sample.file, sample.skipped) for sample in again] == [(sample.file, sample.skipped) for sample in samples]


def test_an_epoch_without_a_usable_sample_ends_in_a_message(tmp_path):
    shards = count_shards([write_tar(tmp_path / "x.tar", [(f"{number}.jpg", b"broken") for number in range(5)])])
    stream = Stream(None, shards, resize(8), 0, 25, 100, 1, 0, 1, 1)
    stream.begin(0)
    message = refusal(list, stream)
    assert "no usable entry in 100 tries" in message and "x.tar: sample" in message


def test_errors_of_data_workers_are_one_line(tmp_path):
    path = write_shard(tmp_path / "x.tar", range(4))
    stream = Stream(None, [(path, 9)], resize(8), 0, 25, 100, 2, 0, 1, 1)  # a shard that has lost samples since it was counted
    stream.begin(0)
    message = refusal(list, DataLoader(stream, batch_size=2, num_workers=1, collate_fn=list))
    assert message.startswith(f"{path}: has 4 samples")
