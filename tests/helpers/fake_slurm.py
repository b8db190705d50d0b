"""srun, scontrol and scancel on one machine, as far as test_nodes.py needs them: python
fake_slurm.py COMMAND ARGUMENTS.

FAKE_SLURM is a folder: the calls of scontrol and scancel are listed in `calls`, `state` holds the
job's state, `tasks` the process numbers of the step's tasks.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAKE_SLURM"])
PR_SET_CHILD_SUBREAPER = 36


def children():
    """Process numbers of this process's children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(path.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def srun(*arguments):
    """Starts a command once per task, one task per node, and ends with the highest status; SIGTERM
    kills the tasks at once.
    """
    # what outlives its task becomes a child of this process
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    number = next(
        int(argument.partition("=")[2])
        for argument in arguments
        if argument.startswith("--ntasks=")
    )
    command = arguments[
        next(i for i, argument in enumerate(arguments) if not argument.startswith("--")) :
    ]
    common = {
        **os.environ,
        "SLURM_NTASKS": str(number),
        "SLURM_STEP_NUM_TASKS": str(number),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURMD_NODENAME": "localhost",
        "SLURM_LOCALID": "0",
        "BATCH": str(os.getppid()),
    }
    tasks = [
        subprocess.Popen(command, env={**common, "SLURM_PROCID": str(task)})
        for task in range(number)
    ]
    (FOLDER / "tasks").write_text(" ".join(str(task.pid) for task in tasks))
    signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
    statuses = [task.wait() for task in tasks]
    while left := children():  # Slurm, too, leaves nothing of a step behind its tasks
        for pid in left:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return max(status if status >= 0 else 128 - status for status in statuses)


def scontrol(*arguments):
    if arguments[:2] == ("show", "hostnames"):
        print("localhost\nanother")
    elif arguments[:2] == ("show", "job"):
        print(f"JobId={arguments[2]} JobState={(FOLDER / 'state').read_text()} Reason=None")


def scancel(*_):
    """Signals the tasks, twice, as it happens to a job that is preempted."""
    for _ in range(2):
        for pid in (FOLDER / "tasks").read_text().split():
            try:
                os.kill(int(pid), signal.SIGTERM)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


_, called, *others = sys.argv
if called != "srun":
    with open(FOLDER / "calls", "a") as file:
        print(called, *others, file=file)
sys.exit(globals()[called](*others))
