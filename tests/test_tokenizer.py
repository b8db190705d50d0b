"""Token ids as the released checkpoints were trained with, and vocabularies made from captions."""

import json

import pytest

from models.tokenizer import build_tokenizer, check_vocab_size, main, train_vocab
from utils import InputError

GOLDEN = json.load(open("tests/golden/text.json"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("tests/golden/vocab.txt")


def test_token_ids_are_the_released_ones(tokenizer):
    for case in GOLDEN["tokens"]:
        assert tokenizer(case["text"])["input_ids"] == case["input_ids"], case["text"]
    for case in GOLDEN["tokens_truncated_25"]:
        assert tokenizer(case["text"], truncation=True, max_length=25)["input_ids"] == case["input_ids"]
    batch = tokenizer(GOLDEN["batch"]["texts"], padding="longest", return_tensors="pt")
    assert batch["input_ids"].tolist() == GOLDEN["batch"]["input_ids"]
    assert batch["attention_mask"].tolist() == GOLDEN["batch"]["attention_mask"]


def test_folder_with_vocab_or_tokenizer_json(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/vocab.txt").write_bytes(open("tests/golden/vocab.txt", "rb").read())
    tokenizer.save_pretrained(tmp_path / "b")
    text = GOLDEN["tokens"][2]["text"]
    for folder in ("a", "b"):
        assert build_tokenizer(tmp_path / folder)(text)["input_ids"] == GOLDEN["tokens"][2]["input_ids"]


def test_bad_vocabularies_are_named(tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\na\nb\n")
    with pytest.raises(InputError, match=r"lacks \[UNK\], \[CLS\]"):
        build_tokenizer(tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="has no vocab.txt or tokenizer.json"):
        (tmp_path / "empty").mkdir()
        build_tokenizer(tmp_path / "empty")
    with pytest.raises(InputError, match="166 word pieces.*vocab_size 61"):
        check_vocab_size(tokenizer, {"vocab_size": 61}, "tests/golden/vocab.txt")


def test_vocab_trained_on_captions_of_any_language(tmp_path, monkeypatch, capsys):
    captions = ["ein roter Kreis", "ein blauer Kreis", "красный круг", "синий круг", "赤い 円", "青い 円"] * 5
    pieces = train_vocab(captions, 200)
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    entries = [{"image": "x.jpg", "caption": captions[0]}, {"image": "y.jpg", "caption": captions[1:]}]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    monkeypatch.setattr("sys.argv", ["t", str(tmp_path / "train.json"), "--output", str(tmp_path / "v/vocab.txt"), "--size", "200"])
    main()
    tokenizer = build_tokenizer(tmp_path / "v/vocab.txt")
    assert str(len(tokenizer)) in capsys.readouterr().out
    for caption in captions:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        # every word is one piece; Chinese and Japanese signs are words of their own
        assert len(ids) == 1 + sum(1 if word.isalpha() and word < "\u3000" else len(word) for word in caption.split())
