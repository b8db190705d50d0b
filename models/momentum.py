"""The momentum model (Section 3.3): an exponential moving average of every module X that has a
sibling X_m.
"""

import torch
import torch.distributed as dist


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


def all_gather_rows(rows):
    """rows: tensors [n, w] of this process -> each [world * n, w] in the order of the ranks, in one
    message for each dtype.

    No gradient flows through.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    gathered = {}
    for dtype in dict.fromkeys(new.dtype for new in rows):
        names = [i for i, new in enumerate(rows) if new.dtype == dtype]
        own = torch.cat([rows[i] for i in names], dim=1)
        everyone = own.new_empty(dist.get_world_size() * len(own), own.shape[1])
        dist.all_gather_into_tensor(everyone, own)
        gathered |= zip(names, everyone.split([rows[i].shape[1] for i in names], dim=1))
    return [gathered[i] for i in range(len(rows))]


@torch.no_grad()
def enqueue_(queues, rows, ptr):
    """Write the rows of all processes at the pointer, oldest entries first, around the end if need
    be.

    queues: tensors [D, Q]; rows: for each queue this process's [n, D]; ptr: int64 [1], moved in
    place. Any n works: of more than Q rows the last Q stay. Where a row of any queue is not finite
    all keep their old entry: such a step is left out, and must not stay in the queues.
    """
    size, rows = queues[0].shape[1], all_gather_rows(rows)
    count = len(rows[0])
    slots = ((ptr + torch.arange(count, device=ptr.device)) % size)[-size:]
    finite = torch.stack([new[-size:].isfinite().all(dim=1) for new in rows]).all(dim=0)
    for queue, new in zip(queues, rows):
        queue.index_copy_(
            1, slots, torch.where(finite, new[-size:].T.to(queue.dtype), queue[:, slots])
        )
    ptr.copy_((ptr + count) % size)
