"""WebDataset shards: their names, samples, index and order, training on them, and making them from
JSON lists.
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from helpers.files import write_tar
from PIL import Image

from dataset import shards
from dataset.build import build_dataset
from dataset.caption import Pair
from dataset.loading import EpochBatches, TrainBatches
from dataset.shards import Shards, expand, image_and_captions, read_sample
from dataset.store import Entries
from models.tokenizer import build_tokenizer
from tools import to_shards
from utils import InputError, TrainingStopped


def picture(number, form="JPEG"):
    """The bytes of a small image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_shard(path, numbers):
    """A shard as img2dataset writes it, with an image and a caption for each number."""
    members = []
    for number in numbers:
        members += [
            (f"{number:09d}.jpg", picture(number)),
            (f"{number:09d}.txt", f"caption {number}".encode()),
            (f"{number:09d}.json", json.dumps({"caption": f"caption {number}"}).encode()),
        ]
    return write_tar(path, members)


# --------------------------------------------------------------------------------------------------
# names


def test_names_expand_to_lists_and_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "odd [x]"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number:05d}.tar").touch()
    assert expand(["x.json", "a/00001.tar", "odd {not braces.json"]) == (
        ["x.json", "odd {not braces.json"],
        ["a/00001.tar"],
    )
    assert expand(["{a,b}/{00001..00002}.tar"])[1] == [
        "a/00001.tar",
        "a/00002.tar",
        "b/00001.tar",
        "b/00002.tar",
    ]
    assert expand(["a/*.tar", "odd [x]/0000{0,2}.tar"])[1] == [
        "a/00000.tar",
        "a/00001.tar",
        "a/00002.tar",
        "odd [x]/00000.tar",
        "odd [x]/00002.tar",
    ]
    assert expand([tmp_path / "b" / "0000?.tar"])[1][2] == str(tmp_path / "b/00002.tar")


def test_names_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "00001.tar").touch()
    os.symlink("00001.tar", tmp_path / "alias.tar")
    message = refusal(expand, ["{00000..00003}.tar"])
    assert (
        "shard 00000.tar does not exist (3 of the 4" in message and "{00000..00003}.tar" in message
    )
    assert "x*.tar does not exist" in refusal(expand, ["x*.tar"])
    assert "none/0*.tar does not exist (1 of the 2" in refusal(expand, ["{.,none}/0*.tar"])
    assert "{00000..3.tar has an unmatched brace" in refusal(expand, ["{00000..3.tar"])
    for twice in ["00001.tar", "x.json", "00001.tar"], ["00001.tar", tmp_path / "00001.tar"]:
        assert f"{tmp_path}/00001.tar is named 2 times" in refusal(expand, twice)
    assert f"{tmp_path}/00001.tar is named 2 times" in refusal(expand, ["*.tar"])
    for url in (
        "https://host/{0..9}.tar",
        "s3://bucket/x.tar",
        "pipe:cat x.tar",
        "HTTP://host/list.json",
    ):
        message = refusal(expand, ["00001.tar", url])
        assert (
            message.startswith(f"train_file: {url} ")
            and "mount" in message
            and "download" in message
        )


# --------------------------------------------------------------------------------------------------
# samples


def special(name, kind, target=""):
    """A folder or a link."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_samples_are_runs_of_members_of_one_name(tmp_path):
    path = write_tar(
        tmp_path / "x.tar",
        [
            special("part.1", tarfile.DIRTYPE),
            ("__meta__.json", b"left out"),
            ("__index__/0.txt", b"left out"),
            ("part.1/a.jpg", b"1"),
            ("part.1/a.seg.PNG", b"2"),
            special("part.1/b.dir", tarfile.DIRTYPE),
            ("no_suffix", b""),
            ("part.1/a.TXT", b"3"),
            ("part.1/b.jpg", b"4"),
            special("part.1/b.txt", tarfile.SYMTYPE, "a.TXT"),
            ("part.1/.b.jpg", b"-"),
            ("part.1/b.npy", b"big"),
            ("b.jpg", b"5"),
            ("b.jpg", b"6"),
            ("b.txt", b"7"),
            ("ü" * 80 + "/猫.jpg", b"8"),
            ("b.jpg", b"9"),
        ],
    )
    other = write_shard(tmp_path / "y.tar", range(2))
    samples = Shards([path, other])
    assert samples.counts == [5, 2]
    assert [samples[i] for i in range(6)] == [
        {"__key__": "part.1/a", "jpg": b"1", "seg.png": b"", "txt": b"3"},
        {"__key__": "part.1/b", "jpg": b"4", "npy": b""},
        {"__key__": "b", "jpg": b"5", "txt": b"7"},
        {"__key__": "ü" * 80 + "/猫", "jpg": b"8"},
        {"__key__": "b", "jpg": b"9"},
        {
            "__key__": "000000000",
            "jpg": picture(0),
            "txt": b"caption 0",
            "json": b'{"caption": "caption 0"}',
        },
    ]
    for outside in -1, 7:
        with pytest.raises(IndexError):
            samples[outside]


def test_images_and_captions_of_samples():
    def of(**sample):
        return image_and_captions({"__key__": "k", **sample}, "x.tar: sample k")

    for suffix in shards.IMAGE_SUFFIXES:
        assert of(**{suffix: b"image", "txt": b"a", "json": b'{"caption": "b"}'}) == (
            b"image",
            ["a"],
        )
    assert of(jpg=b"", txt="cafe\u0301 ".encode() + b"\xff")[1] == ["cafe\u0301 \ufffd"]
    assert of(jpg=b"", json=b'{"caption": ["a", "b"], "width": 3}')[1] == ["a", "b"]
    for sample, reason in [
        ({"txt": b"a"}, "no image (.jpg, .jpeg"),
        ({"npy": b"", "txt": b""}, "only ['npy', 'txt']"),
        ({"jpg": b""}, "no caption"),
        ({"jpg": b"", "json": b'{"caption": '}, "its .json is not valid"),
        ({"jpg": b"", "json": b"\xff\xfe\xfd"}, "not valid"),
        ({"jpg": b"", "json": b"[" * 100000}, "not valid"),
        ({"jpg": b"", "json": b'["caption"]'}, "its .json is None"),
        *(
            ({"jpg": b"", "json": b'{"caption": %s}' % value}, "'caption' in its .json is")
            for value in (b"null", b"3", b"[]", b'["a", null]', b'{"en": "a"}')
        ),
    ]:
        with pytest.raises(InputError) as caught:
            of(**sample)
        assert str(caught.value).startswith("x.tar: sample k: ") and reason in str(caught.value)


# --------------------------------------------------------------------------------------------------
# index


def counts(paths, processes=1):
    return Shards(paths, processes).counts


# test_annotations.py shows of the cache that processes which start together build it once, and that
# it is used until a file changes


def test_a_damaged_index_is_made_again(tmp_path):
    path = write_shard(tmp_path / "x.tar", range(2))
    for damage in (
        None,
        lambda content: b"",
        lambda content: content[:-9],
        lambda content: b"\xff" + content,
        lambda content: bytes(len(content)),
        lambda content: content[:-4] + b"\1" + content[-3:],
    ):
        if damage:
            (kept,) = Path(os.environ["ALBEF_CACHE"]).glob("shard-*")
            kept.write_bytes(damage(kept.read_bytes()))
        samples = Shards([path])
        assert samples.counts == [2] and [samples[i]["txt"] for i in range(2)] == [
            b"caption 0",
            b"caption 1",
        ]


begun = multiprocessing.get_context("fork").Semaphore(0)


def scan_for_ever(path):
    begun.release()
    time.sleep(1000)


def test_a_run_killed_while_it_scans_keeps_no_other_waiting(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.tar", range(2)) for i in range(2)]
    run = multiprocessing.get_context("fork").Process(target=counts, args=(paths, 2))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_scan", scan_for_ever)
        run.start()
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
    run.kill()
    run.join()
    more = write_shard(tmp_path / "more.tar", range(3))
    assert counts([*paths, more], 2) == [2, 2, 3]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: 4 * 512 + 100],  # within a member's data
        lambda content: content[: 3 * 512],  # after a whole member
        lambda content: content[: 3 * 512 + 100],  # within a header
        lambda content: (
            content[: 3 * 512] + b"?" * 512 + content[4 * 512 :]
        ),  # a header that is none
        lambda content: b"",
        lambda content: b"no tar file at all " * 100,
        lambda content: b"\x1f\x8b" + content,
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_is_not_whole_is_refused(tmp_path, damage, processes):
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"1" * 600)])
    bad = write_tar(
        tmp_path / "bad.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)], tarfile.USTAR_FORMAT
    )
    content = (tmp_path / "bad.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(damage(content))
    message = refusal(Shards, [good, bad], processes)
    assert (
        message.startswith(f"{bad}: not a complete tar file")
        and "copy or download this shard again" in message
    )


def test_any_damage_ends_in_a_message_or_in_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{'n' * 120}{i}.txt", b"text") for i in range(3)])
    content = bytearray((tmp_path / "x.tar").read_bytes())
    places = [Shards([path]).position(i) for i in range(3)]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = content.copy()
        for position in rng.integers(0, len(content) * 2 // 3, 3):
            damaged[position] = rng.integers(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        for function, arguments in [
            (shards._scan, ((path, tmp_path / "index"),)),
            *((read_sample, (place,)) for place in places),
        ]:
            try:
                function(*arguments)
            except (InputError, TrainingStopped) as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused


def test_shards_without_samples_are_refused_if_all_are(tmp_path):
    empty = [write_tar(tmp_path / f"{i}.tar", []) for i in range(2)]
    assert "0.tar holds no sample, nor does any other shard" in refusal(Shards, empty)
    assert counts([*empty, write_shard(tmp_path / "2.tar", range(1))]) == [0, 0, 1]


def pair(name, number, suffix="txt"):
    return [(f"{name}.jpg", picture(number)), (f"{name}.{suffix}", f"caption {number}".encode())]


@pytest.mark.parametrize(
    "names", [["22.00", "22.01", "22.02"], ["a.b/www.site.org_0", "www.site.org_1"]]
)
def test_names_with_dots_are_cut_at_the_last_one_where_only_that_gives_images(
    tmp_path, monkeypatch, names
):
    members = [
        ("__meta__.v1.json", b"{}"),
        *itertools.chain.from_iterable(map(pair, names, itertools.count())),
    ]
    paths = [
        write_tar(tmp_path / "dots.tar", members),
        write_shard(tmp_path / "plain.tar", range(2)),
    ]
    for _ in range(2):  # the second time from the cache
        samples = Shards(paths)
        assert samples.counts == [len(names), 2]
        assert [samples[i] for i in range(len(names))] == [
            {"__key__": name, "jpg": picture(i), "txt": f"caption {i}".encode()}
            for i, name in enumerate(names)
        ]
        assert samples[len(names) + 1]["__key__"] == "000000001"
        monkeypatch.setattr(shards, "_scan", None)


def test_a_shard_of_which_either_dot_loses_samples_is_refused(tmp_path):
    plain, dots = pair("000000", 0), pair("www.site.org_000001", 1)
    for number, members in enumerate([plain + dots, dots + plain]):
        path = write_tar(tmp_path / f"{number}.tar", members)
        message = refusal(Shards, [path])
        assert (
            message.startswith(f"{path}: ")
            and "www.site.org_000001.jpg" in message
            and len(message) < 400
        )


@pytest.mark.parametrize(
    "members, keys",
    [
        # b without its image
        ([*pair("a", 0), ("a.seg.png", b"1"), ("b.seg.png", b"2"), ("b.txt", b"3")], ["a", "b"]),
        ([("a.image.jpg", b"1"), ("a.caption.txt", b"2")], ["a"]),  # no cut gives a pair
        ([*pair("a", 0), ("a.crop.jpg", b"1"), ("a.crop.json", b"2")], ["a"]),
    ],
)
def test_names_are_otherwise_cut_at_the_first_dot(tmp_path, members, keys):
    samples = Shards([write_tar(tmp_path / "x.tar", members)])
    assert [samples[i]["__key__"] for i in range(len(samples))] == keys


def test_many_suffixes_are_not_named():
    sample = {"__key__": "k"} | {f"{i}.jpg": b"" for i in range(1000)}
    assert len(refusal(image_and_captions, sample, "x.tar: sample k")) < 300


@pytest.mark.parametrize("sparse_map", [None, "0,512", "zero"])
def test_sparse_members_are_refused_by_shard_and_name(tmp_path, sparse_map):
    """A sparse member of 2 TB, stored in 512 bytes, by GNU (None) or in PAX headers."""
    info, form = tarfile.TarInfo("1.jpg"), tarfile.GNU_FORMAT
    info.size = 512
    if sparse_map is None:
        info.type = tarfile.GNUTYPE_SPARSE
    else:
        form, keys = tarfile.PAX_FORMAT, {"size": str(1 << 41), "numblocks": "1", "map": sparse_map}
        info.pax_headers = {f"GNU.sparse.{key}": value for key, value in keys.items()}
    path = write_shard(tmp_path / "x.tar", range(1))
    content, end = (tmp_path / "x.tar").read_bytes(), Shards([path]).position(0).end
    member = info.tobuf(form) + b"x" * 512
    (tmp_path / "x.tar").write_bytes(content[:end] + member + content[end:])
    message = refusal(Shards, [path])
    assert message.startswith(f"{path}: ") and ("1.jpg" in message or sparse_map == "zero")


def test_a_shard_that_changes_during_the_run_is_named(tmp_path):
    path = write_shard(tmp_path / "x.tar", range(5))
    samples = Shards([path])
    write_tar(path, [("a.jpg", bytes(5000)), ("b.txt", b"b"), ("c.txt", b"c")])
    with pytest.raises(TrainingStopped, match=f"^{path}: has changed since the run started"):
        samples[1]
    os.truncate(path, 1000)
    with pytest.raises(TrainingStopped, match=f"^{path}: not a complete tar file"):
        samples[4]
    shards._open.cache_clear()
    os.remove(path)
    for problem in "No such file", "not a regular file":
        for read in samples.__getitem__, lambda index: samples.prefetch([index]):
            with pytest.raises(
                TrainingStopped, match=rf"^{path}: cannot read this shard \({problem}"
            ):
                read(0)
        if not os.path.exists(path):
            os.mkfifo(path)  # open() would wait for a writer
    assert path in refusal(Shards, [path]) and path in refusal(Shards, expand([path])[1])


# --------------------------------------------------------------------------------------------------
# training


SIZES = (7, 1, 30, 0, 12)
ENTRIES = 25
TOTAL = sum(SIZES) + ENTRIES


@pytest.fixture
def make(tiny_config, tmp_path, monkeypatch):
    """Makes the training set of uneven shards and of a list of ENTRIES, or of the parts that are
    named.
    """
    monkeypatch.setattr("dataset.caption.UNIT", 8)
    ends = itertools.accumulate(SIZES, initial=0)
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        write_shard(tmp_path / f"{number}.tar", range(start, end))
    entries = []
    for number in range(ENTRIES):
        (tmp_path / f"{number}.png").write_bytes(picture(1000 + number, "PNG"))
        entries.append({"image": f"{number}.png", "caption": [f"one {number}", f"two {number}"]})
    (tmp_path / "list.json").write_text(json.dumps(entries))

    def dataset(parts=("list.json", "*.tar"), **keys):
        config = {
            **tiny_config,
            "train_file": [str(tmp_path / part) for part in parts],
            "image_root": str(tmp_path),
        }
        return build_dataset(
            "pretrain",
            "train",
            {**config, "image_res": 8, "patch_size": 8, "shuffle_buffer": 10, **keys},
            seed=3,
        )

    return dataset


def indices(dataset, epoch, seen=0, batch_size=1, world_size=1, batches=None):
    """The indices of an epoch, or of its first `batches` batches after some that were seen, of all
    processes.
    """
    samplers = [
        EpochBatches(
            len(dataset),
            batch_size,
            seed=3,
            rank=rank,
            world_size=world_size,
            order=dataset.order,
        )
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.begin(epoch, seen)
    return [index for sampler in samplers for batch in list(sampler)[:batches] for index in batch]


@pytest.mark.parametrize("parts", [("*.tar",), ("list.json", "*.tar")])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(make, parts, buffer):
    dataset = make(parts, shuffle_buffer=buffer)
    first, second, again = (indices(dataset, epoch) for epoch in (0, 1, 0))
    assert sorted(first) == sorted(second) == list(range(len(dataset))) and first == again != second


def test_samples_that_come_together_lie_near_each_other(make):
    order = indices(make(), 0)
    starts = itertools.accumulate(SIZES, initial=ENTRIES)
    shard = {
        i: number
        for number, (start, end) in enumerate(itertools.pairwise(starts))
        for i in range(start, end)
    }
    windows = [order[start : start + 10] for start in range(0, TOTAL, 10)]
    # the 30 samples of the largest shard fill two windows and parts of two more, or three
    of_largest = [sum(shard.get(i) == 2 for i in window) for window in windows]
    assert of_largest.count(10) >= 2 and sum(map(bool, of_largest)) <= 4
    assert all(window != sorted(window) for window in windows)
    # lists and shards are mixed, and so are the entries of a list
    assert 0 < sum(i < ENTRIES for i in order[:50]) < 25
    listed = [i for i in indices(make(shuffle_buffer=1), 0) if i < ENTRIES]
    assert sum(b - a == 1 for a, b in itertools.pairwise(listed)) < ENTRIES // 2


def test_any_history_leaves_what_was_not_seen(make):
    dataset, rng = make(), random.Random(0)
    for epoch in range(30):
        seen = []
        for _ in range(rng.randrange(1, 5)):
            batch_size, world_size = rng.randint(1, 12), rng.randint(1, 4)
            batches = rng.randint(0, (TOTAL - len(seen)) // (batch_size * world_size))
            seen += indices(dataset, epoch, len(seen), batch_size, world_size, batches)
        seen += indices(dataset, epoch, len(seen))
        assert sorted(seen) == list(range(TOTAL))


def load(dataset, config, epoch, seen=0):
    """The batches that a process has of an epoch."""
    batches = TrainBatches(
        dataset, build_tokenizer(config["tokenizer"]), config, device=torch.device("cpu"), seed=3
    )
    batches.begin(epoch, seen)
    return list(batches)


def test_data_workers_share_no_position_in_a_shard(make, tiny_config):
    """The main process has the shards open before it forks."""
    dataset = make(("*.tar",), min_scale=1.0, hflip=False, randaugment=False)
    expected = {dataset[i].file: dataset[i].image for i in range(len(dataset))}
    for batch in load(dataset, {**tiny_config, "batch_size": 2, "num_workers": 2}, 0):
        assert all(
            torch.equal(image, expected[file])
            for image, file in zip(batch.image, batch.files, strict=True)
        )


def test_samples_that_cannot_be_used_are_replaced_and_counted(make, tmp_path):
    members = [
        member
        for i in range(9)
        for member in ((f"{i}.jpg", picture(i)), (f"{i}.txt", b"a caption"))
    ]
    members[5] = ("2.txt", b"")
    members[9] = ("4.json", b'{"caption": null}')
    members[12] = ("6.jpg", picture(6)[:200])
    members[16] = ("8.exe", b"")
    path = write_tar(tmp_path / "broken.tar", members)
    dataset = make(("broken.tar",))
    samples = [dataset[i] for i in range(9)]
    assert [bool(sample.skipped) for sample in samples] == [i in (2, 4, 6, 8) for i in range(9)]
    assert all(
        sample.image.shape == (3, 8, 8) and sample.caption == "a caption" for sample in samples
    )
    for i, reason in (
        (2, "a caption is empty"),
        (4, "'caption' in its .json is None"),
        (6, "broken image"),
        (8, "no image"),
    ):
        assert samples[i].skipped[0].startswith(f"{path}: sample {i}: {reason}")
    assert dataset[4].skipped == samples[4].skipped and samples[0].file == f"{path}/0"
    write_tar(path, [(f"{number}.jpg", b"broken") for number in range(5)])
    message = refusal(make(("broken.tar",)).__getitem__, 0)
    assert "no usable entry in 100 tries" in message and f"{path}: sample" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_ends_the_run(make, tiny_config, tmp_path, workers):
    dataset = make(("2.tar",))
    os.truncate(tmp_path / "2.tar", 4000)
    with pytest.raises(TrainingStopped, match=f"^{tmp_path / '2.tar'}: "):
        load(dataset, {**tiny_config, "num_workers": workers}, 0)


# --------------------------------------------------------------------------------------------------
# conversion


@pytest.fixture
def lists(tmp_path):
    """Two lists of 23 and 4 entries, with images of several formats of which two are missing; the
    files are in images.
    """
    entries = []
    for i in range(27):
        form, suffix = [("JPEG", ".JPG"), ("PNG", ".png"), ("BMP", ".picture"), ("JPEG", "")][i % 4]
        file = tmp_path / "images" / f"folder.{i % 2}" / f"{i}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i not in (5, 25):
            file.write_bytes(picture(i, form))
        captions = [f"a caption {i}", "ü 猫 \n 2", ""]
        entries.append(
            {
                "image": f"folder.{i % 2}/{i}{suffix}",
                "caption": captions[: i % 3 + 1] if i % 3 else captions[0],
            }
        )
    for name, part in (("1.json", entries[:23]), ("2.json", entries[23:])):
        (tmp_path / name).write_text(json.dumps(part))
    return [str(tmp_path / "1.json"), str(tmp_path / "2.json")]


def contents(folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"
    }


def test_converted_lists_give_the_same_images_and_captions(tmp_path, lists, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    flags = ["--image_root", "images", "--output"]
    status, out, _ = run_main(
        "tools.to_shards", *lists, *flags, "out", "--samples", 10, "--workers", 2
    )
    assert status == 0 and "2 entries were left out" in out and "out/skipped.txt" in out
    assert out.endswith("train_file: ['out/{00000..00002}.tar']\n")
    samples = Shards(expand(["out/{00000..00002}.tar"])[1])
    assert samples.counts == [9, 10, 6]
    entries = Entries(lists, Pair)
    expected = [
        ((tmp_path / "images" / entry.image).read_bytes(), entry.texts)
        for i, entry in enumerate(entries)
        if i not in (5, 25)
    ]
    found = [samples[i] for i in range(25)]
    assert [image_and_captions(sample, "") for sample in found] == expected
    assert found[1].keys() == {"__key__", "png", "json"} and found[0].keys() == {
        "__key__",
        "jpg",
        "txt",
    }
    assert found[2].keys() == {"__key__", "jpg", "json"} and found[-1]["__key__"] == "000000026"
    lines = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert len(lines) == 2 and f"{lists[0]}: entry 5 " in lines[0] and "does not exist" in lines[0]
    assert f"{lists[1]}: entry 2 " in lines[1]
    status, out, _ = run_main("tools.to_shards", lists[1], *flags, "one")
    assert status == 0 and out.endswith("train_file: ['one/00000.tar']\n")


def test_interrupted_conversion_continues_and_twice_is_the_same(tmp_path, lists, monkeypatch):
    root = tmp_path / "images"
    to_shards.convert(lists, root, tmp_path / "whole", samples=4)
    add, added = to_shards.add_member, []

    def interrupted(tar, name, data):
        added.append(name)
        if len(added) == 27:
            raise KeyboardInterrupt
        add(tar, name, data)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(to_shards, "add_member", interrupted)
        with pytest.raises(KeyboardInterrupt):
            to_shards.convert(lists, root, out, samples=4, workers=1)
    assert sorted(path.name for path in out.glob("*.tar")) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    (out / ".00003.tar.killed.tmp").touch()  # what a process leaves that is killed
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert to_shards.convert(lists, root, out, samples=4, workers=1) == (7, 2)
    # what is complete is not written again
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert contents(out) == contents(tmp_path / "whole")
    assert to_shards.convert(lists, root, out, samples=4) == (7, 2)
    assert contents(out) == contents(tmp_path / "whole")
    (root / "folder.1/5.png").write_bytes(picture(5))
    (out / "00001.tar").unlink()
    assert to_shards.convert(lists, root, out, samples=4) == (7, 1)
    assert len((out / "skipped.txt").read_text().splitlines()) == 1


def test_shards_of_something_else_are_not_mixed(tmp_path, lists):
    root, out = tmp_path / "images", tmp_path / "out"
    to_shards.convert(lists, root, out, samples=10)
    before = contents(out)

    def refused(files=lists, folder=root, samples=10):
        message = refusal(
            lambda: to_shards.convert(files, folder, out, samples=samples),
        )
        assert message.startswith(f"--output {out}: holds shards of other lists")

    (tmp_path / "other").symlink_to(root)
    refused(samples=11)
    refused(files=lists[:1])
    refused(files=lists[::-1])
    refused(folder=tmp_path / "other")
    entries = [{"image": "folder.0/0.JPG", "caption": "another"}]
    (tmp_path / "2.json").write_text(json.dumps(entries))
    refused()
    assert contents(out) == before
    (out / "shards.json").unlink()
    refused()


def test_conversion_errors_name_the_remedy(tmp_path, lists, monkeypatch, run_main):
    message = refusal(lambda: to_shards.convert(lists, tmp_path, tmp_path / "out", samples=10))
    assert message.startswith(f"--image_root {tmp_path}: none of 27 checked images exists")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert "cannot write there" in refusal(
        lambda: to_shards.convert(lists, tmp_path / "images", tmp_path / "file", samples=10)
    )
    missing = tmp_path / "no.json"
    status, out, err = run_main("tools.to_shards", missing, "--output", tmp_path / "out")
    assert status == 2 and err.startswith(f"error: {missing}: cannot read")
    assert len(err.splitlines()) == 1 and not out

    def full(tar, name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_shards, "add_member", full)
    with pytest.raises(TrainingStopped, match="No space left .*repeat the command"):
        to_shards.convert(lists, tmp_path / "images", tmp_path / "out", samples=10, workers=2)
    assert not list((tmp_path / "out").glob("*.tar"))
