"""Check an installation on its GPUs, and print tables of time.

make gpu    # writes output/gpu/report.json and report.md, and ends with the verdict
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench
import checks
import dataloader
import pretrain_step
import torch

from configs.load import save_config
from engine.launch import run_script
from utils import InputError
from visualize.curves import read_curves

ROOT = Path(__file__).resolve().parents[2]


class Size(NamedTuple):
    """What is measured.

    Attributes:
        config: Function (*overrides) -> Config of pre-training.
        batches: Batch sizes of the table of steps.
        steps: Number of steps.
        processes: Number of processes.
        compile_options: Options of torch.compile.
    """

    config: Callable
    batches: tuple
    steps: int
    processes: int
    compile_options: dict = {}


def run_checks(device, size):
    """Run every check. Return (what each found, the names of those that failed)."""
    found, failed = {}, []
    for name, check in checks.CHECKS.items():
        try:
            found[name] = check(device, size)
        except Exception as error:  # whatever fails, the others are of use
            found[name] = f"FAILED: {' '.join(str(error).split())[:300] or type(error).__name__}"
            failed.append(name)
        print(f"{name}: {found[name]}", flush=True)
    return found, failed


def measure_steps(size):
    """Return seconds, FLOPs, memory and MFU of each batch size, eager and compiled."""
    rows = []
    for batch_size in size.batches:
        for mode in ("eager", "compiled"):
            torch._dynamo.reset()
            row = pretrain_step.measure("fast", "bf16", mode, batch_size, size.steps)
            mfu = row["flops"] / row["seconds"] / row["peak"]
            rows.append({"batch": batch_size, "mode": mode, **row, "mfu": mfu})
    return rows


def measure_scaling(device, size):
    """Return samples per second of Pretrain.py on JPEG files by number of processes."""
    rates, batch_size = {}, size.batches[-1]
    counts = {2**i for i in range(size.processes.bit_length())} | {size.processes}
    with tempfile.TemporaryDirectory() as name:
        folder, generator = Path(name), torch.Generator().manual_seed(0)
        paths = [folder / f"{i}.jpg" for i in range(dataloader.PHOTOS)]
        for path in paths:
            dataloader.photo(generator).save(path, quality=90)
        files, captions = dataloader.write_pairs(folder, paths)
        words = dataloader.train_vocab(captions, 2000)
        unused = range(size.config().bert_config.vocab_size - len(words))
        (folder / "vocab.txt").write_text("\n".join([*words, *(f"[unused{i}]" for i in unused)]))
        for processes in sorted(counts):
            copies = -(-processes * batch_size * size.steps // dataloader.PAIRS)
            config = size.config(
                f"batch_size={batch_size}",
                "precision=bf16",
                "scheduler.epochs=1",
                "test_file=null",
                "text_encoder=random",
                "vision_encoder=random",
                "log_every=1",
                f"tokenizer={folder / 'vocab.txt'}",
                f"train_file={json.dumps([files['files']] * copies)}",
            )
            save_config(config, folder)
            out = folder / f"run{processes}"
            flags = "--config", folder / "config.yaml", "--output_dir", out
            status, output = checks.ended(checks.launch(device, processes, *flags))
            if status:
                raise RuntimeError(f"{processes} processes: {output}")
            values = read_curves(out / "tensorboard")["samples_per_s"][1]
            rates[processes] = float(statistics.median(values[len(values) // 2 :]))
    return rates


def table(title, *rows):
    """Return the lines of a table after an empty line and its title."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    rule = "|" + " --- |" * len(rows[0])
    return ["", *([title, ""] if title else []), lines[0], rule, *lines[1:]]


def markdown(content):
    """Return the report as lines of Markdown."""
    steps = [
        (
            row["batch"],
            row["mode"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['batch'] / row['seconds']:.1f}",
            f"{row['memory'] / 1e9:.1f}",
            f"{row['mfu']:.1%}",
        )
        for row in content["steps"]
    ]
    last, rates = content["steps"][-1], content["scaling"]
    alone = last["batch"] / last["seconds"]
    scaling = [
        (count, f"{rate:.1f}", f"{rate / count / rates[1]:.0%}", f"{rate / count / alone:.0%}")
        for count, rate in rates.items()
    ]
    return [
        f"{content['machine']}, {content['processes']} of them",
        *table("", ("check", "found"), *content["checks"].items()),
        *table(
            "A step in bf16; MFU is of the measured matrix-product peak.",
            ("batch", "mode", "ms", "samples/s", "GB", "MFU"),
            *steps,
        ),
        *table(
            f"Pretrain.py on JPEG files, batch {last['batch']} on each GPU.",
            ("GPUs", "samples/s", "of as many times one GPU", "of as many times the step alone"),
            *scaling,
        ),
    ]


def report(device, size, folder):
    """Check, measure and write report.json and report.md. Return the names of failed checks."""
    found, failed = run_checks(device, size)
    content = {
        "machine": bench.MACHINE,
        "processes": size.processes,
        "checks": found,
        "steps": measure_steps(size),
        "scaling": measure_scaling(device, size),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    lines = markdown(content)
    (folder / "report.md").write_text("\n".join(lines) + "\n")
    print(*lines, "", sep="\n")
    verdict = f"not fit to train: {', '.join(failed)}" if failed else "fit to train"
    print(f"this installation is {verdict}")
    return failed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output/gpu")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("torch finds no GPU on this machine; run `make gpu` on one that has some")
    size = Size(
        config=lambda *keys: bench.full_size_config("Pretrain", *keys),
        batches=(32, 64, 128),
        steps=40,
        processes=torch.cuda.device_count(),
    )
    if report(torch.device("cuda"), size, args.output_dir):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
