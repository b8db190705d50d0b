"""The training loop: accumulation, schedule, and when to log, save, validate and stop."""

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel

from configs.config import as_config
from dataset.loading import TrainBatches, to_device
from engine.curves import Curves
from engine.device import autocast, compile_layers, compiles, device_peak, has_bf16, use_device
from engine.processes import StopSignal
from engine.recorder import Recorder, summary, write_log
from engine.saving import BEST, LAST, PREVIOUS, Position, Saver, resume, save_settings
from optim import create_optimizer, step_if_finite
from scheduler import WARMUP_STEP, distillation_weight, learning_rate, scaled
from utils import (
    InputError,
    TrainingStopped,
    gather_lists,
    interruptible,
    is_distributed,
    is_main,
    rank,
    seed_everything,
    world_size,
)


class Run(NamedTuple):
    """What stays the same throughout a run."""

    model: torch.nn.Module
    wrapped: torch.nn.Module  # model, or its DistributedDataParallel
    optimizer: torch.optim.Optimizer
    step: Callable
    config: dict
    scheduler: dict  # config's, for this global batch
    device: torch.device
    seed: int
    output_dir: Path
    iterations: int  # optimizer steps in an epoch
    entries: int = 0  # of the training set
    saver: Saver | None = None  # where nothing is saved

    def save(self, name, position, lr, **options):
        """Begin to write a checkpoint, as Saver.save does; every process must call it.

        Return its path.
        """
        path = self.output_dir / name
        self.saver.save(
            path,
            self.model,
            self.optimizer,
            self.config,
            position,
            self.seed,
            lr,
            self.entries,
            **options,
        )
        return path


def iterate(run, batches, epoch, iteration, alpha):
    """Take one optimizer step over config["accumulate"] batches. Return (values, files, skipped
    reasons).

    The sum of the losses that run.step(model, batch, alpha, update_momentum) returns is minimized;
    values has them, the model's extra metrics and grad_norm, the norm of all gradients, by name.
    Where that is not finite the weights and the optimizer stay as they are. (seed, epoch,
    iteration, batch, rank) seed everything random.
    """
    totals, files, skipped = {}, [], []
    accumulate, clip_grad = run.config["accumulate"], run.config["clip_grad"]
    for micro in range(accumulate):
        batch = next(batches)
        seed_everything(run.seed, epoch, iteration, micro, rank())
        batch = to_device(run.model.prepare(batch), run.device)
        last = micro == accumulate - 1
        with (
            contextlib.nullcontext() if last or run.wrapped is run.model else run.wrapped.no_sync()
        ):
            with autocast(run.config, run.device):
                losses = run.step(run.wrapped, batch, alpha, micro == 0)
            (sum(losses.values()) / accumulate).backward()
        for name, value in {**losses, **run.model.extra_metrics()}.items():
            totals[name] = totals.get(name, 0) + value.detach() / accumulate
        files += batch.files
        skipped += batch.skipped
    params = [param for param in run.model.parameters() if param.grad is not None]
    norm = torch.nn.utils.get_total_norm([param.grad for param in params])
    if clip_grad:
        torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm)
    step_if_finite(run.optimizer, norm)
    run.optimizer.zero_grad(set_to_none=True)
    return {**totals, "grad_norm": norm}, files, skipped


def settle_buckets(run, batches):
    """Run a backward pass without a step, so that DistributedDataParallel orders its buckets.
    Return the batches, unchanged.

    The buckets are ordered after the first backward pass, and with three or more ranks their order
    decides how sums are rounded. Without this pass the first step of a resumed run would have the
    initial order, unlike the same step of an uninterrupted run. The pass changes no weights,
    gradients or buffers.
    """
    batch = next(batches)
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    with autocast(run.config, run.device):
        losses = run.step(run.wrapped, to_device(run.model.prepare(batch), run.device), 0.0, False)
    sum(losses.values()).backward()
    run.optimizer.zero_grad(set_to_none=True)
    for buffer, value in zip(run.model.buffers(), buffers):
        buffer.copy_(value)
    return itertools.chain([batch], batches)


def train_epoch(run, batches, position, recorder, stop):
    """Train from a position to the end of its epoch.

    Return the last learning rate. Raises Interrupted after saving.
    """
    config, epoch, iterations = run.config, position.epoch, run.iterations
    saver = run.saver
    # where nothing is left of the epoch
    lr = learning_rate(run.scheduler, epoch, iterations - 1, iterations)
    for iteration in range(position.iteration, recorder.end):
        lr = learning_rate(run.scheduler, epoch, iteration, iterations)
        alpha = distillation_weight(config, epoch, iteration, iterations)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        with recorder.count_flops():
            values, files, skipped = iterate(run, batches, epoch, iteration, alpha)
        recorder.add(values, lr, files, skipped)

        signum, late, failed = stop.agree(saver.late(), saver.failed())
        if failed:
            saver.finish()
        due = late or (saver.iterations and (iteration + 1) % saver.iterations == 0)
        if (signum or due) and iteration + 1 < recorder.end:
            # a full disk may be emptied before the next save; stopping would lose the progress
            # since the last one
            otherwise = "" if signum else f"training goes on, and saves again after {saver.every}"
            path = run.save(LAST, recorder.position(), lr, otherwise=otherwise)
            if signum:
                saved = f"saved {path} in epoch {epoch} after iteration {iteration}; continue with --resume"
                stop.leave_together(saved, saver.finish)
    return lr


def finish_epoch(run, position, lr, validate, stop):
    """Validate, log and save what an epoch has made. Return the position of the next epoch.

    Without validation every epoch's checkpoint stays, or the last keep_checkpoints of them, with it
    the best one.
    """
    epoch, next_epoch, keep = position.epoch, position.following(), run.config["keep_checkpoints"]
    if validate is None:
        file = f"checkpoint_{epoch:02d}.pth"
    else:
        file = LAST
        # validation takes long, and must not cost the epoch if it is cut off
        path = run.save(file, position, lr)
        saved = f"saved {path} before the validation of epoch {epoch}; continue with --resume"
        stop.leave_together(saved, run.saver.finish)
        with interruptible(saved):
            metrics, name = validate()
        if not math.isfinite(metrics[name]):
            raise TrainingStopped(
                f"epoch {epoch}: the validation score {name} is {metrics[name]}, so the best epoch is unknown; "
                f"{path} holds this epoch"
            )
        write_log(run.output_dir, epoch, **metrics)
        # the best one may have been moved away; rank 0 decides, because scores may differ in
        # rounding
        better = (
            metrics[name] > position.best.get("score", float("-inf"))
            or not (run.output_dir / BEST).exists()
        )
        if gather_lists([better])[0]:
            next_epoch.best = {"score": metrics[name], "epoch": epoch}
            file = BEST
        if is_main():
            best = next_epoch.best
            print(
                f"epoch {epoch}: {name.replace('_', ' ', 1)} {metrics[name]:.4g}, best {best['score']:.4g} "
                f"(epoch {best['epoch']})",
                flush=True,
            )
    run.save(file, next_epoch, lr, keep=keep if validate is None else None)
    return next_epoch


def place(position, batches, config):
    """Place a saved position in the iterations of this run. Return it and the end of its epoch's,
    exclusive.

    The same as it was saved, unless the processes, batch size or accumulation have become others:
    then as many iterations count as done as the samples seen make now, and as many follow as those
    not seen make.
    """
    batches.begin(position.epoch, position.seen)
    iteration = position.seen // (config["batch_size"] * world_size() * config["accumulate"])
    return replace(position, iteration=iteration), iteration + len(batches) // config["accumulate"]


def announce(run, position, resume_from):
    """Print where the run begins, the global batch, the learning rate for it, and a note where the
    warm-up does not get there.

    Of a run that is complete it says that alone.
    """
    config, scheduler, iterations = run.config, run.scheduler, run.iterations
    if position.epoch >= scheduler["epochs"]:
        print(
            f"{resume_from}: the run is complete, it has {position.epoch} epochs and scheduler.epochs is "
            f"{scheduler['epochs']}; to train on, --set scheduler.epochs=N",
            flush=True,
        )
        return
    if config["precision"] == "bf16" and not has_bf16(run.device):
        print("note: this device has no bf16, training in fp32")
    elif (
        run.device.type == "cuda"
        and config["precision"] == "bf16"
        and not device_peak(run.device, config)
    ):
        print(
            f"note: no peak is known of {torch.cuda.get_device_name(run.device)}, so that no MFU is shown"
        )
    if resume_from:
        print(
            f"resuming from {resume_from}: epoch {position.epoch}, iteration {position.iteration}"
        )
    batch = config["batch_size"] * world_size() * config["accumulate"]
    reference, lr = config["reference_batch"], config["optimizer"]["lr"]
    rule = (
        f"as configured (reference_batch would scale {lr:.3g} by sqrt({batch} / reference_batch))"
    )
    if reference:
        rule = f"{lr:.3g} x sqrt({batch} / reference_batch {reference})"
    print(
        f"global batch {batch}: {world_size()} processes x batch_size {config['batch_size']} x accumulate "
        f"{config['accumulate']}; learning rate {scheduler['lr']:.3g}, {rule}",
        flush=True,
    )
    if scheduler["warmup_iters"] is None:
        key, warmup, where, available = (
            "warmup_epochs",
            scheduler["warmup_epochs"] * WARMUP_STEP,
            "epoch 0",
            iterations,
        )
    else:
        key, warmup, where, available = (
            "warmup_iters",
            scheduler["warmup_iters"],
            "the run",
            scheduler["epochs"] * iterations,
        )
    if warmup > available and scheduler["warmup_lr"] != scheduler["lr"]:
        print(
            f"note: scheduler.{key} {scheduler[key]} is a warm-up of {warmup} iterations, {where} has only "
            f"{available}: it ends below the learning rate; lower {key}",
            flush=True,
        )


def wrap(model, config, device):
    """Compile the layers of a model if the configuration says so.

    Return it, or its DistributedDataParallel.
    """
    if compiles(config, device):
        compile_layers(model)
    if not is_distributed():
        return model
    # of the newer name of broadcast_buffers, which torch 2.11 does not know
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def prepare(model, dataset, tokenizer, step, config, output_dir, device, seed, resume_from):
    """Accept what train is given.

    Return the Run, its batches and the Position that it begins at. Raises InputError.
    """
    for param in model.idle_parameters():
        param.requires_grad_(False)
    optimizer = create_optimizer(config["optimizer"], model)
    position = (
        resume(resume_from, model, optimizer, config, seed, len(dataset))
        if resume_from
        else Position()
    )
    batches = TrainBatches(dataset, tokenizer, config, device=device, seed=seed)
    accumulate = config["accumulate"]
    iterations = len(batches) // accumulate
    if not iterations:
        raise InputError(
            f"accumulate {accumulate}: an epoch has only {len(batches)} batches, lower it"
        )
    # one rate, also where a caller changed only this one
    schedule = {**as_config(config).scheduler.to_dict(), "lr": config["optimizer"]["lr"]}
    scheduler = scaled(
        schedule, config["batch_size"] * world_size() * accumulate, config["reference_batch"]
    )
    run = Run(
        model,
        wrap(model, config, device),
        optimizer,
        step,
        config,
        scheduler,
        device,
        seed,
        Path(output_dir),
        iterations,
        len(dataset),
        Saver(config["save_every"]),
    )
    return run, batches, position


def train(
    model,
    dataset,
    tokenizer,
    step,
    config,
    output_dir,
    device,
    seed,
    resume_from=None,
    validate=None,
):
    """Train for scheduler.epochs epochs. Write checkpoints, settings and logs into output_dir.

    step(model, batch, alpha, update_momentum) computes the losses of a batch; resume_from: from
    find_resume_file; validate() -> (metrics for log.txt, name of the one to maximize), the same on
    all processes, is called after every epoch. The checkpoints are checkpoint_last.pth and
    checkpoint_%02d.pth of every epoch, or with validate checkpoint_best.pth of the highest score.
    Other files are config.yaml, tokenizer.json, log.txt and TensorBoard's. Return {score, epoch} of
    the best epoch, or {epoch} of the last one. Nothing is written before all checks pass. Raises
    InputError if resume_from does not fit, Interrupted after saving on SIGTERM or Ctrl-C,
    TrainingStopped if too many losses are not finite or too much data is unusable.
    """
    use_device(config, device)
    run, batches, position = prepare(
        model, dataset, tokenizer, step, config, output_dir, device, seed, resume_from
    )
    position, end = place(position, batches, config)
    if is_main():
        announce(run, position, resume_from)
        run.output_dir.mkdir(parents=True, exist_ok=True)
        save_settings(model, config, run.output_dir)
    # what a stopped run had drawn beyond its checkpoint is drawn anew
    curves, flops = (
        Curves(
            run.output_dir / "tensorboard", position.epoch * run.iterations + position.iteration + 1
        ),
        None,
    )

    with StopSignal() as stop, contextlib.closing(curves), run.saver:
        settled = not is_distributed()
        while position.epoch < run.scheduler["epochs"]:
            model.train()
            with contextlib.closing(Recorder(run, position, end, curves, flops)) as recorder:
                rest = iter(batches)
                if not settled and position.iteration < end:
                    rest, settled = settle_buckets(run, rest), True
                lr = train_epoch(run, rest, position, recorder, stop)
                position, flops = recorder.position(), recorder.flops
            write_log(run.output_dir, position.epoch, train_lr=lr, **summary(position))
            position, end = place(finish_epoch(run, position, lr, validate, stop), batches, config)
        # all wait for the main process: a process that reads the best checkpoint next finds it
        # written
        run.saver.finish()
        stop.leave_together(
            "training was complete and is saved; --resume goes on to the evaluation",
            run.saver.finish,
        )
    if is_main():
        # of use only while the last one may be cut off
        (run.output_dir / PREVIOUS).unlink(missing_ok=True)
    return position.best or {"epoch": position.epoch - 1}
