"""Learning-rate and distillation-weight schedules as pure functions of (epoch, iteration)."""

import math
from typing import Any

import msgspec

from configs.config import Config, SchedulerConfig, as_config

WARMUP_STEP = 100  # iterations between two learning rates of the released warm-up


class Schedule(SchedulerConfig, kw_only=True, frozen=True):
    """The keys of `scheduler` and the learning rate, for a global batch."""

    lr: float


def create_schedule(config: Config, global_batch: int) -> Schedule:
    """Return the schedule of a run.

    If the key reference_batch is set, all rates are multiplied by
    sqrt(global_batch / reference_batch), because the noise of Adam's steps depends on the batch
    size.

    Args:
        config: The configuration.
        global_batch: Samples of an optimizer step, over all ranks.
    """
    reference = config.reference_batch
    factor = math.sqrt(global_batch / reference) if reference else 1
    keys: dict[str, Any] = msgspec.structs.asdict(config.scheduler)
    keys |= {
        "lr": config.optimizer.lr * factor,
        "min_lr": config.scheduler.min_lr * factor,
        "warmup_lr": config.scheduler.warmup_lr * factor,
    }
    return Schedule(**keys)


def _cosine(schedule: Schedule, progress: float) -> float:
    half = 0.5 * (schedule.lr - schedule.min_lr)
    return schedule.min_lr + half * (1 + math.cos(math.pi * progress))


def learning_rate(
    scheduler: Schedule | dict[str, Any], epoch: int, iteration: int, iterations: int
) -> float:
    """Return the learning rate of an iteration.

    The released schedule: in epoch 0 a warm-up from warmup_lr to lr in `warmup_epochs` steps of 100
    iterations. Then the rate is constant within an epoch and follows the cosine from epoch to
    epoch. If warmup_iters is set, the warm-up is linear over that many iterations, and the cosine
    goes from iteration to iteration down to min_lr.

    Args:
        scheduler: The schedule, or a dict of its keys.
        epoch: The epoch, from 0.
        iteration: Optimizer step of the epoch, from 0.
        iterations: Optimizer steps of a whole epoch.
    """
    schedule = scheduler
    if not isinstance(schedule, Schedule):
        schedule = msgspec.convert(scheduler, Schedule)
    lr, warmup_lr = schedule.lr, schedule.warmup_lr
    if schedule.warmup_iters is not None:
        done = epoch * iterations + iteration
        warmup, total = schedule.warmup_iters, schedule.epochs * iterations
        if done < warmup:
            return warmup_lr + (lr - warmup_lr) * done / warmup
        return _cosine(schedule, (done - warmup) / max(1, total - warmup))
    if epoch > 0:
        return _cosine(schedule, epoch / schedule.epochs)
    # the released loop steps its schedule after iterations 0, 100, 200, ..., so a new rate applies
    # from the next iteration on
    step = max(0, iteration - 1) // WARMUP_STEP
    if step >= schedule.warmup_epochs:
        return lr
    return warmup_lr + (lr - warmup_lr) * step / schedule.warmup_epochs


def distillation_weight(
    config: Config | dict[str, Any], epoch: int, iteration: int, iterations: int
) -> float:
    """Return alpha, ramped linearly from 0 within the first epoch if warm_up is set (Section 3.5).

    Args:
        config: The configuration.
        epoch: The epoch, from 0.
        iteration: Optimizer step of the epoch, from 0.
        iterations: Optimizer steps of a whole epoch.
    """
    config = as_config(config)
    if config.warm_up and epoch == 0:
        return config.alpha * min(1.0, iteration / iterations)
    return config.alpha
