"""tools.export to a folder and to the hub, and load_model and --checkpoint from there, on a local
server (tests/helpers/hub.py).
"""

import hashlib
import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT, contents, exit_status, refusal, tiny
from helpers.hub import place

from configs.config import FIELDS, FILE_KEYS
from configs.load import load_config
from inference import load_model
from models import build_model
from models.hub import fetch
from models.tokenizer import build_tokenizer, load_tokenizer
from models.weights import find_checkpoint, read_checkpoint, write_weights
from utils import seed_everything

IMAGE, CAPTION = "images/test/000000.jpg", "a red circle"


@pytest.fixture(scope="module")
def run_folder(shapes, tmp_path_factory):
    """The folder of a run of retrieval with its log."""
    folder, config = (
        tmp_path_factory.mktemp("run"),
        {**tiny(shapes), "bert_config": {**tiny(shapes)["bert_config"]}},
    )
    config["bert_config"]["vocab_size"] = "auto"
    seed_everything(3)
    model = build_model(
        "retrieval",
        config | {"bert_config": tiny(shapes)["bert_config"]},
        load_tokenizer(config)[0],
    )
    torch.save(
        {"model": model.state_dict(), "config": config, "epoch": 1}, folder / "checkpoint_best.pth"
    )
    entries = [
        {"train_loss_itm": 0.5, "val_r_mean": 10.0 + epoch, "epoch": epoch} for epoch in range(3)
    ]
    (folder / "log.txt").write_text(
        "".join(json.dumps(entry) + "\n" for entry in entries)
        + '{"test_txt_r1": 47.8, "epoch": 1}\n'
    )
    return folder


@pytest.fixture
def export(run_main):
    """Runs the tool; returns (exit status, stdout, the last line of stderr)."""

    def call(source, *flags):
        status, out, err = run_main("tools.export", "--checkpoint", source, *flags)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status != 0), err
        return status, out, "".join(errors)

    return call


def outputs(model, shapes):
    return (
        model.embed_images(shapes / IMAGE),
        model.embed_texts(CAPTION),
        torch.tensor(model.match(shapes / IMAGE, CAPTION)),
    )


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_folder_has_weights_configuration_vocabulary_and_card(
    run_folder, export, shapes, tmp_path
):
    folder = tmp_path / "hub/retriever"
    status, out, err = export(run_folder / "checkpoint_best.pth", "--output", f"{folder}/")
    assert status == 0 and f"wrote {folder}/" in out, err
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
    }
    assert (
        build_tokenizer(folder).backend_tokenizer.get_vocab()
        == build_tokenizer(shapes / "vocab.txt").backend_tokenizer.get_vocab()
    )
    config = load_config(folder / "config.json")  # JSON is YAML
    assert config.bert_config.vocab_size == len((shapes / "vocab.txt").read_text().splitlines())
    assert config.bert_config.hidden_act == "gelu" and config.image_res == 32
    assert config.tokenizer == str(folder / "tokenizer.json")
    card = (folder / "README.md").read_text()
    for words in (
        "task retrieval, epoch 1",
        "`test_file`: test.json",
        "| val_r_mean | 11 |",
        "| test_txt_r1 | 47.8 |",
        "arxiv.org/abs/2107.07651",
        'load_model("retriever")',
        "- vision-language",
    ):
        assert words in card
    for path in folder.iterdir():
        assert (
            str(shapes).encode() not in path.read_bytes()
            and str(ROOT).encode() not in path.read_bytes()
        ), path
    assert "train_loss" not in card and "| val_r_mean | 12" not in card
    moved = folder.rename(tmp_path / "moved")  # what it names lies beside it
    before = outputs(load_model(run_folder, "cpu"), shapes)
    assert same(outputs(load_model(moved, "cpu"), shapes), before)
    assert same(outputs(load_model(moved / "model.safetensors", "cpu"), shapes), before)

    left = contents(moved)
    status, _, err = export(run_folder / "checkpoint_best.pth", "--output", f"{moved}/")
    assert (
        status == 2
        and "moved/ exists already" in err
        and "--overwrite" in err
        and contents(moved) == left
    )
    assert (
        export(
            run_folder / "checkpoint_best.pth", "--output", f"{moved}/", "--overwrite", "--momentum"
        )[0]
        == 0
    )
    assert "text_encoder_m." in str(read_checkpoint(moved / "model.safetensors")["model"].keys())


def test_round_trip_through_the_hub_is_bit_for_bit(
    run_folder, export, hub, shapes, tmp_path, monkeypatch, capsys
):
    before, folder = outputs(load_model(run_folder, "cpu"), shapes), tmp_path / "out"
    status, out, err = export(
        run_folder / "checkpoint_best.pth", "--output", f"{folder}/", "--push", "lab/retriever"
    )
    assert status == 0 and f"published {hub.address}/lab/retriever/commit/" in out, err
    repository = hub.repositories["lab/retriever"]
    first = repository["main"]
    assert repository["private"] is True
    assert repository["commits"][first] == {
        path.name: data for path, data in contents(folder).items()
    }
    assert 'load_model("lab/retriever")' in (folder / "README.md").read_text()

    assert same(outputs(load_model("lab/retriever", "cpu"), shapes), before)
    assert same(outputs(load_model(f"lab/retriever@{first}", "cpu"), shapes), before)

    status, _, err = export(folder, "--push", "lab/retriever")  # a second time
    assert (
        status == 2
        and "lab/retriever: the repository exists already and has 4 files" in err
        and "--overwrite" in err
    )
    assert repository["main"] == first
    # what the owner has changed is uploaded as it is
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert export(folder, "--push", "lab/retriever", "--overwrite")[0] == 0
    assert repository["commits"][repository["main"]]["README.md"] == b"---\nlicense: mit\n---\n"
    assert (
        export(folder, "--push", "lab/open", "--public")[0] == 0
        and hub.repositories["lab/open"]["private"] is False
    )


def test_revisions_are_pinned_and_without_one_the_newest_is_loaded(
    run_folder, export, hub, shapes, tmp_path
):
    folder = tmp_path / "out"
    export(run_folder / "checkpoint_best.pth", "--output", f"{folder}/", "--push", "lab/a")
    first, before = hub.repositories["lab/a"]["main"], outputs(load_model("lab/a", "cpu"), shapes)
    hub.repositories["lab/a"]["v1"] = first
    content = torch.load(run_folder / "checkpoint_best.pth", weights_only=True)
    content["model"]["vision_proj.weight"] *= -2
    torch.save(content, tmp_path / "other.pth")
    assert (
        export(tmp_path / "other.pth", "--output", f"{folder}/", "--push", "lab/a", "--overwrite")[
            0
        ]
        == 0
    )
    assert same(outputs(load_model("lab/a", "cpu"), shapes), before)  # a process sees one version
    fetch.cache_clear()
    assert not same(outputs(load_model("lab/a", "cpu"), shapes), before)
    for revision in ("v1", first):
        assert same(outputs(load_model(f"lab/a@{revision}", "cpu"), shapes), before)
    hub.requests.clear()
    fetch.cache_clear()
    load_model(f"lab/a@{first}", "cpu")
    assert not hub.requests  # a commit in the cache needs no network
    assert "refuses the request" in refusal(load_model, "lab/a@v7")


def test_offline_and_without_a_network_the_cache_serves(
    run_folder, export, hub, shapes, tmp_path, monkeypatch, capsys
):
    export(run_folder / "checkpoint_best.pth", "--output", f"{tmp_path}/out/", "--push", "lab/a")
    before = outputs(load_model("lab/a", "cpu"), shapes)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        fetch.cache_clear()
        hub.requests.clear()
        assert same(outputs(load_model("lab/a", "cpu"), shapes), before) and not hub.requests
        assert "offline mode" in capsys.readouterr().err
        assert "unset HF_HUB_OFFLINE" in refusal(load_model, "lab/b")
    place(monkeypatch, "http://127.0.0.1:9")
    fetch.cache_clear()
    assert same(outputs(load_model("lab/a", "cpu"), shapes), before)
    assert capsys.readouterr().err.count(" from the cache") == 1
    message = refusal(load_model, "lab/b")
    assert "the hub cannot be reached" in message and "http://127.0.0.1:9" in message
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    assert "the hub cannot be reached" in refusal(load_model, f"lab/b@{'1' * 40}")
    status, _, err = export(tmp_path / "out", "--push", "lab/b")
    assert status == 2 and "--push lab/b: the hub cannot be reached" in err


def test_what_the_hub_lacks_is_one_line(hub, export, run_folder, tmp_path):
    assert (
        "checkpoint: lab/a is not a local file or folder, and the hub refuses the request"
        in refusal(load_model, "lab/a")
    )
    hub.repositories["lab/other"] = {"commits": {"0" * 40: {"a.txt": b""}}, "main": "0" * 40}
    assert "the hub repository of this name has no model.safetensors" in refusal(
        load_model, "lab/other"
    )
    assert "weights/ALBEF.pth does not exist" in refusal(load_model, "weights/ALBEF.pth")
    checkpoint = run_folder / "checkpoint_best.pth"
    for flags, words in (
        (["--push", "lab/a"], "add --output FOLDER/"),
        (["--push", "lab/a", "--output", "a.pth"], "end --output a.pth with"),
        ([], "--output is missing"),
        (["--output", "a.pth", "--config", "configs/VE.yaml"], "--config"),
        (["--output", "a.pth", "--set", "alpha=0"], "--set"),
        (["--output", "a/", "--public"], "--public"),
        (["--push", "a b", "--output", f"{tmp_path}/x/"], "write USER/NAME"),
    ):
        status, _, err = export(checkpoint, *flags)
        assert status == 2 and words in err


def test_scripts_take_a_repository_and_a_run_folder_as_checkpoint(
    run_folder, export, hub, shapes, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    export(run_folder / "checkpoint_best.pth", "--output", f"{tmp_path}/out/", "--push", "lab/a")
    found = {}
    for source in ("lab/a", run_folder / "checkpoint_best.pth", run_folder):
        data = ["--set", f"test_file={shapes / 'test.json'}", f"image_root={shapes}"]
        flags = [
            "--evaluate",
            "--checkpoint",
            source,
            "--output_dir",
            tmp_path / "e",
            "--device",
            "cpu",
            *data,
        ]
        monkeypatch.setattr(
            sys, "argv", list(map(str, ["Retrieval.py", *flags, "--split", "test"]))
        )
        assert exit_status(importlib.import_module("Retrieval").main) == 0
        found[source] = capsys.readouterr().out.partition("ITC  ")[2]
        log = (tmp_path / "e/log.txt").read_text().splitlines()[-1]
        named = source if source == "lab/a" else str(find_checkpoint(source))
        assert json.loads(log)["checkpoint"] == named
    assert len(set(found.values())) == 1 and "chance" in found["lab/a"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["visualize", "--checkpoint", "lab/a", "--image", str(shapes / IMAGE), "--text", CAPTION],
    )
    assert exit_status(importlib.import_module("tools.visualize").main) == 0
    assert (tmp_path / "heatmap.png").exists()


def test_a_hub_writes_nothing_outside_of_its_cache(run_folder, export, hub, shapes, tmp_path):
    export(run_folder / "checkpoint_best.pth", "--output", f"{tmp_path}/out/", "--push", "lab/a")
    outside = tmp_path / "outside"
    before = set(tmp_path.rglob("*"))
    for header in ("ETag", "X_Linked_ETag", "X_Repo_Commit", "X_Xet_Hash"):
        for value in (
            "../../../outside",
            str(outside),
            f'"{outside}"',
            f'W/"{outside}"',
            "..",
            ".",
            "a/b",
            "",
        ):
            hub.headers = {header: value}
            for source in ("lab/a", "lab/none"):
                hub.repositories["lab/none"] = {"commits": {"0" * 40: {}}, "main": "0" * 40}
                message = refusal(load_model, source)
                assert (
                    source == "lab/none"
                    and header in ("X_Linked_ETag", "X_Xet_Hash")
                    or header.replace("_", "-") in message
                )
            assert "X-" in refusal(build_tokenizer, "lab/a") or "ETag" in refusal(
                build_tokenizer, "lab/a"
            )
    assert set(tmp_path.rglob("*")) == before
    hub.headers = {}
    assert "not a valid hub name" in refusal(load_model, "lab/a@../../../outside")
    load_model("lab/a", "cpu")


def test_the_configuration_of_a_repository_opens_nothing_else(
    run_folder, export, hub, shapes, tmp_path
):
    texts = {name for name, field in FIELDS.items() if field.accepts("any text")}
    assert texts <= {*FILE_KEYS, "eos", "optimizer.opt"}
    export(run_folder / "checkpoint_best.pth", "--output", f"{tmp_path}/out/", "--push", "lab/a")
    published = outputs(load_model("lab/a", "cpu"), shapes)
    repository = hub.repositories["lab/a"]
    files = repository["commits"][repository["main"]]
    good = json.loads(files["config.json"])
    others = [key for key in FILE_KEYS if key != "bert_config"]
    content = {
        **read_checkpoint(tmp_path / "out/model.safetensors"),
        "config": {**good, "tokenizer": "/dev/zero"},
    }
    # the metadata of the weights has another configuration
    with open(tmp_path / "model.safetensors", "wb") as file:
        write_weights(file, ".safetensors", content.pop("model"), content)
    files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()

    def load(config):
        files["config.json"] = config
        commit = hashlib.sha1(config).hexdigest()
        repository.update(commits={commit: files}, main=commit)
        fetch.cache_clear()
        return load_model("lab/a", "cpu")

    for value in ("/dev/zero", "../tokenizer.json", [str(tmp_path)], 5):
        model = load(json.dumps({**good, **dict.fromkeys(others, value)}).encode())
        assert repository["main"] in model.config.tokenizer and not model.config.test_file
        assert same(outputs(model, shapes), published)
    for config in (b"{", b"[]", b"5", b'"image_res"', b'{"a":' * 100_000):
        assert "config.json: not a JSON object" in refusal(load, config)


def test_only_the_named_files_are_uploaded_and_the_hub_is_asked_first(
    run_folder, export, hub, tmp_path
):
    folder = tmp_path / "out"
    checkpoint = run_folder / "checkpoint_best.pth"
    assert export(checkpoint, "--output", f"{folder}/")[0] == 0
    for name in ("secret.txt", "optimizer.pth", "sub/vocab.txt", "README.md.bak", ".env"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    assert export(folder, "--push", "lab/a")[0] == 0
    repository = hub.repositories["lab/a"]
    assert set(repository["commits"][repository["main"]]) == {
        "model.safetensors",
        "config.json",
        "README.md",
        "tokenizer.json",
    }
    status, _, err = export(checkpoint, "--output", f"{tmp_path}/new/", "--push", "lab/a")
    assert (
        status == 2 and "lab/a" in err and "--overwrite" in err and not (tmp_path / "new").exists()
    )
    status, _, err = export(checkpoint, "--output", f"{folder}/", "--push", "lab/b")
    assert (
        status == 2
        and str(folder) in err
        and "--overwrite" in err
        and "lab/b" not in hub.repositories
    )
    (folder / "tokenizer.json").unlink()
    status, _, err = export(folder, "--push", "lab/b")
    assert status == 2 and "tokenizer.json" in err and "lab/b" not in hub.repositories
