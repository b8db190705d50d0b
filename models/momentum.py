"""The momentum model (Section 3.3): an exponential moving average of every module X that has a
sibling X_m.
"""

import torch


def _pairs(model):
    children = dict(model.named_children())
    base, momentum = [], []
    for name, child in children.items():
        if name.endswith("_m"):
            base.extend(children[name[:-2]].parameters())
            momentum.extend(child.parameters())
    return base, momentum


@torch.no_grad()
def copy_to_momentum_(model):
    """Start the momentum model as a copy of the base model and take it out of the optimizer's
    reach.
    """
    for param, param_m in zip(*_pairs(model)):
        param_m.copy_(param)
        param_m.requires_grad_(False)


@torch.no_grad()
def update_momentum_(model, momentum):
    """theta_m <- momentum * theta_m + (1 - momentum) * theta, in place for all parameters at once."""
    base, momentum_params = _pairs(model)
    torch._foreach_lerp_(momentum_params, base, 1 - momentum)
