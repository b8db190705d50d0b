"""The rendezvous of a run's processes at MASTER_ADDR:MASTER_PORT, before they form a group."""

import datetime
import logging
import os
import re
import socket
import time
import uuid

import torch.distributed as dist

from utils import InputError, environment_number

NOTICE = 5  # seconds after which a waiting process logs the missing ranks

logger = logging.getLogger(__name__)


def slurm_to_environment() -> None:
    """Translate Slurm's variables to torchrun's if srun has started several tasks."""
    # a batch script is not a step
    if "RANK" in os.environ or environment_number("SLURM_STEP_NUM_TASKS", 1) == 1:
        return
    names = {
        "RANK": "SLURM_PROCID",
        "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
        "LOCAL_RANK": "SLURM_LOCALID",
    }
    for name, slurm_name in names.items():
        os.environ[name] = os.environ[slurm_name]
    # a port for each job, as in scripts/slurm_pretrain.sh
    os.environ.setdefault("MASTER_PORT", str(10000 + environment_number("SLURM_JOB_ID") % 20000))
    # the first of a list such as node[01-04,07],gpu3; `scontrol show hostnames` is missing in most
    # containers
    nodes = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", os.environ.get("SLURM_STEP_NODELIST", ""))
    os.environ.setdefault("MASTER_ADDR", nodes.partition(",")[0])


class Rendezvous:
    """Connects this process to the others. Signals and the timeout end every wait.

    Args:
        world_size: Number of processes.
        timeout: Seconds to wait for them.
    """

    def __init__(self, world_size: int, timeout: float) -> None:
        self.world_size, self.timeout = world_size, timeout
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise InputError(
                    f"WORLD_SIZE is {world_size} in the environment, but {name} is missing; start"
                    " the script with torchrun or srun, or unset WORLD_SIZE"
                )
        self.rank, self.host = environment_number("RANK"), os.environ["MASTER_ADDR"]
        self.port = environment_number("MASTER_PORT")
        self._begun, self._noticed = time.monotonic(), False

    def meet(self) -> dist.Store:
        """Return a store that all ranks of this start of the run share. Raises InputError."""
        try:
            store = self._connect()
            prefix = self._send_prefix(store) if self.rank == 0 else self._receive_prefix(store)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise self._failure(str(error).splitlines()[0]) from None
        return dist.PrefixStore(prefix, store)

    def _failure(self, reason: str) -> InputError:
        cause = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "WORLD_SIZE"
        return InputError(
            f"--timeout {self.timeout:g}: {reason}; start {self.world_size} processes with"
            f" torchrun or srun, or unset {cause} to run a single process"
        )

    def _pause(self, missing: str) -> None:
        """Wait a moment, and log once which ranks are missing. Raises InputError at the timeout."""
        waited = time.monotonic() - self._begun
        reason = f"{missing} did not connect at {self.host}:{self.port}"
        if waited > self.timeout:
            raise self._failure(reason)
        if waited > NOTICE and not self._noticed:
            self._noticed = True
            # every rank: rank 0 may be the missing one
            logger.error("note: still waiting, %s", self._failure(reason))
        time.sleep(0.02)

    def _connect(self) -> dist.Store:
        """Connect to the store of the launcher's agent or of rank 0."""
        serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        while not serves:
            try:  # torch would wait for the server without handling signals
                socket.create_connection((self.host, self.port), 1).close()
                break
            except OSError:
                self._pause("rank 0")
        return dist.TCPStore(
            self.host,
            self.port,
            self.world_size,
            serves,
            datetime.timedelta(seconds=self.timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )

    def _send_prefix(self, store: dist.Store) -> str:
        """Send the other ranks a key prefix for this start of the run. Return the prefix.

        torchrun may restart the processes with the same store, which still has the addresses of
        dead processes (torch 2.11 to 2.15). A process that reads such an address waits for ever. So
        each rank draws a random number, and rank 0 stores the prefix under that number.
        """
        prefix, missing = uuid.uuid4().hex, set(range(1, self.world_size))
        while missing:
            for other in sorted(missing):
                if store.check([f"albef/joined/{prefix}/{other}"]):
                    missing.remove(other)
                elif store.check([f"albef/hello/{other}"]):
                    number = store.get(f"albef/hello/{other}").decode()
                    store.set(f"albef/answer/{number}", prefix)
            if missing:
                shown = ", ".join(map(str, sorted(missing)[:8]))
                self._pause(f"rank{'s' * (len(missing) > 1)} {shown}{', ...' * (len(missing) > 8)}")
        return prefix

    def _receive_prefix(self, store: dist.Store) -> str:
        """Receive the key prefix from rank 0. Return it."""
        number = uuid.uuid4().hex
        store.set(f"albef/hello/{self.rank}", number)
        while not store.check([f"albef/answer/{number}"]):
            self._pause("rank 0")
        prefix = store.get(f"albef/answer/{number}").decode()
        store.set(f"albef/joined/{prefix}/{self.rank}", "")
        return prefix
