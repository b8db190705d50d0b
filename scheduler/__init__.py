"""Learning-rate and distillation-weight schedules as pure functions of (epoch, iteration)."""

import math

WARMUP_STEP = 100  # iterations between two learning rates of the released warm-up


def scaled(scheduler, batch, reference_batch):
    """Return the schedule for another global batch: rates times sqrt(batch / reference_batch), as
    Adam's noise grows and falls.

    batch: samples of an optimizer step; reference_batch: those that the rates were chosen for,
    None: they hold as they are.
    """
    factor = math.sqrt(batch / reference_batch) if reference_batch else 1
    return {**scheduler, **{key: scheduler[key] * factor for key in ("lr", "min_lr", "warmup_lr")}}


def _cosine(scheduler, progress):
    lr, min_lr = scheduler["lr"], scheduler["min_lr"]
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def learning_rate(scheduler, epoch, iteration, iterations):
    """Return the learning rate of an iteration (an optimizer step) of an epoch that has
    `iterations` of them.

    The released schedule: in epoch 0 a warm-up from warmup_lr to lr in `warmup_epochs` steps of 100
    iterations, then a rate that is constant within an epoch and follows the cosine from epoch to
    epoch. With warmup_iters the smooth one: linear warm-up over that many iterations, then the
    cosine from iteration to iteration down to min_lr.
    """
    lr, warmup_lr = scheduler["lr"], scheduler["warmup_lr"]
    if scheduler["warmup_iters"] is not None:
        done, warmup, total = (
            epoch * iterations + iteration,
            scheduler["warmup_iters"],
            scheduler["epochs"] * iterations,
        )
        if done < warmup:
            return warmup_lr + (lr - warmup_lr) * done / warmup
        return _cosine(scheduler, (done - warmup) / max(1, total - warmup))
    if epoch > 0:
        return _cosine(scheduler, epoch / scheduler["epochs"])
    steps = scheduler["warmup_epochs"]
    # the released loop steps its schedule after iterations 0, 100, 200, ..., so a new rate holds
    # from the next one on
    step = max(0, iteration - 1) // WARMUP_STEP
    return lr if step >= steps else warmup_lr + (lr - warmup_lr) * step / steps


def distillation_weight(config, epoch, iteration, iterations):
    """alpha, ramped linearly from 0 within the first epoch if warm_up is on (Section 3.5)."""
    if config["warm_up"] and epoch == 0:
        return config["alpha"] * min(1.0, iteration / iterations)
    return config["alpha"]
