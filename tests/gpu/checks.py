"""What must hold on a GPU before a run is worth its hours.

Each check returns what it found, and raises AssertionError if it fails.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pretrain_step
import torch

from dataset.shapes.files import write_dataset
from engine.precision import compile_layers
from engine.trainer import create_train_state, train_step
from models import build_model
from utils import Text, seed_everything

ROOT = Path(__file__).resolve().parents[2]
# largest relative gap of the losses, and relative norm of the gap of all gradients. The limit of
# the gradients is five times the gap of bf16 on a CPU (0.036); TF32 has three more bits
GOLDEN = {"fp32": (1e-4, 1e-4), "tf32": (6e-3, 0.025), "bf16": (5e-2, 0.2)}
COMPILED = 2e-2
ITERATIONS, BATCH_SIZE = 15, 8  # of an epoch of the runs of several processes; they have two


def golden(device, size):
    """The released implementation's losses and gradients in fp32, TF32 and bf16."""
    data = torch.load(ROOT / "tests/golden/pretrain.pt", weights_only=True)
    found, before = [], torch.get_float32_matmul_precision()
    for name, limits in GOLDEN.items():
        model = build_model(
            "pretrain", {**data["config"], "bert_config": str(ROOT / "tests/golden/bert.json")}
        )
        model.load_state_dict(data["state_dict"], strict=False)
        model.to(device).train()
        moved = {
            key: value.to(device) for key, value in data.items() if isinstance(value, torch.Tensor)
        }
        torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            losses = model.losses(
                moved["image"],
                Text(moved["input_ids"], moved["attention_mask"]),
                alpha=data["alpha"],
                masked=(moved["masked_input_ids"], moved["labels"]),
            )
        sum(losses.values()).backward()
        torch.set_float32_matmul_precision(before)
        of_losses = max(abs(value.item() / data[key] - 1) for key, value in losses.items())
        ours = torch.cat([model.get_parameter(key).grad.cpu().flatten() for key in data["grads"]])
        theirs = torch.cat([value.flatten() for value in data["grads"].values()])
        gaps = of_losses, float((ours - theirs).norm() / theirs.norm())
        found.append("{} {:.0e} and {:.0e}".format(name, *gaps))
        assert all(gap <= limit for gap, limit in zip(gaps, limits, strict=True)), (
            f"losses and gradients are off by {found[-1]}"
        )
    return "losses and gradients are off by " + ", ".join(found)


def new_run(device, size, batch_size):
    """Return the state of a pre-training run in bf16, and its batch."""
    config = size.config(f"batch_size={batch_size}", "precision=bf16", "compile=false")
    seed_everything(0)
    model = build_model("pretrain", config).to(device).train()
    state = create_train_state(model, range(1), config, device=device, seed=0)
    return state, pretrain_step.make_batch(batch_size, config.image_res)


def take_step(state, batch, iteration):
    """Take the optimizer step of an iteration. Return its StepOutput."""
    state.iteration = iteration
    return train_step(state, iter([batch]), 0.4)


def step_without_waits(device, size):
    """A step never waits for the device, and its attention runs in fused kernels."""
    state, batch = new_run(device, size, size.batches[0])
    take_step(state, batch, 0)
    watched = device.type == "cuda"
    if watched:
        torch.cuda.set_sync_debug_mode("error")
    try:
        take_step(state, batch, 1)
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile() as profiler:
        take_step(state, batch, 2)
    names = {
        event.key.removeprefix("aten::_scaled_dot_product_")
        for event in profiler.key_averages()
        if event.key.startswith("aten::_scaled_dot_product_") and "backward" not in event.key
    }
    assert not watched or (names and "attention_math" not in names), (
        f"attention runs as {', '.join(sorted(names))}"
    )
    return f"attention runs as {', '.join(sorted(names))}"


def compiled_as_eager(device, size):
    """A compiled step has the eager losses, and no graph is compiled after the first steps."""
    values, graphs = [], 0
    for compiled in (False, True):
        state, batch = new_run(device, size, size.batches[0])
        if compiled:
            torch._dynamo.reset()
            compile_layers(state.model, **size.compile_options)
        values.append([value.item() for value in take_step(state, batch, 0).losses.values()])
    for number in range(1, pretrain_step.WARM_UP + 2):
        if number == pretrain_step.WARM_UP:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        take_step(state, batch, number)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, (
        "a graph is compiled after the first steps"
    )
    gap = max(
        abs(ours - theirs) / (abs(theirs) + 1e-3) for theirs, ours in zip(*values, strict=True)
    )
    assert gap <= COMPILED, f"losses and norm of the gradients are off by {gap:.0e}"
    return f"losses and norm of the gradients are off by {gap:.0e}; {graphs} graphs"


# --------------------------------------------------------------------------------------------------
# processes, one on each GPU


def launch(device, processes, *arguments):
    """Start Pretrain.py on so many processes. Return its Popen."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "Pretrain.py",
    ]
    return subprocess.Popen(
        [*command, "--device", device.type, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    """Wait for a program. Return its exit code and its errors, else the end of its output."""
    lines = process.communicate()[0].splitlines()
    return process.returncode, " ".join(
        [line for line in lines if line.startswith("error:")] or lines[-10:]
    )


def processes_repeat_and_resume(device, size):
    """Two runs on all GPUs have equal bits, also after SIGTERM and --resume."""
    with tempfile.TemporaryDirectory() as folder:
        data, weights = Path(folder, "data"), {}
        write_dataset(
            data, train=ITERATIONS * BATCH_SIZE * size.processes, val=2, test=2, captions=1
        )

        def arguments(name, *keys):
            given = (
                f"train_file={data}/pretrain.json",
                "test_file=null",
                f"image_root={data}",
                f"tokenizer={data}/vocab.txt",
                f"batch_size={BATCH_SIZE}",
                "scheduler.epochs=2",
                "num_workers=1",
                "deterministic=true",
            )
            return (
                "--config",
                "configs/shapes/Pretrain.yaml",
                "--output_dir",
                Path(folder, name),
                "--set",
                *given,
                *keys,
            )

        def finish(name, *flags):
            status, output = ended(launch(device, size.processes, *arguments(name), *flags))
            assert status == 0, f"{name}: {output}"
            weights[name] = torch.load(
                Path(folder, name, "checkpoint_last.pth"), weights_only=True
            )["model"]

        finish("once")
        finish("again")
        process = launch(device, size.processes, *arguments("interrupted"))
        while process.poll() is None and not Path(folder, "interrupted/checkpoint_00.pth").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        status, output = ended(process)
        assert status != 0, "the run was over before SIGTERM reached it"
        finish("interrupted", "--resume")
        for name in ("again", "interrupted"):
            differing = [
                key
                for key, value in weights["once"].items()
                if not torch.equal(value, weights[name][key])
            ]
            assert not differing, (
                f"{name}: {len(differing)} tensors differ, {differing[0]} among them"
            )
    steps = 2 * ITERATIONS
    return f"{size.processes} processes, {steps} steps: the same bits twice, also after SIGTERM"


CHECKS = {
    check.__name__.replace("_", " "): check
    for check in (
        golden,
        step_without_waits,
        compiled_as_eager,
        processes_repeat_and_resume,
    )
}
