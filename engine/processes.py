"""Joining the process group that torchrun or Slurm has started, if one has, and leaving it together."""

import datetime
import os
import re
import signal
import time
import uuid

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils import (SIGNALS, TIMEOUT, InputError, Interrupted, explain_nccl, gather_lists, interruptible, is_distributed,
                   local_rank)  # fmt: skip

NCCL_SHARE = 3  # an operation of the GPUs waits a third as long as one of the hosts: no files are read between two of them


def find_device(name):
    """Return the torch.device of a name, None for a GPU where there is one. Raises InputError."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch finds no GPU here, use --device cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise InputError(f"--device {name}: this code does not run there, use cuda or cpu")
    return device


def init_process_group(device, timeout=TIMEOUT):
    """Join the process group of the launcher, if there is one. Return this process's device. Raises InputError.

    device: None for a GPU where there is one. timeout: seconds after which a process that waits for the others gives up.
    """
    device = find_device(device)
    _slurm_to_environment()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.type == "cuda":
        device = _own_gpu(device, several)
    if several:
        try:
            _join(device, timeout)
        except InputError:
            raise
        except (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError, ValueError) as error:
            if said := explain_nccl(str(error)):
                raise InputError(said) from None
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise InputError(f"--timeout {timeout:g}: the processes of the run do not find each other by {address}: start as "
                             f"many as WORLD_SIZE says, or see to the network ({str(error).splitlines()[0]})") from None
    return device


def _own_gpu(device, several):
    """Return the GPU of this process: of several on a machine the one of its local rank. Raises InputError."""
    count, number = torch.cuda.device_count(), local_rank()
    if not several:
        if (device.index or 0) >= count:
            raise InputError(f"--device {device}: torch finds {count} GPUs here, the last one is cuda:{count - 1}")
        return device
    if count == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        number = 0  # srun may show each task its own GPU alone; torchrun shows all
    if number >= count:
        raise InputError(f"process {number} of this machine has no GPU, torch finds {count} here: start as many processes as "
                         f"GPUs (torchrun --nproc_per_node={count}), or use --device cpu")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _join(device, timeout):
    """Join the group: gloo for the hosts, and NCCL, which connects at once and says here what is wrong, for GPUs."""
    patience = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        store = dist.PrefixStore(_agree_on_prefix(store, rank, world_size, timeout), store)
    if device.type != "cuda":
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=world_size, timeout=patience, device_id=device
    )
    dist.group.WORLD._get_backend(device)._set_default_timeout(patience / NCCL_SHARE)


def _slurm_to_environment():
    """Translate Slurm's variables to torchrun's, where srun has started several tasks without torchrun."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:  # a batch script itself is not a step
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    # a job's own, by the rule of scripts/slurm_pretrain.sh
    os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    # the first of a list such as node[01-04,07],gpu3; `scontrol show hostnames` is missing in most containers
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"]).partition(",")[0]
    os.environ.setdefault("MASTER_ADDR", first)


def _agree_on_prefix(store, rank, world_size, timeout):
    """Return a prefix for the keys of this start of the run, which process 0 draws and hands to each of the others.

    torchrun may restart the processes on the store that those before have used, with the addresses of the dead in it: a
    process that reads one waits for ever. So every process says which number it has drawn, and the answer is under that number.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"albef/hello/{rank}", mine)
        prefix = store.get(f"albef/answer/{mine}").decode()
        store.set(f"albef/joined/{prefix}/{rank}", "")
        return prefix
    missing, deadline = set(range(1, world_size)), time.monotonic() + timeout
    while missing:
        for other in sorted(missing):
            if store.check([f"albef/joined/{mine}/{other}"]):
                missing.remove(other)
            elif store.check([f"albef/hello/{other}"]):
                store.set(f"albef/answer/{store.get(f'albef/hello/{other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise InputError(f"--timeout {timeout:g}: {len(missing)} of {world_size} processes have not come, the first is "
                             f"process {min(missing)}")
        time.sleep(0.02)
    return mine


class StopSignal:
    """Within it SIGTERM and Ctrl-C are noted, so that all processes of a run save and leave together.

    Every process must call agree, after each iteration, and leave_together, at the same places: they wait for the others.
    leave_at_once concerns one process alone.
    """

    def __enter__(self):
        self.signum, self._pending = 0, None
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, _):
        self.signum = signum

    def agree(self, *own):
        """Return the signal to stop for, 0 for none, and of each of `own` numbers the largest that a process has.

        The answer is the same on all processes, and every process must call it. It is a reduction on the CPU that runs beside
        the next iteration, so that no process waits for it: the answer to iteration i is read after iteration i + 1.
        """
        if not is_distributed():
            return [self.signum, *own]
        answer = [0] * (1 + len(own))
        if self._pending is not None:
            numbers, work = self._pending
            work.wait()
            answer = numbers.tolist()
        numbers = torch.tensor([self.signum, *map(int, own)])
        self._pending = numbers, dist.all_reduce(numbers, op=dist.ReduceOp.MAX, async_op=True)
        return answer

    def leave_together(self, message, finish):
        """Raise Interrupted if any process has had a signal, after finish(), which waits for the one that saves.

        Every process must call it. The launcher ends all processes as soon as one has left.
        """
        if signum := max(gather_lists([self.signum])):
            finish()
            raise Interrupted(signum, message, together=True)

    def leave_at_once(self, message):
        """Return a context within which a signal ends the process that gets it at once, by Interrupted."""
        return interruptible(message)
