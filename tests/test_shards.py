"""WebDataset shards: what they are named, counted, read as, and made from JSON lists."""

import io
import json
import multiprocessing
import os
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_iterator

from conftest import exit_status, refusal
from dataset import shards, to_shards
from dataset.annotations import load_annotations
from dataset.shards import count_shards, expand, image_and_captions, read_shard


def picture(number, form="JPEG"):
    """The bytes of a small image that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT):
    """A tar file of (name, bytes), or of TarInfos without data."""
    with tarfile.open(path, "w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return str(path)


def write_shard(path, numbers):
    """A shard as img2dataset writes it, with an image and a caption for each number."""
    members = []
    for number in numbers:
        members += [(f"{number:09d}.jpg", picture(number)), (f"{number:09d}.txt", f"caption {number}".encode()),
                    (f"{number:09d}.json", json.dumps({"caption": f"caption {number}"}).encode())]
    return write_tar(path, members)


def keys(path, numbers):
    return [sample["__key__"] for sample in read_shard(path, numbers)]


# ---------------------------------------------------------------------------------------------------------------------
# names


def test_names_expand_to_lists_and_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "odd [x]"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number:05d}.tar").touch()
    assert expand(["x.json", "a/00001.tar", "odd {not braces.json"]) == (["x.json", "odd {not braces.json"], ["a/00001.tar"])
    assert expand(["{a,b}/{00001..00002}.tar"])[1] == ["a/00001.tar", "a/00002.tar", "b/00001.tar", "b/00002.tar"]
    assert expand(["a/*.tar", "odd [x]/0000{0,2}.tar"])[1] == [
        "a/00000.tar", "a/00001.tar", "a/00002.tar", "odd [x]/00000.tar", "odd [x]/00002.tar",
    ]  # fmt: skip
    assert expand([tmp_path / "b" / "0000?.tar"])[1][2] == str(tmp_path / "b/00002.tar")


def test_names_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "00001.tar").touch()
    os.symlink("00001.tar", tmp_path / "alias.tar")
    message = refusal(expand, ["{00000..00003}.tar"])
    assert "shard 00000.tar does not exist (3 of the 4" in message and "{00000..00003}.tar" in message
    assert "x*.tar does not exist" in refusal(expand, ["x*.tar"])
    assert "none/0*.tar does not exist (1 of the 2" in refusal(expand, ["{.,none}/0*.tar"])
    assert "{00000..3.tar has a brace without its other one" in refusal(expand, ["{00000..3.tar"])
    assert "00001.tar is named twice;" in refusal(expand, ["00001.tar", "x.json", "00001.tar"])
    assert f"{tmp_path}/00001.tar is named twice (as 00001.tar)" in refusal(expand, ["00001.tar", tmp_path / "00001.tar"])
    assert "alias.tar is named twice" in refusal(expand, ["*.tar"])
    for url in ("https://host/{0..9}.tar", "s3://bucket/x.tar", "pipe:cat x.tar", "HTTP://host/list.json"):
        message = refusal(expand, ["00001.tar", url])
        assert message.startswith(f"train_file: {url} ") and "mount" in message and "download" in message


# ---------------------------------------------------------------------------------------------------------------------
# samples


def folder_entry(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def link_entry(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def test_samples_are_grouped_and_counted_alike(tmp_path):
    path = write_tar(tmp_path / "x.tar", [
        folder_entry("part.1"), ("__meta__.json", b"left out"), ("__index__/0.txt", b"left out"),
        ("part.1/a.jpg", b"1"), ("part.1/a.seg.PNG", b"2"), folder_entry("part.1/b.dir"), ("no_suffix", b""),
        ("part.1/a.TXT", b"3"), ("part.1/b.jpg", b"4"), link_entry("part.1/b.txt", "part.1/a.TXT"), ("part.1/.b.jpg", b"-"),
        ("part.1/b.npy", b"big"), ("b.jpg", b"5"), ("b.jpg", b"6"), ("b.txt", b"7"), ("ü" * 80 + "/猫.jpg", b"8"),
        ("b.jpg", b"9"),
    ])  # fmt: skip
    assert count_shards([path]) == [(path, 5)]
    assert list(read_shard(path, range(5))) == [
        {"__key__": "part.1/a", "jpg": b"1", "seg.png": b"", "txt": b"3"}, {"__key__": "part.1/b", "jpg": b"4", "npy": b""},
        {"__key__": "b", "jpg": b"5", "txt": b"7"}, {"__key__": "ü" * 80 + "/猫", "jpg": b"8"}, {"__key__": "b", "jpg": b"9"},
    ]  # fmt: skip
    assert keys(path, [1, 4]) == ["part.1/b", "b"] and keys(path, []) == []


def test_samples_are_those_of_the_webdataset_library(tmp_path):
    path = write_shard(tmp_path / "0.tar", range(20))
    with open(path, "rb") as file:
        files = ({**member, "__url__": path} for member in tar_file_iterator(file))
        theirs = [{name: value for name, value in sample.items() if name != "__url__"} for sample in group_by_keys(files)]
    assert list(read_shard(path, range(20))) == theirs
    assert list(read_shard(path, [3, 4, 17])) == [theirs[3], theirs[4], theirs[17]]


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "0.tar", range(50))
    read = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda self, member: read.append(member.name) or extract(self, member))
    samples = read_shard(path, [10, 12])
    assert next(samples)["__key__"] == "000000010" and len(read) == 3
    assert next(samples)["__key__"] == "000000012" and len(read) == 6
    read_headers = []
    following = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: read_headers.append(0) or following(self))
    assert len(list(read_shard(path, range(5)))) == 5
    assert len(read_headers) <= 5 * 3 + 2


def test_images_and_captions_of_samples():
    def of(**sample):
        return image_and_captions({"__key__": "k", **sample}, "x.tar: sample k")

    for suffix in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"):
        assert of(**{suffix: b"image", "txt": b"a", "json": b'{"caption": "b"}'}) == (b"image", ["a"])
    assert of(jpg=b"", txt="cafe\u0301 ".encode() + b"\xff")[1] == ["cafe\u0301 \ufffd"]
    assert of(jpg=b"", json=b'{"caption": ["a", "b"], "width": 3}')[1] == ["a", "b"]
    for sample, reason in [
        ({"txt": b"a"}, "no image (.jpg, .jpeg"), ({"npy": b"", "txt": b""}, "only .npy, .txt"), ({"jpg": b""}, "no caption"),
        ({"jpg": b"", "json": b'{"caption": '}, "its .json is not valid"), ({"jpg": b"", "json": b"\xff\xfe\xfd"}, "not valid"),
        ({"jpg": b"", "json": b"[" * 100000}, "not valid"), ({"jpg": b"", "json": b'["caption"]'}, "its .json is None"),
        *(({"jpg": b"", "json": b'{"caption": %s}' % value}, "'caption' in its .json is")
          for value in (b"null", b"3", b"[]", b'["a", null]', b'{"en": "a"}')),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            of(**sample)
        assert str(caught.value).startswith("x.tar: sample k: ") and reason in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# counts


def test_counts_are_kept_until_a_shard_changes(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.tar", range(n)) for i, n in enumerate([3, 0, 2])]
    assert count_shards(paths) == list(zip(paths, [3, 0, 2]))
    with monkeypatch.context() as patch:
        patch.delattr(shards, "_count")
        assert count_shards(paths[::-1]) == list(zip(paths, [3, 0, 2]))[::-1]
    write_shard(paths[1], range(1))
    assert count_shards(paths, processes=2) == list(zip(paths, [3, 1, 2]))
    os.utime(paths[2], ns=(1, 1))
    more = write_shard(tmp_path / "more.tar", range(4))
    assert count_shards([paths[2], more], processes=2) == [(paths[2], 2), (more, 4)]


def test_a_line_that_was_not_written_whole_is_no_count(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.tar", range(i + 1)) for i in range(2)]
    count_shards(paths[:1])
    (cache,) = (tmp_path / os.environ["ALBEF_CACHE"]).rglob("counts.txt")
    whole = cache.read_bytes()
    for cut in range(len(whole)):
        cache.write_bytes(whole[:cut])
        for _ in range(2):
            assert count_shards(paths, processes=1) == [(paths[0], 1), (paths[1], 2)]
    cache.write_bytes(b"\xff\x00 \n1 2 3\n")
    assert count_shards(paths) == [(paths[0], 1), (paths[1], 2)]


def test_processes_that_start_together_count_once(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.tar", range(i)) for i in range(4)]
    context = multiprocessing.get_context("fork")
    barrier, counted, results = context.Barrier(3), context.Value("i"), context.Queue()
    count = shards._count

    def counting(path):
        with counted.get_lock():
            counted.value += 1
        return count(path)

    def when_all_are_ready():
        barrier.wait()
        results.put(count_shards(paths, processes=1))

    monkeypatch.setattr(shards, "_count", counting)
    workers = [context.Process(target=when_all_are_ready) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [list(zip(paths, range(4)))] * 3
    for worker in workers:
        worker.join()
    assert counted.value == 4


begun = multiprocessing.get_context("fork").Semaphore(0)


def count_for_ever(path):
    begun.release()
    time.sleep(1000)


def test_a_run_killed_while_it_counts_keeps_no_other_waiting(tmp_path, monkeypatch):
    paths = [write_shard(tmp_path / f"{i}.tar", range(2)) for i in range(2)]
    run = multiprocessing.get_context("fork").Process(target=count_shards, args=(paths, 2))
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_count", count_for_ever)
        run.start()
        assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
    run.kill()
    run.join()
    assert count_shards(paths, 1) == [(path, 2) for path in paths]


@pytest.mark.parametrize("damage", [
    lambda content: content[: 4 * 512 + 100],  # within a member's data
    lambda content: content[: 3 * 512],  # after a whole member
    lambda content: content[: 3 * 512 + 100],  # within a header
    lambda content: content[: 3 * 512] + b"?" * 512 + content[4 * 512 :],  # a header that is none
    lambda content: b"", lambda content: b"no tar file at all " * 100, lambda content: b"\x1f\x8b" + content,
])  # fmt: skip
@pytest.mark.parametrize("processes", [1, 2])
def test_a_shard_that_is_not_whole_is_refused(tmp_path, damage, processes):
    good = write_tar(tmp_path / "good.tar", [("a.jpg", b"1" * 600)])
    bad = write_tar(tmp_path / "bad.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)], tarfile.USTAR_FORMAT)
    content = (tmp_path / "bad.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(damage(content))
    message = refusal(lambda: count_shards([good, bad], processes))
    assert message.startswith(f"{bad}: not a complete tar file") and "copy or download this shard again" in message


def test_any_damage_ends_in_a_message_or_in_samples(tmp_path):
    path = write_tar(tmp_path / "x.tar", [(f"{'n' * 120}{i}.txt", b"text") for i in range(3)])
    content = bytearray((tmp_path / "x.tar").read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = content.copy()
        for position in rng.integers(0, len(content) * 2 // 3, 3):
            damaged[position] = rng.integers(256)
        (tmp_path / "x.tar").write_bytes(damaged)
        try:
            list(read_shard(path, range(3)))
        except shards.InputError as error:
            assert str(error).startswith(f"{path}: ")
            refused += 1
    assert refused


def test_shards_without_samples_are_refused_if_all_are(tmp_path):
    empty = [write_tar(tmp_path / f"{i}.tar", []) for i in range(2)]
    assert "0.tar holds no sample, nor do the other shards" in refusal(count_shards, empty)
    assert count_shards([*empty, write_shard(tmp_path / "2.tar", range(1))])[0] == (empty[0], 0)


def test_a_shard_that_changes_during_the_run_is_named(tmp_path):
    path = write_shard(tmp_path / "x.tar", range(5))
    samples = read_shard(path, range(10))
    assert "has 5 samples, but had at least 6" in refusal(list, samples)
    os.truncate(path, 512 * 5)
    assert f"{path}: not a complete tar file" in refusal(list, read_shard(path, range(5)))
    os.remove(path)
    assert f"{path}: cannot read this shard (No such file" in refusal(list, read_shard(path, range(5)))


# ---------------------------------------------------------------------------------------------------------------------
# conversion


@pytest.fixture
def lists(tmp_path):
    """Two lists of 23 and 4 entries, with images of several formats of which two are missing; the files are in images."""
    entries = []
    for i in range(27):
        form, suffix = [("JPEG", ".JPG"), ("PNG", ".png"), ("BMP", ".picture"), ("JPEG", "")][i % 4]
        file = tmp_path / "images" / f"folder.{i % 2}" / f"{i}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i not in (5, 25):
            file.write_bytes(picture(i, form))
        captions = [f"a caption {i}", "ü 猫 \n 2", ""]
        entries.append({"image": f"folder.{i % 2}/{i}{suffix}", "caption": captions[: i % 3 + 1] if i % 3 else captions[0]})
    for name, part in (("1.json", entries[:23]), ("2.json", entries[23:])):
        (tmp_path / name).write_text(json.dumps(part))
    return [str(tmp_path / "1.json"), str(tmp_path / "2.json")]


def run_to_shards(monkeypatch, capsys, *arguments):
    """(exit status, what is printed) of the command."""
    monkeypatch.setattr(sys, "argv", ["to_shards", *map(str, arguments)])
    status = exit_status(to_shards.main)
    return status, "".join(capsys.readouterr())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def test_converted_lists_give_the_same_images_and_captions(tmp_path, lists, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = run_to_shards(monkeypatch, capsys, *lists, "--image_root", "images", "--output", "out", "--samples", 10,
                                    "--processes", 2)
    assert status == 0
    assert "2 entries were left out" in printed and "out/skipped.txt" in printed
    name = printed.strip().splitlines()[-1]
    assert name == "train_file: ['out/{00000..00002}.tar']"
    _, paths = expand(["out/{00000..00002}.tar"])
    assert [count for _, count in count_shards(paths)] == [9, 10, 6]
    annotations = load_annotations(lists)
    expected = [((tmp_path / "images" / annotations.image(i)).read_bytes(), annotations.captions(i))
                for i in range(27) if i not in (5, 25)]
    found = [sample for path, count in count_shards(paths) for sample in read_shard(path, range(count))]
    assert [image_and_captions(sample, "") for sample in found] == expected
    assert found[1].keys() == {"__key__", "png", "json"} and found[0].keys() == {"__key__", "jpg", "txt"}
    assert found[2].keys() == {"__key__", "jpg", "json"} and found[-1]["__key__"] == "000000026"
    lines = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert len(lines) == 2 and f"{lists[0]}: entry 5 " in lines[0] and "No such file" in lines[0]
    assert f"{lists[1]}: entry 2 " in lines[1]


def test_interrupted_conversion_continues_and_twice_is_the_same(tmp_path, lists, monkeypatch, capsys):
    root = tmp_path / "images"
    to_shards.convert(lists, root, tmp_path / "whole", 4)
    writes = []

    class Interrupted(TarWriter):
        def write(self, sample):
            writes.append(sample["__key__"])
            if len(writes) == 14:
                raise KeyboardInterrupt
            return super().write(sample)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(to_shards, "TarWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            to_shards.convert(lists, root, out, 4, processes=1)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    (out / ".00003.tar.killed.tmp").touch()  # what a process leaves that is killed
    with monkeypatch.context() as patch:
        patch.setattr(to_shards, "TarWriter", lambda *args, **kwargs: writes.append("shard") or TarWriter(*args, **kwargs))
        assert to_shards.convert(lists, root, out, 4, processes=1) == (7, 2)
    assert writes.count("shard") == 4
    assert contents(out) == contents(tmp_path / "whole")
    assert to_shards.convert(lists, root, out, 4) == (7, 2)
    assert contents(out) == contents(tmp_path / "whole")
    (root / "folder.1/5.png").write_bytes(picture(5))
    (out / "00001.tar").unlink()
    assert to_shards.convert(lists, root, out, 4) == (7, 1)
    assert len((out / "skipped.txt").read_text().splitlines()) == 1


def test_shards_of_something_else_are_not_mixed(tmp_path, lists):
    root, out = tmp_path / "images", tmp_path / "out"
    to_shards.convert(lists, root, out, 10)
    before = contents(out)
    assert "other samples" in refusal(to_shards.convert, lists, root, out, 11)
    for other in (lists[:1], lists[::-1]):
        assert "other lists" in refusal(to_shards.convert, other, root, out, 10)
    (tmp_path / "other").symlink_to(root)
    assert "other image_root" in refusal(to_shards.convert, lists, tmp_path / "other", out, 10)
    (tmp_path / "2.json").write_text(json.dumps([{"image": "folder.0/0.JPG", "caption": "another"}]))
    message = refusal(to_shards.convert, lists, root, out, 10)
    assert message.startswith(f"{out}/shards.json: ") and "name another --output" in message
    assert contents(out) == before
    (out / "shards.json").write_text("{")
    assert "shards.json: cannot be read" in refusal(to_shards.convert, lists, root, out, 10)
    (out / "shards.json").unlink()
    assert "holds shards but no shards.json" in refusal(to_shards.convert, lists, root, out, 10)


def test_conversion_errors_name_the_remedy(tmp_path, lists, monkeypatch, capsys):
    message = refusal(to_shards.convert, lists, tmp_path, tmp_path / "out", 10)
    assert message.startswith(f"--image_root {tmp_path}: none of 27 images looked for exists")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    assert "cannot write there" in refusal(to_shards.convert, lists, tmp_path / "images", tmp_path / "file", 10)
    status, printed = run_to_shards(monkeypatch, capsys, tmp_path / "no.json", "--output", tmp_path / "out")
    assert status == 2 and printed.startswith(f"error: {tmp_path / 'no.json'}: cannot read") and len(printed.splitlines()) == 1

    class Full(TarWriter):
        def write(self, sample):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_shards, "TarWriter", Full)
    message = refusal(lambda: to_shards.convert(lists, tmp_path / "images", tmp_path / "out", 10, processes=2))
    assert "No space left on device" in message and "run the same command again" in message
    assert not list((tmp_path / "out").glob("*.tar"))


def test_one_shard_is_named_without_braces(tmp_path, lists, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, printed = run_to_shards(monkeypatch, capsys, lists[1], "--image_root", "images", "--output", "out")
    assert status == 0 and printed.strip().splitlines()[-1] == "train_file: ['out/00000.tar']"
