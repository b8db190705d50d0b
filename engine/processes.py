"""Joining the process group that torchrun or Slurm has started, if one has, and leaving it
together.
"""

import datetime
import os
import re
import signal
import socket
import sys
import time
import uuid

import torch
import torch.distributed as dist

from utils import (
    SIGNALS,
    TIMEOUT,
    InputError,
    Interrupted,
    end_at_once,
    environment_number,
    gather_lists,
    is_distributed,
    is_main,
    local_rank,
)

PATIENCE = 5  # seconds after which a waiting process prints the missing ranks


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


def init_process_group(device: str | None, timeout: float = TIMEOUT) -> torch.device:
    """Join the process group of the launcher, if there is one.

    Args:
        device: Name of the device, None for a GPU if there is one.
        timeout: Seconds after which a process gives up waiting for the others.

    Returns:
        The device of this process.

    Raises:
        InputError: The device is missing, or other processes do not join in time.
    """
    device = find_device(device)
    _slurm_to_environment()
    world_size = environment_number("WORLD_SIZE", 1)
    if device.type == "cuda":
        device = _own_gpu(device, world_size > 1)
    if world_size > 1:
        _join(device, world_size, timeout)
    return device


def _own_gpu(device, several):
    """Return the GPU of this process, by its local rank if there are several processes.

    Raises InputError.
    """
    count, number = torch.cuda.device_count(), local_rank()
    if not several:
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {device}: torch finds {count} GPUs here, the last one is cuda:{count - 1}"
            )
        return device
    if count == 1 and "LOCAL_WORLD_SIZE" not in os.environ:
        number = 0  # srun may show each task only its own GPU; torchrun shows all
    if number >= count:
        raise InputError(
            f"process {number} of this machine has no GPU, torch finds {count} here: start as many processes as "
            f"GPUs (torchrun --nproc_per_node={count}), or use --device cpu"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _join(device, world_size, timeout):
    """Join the group: gloo on the CPU and NCCL on GPUs.

    With device_id NCCL connects here, so its errors appear here.
    """
    meeting, patience = _Meeting(world_size, timeout), datetime.timedelta(seconds=timeout)
    try:
        store = meeting.store()
        prefix = (
            meeting.wait_for_others(store) if meeting.rank == 0 else meeting.wait_for_first(store)
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise meeting.failed(str(error).splitlines()[0]) from None
    backend = {"backend": "gloo"}
    if device.type == "cuda":
        backend = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    dist.init_process_group(
        **backend,
        store=dist.PrefixStore(prefix, store),
        rank=meeting.rank,
        world_size=world_size,
        timeout=patience,
    )


class _Meeting:
    """The rendezvous of a run's processes at MASTER_ADDR:MASTER_PORT. Signals end every wait."""

    def __init__(self, world_size, timeout):
        self.world_size, self.timeout = world_size, timeout
        self.rank = environment_number("RANK")
        self.host, self.port = os.environ.get("MASTER_ADDR"), environment_number("MASTER_PORT")
        if not self.host:
            raise InputError(
                f"WORLD_SIZE is {world_size} but MASTER_ADDR is missing: start by torchrun, or unset WORLD_SIZE"
            )
        if self.port > 65535:
            raise InputError(
                f"MASTER_PORT={self.port} in the environment is not a port, which is at most 65535: start by torchrun"
            )
        self.begun, self.announced = time.monotonic(), False

    def failed(self, reason):
        """Return the InputError of a rendezvous that failed."""
        cause = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "WORLD_SIZE"
        return InputError(
            f"--timeout {self.timeout:g}: {reason}; start {self.world_size} processes by torchrun or srun, or unset {cause} to run "
            "one alone"
        )

    def pause(self, missing):
        """Wait a moment, and print once who is `missing`. Raises InputError after the timeout."""
        waited = time.monotonic() - self.begun
        said = f"{missing} of {self.world_size} processes not reached at {self.host}:{self.port}"
        if waited > self.timeout:
            raise self.failed(said)
        if waited > PATIENCE and not self.announced:
            self.announced = True
            print(f"note: waiting, {self.failed(said)}", file=sys.stderr, flush=True)
        time.sleep(0.02)

    def store(self):
        """Connect to the store of the launcher's agent or of rank 0."""
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not serves:
            try:  # torch would wait for the server without handling signals
                socket.create_connection((self.host, self.port), 1).close()
                break
            except OSError:
                self.pause("rank 0")
        patience = datetime.timedelta(seconds=self.timeout)
        return dist.TCPStore(
            self.host,
            self.port,
            self.world_size,
            serves,
            patience,
            wait_for_workers=False,
            multi_tenant=True,
        )

    def wait_for_others(self, store):
        """Send the other ranks a key prefix for this start of the run. Return the prefix.

        torchrun may restart the processes with the same store, which still has the addresses of
        dead processes. A process that reads such an address waits for ever. So each rank draws a
        random number, and rank 0 stores the prefix under that number.
        """
        prefix, missing = uuid.uuid4().hex, set(range(1, self.world_size))
        while missing:
            for other in sorted(missing):
                if store.check([f"albef/joined/{prefix}/{other}"]):
                    missing.remove(other)
                elif store.check([f"albef/hello/{other}"]):
                    store.set(f"albef/answer/{store.get(f'albef/hello/{other}').decode()}", prefix)
            if missing:
                self.pause(
                    f"rank {', '.join(map(str, sorted(missing)[:8]))}{', ...' * (len(missing) > 8)}"
                )
        return prefix

    def wait_for_first(self, store):
        """Receive the key prefix from rank 0. Return it."""
        mine = uuid.uuid4().hex
        store.set(f"albef/hello/{self.rank}", mine)
        while not store.check([f"albef/answer/{mine}"]):
            self.pause("rank 0")
        prefix = store.get(f"albef/answer/{mine}").decode()
        store.set(f"albef/joined/{prefix}/{self.rank}", "")
        return prefix


def _slurm_to_environment():
    """Translate Slurm's variables to torchrun's if srun has started several tasks without torchrun."""
    # a batch script is not a step
    if "RANK" in os.environ or environment_number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    for name, of_slurm in (
        ("RANK", "SLURM_PROCID"),
        ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
    ):
        os.environ[name] = str(environment_number(of_slurm))
    # a port for each job, as in scripts/slurm_pretrain.sh
    os.environ.setdefault("MASTER_PORT", str(10000 + environment_number("SLURM_JOB_ID") % 20000))
    # the first of a list such as node[01-04,07],gpu3; `scontrol show hostnames` is missing in most
    # containers
    first = re.sub(
        r"\[([^],-]*)[^]]*\]", r"\1", os.environ.get("SLURM_STEP_NODELIST", "")
    ).partition(",")[0]
    os.environ.setdefault("MASTER_ADDR", first)


class StopSignal:
    """Context that records SIGTERM and Ctrl-C, so that all processes save and exit together. A
    second signal ends at once.

    Every process must call `agree` after each iteration, and `leave_together` at the same places,
    because they wait for the others.
    """

    def __enter__(self):
        self.signum, self._noted, self._pending = 0, 0.0, None
        self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum, _):
        # Slurm signals a preempted job twice, torchrun forwards a signal that its workers may have
        # received, and timeout(1) signals its command and then its group
        launched = "RANK" in os.environ or "SLURM_PROCID" in os.environ
        if self.signum and time.monotonic() - self._noted >= (1 if launched else 0.2):
            end_at_once(signum, None)
        self.signum, self._noted = signum, time.monotonic()

    def agree(self, *own):
        """Return the signal to stop for (0: none) and the maximum over all processes of each of
        `own` numbers.

        The result is the same on all processes, and every process must call it. It is a reduction
        on the CPU that runs during the next iteration, so that no process waits for it. The result
        of iteration i is read after iteration i + 1.
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
        """Raise Interrupted if a process has received a signal, after finish(), which waits for the
        save.

        Every process must call it. Rank 0 prints the message first, because the launcher ends all
        processes once one has exited.
        """
        if signum := max(gather_lists([self.signum])):
            finish()
            if is_main():
                print(f"{signal.Signals(signum).name}: {message}", file=sys.stderr, flush=True)
            gather_lists([])
            raise Interrupted(signum)
