import functools
import importlib
import json
import os
import re
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the golden values and bitwise comparisons are the CPU's
os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with OpenMP's threads hangs
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

from engine.launch import configure_logging

TASKS = ["pretrain", "retrieval", "vqa", "ve", "nlvr", "nlvr_pretrain"]  # of different weights

configure_logging()  # as a script: notes are on stderr
# the files with the longest tests, which start first
LONGEST = ("recovery", "processes", "nodes", "learning", "trajectory", "keys", "search", "tasks")


def pytest_collection_modifyitems(items):
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: (*names, item.path.stem).index(item.path.stem))


def assert_close(name, ours, theirs, relative, absolute):
    """Asserts the agreement that tests/golden expects: relative to the largest value of theirs,
    plus an absolute part.
    """
    gap = (ours - theirs).abs().max().item()
    assert gap <= relative * theirs.abs().max().item() + absolute, f"{name}: off by {gap}"


def assert_released_step(model, losses, data):
    """Asserts the losses, the gradients of their sum and, if there, the state after the step of a
    file of tests/golden.
    """
    for name, loss in losses.items():
        assert_close(name, loss.detach(), torch.tensor(data[name]), 1e-4, 1e-5)
    sum(losses.values()).backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    assert grads.keys() == data["grads"].keys()
    for name, grad in data["grads"].items():
        assert_close(name, grads[name], grad, 1e-3, 1e-6)
    state = model.state_dict()
    for name, value in data.get("state_dict_after", {}).items():
        assert_close(name, state[name].float(), value.float(), 1e-4, 1e-5)


INFO = re.compile(
    r"configuration: |model and tokenizer: |training set: |model: |global batch |epoch \d+: "
    r"|resuming from |validation: |to try it in a browser: "
    r"|the run is complete|  \w+: \d+ \(|.* tensors loaded"
)


def problems(stderr):
    """What a script wrote to stderr except for its log: errors, notes, tracebacks."""
    return "".join(line for line in stderr.splitlines(True) if not INFO.match(line))


def refusal(function, *arguments):
    """The message, one line, of the InputError that function(*arguments) raises."""
    from utils import InputError

    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def exit_status(main):
    """The exit status of a script's main function, run as the script does."""
    from engine.launch import run_script

    try:
        run_script(main)
    except SystemExit as stop:
        return stop.code
    return 0


def log(folder):
    """The objects of a run's log.txt."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def contents(folder):
    """The bytes of a folder's files by path, without hidden ones."""
    return {path: path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def limit(size):
    """Lets no file of this process grow beyond size bytes, None: any; writing more fails as on a
    full disk.
    """
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture(scope="session")
def golden():
    """Loads a file of tests/golden."""
    return lambda name: torch.load(ROOT / "tests/golden" / name, weights_only=True)


@pytest.fixture(scope="session")
def released(golden):
    """Builds the small released model of a task with some keys changed; returns (golden values,
    model, text).
    """
    from models import build_model
    from utils import Text

    def build(task, **keys):
        data, bert = golden(f"{task}.pt"), "bert_nlvr" if "nlvr" in task else "bert"
        model = build_model(
            task, {**data["config"], "bert_config": f"tests/golden/{bert}.json", **keys}
        )
        missing, unexpected = model.load_state_dict(data["state_dict"], strict=False)
        assert not missing and all(
            "_m." in name and keys.get("distill") is False for name in unexpected
        )
        prefix = "question_" * (task == "vqa")
        return (
            data,
            model.train(),
            Text(data[f"{prefix}input_ids"], data[f"{prefix}attention_mask"]),
        )

    return build


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ALBEF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A small folder of the built-in data set."""
    from dataset.shapes.files import write_dataset

    folder = tmp_path_factory.mktemp("shapes")
    write_dataset(folder, train=48, val=8, test=12, noise=0.1, seed=0, image_size=48, captions=3)
    return folder


@pytest.fixture(scope="session")
def few_shapes(shapes, tmp_path_factory):
    """The folder of shapes with lists of 40 entries to train on: epochs of five batches."""
    folder = tmp_path_factory.mktemp("few")
    for path in shapes.iterdir():
        if path.name.endswith("_train.json"):
            (folder / path.name).write_text(json.dumps(json.loads(path.read_text())[:40]))
        else:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="session")
def sharded(shapes, tmp_path_factory):
    """The train_file of the pre-training data of shapes as WebDataset shards of 20 samples."""
    from tools.to_shards import convert

    folder = tmp_path_factory.mktemp("shards")
    convert([str(shapes / "pretrain.json")], str(shapes), folder, samples=20, workers=1)
    return f"{folder}/*.tar"


def tiny(shapes):
    """A configuration that trains a tiny model on a folder of shapes in a second."""
    from configs.config import as_config

    vocab = (shapes / "vocab.txt").read_text().splitlines()
    bert = {
        "attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "hidden_size": 16,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 40,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": len(vocab),
        "fusion_layer": 2,
        "encoder_width": 16,
    }
    return as_config(
        {
            "train_file": str(shapes / "pretrain.json"),
            "test_file": str(shapes / "test.json"),
            "image_root": str(shapes),
            "bert_config": bert,
            "tokenizer": str(shapes / "vocab.txt"),
            "text_encoder": "random",
            "vision_encoder": "random",
            "image_res": 32,
            "patch_size": 16,
            "vision_width": 16,
            "vision_depth": 2,
            "vision_heads": 2,
            "embed_dim": 8,
            "queue_size": 20,
            "batch_size": 8,
            "num_workers": 0,
            "k_test": 4,
            "scheduler": {"lr": 1e-3, "epochs": 2, "warmup_iters": 2},
        }
    ).to_dict()


@pytest.fixture
def tiny_config(shapes):
    """A configuration that trains a tiny model on the shapes in a second."""
    return tiny(shapes)


@pytest.fixture(scope="session")
def whole(shapes, tmp_path_factory):
    """The folder of an undisturbed run of the tiny configuration."""
    from helpers.training import run

    folder = tmp_path_factory.mktemp("whole")
    run(tiny(shapes), folder)
    return folder


@pytest.fixture
def pretrained(tiny_config, tmp_path):
    """A file of pre-trained weights, as Pretrain.py leaves it."""
    from models import build_model
    from utils import seed_everything

    seed_everything(5)
    model = build_model("pretrain", tiny_config)
    torch.save({"model": model.state_dict()}, tmp_path / "pretrained.pth")
    return tmp_path / "pretrained.pth"


@pytest.fixture
def call(monkeypatch):
    """Runs the main function of a module in this process, with a command line."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        importlib.import_module(module).main()

    return run


@pytest.fixture
def run_main(call, capsys):
    """Runs the main function of a module; returns (exit status, stdout, stderr)."""

    def run(module, *arguments):
        status = exit_status(lambda: call(module, *arguments))
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def run_script(call, tiny_config, tmp_path, capsys):
    """Runs a script with changed keys of the tiny configuration; returns (exit status, errors and
    notes on stderr).
    """
    from helpers.training import command_line

    def run(script, *flags, **keys):
        arguments = command_line({**tiny_config, **keys}, tmp_path / "out", tmp_path)
        status = exit_status(lambda: call(script, *arguments, *flags))
        return status, problems(capsys.readouterr().err)

    return run


@pytest.fixture
def pretrain(run_script):
    """Runs Pretrain.py as run_script does."""
    return functools.partial(run_script, "Pretrain")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server in the place of the Hugging Face hub, and an empty cache."""
    import huggingface_hub
    from helpers.hub import place, serve

    from models.hub import fetch

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serve() as server:
        place(monkeypatch, server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        fetch.cache_clear()
        yield server
    fetch.cache_clear()
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def files(shapes, tmp_path_factory):
    """Checkpoints of tiny random models by task."""
    from models import build_model
    from models.tokenizer import load_tokenizer
    from utils import seed_everything

    folder, config = (
        tmp_path_factory.mktemp("checkpoints"),
        {**tiny(shapes), "k_test": 3, "batch_size_test": 4},
    )
    for number, task in enumerate(TASKS):
        seed_everything(number)
        model = build_model(task, config, load_tokenizer(config)[0])
        # at its usual scale everything would look alike to a random model
        for parameter in model.parameters():
            parameter.data.mul_(2.5)
        torch.save(
            {"model": model.state_dict(), "config": model.config.to_dict(), "epoch": 3},
            folder / f"{task}.pth",
        )
    return {task: folder / f"{task}.pth" for task in TASKS}


@pytest.fixture(scope="module")
def models(files):
    """Models by task, as load_model gives them."""
    from inference import load_model

    return {task: load_model(path, "cpu") for task, path in files.items()}


@pytest.fixture(scope="module")
def photos(shapes):
    """The paths of test images."""
    return sorted(map(str, (shapes / "images/test").glob("*.jpg")))


@pytest.fixture(scope="module")
def picture():
    """A photo-like picture of Pillow."""
    from benchmarks.dataloader import photo

    return photo(torch.Generator().manual_seed(0))
