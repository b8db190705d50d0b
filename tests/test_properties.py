"""Properties that hold for any input: clean-up and tokenization of texts, configurations,
annotation files.

An `example` is an input that once ended in a stack trace or slipped through, or one that careless
users have.
"""

import copy
import itertools
import json
import math
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from configs.config import FIELDS, OTHER_NAMES, SECTIONS, as_config
from configs.load import load_config, override, save_config
from dataset.caption import Pair
from dataset.entries import digest, read_json_list, where
from dataset.retrieval import RetrievalPair
from dataset.store import Entries
from dataset.text import pre_caption, pre_question, tokenize
from models.tokenizer import build_tokenizer
from utils import InputError

settings.register_profile(
    "same every time",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
    ],
)
settings.load_profile("same every time")

ANY_TEXT = st.text(st.characters())  # halves of surrogate pairs and control characters too
# a file that is written again within the clock's resolution looks like the one before
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the files of all examples."""
    return tmp_path_factory.mktemp("properties")


def new_file(folder, content):
    path = folder / f"{next(NUMBERS)}"
    path.write_bytes(content)
    return path


def one_line(error, start):
    """Asserts that an InputError's message is one line, not a page long, and begins with what is
    wrong; returns it.
    """
    message = str(error)
    assert message.startswith(str(start)) and len(message.splitlines()) == 1 and len(message) < 1500
    return message


def nearly(content, data):
    """Bytes with some of them taken away, doubled or replaced, or without their end."""
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 20)))
        middle = data.draw(
            st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=4) | st.just(None)
        )
        content = content[:start] if middle is None else content[:start] + middle + content[end:]
    return content


# --------------------------------------------------------------------------------------------------
# texts

LISTED = ",.'!?\"()*#:;~-/"
PIECES = [
    "<person>",
    "<PERSON>",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "a",
    "Red",
    "dog's",
    "[SEP]",
    "[MASK]",
    "İ",
    "ΑΣ",
    *LISTED,
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(), max_size=40).map("".join)


@given(TEXTS, st.integers(1, 60), st.sampled_from([1, 1, 1, 500]))
def test_texts_are_clean_short_and_stay_as_they_are(text, max_words, times):
    caption, question = (
        clean_up(text * times, max_words) for clean_up in (pre_caption, pre_question)
    )
    for clean in caption, question:
        assert (
            len(clean.split(" ")) <= max_words
            and not set(clean) & set(LISTED)
            and clean == clean.lower()
        )
    assert caption == caption.strip(" ") and "  " not in caption and not caption.endswith("\n")
    assert caption in pre_caption(text * times, 10**9)
    # "<<person>>" loses a pair of brackets each time
    assert pre_caption(caption, max_words) == caption or "<person>" in caption
    assert pre_question(question, max_words) == question.rstrip(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("tests/golden/vocab.txt")


@given(
    st.lists(TEXTS | ANY_TEXT, min_size=1, max_size=5),
    st.integers(1, 40) | st.none(),
    st.sampled_from([1, 1, 300]),
)
@example(["cut emoji \ud83d"], 25, 1)
def test_any_text_becomes_ids_within_the_limit(tokenizer, texts, max_tokens, times):
    ids, mask = tokenize([text * times for text in texts], tokenizer, max_tokens)
    assert ids.shape == mask.shape and len(ids) == len(texts)
    assert max_tokens is None or ids.shape[1] <= max_tokens
    assert 0 <= ids.min() and ids.max() < len(tokenizer)
    assert (ids[:, 0] == tokenizer.cls_token_id).all() and (mask[:, 0] == 1).all()
    assert (ids[mask == 0] == tokenizer.pad_token_id).all() and (mask.sum(1).max() == mask.shape[1])
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)


# --------------------------------------------------------------------------------------------------
# configurations


def nested(scalars, keys):
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=8,
    )


JSON_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON_VALUES = nested(JSON_SCALARS, ANY_TEXT)
# text without the two characters that ruamel.yaml writes and cannot always read back
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="?\x85")) | st.sampled_from(
    ["itc", "bf16", "all", "1e-4"]
)
VALUES = nested(
    st.none() | st.booleans() | st.integers(-1, 10**6) | st.floats() | st.floats(0, 1) | WORDS,
    WORDS,
)
NAMES = st.sampled_from([*FIELDS, *SECTIONS, *OTHER_NAMES, "bert_config.vocab_size"])
YAML_PIECES = st.lists(
    st.sampled_from([*"[]{}:,.=#&*'\"|>-~!\n\x00\ufeff", ": ", "- ", ".nan", "2020-02-30"]) | WORDS,
    max_size=8,
)


def assert_complete_or_refused(start, function, *arguments):
    """Asserts that a configuration has every key and survives its snapshot, or is refused in a
    line.
    """
    try:
        config = function(*arguments)
    except InputError as error:
        one_line(error, start)
        return
    assert as_config(config.to_dict()) == config
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, folder)
        assert load_config(f"{folder}/config.yaml") == config


@given(st.dictionaries(NAMES | WORDS, VALUES, max_size=2))
@example({"temp": math.inf})
@example({"temp": math.nan})
@example({1: 2})
@example({"train_file": [3]})
@example({"image_root": "\udce9"})
@example({"image_root": "'" + "\\" * 70 + " \\"})
@example({"scheduler": {"lr": 1}, "schedular": {"lr": 2}})
def test_any_values_are_refused_in_a_line_or_complete(config):
    before = copy.deepcopy(config)
    assert_complete_or_refused("where", as_config, config, "where")
    assert repr(config) == repr(before)


@given(st.sampled_from(["configs/VQA.yaml", "configs/shapes/Pretrain.yaml"]), st.data())
def test_any_slip_in_a_file_is_refused_in_a_line_or_a_complete_configuration(folder, path, data):
    path = new_file(folder, nearly(Path(path).read_bytes(), data))
    assert_complete_or_refused(path, load_config, path)


@given(
    st.lists(
        st.builds(
            "{}{}{}".format,
            NAMES | WORDS,
            st.sampled_from(["=", "=", "=", "", ".lr="]),
            YAML_PIECES.map("".join),
        )
    )
)
@example(["batch_size"])
@example(["a\nb=[" + "c\n"])
@example(["image_root=/data/caf\udce9"])  # as the command line hands over what is not UTF-8
@example(["optimizer.lr.lr=1"])
@example(["=1"])
def test_any_overrides_are_refused_in_a_line_or_a_complete_configuration(overrides):
    config = {"bert_config": "configs/config_bert.json", "scheduler": {"lr": 1}}
    before = copy.deepcopy(config)
    assert_complete_or_refused("--set", override, config, overrides, "--set")
    assert config == before


@pytest.mark.parametrize(
    "override_, hint", [("lr=1e-5", "optimizer.lr?"), ("epochs=3", "scheduler.epochs?")]
)
def test_a_key_of_optimizer_or_scheduler_without_its_prefix_is_recognized(override_, hint):
    with pytest.raises(InputError, match="did you mean") as caught:
        override({}, [override_], "where")
    assert one_line(caught.value, "--set").endswith(hint)


# --------------------------------------------------------------------------------------------------
# annotation files

LAYOUTS = st.sampled_from(
    [
        {},
        {"indent": 1},
        {"separators": (",", ":")},
        {"separators": (" \r\n,\t", " :\n"), "indent": "\t"},
    ]
)
PATHS = st.text(st.characters(), min_size=1) | st.just("\udce9.jpg")
PAIRS = st.lists(
    st.fixed_dictionaries(
        {"image": PATHS, "caption": TEXTS | st.lists(TEXTS, min_size=1, max_size=3)},
        optional={
            "image_id": st.integers() | st.text(),
            "score": st.floats(),
            "box": JSON_VALUES,
            "big": st.just(10**40),
        },
    ),
    min_size=1,
    max_size=6,
).map(lambda entries: json.loads(json.dumps(entries)))
JSON_WORDS = st.sampled_from(
    [
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        '"',
        " ",
        "\n",
        "\t",
        '{"a": 1}',
        '{"a": 1},',
        '"a": ',
        "{}",
        "[{}",
        "}]",
        "1",
        "-",
        "1.",
        "1e",
        "1.5e+3",
        "true",
        "nul",
        "NaN",
        "-Infinity",
        "\\",
        "\\u",
        "\\ud83d",
        "\\ude00",
        "\\n",
        "\x00",
        "\x0c",
        "\x1c",
        "\xa0",
        "\u2028",
        "\ufeff",
        "\r",
    ]
)
JSON_TEXTS = st.lists(JSON_WORDS | ANY_TEXT, max_size=15).map("".join) | JSON_VALUES.map(json.dumps)


BLOCKS = [0, 100, 1 << 16]  # least bytes of a list that are decoded at a time


def as_bytes(entries, layout):
    return json.dumps(entries, **layout).encode("utf-8", "surrogatepass")


def reference(content):
    """The entries as json.loads reads them, or None where there is no list of any."""
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, list) and entries else None


@given(st.binary() | JSON_TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"[" * 100_000)
@example(b'[{"a": ' + b"[" * 100_000)
@example(b'[{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}]")
@example(b'[{"question_id": ' + b"9" * 5000 + b"}]")
@example("\xa0[{}]".encode())
@example(b"\x0c[{}]")
@example("[\u2003{}]".encode())
@example("[\u2003]".encode())
@example("[{}]\u2003".encode())
@example(b'\xef\xbb\xbf[{"a": NaN, "b": -Infinity}]')
def test_any_file_is_read_as_by_json_or_refused_in_a_line(folder, content):
    path, expected = new_file(folder, content), reference(content)
    try:
        entries = read_json_list(path)
    except InputError as error:
        one_line(error, path)
        entries = None
    # as text, in which nan equals nan
    assert repr(entries) == repr(expected)


def as_pairs(entries):
    pairs = ((entry["image"], entry["caption"]) for entry in entries)
    return [(image, [caption] if isinstance(caption, str) else caption) for image, caption in pairs]


def contents(loaded):
    return [(entry.image, entry.texts) for entry in loaded]


@given(
    st.lists(PAIRS, min_size=1, max_size=3),
    LAYOUTS,
    st.sampled_from([16, 32, 1 << 14]),
    st.sampled_from(BLOCKS),
)
def test_any_paths_and_captions_survive_the_cache(folder, lists, layout, batch, block):
    files = [new_file(folder, as_bytes(entries, layout)) for entries in lists]
    with mock.patch("dataset.store._BATCH", batch), mock.patch("dataset.entries._BLOCK", block):
        loaded = Entries(files, Pair)
    expected = as_pairs([entry for entries in lists for entry in json.loads(json.dumps(entries))])
    assert contents(loaded) == contents(Entries(files, Pair)) == expected
    places = [
        where(file, number)
        for file, entries in zip(files, lists, strict=True)
        for number in range(len(entries))
    ]
    assert [loaded.where(i) for i in range(len(loaded))] == places


def is_right(entry):
    if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
        return False
    captions = entry.get("caption")
    listed = isinstance(captions, list) and len(captions) > 0
    return all(isinstance(text, str) for text in captions) if listed else isinstance(captions, str)


@given(PAIRS, LAYOUTS, st.sampled_from(BLOCKS), st.data())
def test_any_slip_in_a_list_of_pairs_is_loaded_as_by_json_or_refused_in_a_line(
    folder, entries, layout, block, data
):
    content = as_bytes(entries, {**layout, "ensure_ascii": data.draw(st.booleans())})
    content = nearly(content, data)
    path, expected = new_file(folder, content), reference(content)
    try:
        with mock.patch("dataset.entries._BLOCK", block):
            loaded = Entries([path], Pair)
    except InputError as error:
        assert expected is None or not all(map(is_right, expected))
        one_line(error, path)
    else:
        assert contents(loaded) == as_pairs(expected)


IDS = st.integers() | st.text(st.characters()) | st.sampled_from([0, "0", 10**40])


@given(
    st.lists(
        st.fixed_dictionaries(
            {"image": PATHS, "caption": TEXTS.map("word ".__add__), "image_id": IDS}
        ),
        min_size=1,
    )
)
def test_entries_are_of_one_group_if_they_have_one_image_id(folder, entries):
    groups = [
        digest(entry.group)
        for entry in Entries([new_file(folder, as_bytes(entries, {}))], RetrievalPair)
    ]
    ids = [entry["image_id"] for entry in json.loads(json.dumps(entries))]
    pairs = list(itertools.product(range(len(ids)), repeat=2))
    assert [groups[i] == groups[k] for i, k in pairs] == [ids[i] == ids[k] for i, k in pairs]
