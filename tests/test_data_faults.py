"""What becomes of faulty data. tests/FAULTS.md has a table whose rows are tested here or in
test_images.py.
"""

import json
import os
import re
import stat
import unicodedata

import pytest
import torch
from conftest import ROOT, refusal
from helpers.files import declares, encoded, jpeg_of_scans
from PIL import Image

from dataset.build import build_dataset
from dataset.caption import draw_caption
from dataset.text import is_blank, pre_caption, tokenize
from models.tokenizer import build_tokenizer
from utils import InputError

GOOD = "images/train/000000.jpg"
HALF = "\ud83d"  # of a surrogate pair
BLANK = {
    "empty": "",
    "blanks": " \t\n",
    "punctuation": "?! ... --",
    "control": "\0\x01\x1b",
    "zero-width": "\u200b\ufeff\u200d",
    "half a surrogate pair": HALF,
    "marks without letters": "\u0301\ufe0f",
    "replacement": "\ufffd\ufffd",
    "private": "\ue000",
}
UNUSABLE = {  # name of the image file -> words of the reason
    "corrupt.jpg": "broken image",
    "truncated.jpg": "broken image",
    "corrupt.png": "broken image",
    "empty.jpg": "empty file",
    "html.jpg": "not an image",
    "gone.jpg": "does not exist",
    "bomb.jpg": "too large",
    "bomb.png": "too large",
    "float.tiff": "unknown range of gray",
    "slow.jpg": "too slow to decode",
    "page.eps": "not an image",
    "fifo.jpg": "not a regular file",
    "device.jpg": "not a regular file",
    "socket.jpg": "unreadable",
}
LATER = {  # changes of images after the start
    "gone.jpg": lambda path: None,
    "fifo.jpg": os.mkfifo,
    "device.jpg": lambda path: path.symlink_to("/dev/zero"),
    "socket.jpg": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}


@pytest.fixture
def tokenizer(tiny_config):
    return build_tokenizer(tiny_config["tokenizer"])


@pytest.fixture
def folder(shapes, tmp_path):
    """Make an image folder with the files of UNUSABLE, the unchanged files of LATER and a good
    image.
    """
    good = (shapes / GOOD).read_bytes()
    png = encoded(Image.open(shapes / GOOD), "PNG")
    files = {
        "corrupt.jpg": good[:-200] + b"\xff\xd9",
        "truncated.jpg": good[:-200],
        "corrupt.png": png[:60] + bytes(len(png) - 60),
        "empty.jpg": b"",
        "html.jpg": b"<html>404 Not Found</html>",
        "bomb.jpg": declares(30000, 30000, "JPEG"),
        "bomb.png": declares(30000, 30000, "PNG"),
        "good.jpg": good,
        "slow.jpg": jpeg_of_scans(Image.new("RGB", (16, 16)), 101),
        "page.eps": encoded(Image.new("RGB", (16, 16)), "EPS"),
    }
    for name, data in {**files, **dict.fromkeys(LATER, b"")}.items():
        (tmp_path / name).write_bytes(data)
    Image.new("F", (40, 30), 0.5).save(tmp_path / "float.tiff")
    return tmp_path


def break_later(folder):
    """Change the images of LATER."""
    for name, make in LATER.items():
        (folder / name).unlink()
        make(folder / name)


def build(name, tiny_config, folder, entries, **keys):
    """A data set of entries."""
    path = folder / "list.json"
    path.write_bytes(entries if isinstance(entries, bytes) else json.dumps(entries).encode())
    files = {key: [str(path)] for key in ("train_file", "val_file", "test_file")}
    roots = {"image_root": str(folder), "vqa_root": str(folder)}
    return build_dataset(*name.rsplit("_", 1), {**tiny_config, **files, **roots, **keys}, seed=4)


def entries_of(name, images, text="a red circle"):
    """Entries with these images in the form of data set `name`."""
    task, _, split = name.partition("_")
    forms = {
        "pretrain": lambda i, image: {"image": image, "caption": text},
        "retrieval": lambda i, image: {
            "image": image,
            "caption": text if split == "train" else [text],
            "image_id": i,
        },
        "ve": lambda i, image: {"image": image, "sentence": text, "label": "neutral"},
        "nlvr": lambda i, image: {"images": [image, "good.jpg"], "sentence": text, "label": "True"},
        "vqa": lambda i, image: {
            "image": image,
            "question": text,
            "question_id": i,
            "dataset": "vqa",
            "answer": ["a"],
        },
        "grounding": lambda i, image: {"image": image, "text": text, "ref_id": 0},
    }
    return [forms[task](i, image) for i, image in enumerate(images)]


# --------------------------------------------------------------------------------------------------
# images


@pytest.mark.parametrize("name", ["pretrain_train", "retrieval_train", "vqa_train", "nlvr_train"])
def test_in_training_unusable_images_are_replaced_and_listed(tiny_config, folder, name):
    dataset = build(name, tiny_config, folder, entries_of(name, [*UNUSABLE, *["good.jpg"] * 20]))
    break_later(folder)
    for i, (image, words) in enumerate(UNUSABLE.items()):
        sample = dataset[i]
        assert (
            image in sample.skipped[0]
            and words in sample.skipped[0]
            and "\n" not in sample.skipped[0]
        )
        assert torch.equal(sample.image, dataset[i].image) and sample.image.shape[-3:] == (
            3,
            32,
            32,
        )
    batch = dataset.collate(
        [dataset[0], dataset[1], dataset[20]], build_tokenizer(tiny_config["tokenizer"])
    )
    assert len(batch.skipped) >= 2 and all("good.jpg" in file for file in batch.files)


@pytest.mark.parametrize("name", ["retrieval_test", "vqa_test", "nlvr_test"])
def test_unusable_images_end_a_test(tiny_config, folder, name):
    dataset = build(name, tiny_config, folder, entries_of(name, UNUSABLE))
    break_later(folder)
    for i, (image, words) in enumerate(UNUSABLE.items()):
        message = refusal(dataset.__getitem__, i)
        assert (
            image in message and words in message and "an evaluation needs all of them" in message
        )


@pytest.mark.parametrize("name", ["pretrain_train", "retrieval_test"])
def test_missing_images_are_refused_before_the_start(tiny_config, folder, name):
    (folder / "photos").mkdir()
    break_later(folder)
    for image, problem in (
        ("gone.jpg", "does not exist"),
        ("photos", "is a folder"),
        ("https://host/a.jpg", "is a URL"),
        ("fifo.jpg", "is not a regular file"),
        ("device.jpg", "is not a regular file"),
    ):
        message = refusal(build, name, tiny_config, folder, entries_of(name, ["good.jpg", image]))
        assert (
            "entry 1" in message
            and f"{image} {problem} (1 of 2" in message
            and "image_root" in message
        )


@pytest.mark.parametrize("name", ["pretrain_train", "grounding_train", "retrieval_test"])
@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_thin_and_tiny_images_are_used(tiny_config, folder, name, size):
    Image.new("RGB", size, "red").save(folder / "thin.png")
    dataset = build(name, tiny_config, folder, entries_of(name, ["thin.png"]))
    for epoch in range(5):
        dataset.epoch = epoch
        image = dataset[0] if name == "retrieval_test" else dataset[0].image
        assert image.shape == (3, 32, 32) and image[0].max() > 200


# --------------------------------------------------------------------------------------------------
# texts


@pytest.mark.parametrize("caption", BLANK.values(), ids=BLANK)
def test_in_pre_training_blank_captions_are_replaced_and_listed(tiny_config, folder, caption):
    entries = entries_of("pretrain_train", ["good.jpg"] * 20)
    entries[1]["caption"] = caption
    sample = build("pretrain_train", tiny_config, folder, entries)[1]
    assert sample.caption == "a red circle" and len(sample.skipped) == 1
    assert "entry 1" in sample.skipped[0] and "empty after clean-up" in sample.skipped[0]


def test_of_a_list_of_captions_only_the_drawn_one_matters(tiny_config, folder):
    entries = entries_of("pretrain_train", ["good.jpg"] * 20)
    entries[1]["caption"] = ["\u200b", "fine"]
    dataset, skipped = build("pretrain_train", tiny_config, folder, entries), set()
    for epoch in range(20):
        dataset.epoch = epoch
        skipped.add(len(dataset[1].skipped))
        assert dataset[1].caption == "a red circle" if dataset[1].skipped else "fine"
    assert skipped == {0, 1}


@pytest.mark.parametrize("caption", BLANK.values(), ids=BLANK)
@pytest.mark.parametrize(
    "name", ["retrieval_train", "retrieval_test", "vqa_train", "vqa_test", "ve_train", "nlvr_test"]
)
def test_elsewhere_blank_texts_are_refused_before_the_start(tiny_config, folder, name, caption):
    entries = entries_of(name, ["good.jpg"]) + entries_of(name, ["good.jpg"], caption)
    message = refusal(build, name, tiny_config, folder, entries)
    assert "list.json: entry 1" in message and "empty after clean-up" in message


USED = {  # caption -> what is left of it
    "a" * 100_000: "a" * 100_000,
    "a " * 50_000: " ".join(["a"] * 30),
    "a\tred\ncircle": "a\tred\ncircle",
    "a\0red": "a\0red",
    f"a {HALF} circle": "a circle",
    f"cut {HALF}": "cut",
    "a red circle \U0001f534": "a red circle \U0001f534",
    "\U0001f468\u200d\U0001f469": "\U0001f468\u200d\U0001f469",
    "\u200fעיגול אדום": "\u200fעיגול אדום",
    "دائرة حمراء": "دائرة حمراء",
    "赤い円": "赤い円",
    "zero\u200bwidth": "zero\u200bwidth",
}


@pytest.mark.parametrize("caption", USED, ids=lambda caption: ascii(caption[:12]))
def test_unusual_texts_are_used(tiny_config, folder, tokenizer, caption):
    sample = build(
        "pretrain_train", tiny_config, folder, entries_of("pretrain_train", ["good.jpg"], caption)
    )[0]
    assert sample.caption == USED[caption] and not sample.skipped
    dataset = build(
        "retrieval_test", tiny_config, folder, entries_of("retrieval_test", ["good.jpg"], caption)
    )
    for text in (sample.caption, dataset.texts[0]):
        ids, mask = tokenize([text, "a red circle"], tokenizer, 25)
        assert ids[0, 0] == tokenizer.cls_token_id and 2 <= mask[0].sum() <= 25
    # the same ids whether the half was dropped while the list was read, as in pre-training, or
    # after
    assert torch.equal(
        *(tokenize([text], tokenizer, 25)[0] for text in (sample.caption, dataset.texts[0]))
    )


def test_of_any_text_a_tokenizer_makes_at_least_cls(tiny_config, tokenizer):
    ids, mask = tokenize([pre_caption(text, 30) for text in [*BLANK.values(), "a"]], tokenizer)
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and mask.sum(1).tolist() == [1] * len(
        BLANK
    ) + [2]


def test_blank_is_what_leaves_no_word_piece(tokenizer):
    characters = map(
        chr,
        [*range(0x3100), *range(0xD700, 0xE100), *range(0xFE00, 0x10000), *range(0x1F600, 0x1F610)],
    )
    # a tokenizer's tables of Unicode are of another version than Python's
    old = [
        c
        for c in characters
        if unicodedata.ucd_3_2_0.category(c) == unicodedata.category(c) != "Cn"
    ]
    texts = [pre_caption(character, 30) for character in old]
    pieces = tokenize(texts, tokenizer)[1].sum(1) - 1
    different = [
        ascii(c)
        for c, text, count in zip(old, texts, pieces.tolist(), strict=True)
        if is_blank(text) != (count == 0)
    ]
    assert not different and len(old) > 9000


def test_texts_with_words_beside_blank_ones_are_used():
    for blank in BLANK.values():
        assert draw_caption([f"{blank} dog"], "entry 0").split()[-1] == "dog"


def test_duplicated_entries_are_used_as_they_are(tiny_config, folder):
    for name in ("pretrain_train", "retrieval_train", "ve_train"):
        assert len(build(name, tiny_config, folder, entries_of(name, ["good.jpg"]) * 3)) == 3
    dataset = build(
        "retrieval_test", tiny_config, folder, entries_of("retrieval_test", ["good.jpg"]) * 3
    )
    assert len(dataset) == 1 and dataset.img2txt == [[0, 1, 2]]
    with pytest.raises(InputError, match="same question_id 0"):
        build("vqa_test", tiny_config, folder, entries_of("vqa_test", ["good.jpg"]) * 2)


def test_every_row_of_the_table_names_a_test():
    page = (ROOT / "tests/FAULTS.md").read_text()
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("|") and not line.endswith(("|---|", "| test |"))
    ]
    assert len(rows) > 20 and all(re.search("`test_", row) for row in rows)
