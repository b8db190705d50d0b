"""Measure time and memory of a full-size pre-training step, fast path against plain path.

The model is ViT-B/16 at 256 px and BERT-base with a vocabulary of 30,522. The queue has 65,536
entries. The texts have 12 to 25 tokens. A step has all parts of a step of the training loop:
masking, the momentum update, losses, gradients and AdamW. The plain path is tests/helpers/plain.py.
Each row runs in its own process, so that its peak memory does not include other rows. The speed of
the machine's matrix products is measured before and after each row.

    python benchmarks/pretrain_step.py [--batch_size 8] [--steps 3]
"""

import argparse
import functools
import json
import resource
import subprocess
import sys

import torch
from bench import DEVICE, MACHINE, full_size_config, random_text, seconds, seconds_in_a_row
from helpers.plain import pretrain_losses, unfuse
from torch.utils.flop_counter import FlopCounterMode

from dataset.caption import CaptionBatch
from engine.precision import compile_layers
from engine.trainer import create_train_state, train_step
from models import build_model
from utils import Text

GPU = DEVICE.type == "cuda"
MATMUL = 4096
WARM_UP = 3  # steps before the measured ones


def matmul_peak(dtype):
    """Return the FLOP/s of the fastest of several large matrix products."""
    a, b = (torch.randn(MATMUL, MATMUL, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * MATMUL**3 / min(seconds(lambda: a @ b, 7)[2:])


def make_batch(batch_size, image_res):
    """Return a batch of random images and texts of 12 to 25 tokens, in pinned memory for a GPU, as
    the loader gives them.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 26, (batch_size,), generator=generator)
    lengths[0] = 25
    text = random_text(lengths, 25, generator)
    image = torch.randint(
        256, (batch_size, 3, image_res, image_res), generator=generator, dtype=torch.uint8
    )
    tensors = [image, *text, torch.full((batch_size,), -1)]
    image, input_ids, attention_mask, index = [
        tensor.pin_memory() if GPU else tensor for tensor in tensors
    ]
    return CaptionBatch(image, Text(input_ids, attention_mask), index, [], [])


def plain_step(model, batch, alpha, update_momentum):
    return pretrain_losses(
        model, batch.image, batch.text, alpha, (batch.masked.input_ids, batch.masked.labels)
    )


def measure(path, precision, mode, batch_size, steps):
    """Build the model, take steps and return what they cost."""
    compiled = mode == "compiled"
    config = full_size_config(
        "Pretrain", f"batch_size={batch_size}", f"precision={precision}", "compile=false"
    )
    torch.manual_seed(0)
    model = build_model("pretrain", config).to(DEVICE).train()
    batch = make_batch(batch_size, config.image_res)
    if path == "plain":
        unfuse(model)
        model.forward = functools.partial(plain_step, model)
    state = create_train_state(model, range(1), config, device=DEVICE, seed=0)

    def step(number):
        state.iteration = number
        train_step(state, iter([batch]), 0.4)

    # before compiling: the counter sees single operations
    with FlopCounterMode(display=False) as counter:
        step(0)
    flops = counter.get_total_flops()
    if compiled:
        compile_layers(model)
    for number in range(WARM_UP):  # compilation, and on a CPU the first touch of fresh memory
        step(number)
    if GPU:
        # the fast step waits for nothing
        torch.cuda.set_sync_debug_mode("warn" if path == "fast" else "default")
        step(0)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = matmul_peak(dtype)
    time = seconds_in_a_row(lambda: step(1), steps)
    peak = max(before, matmul_peak(dtype))
    memory = (
        torch.cuda.max_memory_allocated()
        if GPU
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"seconds": time, "flops": flops, "peak": peak, "memory": memory}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=64 if GPU else 8)
    parser.add_argument("--steps", type=int, default=20 if GPU else 3)
    # what the processes of the rows are started with
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(*args.row, args.batch_size, args.steps)))
        return
    print(f"pre-training step, batch {args.batch_size}, {MACHINE}; {args.steps} steps")
    print(
        f"{'path':16}{'precision':>10}{'s/step':>9}{'samples/s':>11}{'GB':>7}{'TFLOP':>8}"
        f"{'peak TFLOP/s':>14}{'of peak':>9}"
        f"{'vs plain':>10}{'vs plain fp32':>15}"
    )
    plain_seconds = {}
    for precision in ("fp32", "bf16"):
        for path, mode in [("plain", "eager"), ("fast", "eager")] + [("fast", "compiled")] * GPU:
            sizes = ["--batch_size", str(args.batch_size), "--steps", str(args.steps)]
            command = [sys.executable, __file__, *sizes, "--row", path, precision, mode]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            time = row["seconds"]
            base = plain_seconds.setdefault(precision, time)  # the plain row comes first
            print(
                f"{path + ' ' + mode:16}{precision:>10}{time:9.3f}{args.batch_size / time:11.2f}"
                f"{row['memory'] / 1e9:7.1f}{row['flops'] / 1e12:8.2f}{row['peak'] / 1e12:14.3f}"
                f"{row['flops'] / time / row['peak']:9.1%}{time / base:10.2f}"
                f"{time / plain_seconds['fp32']:15.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
