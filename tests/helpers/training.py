"""Run pre-training in the test's process, and act in the middle of it."""

import json
import os
import signal

import pytest
import torch
from ruamel.yaml import YAML

from configs.config import as_config
from dataset.build import build_dataset
from dataset.loading import TrainBatches
from engine.checkpointing import Checkpointer, find_resume_file, resume
from engine.launch import Interrupted
from engine.metric_logger import MetricLogger
from engine.run import save_settings
from engine.trainer import create_train_state, train
from models import build_model
from models.tokenizer import build_tokenizer
from utils import seed_everything

CPU = torch.device("cpu")


def fit(model, dataset, tokenizer, config, output_dir, *, seed=1, resume_from=None, validate=None):
    """Trains a model as engine.run does. Returns the state of the run."""
    config = as_config(config)
    data = TrainBatches(dataset, tokenizer, config, device=CPU, seed=seed)
    state = create_train_state(model, data, config, device=CPU, seed=seed)
    if resume_from:
        resume(resume_from, state, len(dataset))
    save_settings(model, config, output_dir)
    with (
        Checkpointer(output_dir, config.save_every, len(dataset)) as checkpointer,
        MetricLogger(output_dir, config, CPU) as logger,
    ):
        train(state, data, checkpointer, logger, validate=validate)
    return state


def run(config, output_dir, resume=False, forward=None, validate=None):
    """Trains as Pretrain.py does; forward(model.forward) may wrap what a step computes."""
    output_dir.mkdir(exist_ok=True)
    tokenizer = build_tokenizer(config["tokenizer"])
    dataset = build_dataset("pretrain", "train", config, seed=1)
    seed_everything(1)
    model = build_model("pretrain", config, tokenizer)
    if forward:
        model.forward = forward(model.forward)
    resume_from = find_resume_file(output_dir, "", resume)
    fit(model, dataset, tokenizer, config, output_dir, resume_from=resume_from, validate=validate)
    return model


def at(number, act):
    """Wraps a function so that act() comes before its number-th call."""

    def wrap(function):
        calls = iter(range(1, 1000))

        def wrapped(*args, **options):
            if next(calls) == number:
                act()
            return function(*args, **options)

        return wrapped

    return wrap


def signal_at(number, signum=signal.SIGTERM):
    """Wraps a function so that the process gets a signal in its number-th call."""
    return at(number, lambda: os.kill(os.getpid(), signum))


def stop_at(number, config, folder):
    """Runs until a signal in the number-th step."""
    with pytest.raises(Interrupted):
        run(config, folder, forward=signal_at(number))


def command_line(config, output_dir, tmp_path):
    """Writes a configuration to a file. Returns the flags of a script that runs it on the CPU."""
    path, bert = tmp_path / "config.yaml", config["bert_config"]
    if isinstance(bert, dict):
        (tmp_path / "bert.json").write_text(json.dumps(bert))
        bert = str(tmp_path / "bert.json")
    YAML(typ="safe").dump({**config, "bert_config": bert}, path)
    return ["--config", path, "--output_dir", output_dir, "--device", "cpu"]


def broken_copy(shapes, folder, how_many):
    """The shapes' pre-training images with the first ones cut off; the others are links."""
    for entry in json.loads((shapes / "pretrain.json").read_text()):
        target = folder / entry["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if how_many > 0:
            target.write_bytes((shapes / entry["image"]).read_bytes()[:400])
            how_many -= 1
        else:
            target.symlink_to(shapes / entry["image"])
    return str(folder)
