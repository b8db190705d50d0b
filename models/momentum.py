"""The momentum model (Section 3.3) and the queues of its features (Section 3.2).

Every module X with a sibling X_m has its exponential moving average there.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def _pairs(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
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


def all_gather_rows(rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gather the rows of all ranks in one message for each dtype, without a gradient.

    Args:
        rows: Tensors [n, w] of this rank.

    Returns:
        Tensors [world size * n, w] in the order of the ranks.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(new.dtype for new in rows):
        numbers = [i for i, new in enumerate(rows) if new.dtype == dtype]
        of_rank = torch.cat([rows[i] for i in numbers], dim=1)
        of_all = of_rank.new_empty(dist.get_world_size() * len(of_rank), of_rank.shape[1])
        dist.all_gather_into_tensor(of_all, of_rank)
        widths = [rows[i].shape[1] for i in numbers]
        gathered |= zip(numbers, of_all.split(widths, dim=1), strict=True)
    return [gathered[i] for i in range(len(rows))]


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
    size, rows = queues[0].shape[1], all_gather_rows(rows)
    count = len(rows[0])
    slots = ((ptr + torch.arange(count, device=ptr.device)) % size)[-size:]
    finite = torch.stack([new[-size:].isfinite().all(dim=1) for new in rows]).all(dim=0)
    for queue, new in zip(queues, rows, strict=True):
        entries = torch.where(finite, new[-size:].T.to(queue.dtype), queue[:, slots])
        queue.index_copy_(1, slots, entries)
    ptr.copy_((ptr + count) % size)
