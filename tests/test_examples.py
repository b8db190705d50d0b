"""examples/: what changes the method without touching the framework trains and computes what it
says.
"""

import sys
from dataclasses import replace

import torch
from conftest import assert_close, log
from helpers.launch import start_alone
from helpers.training import command_line
from ruamel.yaml import YAML

from configs.config import as_config
from configs.tasks import TASKS
from engine import run
from engine.configuration import choose_config
from examples import tcl
from models import build_model
from models.weights import load_checkpoint


def test_tcl_averages_the_four_contrasts(released, monkeypatch):
    row = replace(TASKS["pretrain"], model="examples.tcl_model:TCL")
    monkeypatch.setitem(TASKS, "pretrain", row)
    data, model, text = released("pretrain", distill=False)
    seen, encode = [], model.encode_image
    monkeypatch.setattr(
        model,
        "encode_image",
        lambda image, momentum=False: (seen.append(image), encode(image, momentum))[1],
    )
    images, texts = model.image_queue.clone(), model.text_queue.clone()
    entered = []
    monkeypatch.setattr(model, "enqueue", entered.append)
    losses = model.losses(data["image"], text, masked=(data["masked_input_ids"], data["labels"]))

    online, second = seen
    assert (
        torch.equal(online, data["image"])
        and second.shape == online.shape
        and not torch.equal(second, online)
    )
    (image_m, text_m), temp = entered[0], model.temp.detach()
    with torch.no_grad():
        image, sentence = encode(data["image"])[1], model.encode_text(text)[1]
    contrasts = [
        (image, text_m, texts),
        (sentence, image_m, images),
        (image, image_m, images),
        (sentence, text_m, texts),
    ]
    by_hand = [
        -torch.diag((rows @ torch.cat([others.T, queue], 1) / temp).log_softmax(1)).mean()
        for rows, others, queue in contrasts
    ]
    assert_close("loss_ita", losses["loss_ita"].detach(), torch.stack(by_hand).mean(), 1e-5, 1e-6)
    assert_close(
        "intra", model.extra_metrics()["intra"], torch.stack(by_hand[2:]).mean(), 1e-5, 1e-6
    )


def test_tcl_trains_as_a_program_and_leaves_a_model_that_every_task_loads(tiny_config, tmp_path):
    arguments = command_line(tiny_config, tmp_path / "out", tmp_path)
    command = ["-m", "examples.tcl", *arguments, "--set", "scheduler.epochs=1"]
    program, output, errors = start_alone(tmp_path / "said", *command)
    program.join(120)
    assert program.exitcode == 0, errors.read_text()
    assert "last epoch: epoch 0, " in output.read_text()
    assert all(entry["train_intra"] > 0 for entry in log(tmp_path / "out"))
    load_checkpoint(build_model("retrieval", tiny_config), tmp_path / "out/checkpoint_last.pth")


def test_tcl_reads_its_own_configuration(monkeypatch):
    monkeypatch.setitem(TASKS, "pretrain", TASKS["pretrain"])  # restores the row that main replaces
    monkeypatch.setattr(sys, "argv", ["tcl.py"])
    monkeypatch.setattr(run, "run_task", lambda task, _: found.append(choose_config(task, "")[1]))
    found = []
    tcl.main()
    assert found == ["examples/tcl.yaml"]


def test_the_configuration_is_the_quickstarts():
    ours, quickstart = (
        YAML(typ="safe").load(open(path))
        for path in ("examples/tcl.yaml", "configs/shapes/Pretrain.yaml")
    )
    assert as_config(ours) == as_config(quickstart)
