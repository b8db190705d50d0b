"""The training loop: `train` calls `train_one_epoch`, which calls `train_step`."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from configs.config import Config, as_config
from dataset.loading import TrainBatches, to_device
from engine.checkpointing import BEST, LAST, Best, Checkpointer, Progress
from engine.distributed import StopSignal, settle_buckets, wrap_ddp
from engine.launch import interruptible
from engine.metric_logger import MetricLogger, summarize, write_log
from engine.precision import autocast, compile_layers, compiles, has_bf16, use_device
from engine.signs import warn_of_training
from models.albef import ALBEF
from optim import create_optimizer, step_if_finite
from scheduler import WARMUP_STEP, Schedule, create_schedule, distillation_weight, learning_rate
from utils import (
    InputError,
    TrainingStopped,
    gather_lists,
    is_distributed,
    rank,
    seed_everything,
    world_size,
)

Validate = Callable[[], tuple[dict[str, float], str]]

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainState(Progress):
    """Everything that a training step reads and changes, and the progress of the run.

    Attributes:
        model: The model.
        ddp_model: Its DistributedDataParallel, or the model if this process is alone.
        optimizer: The optimizer.
        schedule: Learning rates for the global batch.
        config: The configuration.
        device: Device of the model.
        seed: The flag --seed.
        iterations: Optimizer steps of a whole epoch.
        global_batch: Samples of an optimizer step, over all ranks.
        buckets_settled: Whether the buckets of DistributedDataParallel are final.
        warned: Metrics that `warn_of_training` has named.
    """

    model: ALBEF
    ddp_model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    config: Config
    device: torch.device
    seed: int
    iterations: int
    global_batch: int
    buckets_settled: bool = False
    warned: set[str] = field(default_factory=set)


class StepOutput(NamedTuple):
    """Result of an optimizer step.

    Attributes:
        losses: Losses and extra metrics of the model by name, scalars on the device.
        grad_norm: Norm of all gradients. The step is skipped if it is not finite.
        files: Image files of this rank's samples.
        skipped: Reasons why entries of the data set were unusable.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    files: list[str]
    skipped: list[str]


def create_train_state(
    model: ALBEF,
    data: TrainBatches,
    config: Config | dict[str, Any],
    *,
    device: torch.device,
    seed: int,
) -> TrainState:
    """Return the state of a new run: optimizer, schedule, compiled layers, data parallelism.

    Args:
        model: The model, on `device`.
        data: The batches of the training set.
        config: The configuration.
        device: Device of the model.
        seed: Random seed.

    Raises:
        InputError: An epoch has fewer batches than an optimizer step takes.
    """
    config = as_config(config)
    iterations = len(data) // config.accumulate
    if not iterations:
        raise InputError(
            f"accumulate {config.accumulate}: an epoch has only {len(data)} batches; lower"
            " accumulate"
        )
    use_device(config, device)
    for param in model.idle_parameters():
        param.requires_grad_(False)
    if compiles(config, device):
        compile_layers(model)
    global_batch = config.train_batch_size * world_size() * config.accumulate
    return TrainState(
        model=model,
        ddp_model=wrap_ddp(model),
        optimizer=create_optimizer(config.optimizer, model),
        schedule=create_schedule(config, global_batch),
        config=config,
        device=device,
        seed=seed,
        iterations=iterations,
        global_batch=global_batch,
    )


def train(
    state: TrainState,
    data: TrainBatches,
    checkpointer: Checkpointer,
    logger: MetricLogger,
    *,
    validate: Validate | None = None,
) -> Best | None:
    """Train until scheduler.epochs epochs are complete or `patience` is used up, and save.

    After every epoch checkpoint_last.pth and checkpoint_%02d.pth are written. With `validate`,
    checkpoint_best.pth replaces checkpoint_%02d.pth and holds the epoch of the highest score.

    Args:
        state: The run, new or resumed.
        data: The batches of the training set.
        checkpointer: An entered context that saves.
        logger: An entered context that logs.
        validate: Called after every epoch on all ranks; returns metrics for log.txt, and the name
            of the metric to maximize.

    Returns:
        The best epoch, None without `validate`.

    Raises:
        InputError: The data does not fit the run.
        Interrupted: A signal ended the run; its state is saved.
        TrainingStopped: Too many steps are not finite, or too much data is unusable.
    """
    log_start(state)
    with StopSignal() as stop:
        while state.epoch < state.config.scheduler.epochs and not has_stalled(state):
            lr = train_one_epoch(state, data, checkpointer, logger, stop)
            end_epoch(state, checkpointer, lr, stop, validate)
        # all wait for rank 0: a rank that reads the best checkpoint next finds it written
        checkpointer.finish()
        stop.leave_together(
            "training was complete and is saved; --resume continues with the evaluation",
            checkpointer.finish,
        )
    return state.best


def has_stalled(state: TrainState) -> bool:
    """Return whether the last `patience` epochs brought no better validation score; log it."""
    patience = state.config.patience
    if not (patience and state.best) or state.iteration:
        return False
    best, waited = state.best.epoch, state.epoch - 1 - state.best.epoch
    if waited < patience:
        return False
    log.info(
        "training stops (patience): %d epochs without a better score, the best epoch is %d",
        waited,
        best,
    )
    return True


def train_one_epoch(
    state: TrainState,
    data: TrainBatches,
    checkpointer: Checkpointer,
    logger: MetricLogger,
    stop: StopSignal,
) -> float:
    """Train to the end of the epoch and log it.

    Returns:
        The last learning rate.

    Raises:
        Interrupted: A signal ended the run; its state is saved.
    """
    state.model.train()
    end = locate_in_epoch(state, data)
    logger.begin_epoch(state, end)
    batches = iter(data)
    if is_distributed() and not state.buckets_settled and state.iteration < end:
        batches, state.buckets_settled = settle_buckets(state, batches), True
    # the rate of a resumed epoch without remaining iterations
    lr = learning_rate(state.schedule, state.epoch, state.iterations - 1, state.iterations)
    while state.iteration < end:
        lr = learning_rate(state.schedule, state.epoch, state.iteration, state.iterations)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        alpha = distillation_weight(state.config, state.epoch, state.iteration, state.iterations)
        with logger.count_flops():
            output = train_step(state, batches, alpha)
        logger.add(state, output, lr)
        state.iteration += 1
        state.samples_seen += state.global_batch
        if state.iteration < end:
            save_if_due(state, checkpointer, logger, stop, lr)
    logger.end_epoch(state)
    warn_of_training(state)
    write_log(logger.output_dir, state.epoch, train_lr=lr, **summarize(state))
    return lr


def train_step(state: TrainState, batches: Iterator[Any], alpha: float) -> StepOutput:
    """Take one optimizer step over `accumulate` micro-batches.

    The sum of the model's losses is minimized. Everything random is seeded by (seed, epoch,
    iteration, micro-batch, rank). If the gradients are not finite, weights and optimizer stay as
    they are.

    Args:
        state: The run.
        batches: Micro-batches of this rank, on the host.
        alpha: Weight of the momentum model's pseudo-targets (Equations 6 and 7).
    """
    config, totals, files, skipped = state.config, {}, [], []
    for micro in range(config.accumulate):
        batch = next(batches)
        seed_everything(state.seed, state.epoch, state.iteration, micro, rank())
        batch = to_device(state.model.prepare(batch), state.device)
        # gradients are averaged over the ranks once a step
        last = micro == config.accumulate - 1
        local = (
            contextlib.nullcontext() if last or not is_distributed() else state.ddp_model.no_sync()
        )
        with local:
            with autocast(config, state.device):
                losses = state.ddp_model(batch, alpha=alpha, update_momentum=micro == 0)
            (sum(losses.values()) / config.accumulate).backward()
        for name, value in {**losses, **state.model.extra_metrics()}.items():
            totals[name] = totals.get(name, 0) + value.detach() / config.accumulate
        files += batch.files
        skipped += batch.skipped
    params = list(state.model.parameters())
    norm = nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
    if config.clip_grad:
        nn.utils.clip_grads_with_norm_(params, config.clip_grad, norm)
    step_if_finite(state.optimizer, norm)
    state.optimizer.zero_grad(set_to_none=True)
    return StepOutput(totals, norm, files, skipped)


def locate_in_epoch(state: TrainState, data: TrainBatches) -> int:
    """Skip the samples that the epoch has seen.

    If the number of ranks, the batch size or the accumulation has changed since the run was saved,
    iterations are recomputed from the samples.

    Returns:
        The end of the epoch's iterations, exclusive.
    """
    data.begin(state.epoch, state.samples_seen)
    state.iteration = state.samples_seen // state.global_batch
    return state.iteration + len(data) // state.config.accumulate


def save_if_due(
    state: TrainState,
    checkpointer: Checkpointer,
    logger: MetricLogger,
    stop: StopSignal,
    lr: float,
) -> None:
    """Save within an epoch if it is time, and end the run if a rank has received a signal."""
    signum, late, failed = stop.agree(checkpointer.is_late(), checkpointer.has_failed())
    if failed:
        checkpointer.finish()
    if not (signum or late or checkpointer.is_due(state.iteration - 1)):
        return
    logger.flush(state)
    path = checkpointer.save(state, LAST, lr, optional=not signum)
    if signum:
        stop.leave_together(
            f"saved {path} in epoch {state.epoch} after iteration {state.iteration - 1}; continue"
            " with --resume",
            checkpointer.finish,
        )


def end_epoch(
    state: TrainState,
    checkpointer: Checkpointer,
    lr: float,
    stop: StopSignal,
    validate: Validate | None,
) -> None:
    """Validate and save a finished epoch, and set the state to the next one."""
    if validate is None:
        name, keep = f"checkpoint_{state.epoch:02d}.pth", state.config.keep_checkpoints
    else:
        # validation takes long, and must not cost the epoch if it is killed
        path = checkpointer.save(state, LAST, lr)
        saved = f"saved {path} before the validation of epoch {state.epoch}; continue with --resume"
        stop.leave_together(saved, checkpointer.finish)
        with interruptible(saved):
            is_best = validate_epoch(state, checkpointer, validate)
        name, keep = BEST if is_best else LAST, None
    state.begin_next_epoch()
    checkpointer.save(state, name, lr, keep=keep)


def validate_epoch(state: TrainState, checkpointer: Checkpointer, validate: Validate) -> bool:
    """Validate, log, and update `state.best`. Return whether the epoch is the best so far.

    Raises:
        TrainingStopped: The score is not finite.
    """
    metrics, name = validate()
    score, folder = metrics[name], checkpointer.output_dir
    if not math.isfinite(score):
        raise TrainingStopped(
            f"epoch {state.epoch}: the validation score {name} is {score}, so the best epoch is"
            f" unknown; {folder / LAST} has the weights of this epoch"
        )
    write_log(folder, state.epoch, **metrics)
    # the best one may have been moved away; rank 0 decides, because scores may differ in rounding
    better = state.best is None or score > state.best.score or not (folder / BEST).exists()
    if gather_lists([better])[0] or state.best is None:
        state.best = Best(score, state.epoch)
    log.info(
        "epoch %d: %s %.4g, best %.4g (epoch %d)",
        state.epoch,
        name.replace("_", " ", 1),
        score,
        state.best.score,
        state.best.epoch,
    )
    return state.best.epoch == state.epoch


def log_start(state: TrainState) -> None:
    """Log the global batch and the learning rate, and a warm-up that does not fit the run."""
    config, schedule = state.config, state.schedule
    if state.epoch >= schedule.epochs:
        log.info(
            "the run is complete: it has trained %d epochs, and scheduler.epochs is %d; to"
            " continue, add --set scheduler.epochs=N",
            state.epoch,
            schedule.epochs,
        )
        return
    if config.precision == "bf16" and not has_bf16(state.device):
        log.warning("this device does not support bf16, so training uses fp32")
    lr, reference = config.optimizer.lr, config.reference_batch
    rule = "as configured"
    if reference:
        rule = f"{lr:.3g} x sqrt({state.global_batch} / reference_batch {reference})"
    log.info(
        "global batch %d: world size %d x batch_size %d x accumulate %d; learning rate %.3g, %s",
        state.global_batch,
        world_size(),
        config.batch_size,
        config.accumulate,
        schedule.lr,
        rule,
    )
    warmup, available = schedule.warmup_epochs * WARMUP_STEP, state.iterations
    if schedule.warmup_iters is not None:
        warmup, available = schedule.warmup_iters, schedule.epochs * state.iterations
    if warmup > available and schedule.warmup_lr != schedule.lr:
        log.warning(
            "scheduler: the warm-up takes %d iterations, but only %d are available, so the"
            " learning rate does not reach its full value; lower warmup_iters or warmup_epochs",
            warmup,
            available,
        )
