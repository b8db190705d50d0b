"""Start scripts in processes that fork from a server with torch and all tasks imported."""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from conftest import ROOT

from configs.tasks import TASKS

SERVER = multiprocessing.get_context("forkserver")
MODULES = [
    path.partition(":")[0]
    for task in TASKS.values()
    for path in (task.model, task.train_data, task.test_data, task.evaluate)
    if path
]
# torch.distributed.run is left out: runs that fork from a server with it take more CPU time
SERVER.set_forkserver_preload(["engine.run", "torch.utils.tensorboard", *MODULES])
TIMEOUT = 300  # seconds without an end of any process


def begin(argv, environment, said, alone=False):
    """In a new process, run the script argv[0], or the module argv[1] after -m.

    It has this environment and prints to the files `said`. If alone, it is in a session of its own.
    """
    if alone:
        os.setsid()
    # for its data workers: not that of this process
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    status = 0
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    except Exception:
        traceback.print_exc()
        status = 1
    # as a script ends: multiprocessing leaves out the handlers of atexit, one of which ends data
    # workers
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.exit(status)


def start_alone(folder, *arguments, **environment):
    """Start a script in a session of its own. Return (process, files of its stdout and stderr).

    What it prints goes to NUMBER.out and NUMBER.err in the folder.
    """
    folder.mkdir(exist_ok=True)
    number = len(list(folder.iterdir()))
    said = [folder / f"{number}.{kind}" for kind in ("out", "err")]
    for path in said:
        path.touch()
    given = {key: str(value) for key, value in environment.items()}
    environment = {**os.environ, **given}
    process = SERVER.Process(
        target=begin, args=(list(map(str, arguments)), environment, said, True)
    )
    process.start()
    return process, *said


def free_port():
    """Return a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def as_torchrun(rank, processes):
    """Return the variables that torchrun gives to a process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def as_srun(rank, processes):
    """Return the variables that srun gives to a task, one a node."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
    }


def start(folder, script, *arguments, processes=2, launcher=as_torchrun, **environment):
    """Start a script of the repository in several processes, with the variables of a launcher.

    What they print goes to RANK.out and RANK.err in the folder.
    """
    common = {**os.environ, **environment, "MASTER_PORT": str(free_port())}
    argv, started = [str(ROOT / script), *map(str, arguments)], []
    for rank in range(processes):
        said = [Path(folder, f"{rank}.{kind}") for kind in ("out", "err")]
        for path in said:
            path.touch()
        started.append(
            SERVER.Process(
                target=begin,
                args=(argv, {**common, **launcher(rank, processes)}, said),
            )
        )
        started[-1].start()
    return started


def launch(script, *arguments, processes=2, **options):
    """Run a script of the repository in several processes, with the options of `start`.

    Return a subprocess.CompletedProcess of them all.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = start(folder, script, *arguments, processes=processes, **options)
        left = {process.sentinel: process for process in started}
        while left:
            ended = wait(left, TIMEOUT)
            for sentinel in ended:
                left.pop(sentinel).join()
            if not ended or any(process.exitcode for process in started):
                for process in left.values():
                    process.terminate() if ended else process.kill()
        codes = [process.exitcode for process in started]
        said = (
            "".join(Path(folder, f"{rank}.{kind}").read_text() for rank in range(processes))
            for kind in ("out", "err")
        )
        return subprocess.CompletedProcess([script, *arguments], max(codes, key=abs), *said)
