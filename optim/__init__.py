"""Optimizers over torch.optim and timm."""

import torch
from timm.optim import create_optimizer_v2, list_optimizers

from utils import InputError


def parameter_groups(model, weight_decay):
    """Two groups: biases and one-dimensional parameters without weight decay, then all others with it."""
    plain, decayed = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (plain if param.ndim == 1 or name.endswith(".bias") else decayed).append(param)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def create_optimizer(config, model):
    """The optimizer of the key `optimizer` {opt, lr, weight_decay}: fused AdamW, any other name from timm's factory."""
    groups = parameter_groups(model, config["weight_decay"])
    name = config["opt"].lower()
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=config["lr"], fused=True)
    if name not in list_optimizers():
        raise InputError(f"optimizer: opt is {config['opt']!r}, neither adamW nor a name that timm knows")
    return create_optimizer_v2(groups, opt=name, lr=config["lr"], weight_decay=config["weight_decay"])
