"""The training loop as a whole against the released one, and against its variants worked out by
hand.
"""

import math
import unittest.mock

import pytest
import torch
from conftest import assert_close, log
from helpers.launch import launch
from helpers.trajectory import BATCH_SIZE, DATA, EPOCH, Served, build, follow, most_similar

from utils import Text

LOSSES = ("loss_mlm", "loss_ita", "loss_itm")


def assert_same_weights(path, expected):
    state = torch.load(path, weights_only=True)["model"]
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        ours, theirs = state[name].double(), value.double()
        # of the keys the gradient is round-off, which Adam makes as large as any other
        if name.endswith("qkv.bias"):
            ours, theirs = (
                torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (ours, theirs)
            )
        if not name.endswith("key.bias"):
            assert_close(name, ours, theirs, 1e-4, 1e-5)


def test_the_loop_follows_the_released_one(tmp_path):
    """48 steps: optimizer, weight decay groups, schedule, ramp of alpha, momentum and queue at
    once.
    """
    # epochs of 24, 12 and 12 iterations, of which a run has only one length: the second resumes the
    # first
    losses = follow(tmp_path, Served(24, last=24), **{"scheduler.epochs": 4})
    losses += follow(
        tmp_path, Served(12, first=24), tmp_path / "checkpoint_00.pth", **{"scheduler.epochs": 4}
    )
    for i, (ours, (*theirs, _)) in enumerate(zip(losses, DATA["log"], strict=True)):
        assert [ours[name] for name in LOSSES] == pytest.approx(theirs, rel=1e-4, abs=1e-5), i
    assert_same_weights(tmp_path / "checkpoint_02.pth", DATA["end"])
    lrs = [DATA["log"][last][-1] for last in (23, 35, 47)]
    assert [entry["train_lr"] for entry in log(tmp_path)] == pytest.approx(lrs)


def by_hand(accumulate=1, clip_grad=None, processes=1, temp_lr_scale=1.0):
    """Two epochs; of the model nothing but its losses and their gradients is used.
    All else is in float64.

    Returns (the mean of each loss and of the norm of the gradients, [epochs] by name; the state
    dict at the end). The norm says what AdamW does not: gradients that are all too large by one
    factor make nearly the same steps.
    """
    config, model = build()
    weights = {name: param.data.double() for name, param in model.named_parameters()}
    trained = [name for name, param in model.named_parameters() if param.requires_grad]
    moments = {
        name: (torch.zeros_like(weights[name]), torch.zeros_like(weights[name])) for name in trained
    }
    queues, pointer = [model.image_queue.double(), model.text_queue.double()], int(model.queue_ptr)
    entering, means, step = [], {name: [] for name in (*LOSSES, "grad_norm")}, 0
    model.enqueue = entering.append
    iterations = EPOCH // accumulate
    for epoch in range(2):
        lr = 1e-4 if epoch == 0 else 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 2)) / 2
        sums = dict.fromkeys(means, 0.0)
        for iteration in range(iterations):
            alpha = 0.4 * min(1, iteration / iterations) if epoch == 0 else 0.4
            weights["temp"].clamp_(0.001, 0.5)
            for name in weights:
                if "_m." in name:
                    weights[name] = 0.9 * weights[name] + 0.1 * weights[name.replace("_m.", ".", 1)]
            gradients = {name: torch.zeros_like(weights[name]) for name in trained}
            for micro in range(accumulate):
                batch = DATA["batches"][(epoch * iterations + iteration) * accumulate + micro]
                model.load_state_dict(
                    {
                        **{name: value.float() for name, value in weights.items()},
                        "image_queue": queues[0].float(),
                        "text_queue": queues[1].float(),
                    },
                    strict=False,
                )
                for rank in range(processes):
                    image, ids, attention, masked, labels = (
                        batch[name][rank::processes]
                        for name in ("image", "input_ids", "attention_mask", "masked", "labels")
                    )
                    model.zero_grad()
                    losses = model.losses(
                        image / 64,
                        Text(ids, attention),
                        alpha,
                        (masked, labels),
                        update_momentum=False,
                    )
                    sum(losses.values()).backward()
                    for name in trained:
                        gradients[name] += (
                            model.get_parameter(name).grad.double() / accumulate / processes
                        )
                    for name, value in losses.items():
                        sums[name] += value.item() / accumulate / processes
                # of all processes, one after the other
                rows = [torch.cat(features) for features in zip(*entering, strict=True)]
                for row in zip(*rows, strict=True):
                    for queue, feature in zip(queues, row, strict=True):
                        queue[:, pointer] = feature
                    pointer = (pointer + 1) % queues[0].shape[1]
                entering.clear()
            norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
            sums["grad_norm"] += norm
            step += 1
            for name in trained:
                gradient, (first, second) = gradients[name], moments[name]
                if clip_grad:
                    gradient = gradient * min(1, clip_grad / (norm + 1e-6))
                rate = lr * (temp_lr_scale if name == "temp" else 1)
                if gradient.ndim != 1 and not name.endswith("bias"):
                    weights[name] *= 1 - rate * 0.02
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                weights[name] -= (
                    rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                )
        for name in means:
            means[name].append(sums[name] / iterations)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    return means, {
        **model.state_dict(),
        "image_queue": queues[0],
        "text_queue": queues[1],
        "queue_ptr": torch.tensor([pointer]),
    }


VARIANTS = [
    {"accumulate": 3, "clip_grad": 0.7, "temp_lr_scale": 0.1},
    {"processes": 2, "accumulate": 2, "clip_grad": 1.0},
]


@pytest.mark.parametrize(
    "variant",
    VARIANTS,
    ids=lambda variant: "-".join(f"{key}={value}" for key, value in variant.items()),
)
def test_variants_of_the_loop_equal_what_is_worked_out_by_hand(variant, tmp_path):
    with unittest.mock.patch("models.losses.draw", most_similar):
        means, state = by_hand(**variant)
    keys = {key: value for key, value in variant.items() if key in ("accumulate", "clip_grad")}
    keys |= {"scheduler.epochs": 2, "optimizer.temp_lr_scale": variant.get("temp_lr_scale", 1)}
    processes = variant.get("processes", 1)
    if processes == 1:
        follow(tmp_path / "run", Served(EPOCH), **keys)
    else:
        keys["batch_size"] = BATCH_SIZE // processes
        ended = launch(
            "tests/helpers/trajectory.py",
            tmp_path / "run",
            *(f"{key}={value}" for key, value in keys.items()),
        )
        assert ended.returncode == 0, ended.stderr
    entries = log(tmp_path / "run")
    for name, mean in means.items():
        assert [entry[f"train_{name}"] for entry in entries] == pytest.approx(mean, rel=1e-4), name
    assert_same_weights(tmp_path / "run/checkpoint_last.pth", state)
