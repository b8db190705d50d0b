"""What an epoch records: losses, progress, unusable entries, steps that went wrong, log.txt."""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from engine.saving import LAST, Position
from utils import TrainingStopped, atomic_write, gather_lists, is_distributed, is_main, remake_output_dir, world_size

# dense bf16 matrix-product peak in FLOP/s, by a part of the device's name
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12}
SKIPPED_IN_LOG = 100  # names of unusable files an epoch's entry in log.txt lists; skipped.txt has them all
RECENT = 100  # iterations that a loss is compared with
SPIKE = 6  # standard deviations above their mean that make a loss spike


def device_peak(device, config):
    """bf16 matrix-product peak of the device in FLOP/s, None where it is not known."""
    if device.type != "cuda" or config["precision"] != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


class Recorder:
    """Collects losses on the device and fetches them every `every` iterations: checks, sums, progress, TensorBoard.

    position: where the epoch goes on; iterations: of a whole epoch; end: the epoch's last iteration, exclusive.
    """

    def __init__(self, position, config, device, output_dir, iterations, end, curves):
        self.start, self.config, self.device = position, config, device
        self.sums, self.counted, self.recent = dict(position.sums), position.counted, list(position.recent)
        self.spikes, self.skipped_steps = position.spikes, position.skipped_steps
        self.output_dir, self.iterations, self.end, self.epoch = Path(output_dir), iterations, end, position.epoch
        # the entries an interrupted epoch could not use belong to no process in particular
        self.skipped, self.new_skipped = list(position.skipped) if is_main() else [], []
        self.batch_samples = config["batch_size"] * config["accumulate"] * world_size()
        self.iteration, self.pending = position.iteration, []
        # on a CPU there is nothing to wait for
        self.every = config["log_every"] if device.type == "cuda" else 1
        self.peak, self.flops = device_peak(device, config), None
        self.bar = tqdm(
            total=end, initial=position.iteration, desc=f"epoch {position.epoch}", disable=not is_main(),
            file=sys.stdout, dynamic_ncols=True, mininterval=1,
        )  # fmt: skip
        self.curves = curves
        self.clock = time.perf_counter()

    def add(self, values, lr, files, skipped):
        """values: name -> scalar tensor on the device; files: this process's; skipped: reasons."""
        self.pending.append((values, files))
        self.new_skipped += skipped
        self.lr = lr
        self.iteration += 1
        if len(self.pending) >= self.every or self.iteration == self.end:
            self.fetch()

    def fetch(self):
        """Brings what is pending to the host, averaged over the processes. Raises TrainingStopped."""
        if not self.pending:
            return
        names = list(self.pending[0][0])
        local = torch.stack([torch.stack([values[n].detach().float() for n in names]) for values, _ in self.pending])
        count = torch.tensor([len(self.skipped) + len(self.new_skipped)], device=self.device)
        mean = local.clone()
        if is_distributed():
            dist.all_reduce(mean)
            dist.all_reduce(count)
            mean /= world_size()
        first = self.iteration - len(self.pending)
        good = []
        for number, (row, own) in enumerate(zip(mean.double().cpu(), local.cpu())):
            values = dict(zip(names, row.tolist()))
            if row.isfinite().all():
                good.append(values)
                self._check_spike(values, first + number, self.pending[number][1])
            else:
                bad = [name for name in names if not math.isfinite(values[name])]
                bad = [name for name in bad if name.startswith("loss")] or bad  # gradients are not finite on all processes
                own_bad = not all(own[names.index(name)].isfinite() for name in bad)
                files = self.pending[number][1] if own_bad else []
                self._note_nonfinite(bad, first + number, files, not math.isfinite(values["grad_norm"]))
        for values in good:
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.counted += len(good)
        self._note_skipped(int(count))
        self._show({name: statistics.fmean(values[name] for values in good) for name in names if good}, len(self.pending))
        self.pending = []

    def _check_spike(self, values, iteration, files):
        loss = sum(value for name, value in values.items() if name.startswith("loss"))
        if len(self.recent) == RECENT:
            usual, spread = statistics.fmean(self.recent), statistics.stdev(self.recent)
            if loss > usual + SPIKE * spread:
                self.spikes += 1
                losses = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name.startswith("loss"))
                self._report(f"loss spike in epoch {self.epoch} iteration {iteration}: {losses}; their sum {loss:.4g} was "
                             f"{usual:.4g} +- {spread:.2g} in the {RECENT} steps before", gather_lists(files))
        self.recent = [*self.recent, loss][-RECENT:]

    def _note_nonfinite(self, names, iteration, files, step_skipped):
        self.skipped_steps += 1
        what = f"{', '.join(names)} not finite in epoch {self.epoch} iteration {iteration}"
        files = gather_lists(files)
        self._report(f"{what}: the step was {'skipped' if step_skipped else 'done, its gradients were finite'}", files)
        skipped = self.start.skipped_steps_before + self.skipped_steps
        if skipped > self.config["max_skipped_steps"]:
            last = self.output_dir / LAST
            raise TrainingStopped(
                f"{what}; {skipped} steps skipped, max_skipped_steps is {self.config['max_skipped_steps']}; "
                f"{f'the last checkpoint is {last}' if last.exists() else 'there is no checkpoint yet'}; "
                f"files of this step: {', '.join(files)}"
            )

    def _report(self, what, files):
        """Writes what happened in a step, with its files on all processes, to bad_steps.txt and to the screen."""
        if is_main():
            append(self.output_dir / "bad_steps.txt", [f"{what}; files of this step: {', '.join(files)}"])
            tqdm.write(f"note: {what}; its files are in {self.output_dir / 'bad_steps.txt'}", file=sys.stderr)

    def _note_skipped(self, count):
        if self.new_skipped:
            append(self.output_dir / "skipped.txt", [f"epoch {self.epoch}: {reason}" for reason in self.new_skipped])
            self.skipped += self.new_skipped
            self.new_skipped = []
        samples = self.iterations * self.batch_samples
        if count > self.config["max_skipped"] * samples:
            last = gather_lists(self.skipped)[-1]
            raise TrainingStopped(
                f"{count} entries could not be used, more than {self.config['max_skipped']:.1%} (max_skipped) of an epoch's "
                f"{samples}; they are listed in {self.output_dir / 'skipped.txt'}, one of them: {last}"
            )

    def _show(self, means, iterations):
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / iterations, now
        if self.curves is None:
            return
        step = self.epoch * self.iterations + self.iteration
        rate = self.batch_samples / seconds
        shown = {**means, "lr": self.lr, "samples_per_s": rate}
        if self.flops and self.peak:
            shown["mfu"] = self.flops / seconds / self.peak
        self.curves.add({f"train/{name}": value for name, value in shown.items()}, step)
        left = (self.config["scheduler"]["epochs"] * self.iterations - step) * seconds
        text = " ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in means.items() if n.startswith("loss"))
        mfu = f" MFU {shown['mfu']:.1%}" if "mfu" in shown else ""
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        self.bar.set_postfix_str(f"{text} lr {self.lr:.1e} {rate:.1f} samples/s{mfu} run ETA {eta}", refresh=False)
        self.bar.update(iterations)

    def position(self):
        """Where the run stands after the iterations recorded so far; fetches them first. To be called on all processes."""
        self.fetch()
        seen = self.start.seen + (self.iteration - self.start.iteration) * self.batch_samples
        return Position(
            epoch=self.epoch, iteration=self.iteration, seen=seen,
            sums=dict(self.sums), counted=self.counted, recent=list(self.recent), spikes=self.spikes,
            skipped_steps=self.skipped_steps, skipped_steps_before=self.start.skipped_steps_before,
            skipped=gather_lists(self.skipped), best=self.start.best,
        )  # fmt: skip

    def close(self):
        self.bar.close()


def following(position):
    """The position at the beginning of the epoch after a finished one."""
    return Position(
        epoch=position.epoch + 1, recent=position.recent, best=position.best,
        skipped_steps_before=position.skipped_steps_before + position.skipped_steps,
    )  # fmt: skip


def summary(position):
    """A finished epoch's means and counts for log.txt, keys train_*."""
    means = {f"train_{name}": total / max(1, position.counted) for name, total in position.sums.items()}
    counts = {"skipped": len(position.skipped), "skipped_steps": position.skipped_steps, "loss_spikes": position.spikes}
    means |= {f"train_{name}": count for name, count in counts.items() if count}
    if position.skipped:
        means["train_skipped_entries"] = sorted(position.skipped)[:SKIPPED_IN_LOG]
    return means


def append(path, lines):
    """Appends lines to a text file of a run's folder, which is made if it is gone. Raises TrainingStopped."""
    try:
        remake_output_dir(path.parent)
        with open(path, "a") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise TrainingStopped(f"cannot write {path}: {error.strerror}") from None


def write_log(output_dir, epoch, **values):
    """Adds values to an epoch's JSON object in log.txt, on the main process; epoch None: as an object of its own."""
    if not is_main():
        return
    path = Path(output_dir) / "log.txt"
    try:
        remake_output_dir(path.parent)
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        entry = next((line for line in lines if line["epoch"] == epoch), None) if epoch is not None else None
        if entry is None:
            lines.append(entry := {})
        entry.update(values)
        entry["epoch"] = entry.pop("epoch", epoch)  # at the end
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise TrainingStopped(f"cannot write {path}: {error.strerror}; earlier lines are untouched") from None
