"""Several processes: join the launcher's group, compare and wrap, stop together."""

import datetime
import itertools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.config import FILE_KEYS, Config
from dataset.loading import to_device
from engine.launch import Interrupted, end_at_once
from engine.precision import autocast, find_device
from engine.rendezvous import Rendezvous, slurm_to_environment
from utils import (
    SIGNALS,
    InputError,
    environment_number,
    gather_lists,
    hash_contents,
    is_distributed,
    is_main,
)

if TYPE_CHECKING:
    from engine.trainer import TrainState

# nodes may have different paths and numbers of cores
KEYS_OF_A_NODE = {*FILE_KEYS, "num_workers"}

logger = logging.getLogger(__name__)


def init_process_group(device: str | None, timeout: float) -> torch.device:
    """Join the process group of the launcher, if there is one.

    The backends are gloo on the CPU and NCCL on GPUs.

    Args:
        device: Name of the device, None for a GPU if there is one.
        timeout: Seconds after which a process gives up waiting for the others.

    Returns:
        The device of this process.

    Raises:
        InputError: The device is missing, or other processes do not join in time.
    """
    found = find_device(device)
    slurm_to_environment()
    world_size = environment_number("WORLD_SIZE", 1)
    if world_size == 1:
        return found
    if found.type == "cuda":
        found = _gpu_of_rank()
    rendezvous = Rendezvous(world_size, timeout)
    options: dict[str, Any] = {"backend": "gloo"}
    if found.type == "cuda":
        # with device_id NCCL connects here, so that its errors appear here
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": found}
    dist.init_process_group(
        **options,
        store=rendezvous.meet(),
        rank=rendezvous.rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    return found


def _gpu_of_rank() -> torch.device:
    """Return the GPU of this process by its local rank. Raises InputError."""
    count = torch.cuda.device_count()
    number = environment_number("LOCAL_RANK", environment_number("SLURM_LOCALID", 0))
    if count == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        number = 0  # srun may show each task only its own GPU; torchrun shows all
    if number >= count:
        raise InputError(
            f"local rank {number} has no GPU, because torch finds only {count} on this machine;"
            f" start one process per GPU (torchrun --nproc_per_node={count}), or use --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def check_agreement(
    config: Config, seed: int, tokenizer: Any, data_sets: Mapping[str, Any]
) -> None:
    """Compare configuration, seed, tokenizer, torch and data of all ranks.

    Every rank must call it.

    Args:
        config: The complete configuration. Paths may differ.
        seed: The flag --seed.
        tokenizer: The tokenizer of the texts.
        data_sets: The data sets by split.

    Raises:
        InputError: On all ranks, if anything differs on any rank.
    """
    if not is_distributed():
        return
    keys = config.to_dict()
    facts = {f"the key {key}": keys[key] for key in keys if key not in KEYS_OF_A_NODE}
    facts["--seed"] = seed
    for split, data in data_sets.items():
        facts[f"{split}_file"] = f"{len(data)} samples ({data.digest()})"
    facts["the tokenizer"] = hash_contents([tokenizer.backend_tokenizer.to_str().encode()])
    facts["torch"] = torch.__version__
    first, *others = gather_lists([facts])
    for number, other in enumerate(others, 1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise InputError(
                    f"{name} is {first.get(name)} on rank 0 and {other.get(name)} on rank {number};"
                    " give all ranks the same files and flags"
                )


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap the model in DistributedDataParallel unless this process is alone."""
    if not is_distributed():
        return model
    # newer torch warns that broadcast_buffers is renamed, and torch 2.11 lacks the new name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def settle_buckets(state: "TrainState", batches: Iterator[Any]) -> Iterator[Any]:
    """Run a backward pass without a step, so that DistributedDataParallel orders its buckets.

    It orders them after the first backward pass, and with three or more ranks their order decides
    how sums are rounded. Without this pass the first step of a resumed run would have the initial
    order, unlike the same step of an uninterrupted run. The pass changes no weights, gradients or
    buffers.

    Returns:
        The batches, unchanged.
    """
    batch = next(batches)
    buffers = [buffer.clone() for buffer in state.model.buffers()]
    with autocast(state.config, state.device):
        inputs = to_device(state.model.prepare(batch), state.device)
        losses = state.ddp_model(inputs, alpha=0.0, update_momentum=False)
    sum(losses.values()).backward()
    state.optimizer.zero_grad(set_to_none=True)
    for buffer, value in zip(state.model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    return itertools.chain([batch], batches)


class StopSignal:
    """Context that records signals, so that all ranks save and exit together.

    A second signal ends the process at once. Every rank must call `agree` after each iteration, and
    `leave_together` at the same places.
    """

    def __enter__(self) -> "StopSignal":
        self.signum, self._received, self._pending = 0, 0.0, None
        self._before = {signum: signal.signal(signum, self._record) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, _: FrameType | None) -> None:
        # Slurm signals a preempted job twice, torchrun forwards a signal that its workers may have
        # received, and timeout(1) signals its command and then its group
        if self.signum and time.monotonic() - self._received >= 1:
            end_at_once(signum, None)
        self.signum, self._received = signum, time.monotonic()

    def agree(self, *numbers: int) -> list[int]:
        """Return the maximum over all ranks of the received signal (0: none) and of each number.

        The result is the same on all ranks. It is a reduction on the CPU that runs during the next
        iteration, so that no process waits for it: the result of iteration i is read after
        iteration i + 1.
        """
        if not is_distributed():
            return [self.signum, *map(int, numbers)]
        answer = [0] * (1 + len(numbers))
        if self._pending is not None:
            maxima, work = self._pending
            work.wait()
            answer = maxima.tolist()
        maxima = torch.tensor([self.signum, *map(int, numbers)])
        self._pending = maxima, dist.all_reduce(maxima, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def leave_together(self, message: str, finish: Any) -> None:
        """Raise Interrupted on all ranks if one of them has received a signal.

        Args:
            message: Printed by rank 0 before any rank leaves, because the launcher ends all
                processes once one has exited.
            finish: Function that waits for the checkpoint.
        """
        if signum := max(gather_lists([self.signum])):
            finish()
            if is_main():
                print(f"{signal.Signals(signum).name}: {message}", file=sys.stderr, flush=True)
            gather_lists([])
            raise Interrupted(signum)
