"""Token ids as the released checkpoints were trained with, and vocabularies made from captions."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from conftest import refusal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertTokenizer

from dataset.text import is_blank
from models.tokenizer import SPECIAL, build_tokenizer
from tools.vocabulary import train_vocab

GOLDEN = json.load(open("tests/golden/text.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("tests/golden/vocab.txt")


def test_token_ids_are_the_released_ones(tokenizer):
    for case in GOLDEN["tokens"]:
        assert tokenizer(case["text"])["input_ids"] == case["input_ids"], case["text"]
    for case in GOLDEN["tokens_truncated_25"]:
        assert (
            tokenizer(case["text"], truncation=True, max_length=25)["input_ids"]
            == case["input_ids"]
        )
    batch = tokenizer(GOLDEN["batch"]["texts"], padding="longest", return_tensors="pt")
    assert batch["input_ids"].tolist() == GOLDEN["batch"]["input_ids"]
    assert batch["attention_mask"].tolist() == GOLDEN["batch"]["attention_mask"]


def test_folder_with_vocab_or_tokenizer_json(tokenizer, tmp_path):
    text, ids = GOLDEN["tokens"][2]["text"], GOLDEN["tokens"][2]["input_ids"]
    assert "has no tokenizer.json or vocab.txt" in refusal(build_tokenizer, tmp_path)
    shutil.copy("tests/golden/vocab.txt", tmp_path)
    assert build_tokenizer(tmp_path)(text)["input_ids"] == ids
    # tokenizer.json wins over vocab.txt
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a"]))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_padding(length=128)  # as the files of sentence-transformers have it
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert build_tokenizer(tmp_path)(text)["input_ids"] == ids


def test_marks_and_line_ends_of_windows_and_other_separators_do_not_move_ids(tokenizer, tmp_path):
    vocab = Path("tests/golden/vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + vocab.replace("\n", "\r\n").encode())
    assert (
        build_tokenizer(tmp_path / "vocab.txt").backend_tokenizer.get_vocab()
        == tokenizer.backend_tokenizer.get_vocab()
    )
    (tmp_path / "vocab.txt").write_bytes((vocab + "\u2028\nlast\n").encode())
    assert (
        build_tokenizer(tmp_path / "vocab.txt").backend_tokenizer.get_vocab()["last"]
        == len(tokenizer) + 1
    )


# as of a model that is not BERT
OTHER = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))


@pytest.mark.parametrize(
    "name, content, lacking",
    [
        ("vocab.txt", b"[PAD]\na\nb\n", "[UNK], [CLS]"),
        ("captions.json", b'[{"image": "a.jpg", "caption": "b"}]', ""),
        ("tokenizer.json", b'{"version": "1.0"}', ""),
        (
            "vocab.txt",
            b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n[PAD]\n",
            "line 7 repeats '[PAD]' of line 1",
        ),
        ("tokenizer.json", OTHER.to_str().encode(), "[PAD], [CLS], [SEP], [MASK]"),
        ("photo.png", Path("tests/golden/photo.png").read_bytes(), ""),
    ],
)
def test_bad_vocabularies_are_named(tmp_path, name, content, lacking):
    (tmp_path / name).write_bytes(content)
    message = refusal(build_tokenizer, tmp_path / name)
    expected = f"{name} is not a vocabulary", lacking, "python -m tools.vocabulary"
    assert all(words in message for words in expected)


@pytest.fixture
def vocabulary(call, tmp_path):
    """Returns the tokenizer of a vocabulary that the command makes from captions."""

    def make(captions, *flags):
        entries = [{"image": "x.jpg", "caption": captions * 3}, {"image": "y.jpg", "caption": "a"}]
        (tmp_path / "train.json").write_text(json.dumps(entries))
        output = tmp_path / "v/mine.json"
        call("tools.vocabulary", tmp_path / "train.json", "--output", output, *flags)
        return build_tokenizer(output)

    return make


def test_vocab_trained_on_captions_of_any_language(vocabulary, capsys):
    captions = [
        "ein roter Kreis",
        "ein blauer Kreis",
        "красный круг",
        "синий круг",
        "赤い 円",
        "青い 円",
    ]
    tokenizer = vocabulary(captions, "--size", 200)
    assert tokenizer.all_special_ids == [0, 1, 2, 3, 4]
    assert str(len(tokenizer)) in capsys.readouterr().out
    for caption in captions:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        # every word is one piece; Chinese and Japanese signs are words of their own
        assert len(ids) == 1 + sum(
            1 if word.isalpha() and word < "\u3000" else len(word) for word in caption.split()
        )


def test_own_vocabularies_keep_marks_in_any_composition_and_no_case(vocabulary):
    captions = [
        "赤いパンダ",
        "赤いハンダ",
        "Un Café",
        "un cafe",
        "ação",
        "acao",
        "हिंदी",
        "हदी",
        "güç",
        "guc",
        "한국",
        "Ёж",
        "еж",
    ]
    tokenizer = vocabulary(captions)
    ids = [tokenizer(caption)["input_ids"] for caption in captions]
    assert len(set(map(tuple, ids))) == len(captions)
    for caption, expected in zip(captions, ids, strict=True):
        assert tokenizer.unk_token_id not in expected
        for form in ("NFC", "NFD"):
            assert tokenizer(unicodedata.normalize(form, caption))["input_ids"] == expected
            assert tokenizer(unicodedata.normalize(form, caption).upper())["input_ids"] == expected
    assert tokenizer.decode(ids[2], skip_special_tokens=True) == "un café"
    plain = vocabulary(["a red circle", "a blue circle"], "--overwrite")
    theirs = BertTokenizer(plain.backend_tokenizer.get_vocab(), strip_accents=False)
    for text in ("a red Circle", "circled, red", "un café"):
        assert plain(text)["input_ids"] == theirs(text)["input_ids"][:-1]


def test_nothing_that_is_not_blank_is_lost_on_an_own_vocabulary(vocabulary):
    tokenizer = vocabulary(["a red circle"])
    for character in map(chr, [*range(0x3100), *range(0xA000, 0xA100), *range(0x1F600, 0x1F610)]):
        if unicodedata.ucd_3_2_0.category(character) == unicodedata.category(character) != "Cn":
            lost = len(tokenizer(character)["input_ids"]) == 1
            assert is_blank(character) or not lost, ascii(character)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": False, "tokenize_chinese_chars": False},
    ],
)
def test_what_a_folder_says_of_case_and_accents_is_done(tmp_path, settings):
    pieces = [*SPECIAL, "Café", "café", "Cafe", "cafe", "漢", "漢字", "字", "e\u0301"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "Café cafe e\u0301 漢字"
    for source in (tmp_path, tmp_path / "vocab.txt"):
        theirs = BertTokenizer(str(tmp_path / "vocab.txt"), **{"do_lower_case": True, **settings})
        assert build_tokenizer(source)(text)["input_ids"] == theirs(text)["input_ids"][:-1]


@pytest.mark.parametrize("content", ["{", "[]", '{"do_lower_case": "no"}'])
def test_bad_settings_are_named(tmp_path, content):
    shutil.copy("tests/golden/vocab.txt", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert "tokenizer_config.json" in refusal(build_tokenizer, tmp_path)


@pytest.mark.parametrize(
    "content, output, words",
    [
        ("[]", "v.json", "train.json"),
        ("path,caption\na.jpg,a dog\n", "v.json", "tools.to_json"),
        ('[{"image": "", "caption": "a"}, {"image": "", "caption": 3}]', "v.json", "entry 1"),
        ('[{"image": "", "caption": [" ", ""]}]', "v.json", "train.json: no caption has a word"),
        (
            '\ufeff[{"image": "", "caption": "a \\ud83d"}]',
            "train.json/v.json",
            "--output train.json: cannot write there",
        ),
        ("[]", "vocab.txt", "--output vocab.txt: not a .json file"),
    ],
)
def test_captions_without_a_vocabulary_in_them_and_nowhere_to_write_are_one_line(
    tmp_path, monkeypatch, call, content, output, words
):
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text(content, encoding="utf-8")
    assert words in refusal(call, "tools.vocabulary", "train.json", "--output", output)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_the_same_captions_give_the_same_vocabulary():
    # most pairs of letters are equally frequent
    captions = [f"{a}{b}{c} {c}{b}" for a in "bcdfg" for b in "aeiou" for c in "klmnp"]
    first = train_vocab(captions, 60)
    assert len(first) == len(set(first)) == 60
    assert all(
        train_vocab(iter(some), 60) == first
        for some in (captions, captions[::-1], captions[7:] + captions[:7])
    )


def test_a_smaller_vocabulary_than_asked_for_has_a_reason(call, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    often = [f"{a}{b}{c}" for a in "bcd" for b in "aei" for c in "kl"]  # 18 words
    captions = [" ".join(often)] * 2 + ["zzxq yywv vwyy"]  # 3 words once

    def make(size, captions=captions):
        Path("train.json").write_text(json.dumps([{"image": "a.jpg", "caption": captions}]))
        flags = ["--output", "v.json", "--overwrite", "--size", size]
        call("tools.vocabulary", "train.json", *flags)
        return build_tokenizer("v.json").backend_tokenizer.get_vocab(), capsys.readouterr().err

    pieces, note = make(500)
    assert all(words in note for words in ("--size 500", "2 times", "3 of the 21", "18"))
    assert set(often) <= set(pieces) and not {"zzxq", "yywv", "vwyy"} & set(pieces)
    assert make(len(pieces)) == (pieces, "")
    more, note = make(500, captions * 2)  # what the note advises
    assert {*often, "zzxq", "yywv", "vwyy"} <= set(more) and "0 of the 21" in note


def test_a_vocabulary_replaces_no_file_unless_told_to(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    Path("train.json").write_text('[{"image": "a.jpg", "caption": "a dog"}]')
    Path("v.json").write_text("mine")
    argv = ["tools.vocabulary", "train.json", "--output", "v.json"]
    assert "v.json" in refusal(call, *argv)
    assert Path("v.json").read_text() == "mine"
    call(*argv, "--overwrite")
    assert Path("v.json").read_text() != "mine"
