"""Configuration keys through the whole training loop: what a step sees, computes and leaves."""

import itertools
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from conftest import log
from helpers.training import run

import models.losses
from configs.config import read_bert_config
from dataset.loading import Loader
from models.momentum import update_momentum_


class Step(NamedTuple):
    """What a step of a run gets, and computes."""

    batch: NamedTuple
    alpha: float
    update_momentum: bool
    losses: dict
    seed: int
    training: bool


def trained(config, folder, epochs=1, **keys):
    """The steps of a run of the configuration with other keys, and the model it leaves."""
    config = {**config, "scheduler": {**config["scheduler"], "epochs": epochs}}
    steps = []

    def noted(forward):
        def stepped(batch, *, alpha, update_momentum):
            seed, training = torch.initial_seed(), forward.__self__.training
            losses = forward(batch, alpha=alpha, update_momentum=update_momentum)
            steps.append(Step(batch, alpha, update_momentum, losses, seed, training))
            return losses

        return stepped

    return steps, run({**config, **keys}, folder, forward=noted)


def first_image(config, folder, **keys):
    return trained(config, folder, **keys)[0][0].batch.image


def test_transforms_are_those_of_the_configuration(tiny_config, tmp_path):
    off = {"hflip": False, "min_scale": 1.0, "randaugment": False}
    plain = first_image(tiny_config, tmp_path / "plain", **off)
    for key, value in {"hflip": True, "min_scale": 0.2, "randaugment": True}.items():
        changed = first_image(tiny_config, tmp_path / key, **{**off, key: value})
        assert not torch.equal(plain, changed), key
        if key == "hflip":  # nothing but mirrored
            same = [torch.equal(*pair) for pair in zip(plain, changed, strict=True)]
            assert 0 < sum(same) < 8
            assert all(
                torch.equal(left, right) or torch.equal(left.flip(-1), right)
                for left, right in zip(plain, changed, strict=True)
            )


def test_architecture_is_that_of_the_configuration(tiny_config, tmp_path):
    keys = {
        "vision_depth": 3,
        "vision_heads": 4,
        "patch_size": 8,
        "image_res": 24,
        "embed_dim": 12,
        "queue_size": 28,
    }
    bert = {
        **tiny_config["bert_config"],
        "encoder_width": 20,
        "num_hidden_layers": 3,
        "fusion_layer": 1,
    }
    _, model = trained(tiny_config, tmp_path, **keys, vision_width=20, bert_config=bert)
    state = torch.load(tmp_path / "checkpoint_last.pth", weights_only=True)["model"]
    assert state["visual_encoder.pos_embed"].shape == (1, 1 + 3 * 3, 20)
    assert (
        "visual_encoder.blocks.2.attn.qkv.weight" in state
        and "visual_encoder.blocks.3.attn.qkv.weight" not in state
    )
    assert state["image_queue"].shape == state["text_queue"].shape == (12, 28)
    layers = {
        name.split(".")[4] for name in state if name.startswith("text_encoder.bert.encoder.layer.")
    }
    crossed = {
        name.split(".")[4]
        for name in state
        if name.startswith("text_encoder.bert") and "crossattention" in name
    }
    assert layers == {"0", "1", "2"} and crossed == {"1", "2"}
    assert model.visual_encoder.blocks[0].attn.num_heads == 4


def test_weight_of_distillation_and_its_ramp(tiny_config, tmp_path):
    def alphas(name, **keys):
        return [step.alpha for step in trained(tiny_config, tmp_path / name, 2, **keys)[0]]

    assert alphas("ramp", alpha=0.6) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5] + [0.6] * 6)
    assert alphas("constant", alpha=0.3, warm_up=False) == [0.3] * 12


def test_every_step_of_every_process_has_a_seed_of_its_own(tiny_config, tmp_path, monkeypatch):
    keys = {"accumulate": 2, "batch_size": 4}
    seeds = [step.seed for step in trained(tiny_config, tmp_path / "0", 2, **keys)[0]]
    monkeypatch.setattr("engine.trainer.rank", lambda: 1)
    seeds += [step.seed for step in trained(tiny_config, tmp_path / "1", 2, **keys)[0]]
    assert len(seeds) == len(set(seeds)) == 2 * 2 * 12


def test_the_momentum_model_moves_once_an_optimizer_step(tiny_config, tmp_path):
    with mock.patch("models.contrastive.update_momentum_", wraps=update_momentum_) as update:
        steps, _ = trained(tiny_config, tmp_path, accumulate=2, batch_size=4, momentum=0.9)
    assert [call.args[1] for call in update.mock_calls] == [0.9] * 6 and len(steps) == 12
    assert [step.update_momentum for step in steps] == [True, False] * 6


def test_dropout_is_that_of_the_configuration_and_on_in_every_epoch(tiny_config, tmp_path):
    def losses(name, key, value):
        bert = {
            **tiny_config["bert_config"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            key: value,
        }
        steps, _ = trained(tiny_config, tmp_path / name, 2, bert_config=bert)
        assert all(step.training for step in steps)
        return [float(loss) for loss in steps[0].losses.values()]

    without = losses("without", "hidden_dropout_prob", 0.0)
    assert without != losses("hidden", "hidden_dropout_prob", 0.5)
    assert without != losses("attention", "attention_probs_dropout_prob", 0.5)


def test_what_no_objective_reaches_is_not_trained(tiny_config, tmp_path):
    _, model = trained(tiny_config, tmp_path, objectives=["itm"])
    assert model.idle_parameters() and not any(
        param.requires_grad for param in model.idle_parameters()
    )


def test_dropout_of_1_leaves_nothing(tiny_config):
    from models.bert import Embeddings, ResidualOutput, SelfAttention

    dropout = {"hidden_dropout_prob": 1.0, "attention_probs_dropout_prob": 1.0}
    config = read_bert_config({**tiny_config["bert_config"], **dropout})
    hidden = torch.randn(2, 3, 16)
    output, attention = ResidualOutput(config, 16), SelfAttention(config)
    assert not Embeddings(config)(torch.ones(2, 3, dtype=torch.long)).any()
    assert torch.equal(output(hidden, hidden), output.LayerNorm(hidden))
    assert not attention(hidden, None).any() and attention.eval()(hidden, None).any()


def test_masking_and_negatives_are_those_of_the_configuration(tiny_config, tmp_path):
    def masked(probability):
        with mock.patch("models.pretrain.mask_tokens", wraps=models.losses.mask_tokens) as mask:
            trained(tiny_config, tmp_path / str(probability), mlm_probability=probability)
        assert {call.args[3] for call in mask.mock_calls} == {probability}
        return mask

    masked(0.3)
    for hard in (True, False):
        with mock.patch(
            "models.contrastive.sample_negatives", wraps=models.losses.sample_negatives
        ) as draw:
            trained(tiny_config, tmp_path / str(hard), hard_negatives=hard)
        assert all(call.args[0].any() == hard for call in draw.mock_calls)


OBJECTIVES = {"itc": "loss_ita", "mlm": "loss_mlm", "itm": "loss_itm"}


@pytest.mark.parametrize(
    "objectives",
    [list(names) for n in (1, 2, 3) for names in itertools.combinations(OBJECTIVES, n)],
)
def test_objectives_are_those_of_the_configuration(tiny_config, tmp_path, objectives):
    trained(tiny_config, tmp_path, objectives=objectives)
    logged = {name for name in log(tmp_path)[0] if name.startswith("train_loss")}
    assert logged == {f"train_{OBJECTIVES[name]}" for name in objectives}


@pytest.mark.parametrize(
    "distill,soft",
    [
        (True, {"loss_ita", "loss_mlm"}),
        (False, set()),
        (["itc"], {"loss_ita"}),
        (["mlm"], {"loss_mlm"}),
    ],
)
def test_only_what_is_distilled_depends_on_alpha(tiny_config, tmp_path, distill, soft):
    keys = {"distill": distill, "warm_up": False}
    first = [
        trained(tiny_config, tmp_path / str(alpha), alpha=alpha, **keys)[0][0].losses
        for alpha in (0.1, 0.9)
    ]
    assert {name for name in first[0] if not torch.equal(first[0][name], first[1][name])} == soft


def test_rates_temperature_and_decay_are_those_of_the_configuration(tiny_config, tmp_path):
    scheduler = {
        "epochs": 2,
        "lr": 2e-3,
        "min_lr": 1e-3,
        "warmup_lr": 1e-3,
        "warmup_epochs": 0,
        "warmup_iters": None,
    }
    trained(
        {**tiny_config, "scheduler": scheduler, "optimizer": {"lr": 2e-3}},
        tmp_path / "epochs",
        2,
        temp=0.2,
    )
    entries = log(tmp_path / "epochs")
    assert [entry["train_lr"] for entry in entries] == pytest.approx([2e-3, 1.5e-3])
    assert entries[0]["train_temp"] == pytest.approx(0.2, abs=0.02)
    trained(
        {**tiny_config, "scheduler": scheduler, "optimizer": {"lr": 2e-3}},
        tmp_path / "scaled",
        reference_batch=32,
    )
    assert log(tmp_path / "scaled")[0]["train_lr"] == pytest.approx(2e-3 * (8 / 32) ** 0.5)

    _, decayed = trained(
        tiny_config,
        tmp_path / "decayed",
        optimizer={"opt": "sgd", "lr": 1e-3, "weight_decay": 900.0},
    )
    state = torch.load(tmp_path / "decayed/checkpoint_last.pth", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0, 900.0]
    assert (
        decayed.visual_encoder.blocks[0].attn.qkv.weight.abs().max()
        < 0.01
        < decayed.visual_encoder.norm.weight.abs().max()
    )


def test_precision_compilation_and_checkpointing_are_those_of_the_configuration(
    tiny_config, tmp_path
):
    def dtypes(forward):
        def noted(*args, **options):
            found.add(
                torch.get_autocast_dtype("cpu")
                if torch.is_autocast_enabled("cpu")
                else torch.float32
            )
            return forward(*args, **options)

        return noted

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found = set()
        run({**tiny_config, "precision": precision}, tmp_path / precision, forward=dtypes)
        assert found == {dtype}
    compiling = mock.patch("engine.trainer.compiles", lambda config, device: config.compile is True)
    with (
        compiling,
        mock.patch("engine.trainer.compile_layers") as compiled,
        mock.patch("models.bert.checkpoint") as checkpoint,
    ):
        checkpoint.side_effect = lambda layer, *inputs, use_reentrant, **options: layer(
            *inputs, **options
        )
        trained(tiny_config, tmp_path / "plain")
        assert not compiled.called and not checkpoint.called
        _, model = trained(
            tiny_config, tmp_path / "both", compile=True, gradient_checkpointing=True
        )
        compiled.assert_called_once_with(model)
        assert checkpoint.called and model.visual_encoder.grad_checkpointing


def test_saves_come_as_often_as_the_configuration_says(tiny_config, tmp_path):
    def saves(**keys):
        hours = itertools.count(step=0.25)
        clock = SimpleNamespace(monotonic=lambda: 3600 * next(hours))
        with (
            mock.patch("engine.checkpointing.time", clock),
            mock.patch("engine.checkpointing.Checkpointer.save") as save,
        ):
            trained(tiny_config, tmp_path / f"{len(list(tmp_path.iterdir()))}", **keys)
        return [call.args[1] for call in save.mock_calls].count("checkpoint_last.pth")

    assert (
        saves(save_every=2) == saves(save_every="2 iterations") == 2
        and saves(save_every="1 iteration") == 5
    )
    assert (
        saves(save_every="30 minutes") == 2
        and saves(save_every="0.5 minutes") == 5
        and saves() == 5
    )
    assert saves(save_every=0) == saves(save_every="0 minutes") == 0


def test_batches_and_workers_are_those_of_the_configuration(tiny_config, tmp_path):
    steps, _ = trained(tiny_config, tmp_path / "batch", batch_size=6)
    assert [len(step.batch.image) for step in steps] == [6] * (48 // 6)
    with mock.patch("dataset.loading.Loader", wraps=Loader) as loader:
        trained(tiny_config, tmp_path / "workers", num_workers=1)
    assert loader.mock_calls[0].kwargs["workers"] == 1
