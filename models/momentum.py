"""The momentum model (Section 3.3) and the queues of its features (Section 3.2).

Every module X with a sibling X_m has its exponential moving average there.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import is_distributed, world_size


def _pairs(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    children = dict(model.named_children())
    base, momentum = [], []
    for name, child in children.items():
        if name.endswith("_m"):
            base.extend(children[name[:-2]].parameters())
            momentum.extend(child.parameters())
    return base, momentum


@torch.no_grad()
def copy_to_momentum_(model: nn.Module) -> None:
    """Set the momentum model to the base model and freeze it."""
    for param, param_m in zip(*_pairs(model), strict=True):
        param_m.copy_(param)
        param_m.requires_grad_(False)


@torch.no_grad()
def update_momentum_(model: nn.Module, momentum: float) -> None:
    """Set theta_m to momentum * theta_m + (1 - momentum) * theta, for all parameters at once."""
    base, momentum_params = _pairs(model)
    torch._foreach_lerp_(momentum_params, base, 1 - momentum)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Gather rows [n, w] of all ranks -> [world size * n, w], rank by rank, without a gradient."""
    if not is_distributed():
        return rows
    gathered = rows.new_empty(world_size() * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


@torch.no_grad()
def enqueue_(queues: Sequence[Tensor], rows: Sequence[Tensor], ptr: Tensor) -> None:
    """Write the rows of all ranks over the oldest entries of the queues.

    Any n works: of more than Q rows the last Q stay. If a row of any queue is not finite, all
    queues keep their old entry.

    Args:
        queues: Queues [D, Q].
        rows: For each queue the rows [n, D] of this rank.
        ptr: Position of the oldest entry, int64 [1], moved in place.
    """
    size, rows = queues[0].shape[1], [all_gather_rows(new) for new in rows]
    count = len(rows[0])
    slots = ((ptr + torch.arange(count, device=ptr.device)) % size)[-size:]
    finite = torch.stack([new[-size:].isfinite().all(dim=1) for new in rows]).all(dim=0)
    for queue, new in zip(queues, rows, strict=True):
        entries = torch.where(finite, new[-size:].T.to(queue.dtype), queue[:, slots])
        queue.index_copy_(1, slots, entries)
    ptr.copy_((ptr + count) % size)
