"""Optimizers of torch.optim and timm."""

from typing import Any

import msgspec
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn

from configs.config import OptimizerConfig
from utils import InputError


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer.

    Biases and one-dimensional parameters have no weight decay, all others have it. Parameters whose
    learning rate is scaled have groups of their own: temp, because Adam moves it by about the
    learning rate in every step, and at rates far above the paper's 1e-4 it collapses before the
    features are learned; and parameters that are not in `model.pretrained`.

    Args:
        model: The model. Parameters without gradients are left out.
        config: The keys weight_decay, temp_lr_scale and new_lr_scale.
    """
    pretrained = set(getattr(model, "pretrained", ()))
    # by weight decay and factor of the learning rate, the released groups first
    groups: dict[tuple[float, float], list[Tensor]] = {
        (0.0, 1.0): [],
        (config.weight_decay, 1.0): [],
    }
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        is_plain = param.ndim == 1 or name.endswith(".bias")
        scale = 1.0 if name in pretrained else config.new_lr_scale
        if name == "temp":
            scale = config.temp_lr_scale
        decay = 0.0 if is_plain else config.weight_decay
        groups.setdefault((decay, scale), []).append(param)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), params in groups.items()
        if params
    ]


def create_optimizer(
    config: OptimizerConfig | dict[str, Any], model: nn.Module
) -> torch.optim.Optimizer:
    """Return the optimizer of the key `optimizer`: fused AdamW, others from timm's factory.

    Args:
        config: The keys of `optimizer`. Without opt_eps and opt_betas the optimizer's defaults
            hold.
        model: The model.

    Raises:
        InputError: There is no optimizer of that name, or it has no option that is set.
    """
    if not isinstance(config, OptimizerConfig):
        config = msgspec.convert(config, OptimizerConfig)
    groups = parameter_groups(model, config)
    options: dict[str, Any] = {"eps": config.opt_eps, "betas": config.opt_betas}
    options = {name: value for name, value in options.items() if value is not None}
    name = config.opt.lower()
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True, **options)
    if name not in list_optimizers():
        raise InputError(
            f"optimizer: opt {config.opt!r} is unknown; name adamW or an optimizer of timm"
        )
    optimizer = create_optimizer_v2(
        groups, opt=name, lr=config.lr, weight_decay=config.weight_decay, **options
    )
    for option in options.keys() - optimizer.defaults.keys():
        raise InputError(
            f"optimizer: {config.opt} has no option {option}; remove the key opt_{option}"
        )
    return optimizer


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Take an optimizer step unless the norm of all gradients is not finite.

    Fused AdamW takes the decision on the device, so that the host does not wait.
    """
    if optimizer.defaults.get("fused"):
        # as in gradient scaling: the kernel skips the step
        optimizer.found_inf = (~norm.isfinite()).float()  # ty: ignore[missing-attribute]
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
