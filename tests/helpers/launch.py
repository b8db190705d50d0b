"""Starts a script in several processes as torchrun does, but from a server that has imported what
takes seconds.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import wait
from pathlib import Path

from conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "Attributes",
        "Grounding",
        "NLVR",
        "Pretrain",
        "Pretrain_nlvr",
        "Relevance",
        "Retrieval",
        "VE",
        "VQA",
    ]
)
TIMEOUT = 300  # seconds without an end of any process


def begin(argv, environment, said):
    """In a new process: run the script argv[0] with this environment; what it prints goes to the
    files `said`.
    """
    # for its data workers: not that of this process
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def start(folder, script, *arguments, processes=2, **environment):
    """Start a script of the repository in several processes.

    What they print goes to RANK.out and RANK.err in the folder.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {
        **os.environ,
        **environment,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    argv, started = [str(ROOT / script), *map(str, arguments)], []
    for rank in range(processes):
        said = [Path(folder, f"{rank}.{kind}") for kind in ("out", "err")]
        for path in said:
            path.touch()
        started.append(
            SERVER.Process(
                target=begin,
                args=(argv, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, said),
            )
        )
        started[-1].start()
    return started


def launch(script, *arguments, processes=2, **environment):
    """Run a script of the repository in several processes.

    Return a subprocess.CompletedProcess of them all.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = start(folder, script, *arguments, processes=processes, **environment)
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
