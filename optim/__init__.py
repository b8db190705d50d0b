"""Optimizers over torch.optim and timm."""

import torch
from timm.optim import create_optimizer_v2, list_optimizers

from utils import InputError


def parameter_groups(model, weight_decay, temp_lr_scale=1.0):
    """Return two groups: biases and one-dimensional parameters without weight decay, then all
    others with it.

    temp gets a third group if its learning rate is scaled: Adam moves it by about the learning rate
    in every step, which at rates far above the paper's 1e-4 makes it collapse before the features
    have learned anything.
    """
    plain, decayed, temp = [], [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if name == "temp" and temp_lr_scale != 1:
            temp.append(param)
        else:
            (plain if param.ndim == 1 or name.endswith(".bias") else decayed).append(param)
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    if temp:
        groups.append({"params": temp, "weight_decay": weight_decay, "lr_scale": temp_lr_scale})
    return groups


def create_optimizer(config, model):
    """Return the optimizer of the key `optimizer`: fused AdamW, others from timm's factory.

    config: {opt, lr, weight_decay, temp_lr_scale}; opt_eps and opt_betas default to the
    optimizer's. Raises InputError.
    """
    groups = parameter_groups(model, config["weight_decay"], config["temp_lr_scale"])
    name = config["opt"].lower()
    options = {
        key: config[f"opt_{key}"]
        for key in ("eps", "betas")
        if config.get(f"opt_{key}") is not None
    }
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=config["lr"], fused=True, **options)
    if name not in list_optimizers():
        raise InputError(
            f"optimizer: opt is {config['opt']!r}, neither adamW nor a name that timm knows"
        )
    optimizer = create_optimizer_v2(
        groups, opt=name, lr=config["lr"], weight_decay=config["weight_decay"], **options
    )
    for key in options.keys() - optimizer.defaults.keys():
        raise InputError(f"optimizer: {config['opt']} has no {key}, remove opt_{key}")
    return optimizer


def step_if_finite(optimizer, norm):
    """optimizer.step(), or nothing at all if norm, of all gradients, is not finite; fused AdamW is
    not waited for.
    """
    if optimizer.defaults.get("fused"):
        # as in gradient scaling: the kernel skips the step
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
