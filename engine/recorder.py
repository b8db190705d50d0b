"""What an epoch records: losses, progress, unusable entries, steps that went wrong, log.txt."""

import contextlib
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from engine.device import device_peak
from engine.saving import LAST, writing
from utils import (
    TrainingStopped,
    atomic_write,
    gather_lists,
    is_distributed,
    is_main,
    read_regular,
    world_size,
)

# names of unusable files an epoch's entry in log.txt lists; skipped.txt has them all
SKIPPED_IN_LOG = 100


class Recorder:
    """Collects losses on the device and fetches them every `every` iterations: checks, sums,
    progress, TensorBoard.

    position: where the epoch goes on, kept up to date from there; end: the epoch's last iteration,
    exclusive; flops: of a step as an earlier epoch has counted them.
    """

    def __init__(self, run, position, end, curves, flops=None):
        self.run, self.config, self.now, self.end, self.curves = (
            run,
            run.config,
            position,
            end,
            curves,
        )
        # the entries an interrupted epoch could not use belong to no process in particular
        self.skipped, self.new_skipped = list(position.skipped) if is_main() else [], []
        self.batch_samples = self.config["batch_size"] * self.config["accumulate"] * world_size()
        self.pending = []  # values by name and files of the iterations since those that `now` has
        # on a CPU there is nothing to wait for
        self.every = self.config["log_every"] if run.device.type == "cuda" else 1
        self.peak, self.flops = device_peak(run.device, self.config), flops
        self.bar = tqdm(
            total=end,
            initial=position.iteration,
            desc=f"epoch {position.epoch}",
            disable=not is_main(),
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=1,
        )
        self.clock = time.perf_counter()

    def close(self):
        self.bar.close()

    @contextlib.contextmanager
    def count_flops(self):
        """Count the FLOPs of one step, if the peak of the device is known."""
        if self.flops is not None or self.peak is None:
            yield
            return
        # within it, compiled layers compute eagerly
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def add(self, values, lr, files, skipped):
        """values: name -> scalar tensor on the device; files: this process's; skipped: reasons."""
        self.pending.append((values, files))
        self.new_skipped += skipped
        self.lr = lr
        if len(self.pending) >= self.every or self.now.iteration + len(self.pending) == self.end:
            self.fetch()

    def fetch(self):
        """Move pending values to the host, averaged over the processes, which must all call it.

        Raises TrainingStopped.
        """
        if not self.pending:
            return
        names = list(self.pending[0][0])
        own = torch.stack(
            [torch.stack([values[n].detach().float() for n in names]) for values, _ in self.pending]
        )
        skipped = torch.tensor([len(self.skipped) + len(self.new_skipped)], device=self.run.device)
        mean = own.clone()
        if is_distributed():
            dist.all_reduce(mean)
            dist.all_reduce(skipped)
            mean /= world_size()
        pending, self.pending = self.pending, []
        good = []
        for (_, files), row, own_row in zip(
            pending, mean.double().cpu().tolist(), own.cpu().tolist()
        ):
            values = dict(zip(names, row))
            if all(map(math.isfinite, row)):
                good.append(values)
                self._add_good(values)
            else:
                self._note_nonfinite(values, dict(zip(names, own_row)), files)
            self.now.iteration += 1
            self.now.seen += self.batch_samples
        self._note_skipped(int(skipped))
        self._show(
            {name: statistics.fmean(values[name] for values in good) for name in names if good},
            len(pending),
        )

    def _add_good(self, values):
        """Add the values of an iteration to the sums."""
        for name, value in values.items():
            self.now.sums[name] = self.now.sums.get(name, 0.0) + value
        self.now.counted += 1

    def _note_nonfinite(self, values, own, files):
        """Report an iteration whose values are not finite, with the files of the processes where
        they were not: own values.
        """
        now, bad = self.now, [name for name, value in values.items() if not math.isfinite(value)]
        # gradients are not finite on all processes
        bad = [name for name in bad if name.startswith("loss")] or bad
        now.skipped_steps += 1
        what = f"{', '.join(bad)} not finite in epoch {now.epoch} iteration {now.iteration}"
        files = gather_lists([] if all(math.isfinite(own[name]) for name in bad) else files)
        done = (
            "was done, its gradients were finite"
            if math.isfinite(values["grad_norm"])
            else "was skipped"
        )
        self._report(f"{what}: the step {done}", files)
        skipped, most = (
            now.skipped_steps_before + now.skipped_steps,
            self.config["max_skipped_steps"],
        )
        if skipped > most:
            self.run.saver.wait()
            last = self.run.output_dir / LAST
            raise TrainingStopped(
                f"{what}; {skipped} steps skipped, max_skipped_steps is {most}; "
                f"{f'the last checkpoint is {last}' if last.exists() else 'there is no checkpoint yet'}; "
                f"files of this step: {', '.join(files)}"
            )

    def _report(self, what, files):
        """Write what happened in a step, with its files on all processes, to bad_steps.txt and to
        the screen.
        """
        if is_main():
            path = self.run.output_dir / "bad_steps.txt"
            append(path, [f"{what}; files of this step: {', '.join(files)}"])
            tqdm.write(f"note: {what}; its files are in {path}", file=sys.stderr)

    def _note_skipped(self, count):
        path = self.run.output_dir / "skipped.txt"
        if self.new_skipped:
            append(path, [f"epoch {self.now.epoch}: {reason}" for reason in self.new_skipped])
            self.skipped += self.new_skipped
            self.new_skipped = []
        samples = self.run.iterations * self.batch_samples
        if count > self.config["max_skipped"] * samples:
            last = gather_lists(self.skipped)[-1]
            raise TrainingStopped(
                f"{count} entries could not be used, more than {self.config['max_skipped']:.1%} (max_skipped) of an epoch's "
                f"{samples}; they are listed in {path}, one of them: {last}"
            )

    def _show(self, means, iterations):
        clock = time.perf_counter()
        seconds, self.clock = (clock - self.clock) / iterations, clock
        if not is_main():
            return
        step = self.now.epoch * self.run.iterations + self.now.iteration
        rate = self.batch_samples / seconds
        shown = {**means, "lr": self.lr, "samples_per_s": rate}
        if self.flops:
            shown["mfu"] = self.flops / seconds / self.peak
        self.curves.add({f"train/{name}": value for name, value in shown.items()}, step)
        left = (self.config["scheduler"]["epochs"] * self.run.iterations - step) * seconds
        text = " ".join(
            f"{n.removeprefix('loss_')} {v:.3f}" for n, v in means.items() if n.startswith("loss")
        )
        mfu = f" MFU {shown['mfu']:.1%}" if "mfu" in shown else ""
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        self.bar.set_postfix_str(
            f"{text} lr {self.lr:.1e} {rate:.1f} samples/s{mfu} run ETA {eta}", refresh=False
        )
        self.bar.update(iterations)

    def position(self):
        """Return where the run stands after what was added so far; every process must call it.

        Raises TrainingStopped.
        """
        self.fetch()
        return replace(self.now, skipped=gather_lists(self.skipped))


def summary(position):
    """Return a finished epoch's means and counts for log.txt, keys train_*."""
    means = {
        f"train_{name}": total / max(1, position.counted) for name, total in position.sums.items()
    }
    counts = {"skipped": len(position.skipped), "skipped_steps": position.skipped_steps}
    means |= {f"train_{name}": count for name, count in counts.items() if count}
    if position.skipped:
        means["train_skipped_entries"] = sorted(position.skipped)[:SKIPPED_IN_LOG]
    return means


def append(path, lines):
    """Append lines to a text file of a run's folder. Raises TrainingStopped."""
    with writing(path), open(path, "a") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_log(output_dir, epoch, **values):
    """Add values to an epoch's JSON object in log.txt, on the main process; epoch None: as an
    object of its own.
    """
    if not is_main():
        return
    path = Path(output_dir) / "log.txt"
    # ValueError: they are not ours
    with writing(path, "earlier lines are untouched", (OSError, ValueError)):
        lines = (
            [json.loads(line) for line in read_regular(path).splitlines()] if path.exists() else []
        )
        entry = (
            next((line for line in lines if line.get("epoch") == epoch), None)
            if epoch is not None
            else None
        )
        if entry is None:
            lines.append(entry := {})
        entry.update(values)
        entry["epoch"] = entry.pop("epoch", epoch)  # at the end
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
