"""Time, memory and efficiency of one pre-training step of the full-size model, fast path against plain path.

ViT-B/16 at 256 px, BERT-base with a vocabulary of 30,522, queue 65,536, texts of 12 to 25 tokens; a step is everything the
training loop does: masking, momentum, losses, gradients, AdamW. The plain path is benchmarks/plain.py. Every row runs in a
process of its own, so that peak memory is its own, and measures the machine's matrix-product peak before and after.

    python benchmarks/pretrain_step.py [--batch_size 8] [--steps 3]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.utils.flop_counter import FlopCounterMode

import Pretrain
from dataset.caption import CaptionBatch
from engine import Run, compile_layers, iterate
from models import build_model
from utils import Text
from optim import create_optimizer
from plain import pretrain_losses, unfuse
from stopwatch import seconds
from configs.schema import load_config

CONFIG = str(ROOT / "configs/Pretrain.yaml")
MATMUL = 4096
WARM_UP = 3  # steps before the measured ones


def matmul_peak(device, dtype):
    """FLOP/s of the fastest of several large matrix products."""
    a, b = (torch.randn(MATMUL, MATMUL, device=device).to(dtype) for _ in range(2))
    seconds(lambda: a @ b, device, 2)
    return 2 * MATMUL**3 / min(seconds(lambda: a @ b, device, 5))


def make_batch(batch_size, image_res):
    """A batch of random images and texts of 12 to 25 tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(12, 26, (batch_size,), generator=generator)
    lengths[0] = 25
    mask = (torch.arange(25) < lengths[:, None]).long()
    input_ids = torch.randint(1000, 30000, (batch_size, 25), generator=generator)
    input_ids[:, 0] = 101
    image = torch.randint(256, (batch_size, 3, image_res, image_res), generator=generator, dtype=torch.uint8)
    return CaptionBatch(image, Text(input_ids * mask, mask), torch.full((len(image),), -1), [], [])


def plain_step(model, batch, alpha, update_momentum):
    return pretrain_losses(model, batch.image, batch.text, alpha, (batch.masked.input_ids, batch.masked.labels))


def measure(path, precision, compiled, batch_size, steps):
    """One row: builds the model, takes steps, returns what they cost."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(CONFIG, [f"batch_size={batch_size}", f"precision={precision}", f"compile={compiled}"])
    torch.manual_seed(0)
    model = build_model("pretrain", {**config, "bert_config": str(ROOT / config["bert_config"])}).to(device).train()
    optimizer = create_optimizer(config["optimizer"], model)
    batch = make_batch(batch_size, config["image_res"])
    step = Pretrain.step if path == "fast" else plain_step
    if path == "plain":
        unfuse(model)

    run = Run(model, model, optimizer, step, config, config["scheduler"], device, seed=0, output_dir=None, iterations=1)

    def train_step(number):
        return iterate(run, iter([batch]), 0, number, 0.4)

    with FlopCounterMode(display=False) as counter:  # before compiling: the counter sees single operations
        train_step(0)
    flops = counter.get_total_flops()
    if compiled:
        compile_layers(model)
    for number in range(WARM_UP):  # compilation, and on a CPU the first touch of fresh memory
        train_step(number)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn" if path == "fast" else "default")  # the fast step waits for nothing
        train_step(0)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    peaks = [matmul_peak(device, dtype)]
    times = seconds(lambda: train_step(1), device, steps)
    peaks.append(matmul_peak(device, dtype))
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(times), "flops": flops, "peak": max(peaks), "memory": memory}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--batch_size", type=int, default=64 if gpu else 8)
    parser.add_argument("--steps", type=int, default=20 if gpu else 3)
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what the processes of the rows are started with
    args = parser.parse_args()
    if args.row:
        path, precision, compiled = args.row.split(",")
        print(json.dumps(measure(path, precision, compiled == "compiled", args.batch_size, args.steps)))
        return
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"pre-training step, batch {args.batch_size}, {name}, torch {torch.__version__}; median of {args.steps} steps")
    print(f"{'path':16}{'precision':>10}{'s/step':>9}{'samples/s':>11}{'GB':>7}{'TFLOP':>8}{'peak TFLOP/s':>14}{'of peak':>9}"
          f"{'vs plain':>10}{'vs plain fp32':>15}")
    rows = [("plain", "eager"), ("fast", "eager")] + [("fast", "compiled")] * gpu
    plain_seconds = {}
    for precision in ("fp32", "bf16"):
        for path, mode in rows:
            command = [sys.executable, __file__, "--row", f"{path},{precision},{mode}", "--batch_size", str(args.batch_size),
                       "--steps", str(args.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            if path == "plain":
                plain_seconds[precision] = row["seconds"]
            rate = row["flops"] / row["seconds"]
            print(f"{path + ' ' + mode:16}{precision:>10}{row['seconds']:9.3f}{args.batch_size / row['seconds']:11.2f}"
                  f"{row['memory'] / 1e9:7.1f}{row['flops'] / 1e12:8.2f}{row['peak'] / 1e12:14.3f}{rate / row['peak']:9.1%}"
                  f"{row['seconds'] / plain_seconds[precision]:10.2f}{row['seconds'] / plain_seconds['fp32']:15.2f}", flush=True)


if __name__ == "__main__":
    main()
