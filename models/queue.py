"""Queues of the most recent momentum features of all processes (Section 3.2), which serve as
contrastive negatives.
"""

import torch
import torch.distributed as dist


def gather(rows):
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
    size, rows = queues[0].shape[1], gather(rows)
    count = len(rows[0])
    slots = ((ptr + torch.arange(count, device=ptr.device)) % size)[-size:]
    finite = torch.stack([new[-size:].isfinite().all(dim=1) for new in rows]).all(dim=0)
    for queue, new in zip(queues, rows):
        queue.index_copy_(
            1, slots, torch.where(finite, new[-size:].T.to(queue.dtype), queue[:, slots])
        )
    ptr.copy_((ptr + count) % size)
