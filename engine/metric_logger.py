"""Metrics of a run: fetched from the device, checked, shown, drawn, and written to log.txt."""

import contextlib
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configs.config import Config
from engine.output_dir import writing
from engine.precision import device_peak
from utils import (
    InputError,
    TrainingStopped,
    atomic_write,
    gather_lists,
    is_distributed,
    is_main,
    read_log,
    world_size,
)

if TYPE_CHECKING:
    from engine.checkpointing import Progress
    from engine.trainer import StepOutput, TrainState

LINE_EVERY = 60  # seconds between lines of progress if stderr is not a terminal

logger = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """Values of a step on the device, not fetched yet."""

    iteration: int
    values: dict[str, Tensor]
    files: list[str]


class MetricLogger:
    """Collects the values of steps on the device and fetches them every `log_every` iterations.

    Args:
        output_dir: Folder of log.txt, skipped.txt, bad_steps.txt and the TensorBoard files.
        config: The configuration.
        device: Device of the model.
    """

    def __init__(self, output_dir: Path | str, config: Config, device: torch.device) -> None:
        self.output_dir, self.config, self.device = Path(output_dir), config, device
        # on a CPU there is nothing to wait for
        self.every = config.log_every if device.type == "cuda" else 1
        self.peak, self.flops = device_peak(device, config), None
        self._writer, self._bar = None, tqdm(disable=True)
        self._line_at = time.monotonic()

    def __enter__(self) -> "MetricLogger":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer:
            # a complete run does not fail because of lost points of a curve
            with contextlib.suppress(OSError):
                self._writer.close()

    def begin_epoch(self, state: "TrainState", end: int) -> None:
        """Begin to record an epoch from `state.iteration` to `end`, exclusive."""
        self.end, self.pending = end, []
        self.skipped = []
        self._bar = tqdm(
            total=end,
            initial=state.iteration,
            desc=f"epoch {state.epoch}",
            disable=None if is_main() else True,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=1,
        )
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def count_flops(self) -> Iterator[None]:
        """Count the FLOPs of one step, if the peak of the device is known."""
        if self.flops is not None or self.peak is None:
            yield
            return
        # within it, compiled layers run uncompiled
        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops()

    def add(self, state: "TrainState", output: "StepOutput", lr: float) -> None:
        """Add the output of a step, before `state.iteration` is advanced."""
        values = {**output.losses, "grad_norm": output.grad_norm}
        self.pending.append(_Pending(state.iteration, values, output.files))
        self.skipped += output.skipped
        self.lr = lr
        if len(self.pending) >= self.every or state.iteration + 1 == self.end:
            self.flush(state)

    def flush(self, state: "TrainState") -> None:
        """Fetch pending values, so that `state` is up to date; every rank must call it.

        Raises:
            TrainingStopped: Too many steps are not finite, or too many entries are unusable.
        """
        if not self.pending:
            return
        names = list(self.pending[0].values)
        rows = [
            torch.stack([p.values[name].detach().float() for name in names]) for p in self.pending
        ]
        local = torch.stack(rows)
        skipped = torch.tensor(len(self.skipped), device=self.device)
        mean = local.clone()
        if is_distributed():
            dist.all_reduce(mean)
            dist.all_reduce(skipped)
            mean /= world_size()
        pending, self.pending, finite = self.pending, [], []
        means, locals_ = mean.double().cpu().tolist(), local.cpu().tolist()
        for step, row, local_row in zip(pending, means, locals_, strict=True):
            values = dict(zip(names, row, strict=True))
            if all(map(math.isfinite, row)):
                finite.append(values)
                for name, value in values.items():
                    state.sums[name] = state.sums.get(name, 0.0) + value
                state.counted += 1
            else:
                self._note_nonfinite(state, step, values, dict(zip(names, local_row, strict=True)))
        state.skipped += int(skipped)
        self._note_skipped(state)
        averages = {name: statistics.fmean(v[name] for v in finite) for name in names if finite}
        self._show(state, pending[-1].iteration + 1, averages, len(pending))

    def _note_nonfinite(
        self,
        state: "TrainState",
        step: _Pending,
        values: dict[str, float],
        local: dict[str, float],
    ) -> None:
        """Report an iteration whose values are not finite, with the files of the ranks at fault."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        # gradients are averaged over the ranks, so only a loss tells which rank is at fault
        bad = [name for name in bad if name.startswith("loss")] or bad
        state.skipped_steps += 1
        what = f"{', '.join(bad)} not finite in epoch {state.epoch} iteration {step.iteration}"
        files = gather_lists([] if all(math.isfinite(local[name]) for name in bad) else step.files)
        done = (
            "was taken, because its gradients were finite"
            if math.isfinite(values["grad_norm"])
            else "was skipped"
        )
        listed = f"Files of this step: {', '.join(files)}"
        if is_main():
            path = self.output_dir / "bad_steps.txt"
            append(path, [f"{what}: the step {done}. {listed}"])
            logger.warning("%s: the step %s; %s lists its files", what, done, path)
        skipped, limit = (
            state.skipped_steps_before + state.skipped_steps,
            self.config.max_skipped_steps,
        )
        if skipped > limit:
            raise TrainingStopped(
                f"{what}: {skipped} steps were not finite, and max_skipped_steps is {limit};"
                f" --resume continues from the last checkpoint in {self.output_dir}. {listed}"
            )

    def _note_skipped(self, state: "TrainState") -> None:
        """Write newly skipped entries to skipped.txt, and stop the run if they are too many."""
        path = self.output_dir / "skipped.txt"
        if self.skipped:
            append(path, [f"epoch {state.epoch}: {reason}" for reason in self.skipped])
            self.skipped = []
        samples = state.iterations * state.global_batch
        if state.skipped > self.config.max_skipped * samples:
            raise TrainingStopped(
                f"{state.skipped} entries could not be used, but max_skipped allows only"
                f" {self.config.max_skipped:.1%} of the {samples} samples of an epoch; {path} lists"
                " the unusable entries"
            )

    def _show(
        self, state: "TrainState", done: int, means: dict[str, float], iterations: int
    ) -> None:
        """Show and draw the means of the last `iterations`, after `done` of the epoch."""
        clock = time.perf_counter()
        seconds, self._clock = (clock - self._clock) / iterations, clock
        if not is_main():
            return
        step = state.epoch * state.iterations + done
        rate = state.global_batch / seconds
        losses = [f"{n.removeprefix('loss_')} {v:.3f}" for n, v in means.items() if n[:4] == "loss"]
        shown = {**means, "lr": self.lr, "samples_per_s": rate}
        text = f"{' '.join(losses)} lr {self.lr:.1e} {rate:.1f} samples/s"
        if self.flops:
            shown["mfu"] = self.flops / seconds / self.peak
            text += f" MFU {shown['mfu']:.1%}"
        self._draw(shown, step)
        left = (self.config.scheduler.epochs * state.iterations - step) * seconds
        text += f" run ETA {tqdm.format_interval(left)}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(iterations)
        due = done == self.end or time.monotonic() - self._line_at > LINE_EVERY
        if self._bar.disable and due:
            logger.info("epoch %d: %d/%d %s", state.epoch, done, self.end, text)
            self._line_at = time.monotonic()

    def _draw(self, values: dict[str, float], step: int) -> None:
        """Add points to the TensorBoard curves train/NAME."""
        folder = self.output_dir / "tensorboard"
        with writing(folder):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                # hides points that a killed run drew from this step on
                self._writer = SummaryWriter(str(folder), purge_step=step)
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)

    def end_epoch(self, state: "TrainState") -> None:
        """Fetch pending values and end the progress bar."""
        self.flush(state)
        self._bar.close()


def summarize(progress: "Progress") -> dict[str, Any]:
    """Return a finished epoch's means and counts for log.txt, keys train_*."""
    means: dict[str, Any] = {
        f"train_{n}": total / max(1, progress.counted) for n, total in progress.sums.items()
    }
    counts = {"skipped": progress.skipped, "skipped_steps": progress.skipped_steps}
    return means | {f"train_{name}": count for name, count in counts.items() if count}


def append(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a text file of a run. Raises TrainingStopped."""
    with writing(path), open(path, "a") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_log(output_dir: Path | str, epoch: int | None, **values: Any) -> None:
    """Add values to an epoch's JSON object in log.txt, on rank 0.

    Args:
        output_dir: Folder of log.txt.
        epoch: Epoch of the object, None to append an object of its own.
        values: Metrics by name.

    Raises:
        TrainingStopped: log.txt cannot be written, or one of its lines is not a JSON object.
    """
    if not is_main():
        return
    path = Path(output_dir) / "log.txt"
    with writing(path, "earlier lines are untouched", (OSError, InputError)):
        lines = read_log(path)
        entry = next((line for line in lines if line.get("epoch") == epoch), None)
        if entry is None or epoch is None:
            lines.append(entry := {})
        entry.update(values)
        entry["epoch"] = entry.pop("epoch", epoch)  # the last key
        with atomic_write(path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
