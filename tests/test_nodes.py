"""Several nodes and Slurm, played on this machine: torchrun on each, restarts, srun, the batch
script (docs/distributed.md).
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from chaos import assert_same_run
from conftest import log
from helpers.launch import as_srun, free_port, launch, start_alone

from engine.rendezvous import slurm_to_environment

ROOT = Path(__file__).resolve().parent.parent
ITERATIONS = 24


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration file of a run of two epochs, each of 12 iterations of 2 processes."""
    return chaos.write_run(tmp_path_factory.mktemp("run"), epochs=2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a batch script of two nodes, with Slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "bin").mkdir()
    for name in ("srun", "scontrol", "scancel"):
        command = folder / "bin" / name
        command.write_text(
            f'#!/bin/sh\nexec {sys.executable} {ROOT / "tests/helpers/fake_slurm.py"} {name} "$@"\n'
        )
        command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "GPUS": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }


def free_job_id():
    """A job's number whose port, as the batch script finds it, is free."""
    while True:
        number = 1_000_000 + int.from_bytes(os.urandom(2), "big")
        try:
            with socket.socket() as free:
                free.bind(("localhost", 10000 + number % 20000))
            return number
        except OSError:
            continue


def in_job(slurm, tmp_path, state="RUNNING", **variables):
    """The environment of one more job, submitted in the folder "a copy" of tmp_path, where Slurm
    keeps its own things.
    """
    (tmp_path / "state").write_text(state)
    (tmp_path / "calls").write_text("")
    job = {
        "FAKE_SLURM": str(tmp_path),
        "SLURM_JOB_ID": str(free_job_id()),
        "SLURM_SUBMIT_DIR": str(tmp_path / "a copy"),
    }
    return {**slurm, **job, **variables}


def submit(tmp_path, environment, *arguments):
    """Runs the batch script as Slurm does: a copy of it, in another folder."""
    shutil.copy(ROOT / "scripts/slurm_pretrain.sh", tmp_path / "slurm_script")
    command = ["bash", tmp_path / "slurm_script", *arguments]
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )


def calls(tmp_path):
    """How Slurm's commands were called, but for those that only ask."""
    return [line for line in (tmp_path / "calls").read_text().splitlines() if " show " not in line]


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The folder of a run that nothing happened to, started as by srun without torchrun."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    arguments = ["--config", config, "--output_dir", folder, "--device", "cpu"]
    result = launch("Pretrain.py", *arguments, launcher=as_srun)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("global batch 8: world size 2 x batch_size 4") == 1, result.stderr
    return folder


def test_srun_without_torchrun(undisturbed):
    assert [entry["epoch"] for entry in log(undisturbed)] == [0, 1]


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("gpu3", "gpu3"),
        ("a,b", "a"),
        ("node[01-04,07],gpu3", "node01"),
        ("rack[0-1]n[2-3]-ib,x", "rack0n2-ib"),
        ("n[7]", "n7"),
    ],
)
def test_the_first_node_of_a_step_is_the_master(monkeypatch, nodes, first):
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_JOB_ID": "5",
    }
    monkeypatch.setattr("os.environ", environment := dict(step))
    slurm_to_environment()
    ours = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": first,
        "MASTER_PORT": "10005",
    }
    assert environment == {**step, **ours}


def test_a_batch_script_without_srun_is_one_process(monkeypatch):
    batch = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "5"}
    monkeypatch.setattr("os.environ", environment := dict(batch))
    slurm_to_environment()
    assert environment == batch


def test_on_two_nodes_a_killed_process_is_restarted_and_resumes_without_being_told(
    config, undisturbed, tmp_path
):
    # the launcher of the other process does not count a restart: to it a node has gone and come
    # back
    torchrun = "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=1".split()
    torchrun += "--rdzv_backend=c10d --rdzv_id=run".split()
    torchrun += [f"--rdzv_endpoint=localhost:{free_port()}", ROOT / "tests/helpers/troubled.py"]
    arguments = ["--config", config, "--output_dir", tmp_path / "run", "--device", "cpu"]
    environment = {"TRACE": tmp_path / "trace", "MISHAP": "14"}
    nodes = [start_alone(tmp_path / "said", *torchrun, *arguments, **environment) for _ in range(2)]
    try:
        for node, *_ in nodes:
            node.join(240)
    finally:
        for node, *_ in nodes:
            node.terminate()
    assert [node.exitcode for node, *_ in nodes] == [0, 0], "\n".join(
        errors.read_text() for _, _, errors in nodes
    )
    # the last save was at the end of epoch 0
    assert chaos.lives(tmp_path / "trace") == [list(range(15)), list(range(12, ITERATIONS))]
    assert_same_run(undisturbed, tmp_path / "run")


def test_at_sigterm_the_batch_script_saves_and_requeues_and_the_next_start_goes_on(
    config, slurm, undisturbed, tmp_path
):
    (tmp_path / "a copy").mkdir()
    (tmp_path / "a copy/scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "a copy/Pretrain.py").symlink_to(ROOT / "tests/helpers/troubled.py")
    environment = in_job(slurm, tmp_path, TRACE=str(tmp_path / "trace"), MISHAP="14")
    job = environment["SLURM_JOB_ID"]
    arguments = ["--config", config, "--output_dir", "the run", "--device", "cpu"]
    first = submit(tmp_path, environment, *arguments)
    assert first.returncode == 143, first.stderr
    assert "SIGTERM: saved the run/checkpoint_last.pth in epoch 1 after iteration" in first.stderr
    assert "Traceback" not in first.stderr, first.stderr
    assert calls(tmp_path) == [f"scancel --signal=TERM {job}", f"scontrol requeue {job}"]
    second = submit(tmp_path, {**environment, "SLURM_RESTART_COUNT": "1"}, *arguments)
    assert second.returncode == 0, second.stderr
    assert len(calls(tmp_path)) == 2
    before, after = chaos.lives(tmp_path / "trace")
    assert before + after == list(range(ITERATIONS)) and before[-1] >= 14
    assert_same_run(undisturbed, tmp_path / "a copy/the run")


# --------------------------------------------------------------------------------------------------
# what the batch script does around a run, with a run that takes no time


RUN = """#!/bin/sh
printf '%s\\n' "$@" > "$FAKE_SLURM/arguments"
[ "$SLURM_PROCID" = 1 ] || exit 0
trap 'exit {status}' TERM
{before}
exit {status}
"""


def instant(slurm, tmp_path, status=0, before="", state="RUNNING"):
    """The environment of a job whose second node, after the shell commands `before`, ends with a
    status.
    """
    (tmp_path / "a copy/scripts").mkdir(parents=True)
    for name in ("Pretrain.py", "scripts/node.py"):
        (tmp_path / "a copy" / name).touch()
    (tmp_path / "run python").write_text(RUN.format(status=status, before=before))
    (tmp_path / "run python").chmod(0o755)
    return in_job(slurm, tmp_path, state, PYTHON=str(tmp_path / "run python"))


WARNED = "kill -TERM $BATCH; while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    "status,before,state,requeued",
    [
        (0, "", "RUNNING", False),
        (1, "", "RUNNING", False),  # a loss that is not finite would be so again
        (143, WARNED, "RUNNING", True),
        (143, "", "RUNNING", True),  # preempted: at first only the tasks hear of it
        (1, WARNED, "RUNNING", True),  # told to end it did, though not in order
        (0, WARNED, "RUNNING", False),  # complete before it heard of it
        (2, WARNED, "RUNNING", False),
        (143, WARNED, "COMPLETING", False),  # its owner has cancelled it
    ],
)
def test_what_is_requeued(slurm, tmp_path, status, before, state, requeued):
    environment = instant(slurm, tmp_path, status, before, state)
    result = submit(tmp_path, environment)
    assert result.returncode == status, result.stderr
    assert (f"scontrol requeue {environment['SLURM_JOB_ID']}" in calls(tmp_path)) == requeued
    assert ("requeued" in result.stdout) == (requeued or state != "RUNNING")


@pytest.mark.parametrize(
    "arguments,handed_on",
    [
        ([], ["--resume"]),
        (
            ["--output_dir", "a b", "--set", "x=c d", "y=*"],
            ["--output_dir", "a b", "--set", "x=c d", "y=*", "--resume"],
        ),
        (["--checkpoint", "x.pth"], ["--checkpoint", "x.pth"]),
        (
            ["--seed=1", "--checkpoint=x.pth", "--resume"],
            ["--seed=1", "--checkpoint=x.pth", "--resume"],
        ),
    ],
)
def test_arguments_are_handed_on(slurm, tmp_path, arguments, handed_on):
    environment = instant(slurm, tmp_path)
    assert submit(tmp_path, environment, *arguments).returncode == 0
    ours, _, theirs = (tmp_path / "arguments").read_text().partition("Pretrain.py\n")
    assert theirs.splitlines() == handed_on
    port = 10000 + int(environment["SLURM_JOB_ID"]) % 20000
    assert ours.startswith("scripts/node.py\n") and f"--rdzv_endpoint=localhost:{port}\n" in ours


def test_outside_the_repository_the_batch_script_says_so(slurm, tmp_path):
    (tmp_path / "a copy").mkdir()
    result = submit(tmp_path, in_job(slurm, tmp_path))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {tmp_path / 'a copy'} is not the repository's folder: call sbatch there\n"
    )


def test_a_node_ends_with_the_status_of_an_input_error(tmp_path):
    # process 0 ends last: torchrun ends what still runs once one has failed
    (tmp_path / "run.py").write_text(
        "import os, sys, time, pathlib\nsaid = pathlib.Path(__file__).with_name('said')\n"
        "if os.environ['RANK'] == '1':\n    said.touch()\n    sys.exit(2)\n"
        "while not said.exists():\n    time.sleep(0.01)\nsys.exit(1)"
    )
    command = [ROOT / "scripts/node.py", "--standalone", "--nproc_per_node=2", tmp_path / "run.py"]
    node, _, errors = start_alone(tmp_path / "node", *command, SLURMD_NODENAME="localhost")
    node.join(120)
    assert node.exitcode == 2 and "Traceback" not in errors.read_text(), errors.read_text()
