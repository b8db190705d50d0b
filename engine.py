"""The one training loop: precision, accumulation, schedule, logging, saving, exact resuming."""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
from timm.models.vision_transformer import Block
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dataset import EpochBatches, train_loader
from models.bert import Layer
from models.checkpoint import load_weights, named_tensors, read_checkpoint
from optim import create_optimizer
from scheduler import check_schedule, distillation_weight, learning_rate
from utils import (
    InputError, Interrupted, TrainingStopped, atomic_write, is_distributed, is_main, rank, seed_everything, world_size,
)  # fmt: skip

# dense bf16 matrix-product peak in FLOP/s, by a part of the device's name
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "L4": 121e12}
SKIPPED_IN_LOG = 100  # names of unusable files an epoch's entry in log.txt lists; skipped.txt has them all


class Position(NamedTuple):
    """Where a run stands: the next iteration to do, and what the epoch has summed up so far."""

    epoch: int = 0
    iteration: int = 0
    sums: dict = {}  # name -> sum over the epoch's iterations, equal on all processes
    skipped: list = []  # why entries could not be used, of this epoch, as far as this process saw
    best: dict = {}  # score and epoch of the best validation so far, if there is validation


class StopSignal:
    """Notes SIGTERM and Ctrl-C, and lets all processes agree on the iteration after which they stop.

    The agreement is a reduction on the CPU that runs beside the next iteration, so that nobody waits for it: the answer to
    iteration i is read after iteration i + 1.
    """

    def __enter__(self):
        self.signum, self._pending, self._saved = 0, None, ""
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, _):
        self.signum = signum
        if self._saved:
            raise Interrupted(signum, self._saved)

    @contextlib.contextmanager
    def at_once(self, message):
        """Within it a signal, also one noted before, ends the process at once: whatever there is to save is saved."""
        if self.signum:
            raise Interrupted(self.signum, message)
        self._saved = message
        try:
            yield
        finally:
            self._saved = ""

    def agreed(self):
        """The signal to stop for, 0 for none; the same on all processes. To be called after every iteration."""
        if self._group is None:
            return self.signum
        answer = 0
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = int(flag)
        flag = torch.tensor(self.signum)
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer


def has_bf16(device):
    """Whether the device computes in bf16; every CPU does, some of them slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(config, device):
    """The context of the forward pass: bf16 autocast if the configuration and the device have it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config["precision"] == "bf16" and has_bf16(device))


def compile_layers(model):
    """Compiles every transformer layer in place; names in the state dict stay as they are."""
    for module in model.modules():
        if isinstance(module, (Block, Layer)):
            module.compile()


def device_peak(device, config):
    """bf16 matrix-product peak of the device in FLOP/s, None where it is not known."""
    if device.type != "cuda" or config["precision"] != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path, model, optimizer, config, position, seed, lr):
    """Writes the released keys (model, optimizer, lr_scheduler, config, epoch) and ours for exact resuming, atomically.

    epoch is the last one that was begun. Random states need no key: every iteration seeds itself (utils.seed_everything).
    """
    done = position.iteration == 0
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"lr": lr},
        "config": config,
        "epoch": position.epoch - 1 if done else position.epoch,
        "resume": {**position._asdict(), "seed": seed, "world_size": world_size()},
    }
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise TrainingStopped(f"cannot write {path}: {error}; earlier checkpoints are untouched") from None


def _link_or_copy(source, target):
    """Makes target the same file as source, atomically, without writing it again where the file system allows."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def resume(path, model, optimizer, config, seed):
    """Restores model, optimizer and position of a saved run. Raises InputError if the file is not one of a run."""
    state = read_checkpoint(path)
    lacking = [key for key in ("optimizer", "resume", "config") if key not in state]
    if lacking:
        raise InputError(f"--resume: {path} has no {lacking[0]}, so it cannot be continued; --checkpoint alone starts from "
                         "its weights")
    load_weights(model, named_tensors(state, path), path)
    optimizer.load_state_dict(state["optimizer"])
    saved = state["resume"]
    for key, now in {"seed": seed, "world_size": world_size()}.items():
        if saved.pop(key) != now and is_main():
            print(f"note: {key} differs from the saved run's, the trajectory will not be the same")
    changed = [key for key in config if state["config"].get(key) != config[key]]
    if changed and is_main():
        print(f"note: the configuration differs from the saved run's in {', '.join(changed)}")
    return Position(**saved)


def find_resume_file(output_dir, checkpoint, wanted):
    """The file that --resume continues from, None for a new run. Raises InputError where a new run would overwrite one."""
    last = Path(output_dir) / "checkpoint_last.pth"
    if wanted:
        if checkpoint:
            return Path(checkpoint)
        if not last.exists() and is_main():
            print(f"--resume: {last} does not exist yet, starting from the beginning")
        return last if last.exists() else None
    if last.exists():
        raise InputError(f"--output_dir {output_dir} holds a run already: add --resume to continue it, name another folder, "
                         "or remove it")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# what an epoch records


class Recorder:
    """Collects losses on the device and fetches them every `every` iterations: checks, sums, progress, TensorBoard."""

    def __init__(self, position, config, device, output_dir, iterations, writer):
        self.sums, self.skipped, self.best = dict(position.sums), list(position.skipped), position.best
        self.config, self.device, self.output_dir = config, device, Path(output_dir)
        self.iterations, self.epoch = iterations, position.epoch
        self.batch_samples = config["batch_size"] * config["accumulate"] * world_size()
        self.iteration, self.new_skipped, self.pending = position.iteration, [], []
        # on a CPU there is nothing to wait for
        self.every = config["log_every"] if device.type == "cuda" else 1
        self.peak, self.flops = device_peak(device, config), None
        self.bar = tqdm(
            total=iterations, initial=position.iteration, desc=f"epoch {position.epoch}", disable=not is_main(),
            file=sys.stdout, dynamic_ncols=True, mininterval=1,
        )  # fmt: skip
        self.writer = writer
        self.clock = time.perf_counter()

    def add(self, values, lr, files, skipped):
        """values: name -> scalar tensor on the device; files: this process's; skipped: reasons."""
        self.pending.append((values, files))
        self.new_skipped += skipped
        self.lr = lr
        self.iteration += 1
        if len(self.pending) >= self.every or self.iteration == self.iterations:
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
        rows = mean.double().cpu()
        if not rows.isfinite().all():
            self._stop_for_nonfinite(names, rows, local.cpu())
        for name, total in zip(names, rows.sum(dim=0).tolist()):
            self.sums[name] = self.sums.get(name, 0.0) + total
        self._note_skipped(int(count))
        self._show(dict(zip(names, rows.mean(dim=0).tolist())), len(rows))
        self.pending = []

    def _stop_for_nonfinite(self, names, rows, local):
        row = int((~rows.isfinite()).any(dim=1).nonzero()[0])
        bad = [name for name, value in zip(names, rows[row]) if not value.isfinite()]
        files = [] if local[row].isfinite().all() else self.pending[row][1]
        if is_distributed():
            gathered = [None] * world_size()
            dist.all_gather_object(gathered, files)
            files = sum(gathered, [])
        last = self.output_dir / "checkpoint_last.pth"
        raise TrainingStopped(
            f"{', '.join(bad)} not finite in epoch {self.epoch} iteration {self.iteration - len(self.pending) + row}; "
            f"{f'the last good checkpoint is {last}' if last.exists() else 'there is no checkpoint yet'}; "
            f"files of this step: {', '.join(files)}"
        )

    def _note_skipped(self, count):
        if self.new_skipped:
            with open(self.output_dir / "skipped.txt", "a") as file:
                file.writelines(f"epoch {self.epoch}: {reason}\n" for reason in self.new_skipped)
            self.skipped += self.new_skipped
            self.new_skipped = []
        samples = self.iterations * self.batch_samples
        if count > self.config["max_skipped"] * samples:
            raise TrainingStopped(
                f"{count} entries could not be used, more than {self.config['max_skipped']:.1%} (max_skipped) of an epoch's "
                f"{samples}; they are listed in {self.output_dir / 'skipped.txt'}, the last: {(self.skipped or ['?'])[-1]}"
            )

    def _show(self, means, iterations):
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / iterations, now
        if self.writer is None:
            return
        step = self.epoch * self.iterations + self.iteration
        rate = self.batch_samples / seconds
        shown = {**means, "lr": self.lr, "samples_per_s": rate}
        if self.flops and self.peak:
            shown["mfu"] = self.flops / seconds / self.peak
        for name, value in shown.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        left = (self.config["scheduler"]["epochs"] * self.iterations - step) * seconds
        text = " ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in means.items() if n.startswith("loss"))
        mfu = f" MFU {shown['mfu']:.1%}" if "mfu" in shown else ""
        eta = f"{int(left // 3600)}:{int(left % 3600 // 60):02d}:{int(left % 60):02d}"
        self.bar.set_postfix_str(f"{text} lr {self.lr:.1e} {rate:.1f} samples/s{mfu} run ETA {eta}", refresh=False)
        self.bar.update(iterations)

    def position(self):
        """Where the run stands after the iterations recorded so far; fetches them first."""
        self.fetch()
        return Position(self.epoch, self.iteration, dict(self.sums), list(self.skipped), self.best)

    def summary(self):
        """The epoch's means for log.txt, keys train_*."""
        means = {f"train_{name}": total / self.iterations for name, total in self.sums.items()}
        counts = torch.tensor([len(self.skipped)], device=self.device)
        if is_distributed():
            dist.all_reduce(counts)
        if count := int(counts):
            means["train_skipped"] = count
            means["train_skipped_entries"] = self.skipped[:SKIPPED_IN_LOG]
        return means

    def close(self):
        self.bar.close()


def write_log(output_dir, epoch, **values):
    """Adds values to an epoch's JSON object in log.txt, on the main process; epoch None: as an object of its own."""
    if not is_main():
        return
    path = Path(output_dir) / "log.txt"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    entry = next((line for line in lines if line["epoch"] == epoch), None) if epoch is not None else None
    if entry is None:
        lines.append(entry := {})
    entry.update(values)
    entry["epoch"] = entry.pop("epoch", epoch)  # at the end
    with atomic_write(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Run(NamedTuple):
    """What stays the same throughout a run."""

    model: torch.nn.Module
    wrapped: torch.nn.Module  # model, or its DistributedDataParallel
    optimizer: torch.optim.Optimizer
    step: Callable
    config: dict
    device: torch.device
    seed: int
    output_dir: Path
    iterations: int  # optimizer steps in an epoch

    def save(self, name, position, lr):
        """Writes a checkpoint on the main process; returns its path."""
        path = self.output_dir / name
        if is_main():
            save_checkpoint(path, self.model, self.optimizer, self.config, position, self.seed, lr)
        return path


def iterate(run, batches, epoch, iteration, alpha, count_flops=False):
    """One optimizer step over config["accumulate"] batches. Returns (values, files, skipped reasons, FLOPs or None).

    The sum of the losses that run.step(model, batch, alpha, update_momentum) returns is minimized; values has them and the
    model's extra metrics by name. (seed, epoch, iteration, batch, rank) seed everything random.
    """
    totals, files, skipped = {}, [], []
    accumulate, clip_grad = run.config["accumulate"], run.config["clip_grad"]
    with FlopCounterMode(display=False) if count_flops else contextlib.nullcontext() as counter:
        for micro in range(accumulate):
            batch = next(batches)
            seed_everything(run.seed, epoch, iteration, micro, rank())
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last or run.wrapped is run.model else run.wrapped.no_sync():
                with autocast(run.config, run.device):
                    losses = run.step(run.wrapped, batch, alpha, micro == 0)
                (sum(losses.values()) / accumulate).backward()
            for name, value in {**losses, **run.model.extra_metrics()}.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulate
            files += batch.files
            skipped += batch.skipped
    if clip_grad:
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return totals, files, skipped, counter.get_total_flops() if counter else None


def train_epoch(run, loader, position, recorder, stop):
    """The rest of an epoch from a position on. Returns the last learning rate; raises Interrupted after saving."""
    config, epoch, iterations = run.config, position.epoch, run.iterations
    batches = iter(loader)
    lr = learning_rate(config["scheduler"], epoch, iterations - 1, iterations)  # where nothing is left of the epoch
    for iteration in range(position.iteration, iterations):
        lr = learning_rate(config["scheduler"], epoch, iteration, iterations)
        alpha = distillation_weight(config, epoch, iteration, iterations)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        count_flops = recorder.peak is not None and recorder.flops is None and not config["compile"]
        values, files, skipped, flops = iterate(run, batches, epoch, iteration, alpha, count_flops)
        recorder.flops = flops or recorder.flops
        recorder.add(values, lr, files, skipped)

        signum = stop.agreed()
        due = config["save_every"] and (iteration + 1) % config["save_every"] == 0
        if (signum or due) and iteration + 1 < iterations:
            path = run.save("checkpoint_last.pth", recorder.position(), lr)
            if signum:
                if is_distributed():
                    dist.barrier()  # the launcher ends all processes as soon as one has left, the saving one too
                raise Interrupted(signum, f"{signal.Signals(signum).name}: saved {path} in epoch {epoch} after iteration "
                                  f"{iteration}; continue with --resume")
    return lr


def finish_epoch(run, position, lr, validate, stop):
    """Validates, logs and saves what an epoch has made. Returns the position of the next epoch.

    Without validation every epoch's checkpoint stays, with it the best one.
    """
    epoch, following = position.epoch, Position(position.epoch + 1, best=position.best)
    if validate is None:
        name = f"checkpoint_{epoch:02d}.pth"
    else:
        name = "checkpoint_last.pth"
        path = run.save(name, position, lr)  # validation takes long, and must not cost the epoch if it is cut off
        with stop.at_once(f"saved {path} before the validation of epoch {epoch}; continue with --resume"):
            metrics, score = validate()
        write_log(run.output_dir, epoch, **metrics)
        if score > position.best.get("score", float("-inf")):
            following = following._replace(best={"score": score, "epoch": epoch})
            name = "checkpoint_best.pth"
    path = run.save(name, following, lr)
    if is_main() and name != "checkpoint_last.pth":
        _link_or_copy(path, run.output_dir / "checkpoint_last.pth")
    return following


def train(model, dataset, tokenizer, step, config, output_dir, device, seed, resume_from=None, validate=None):
    """Trains for scheduler.epochs epochs; leaves checkpoints, log.txt and TensorBoard files in output_dir.

    step(model, batch, alpha, update_momentum) computes the losses of a batch; resume_from: from find_resume_file;
    validate() -> (metrics for log.txt, score), the same on all processes, is called after every epoch. The checkpoints are
    checkpoint_last.pth and every epoch's checkpoint_%02d.pth or, with validate, the one of the highest score as
    checkpoint_best.pth. Returns {score, epoch} of that one, or {}. Raises Interrupted after saving on SIGTERM or Ctrl-C,
    TrainingStopped when a loss is not finite or too much data unusable.
    """
    check_schedule(config["scheduler"])
    if config["precision"] == "bf16" and not has_bf16(device) and is_main():
        print("note: this device has no bf16, training in fp32")
    for param in model.idle_parameters():
        param.requires_grad_(False)
    optimizer = create_optimizer(config["optimizer"], model)
    position = resume(resume_from, model, optimizer, config, seed) if resume_from else Position()
    sampler = EpochBatches(len(dataset), config["batch_size"], seed, rank(), world_size())
    loader = train_loader(dataset, sampler, tokenizer, config, device)
    iterations = len(sampler) // config["accumulate"]
    if not iterations:
        raise InputError(f"accumulate {config['accumulate']}: an epoch has only {len(sampler)} batches, lower it")
    if config["compile"]:
        compile_layers(model)
    wrapped = model
    if is_distributed():
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    run = Run(model, wrapped, optimizer, step, config, device, seed, Path(output_dir), iterations)
    # what a stopped run had drawn beyond its checkpoint is drawn anew
    begun = position.epoch * iterations + position.iteration
    writer = SummaryWriter(str(run.output_dir / "tensorboard"), purge_step=begun + 1 if begun else None) if is_main() else None

    with StopSignal() as stop, contextlib.closing(writer) if writer else contextlib.nullcontext():
        epochs = config["scheduler"]["epochs"]
        for epoch in range(position.epoch, epochs):
            model.train()
            sampler.epoch = dataset.epoch = epoch
            sampler.start = position.iteration * config["accumulate"]
            with contextlib.closing(Recorder(position, config, device, run.output_dir, iterations, writer)) as recorder:
                lr = train_epoch(run, loader, position, recorder, stop)
                summary = recorder.summary()
                position = recorder.position()
            write_log(run.output_dir, epoch, train_lr=lr, **summary)
            position = finish_epoch(run, position, lr, validate, stop)
        if stop.signum:
            raise Interrupted(stop.signum, "training was complete and is saved; --resume goes on to the evaluation")
    if is_distributed():
        dist.barrier()  # whoever goes on to read the best checkpoint finds it written
    return position.best
