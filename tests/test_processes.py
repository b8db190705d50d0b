"""However a run ends, none of its processes is left and what it says is one line: each run here is
a process of its own.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, problems
from helpers.launch import as_torchrun, free_port, start_alone
from helpers.training import broken_copy, command_line
from PIL import Image
from torch.utils.data import Dataset

from dataset.loading import Loader
from engine.distributed import StopSignal


def processes(session):
    """Process numbers of what lives in a session: what start_new_session began and all that came of
    it.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def start(tmp_path_factory):
    """Starts a script in a session of its own; what is left of it is killed in the end."""
    started, folder = [], tmp_path_factory.mktemp("said")

    def call(*arguments, **environment):
        started.append(Script(*start_alone(folder, *arguments, **environment)))
        return started[-1]

    yield call
    for script in started:
        for pid in processes(script.pid):
            os.kill(pid, signal.SIGKILL)
        script.process.join()


class Script:
    """A started script."""

    def __init__(self, process, output, errors):
        self.process, self.pid, self.output, self.errors = process, process.pid, output, errors

    def stderr(self):
        return self.errors.read_text()

    def send(self, signum):
        os.kill(self.pid, signum)


def until(condition, seconds=120):
    """Waits for condition() to be true. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ending(script):
    """(exit status, problems on stderr) of a script, when nothing of its session is left."""
    script.process.join(120)
    until(lambda: not processes(script.pid), 20)
    return script.process.exitcode, problems(script.stderr())


@pytest.fixture
def retrieval(tiny_config, shapes, tmp_path, pretrained):
    """Return arguments of Retrieval.py with two data workers, to fine-tune or evaluate on an image
    with many names.
    """

    def arguments(image=shapes / "images/test/000000.jpg", entries=4000):
        links = [tmp_path / f"link{number}.jpg" for number in range(entries)]
        for link in links:
            link.symlink_to(image)
        (tmp_path / "test.json").write_text(
            json.dumps([{"image": str(link), "caption": ["a red circle"]} for link in links])
        )
        files = {
            "train_file": [str(shapes / "retrieval_train.json")],
            "test_file": [str(tmp_path / "test.json")],
        }
        keys = {
            "num_workers": 2,
            "batch_size_test": 2,
            "scheduler": {**tiny_config["scheduler"], "epochs": 1000},
        }
        config = {**tiny_config, **files, **keys}
        del config["vision_encoder"]  # only pre-training reads it
        return [
            "Retrieval.py",
            *command_line(config, tmp_path / "run", tmp_path),
            "--checkpoint",
            pretrained,
        ]

    return arguments


def test_an_unusable_test_image_ends_the_evaluation(retrieval, start, shapes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes((shapes / "images/test/000000.jpg").read_bytes()[:300])
    status, said = ending(start(*retrieval(tmp_path / "broken.jpg", 8), "--evaluate"))
    assert (
        status == 2
        and said.startswith("error: cannot read a test image")
        and len(said.splitlines()) == 1
    ), said


def test_a_training_set_without_a_usable_image_ends_the_training(
    tiny_config, start, shapes, tmp_path
):
    config = {
        **tiny_config,
        "image_root": broken_copy(shapes, tmp_path / "images", 1000),
        "num_workers": 1,
        "test_file": None,
    }
    status, said = ending(start("Pretrain.py", *command_line(config, tmp_path / "run", tmp_path)))
    assert (
        status == 2
        and said.startswith("error: no usable entry in 100 tries")
        and len(said.splitlines()) == 1
    ), said


def test_a_bug_shows_its_stack_trace_and_ends_all(tiny_config, start, tmp_path):
    config = {**tiny_config, "num_workers": 2}
    arguments = command_line(config, tmp_path / "run", tmp_path)
    status, said = ending(start("tests/helpers/troubled.py", *arguments, ERROR="a bug", RANK="1"))
    assert status == 1 and said.splitlines()[-1] == "ValueError: a bug", said


@pytest.mark.parametrize(
    "signum, doing, words",
    [
        (signal.SIGINT, "--evaluate", "before it was complete"),
        (signal.SIGTERM, "--resume", "continue with --resume"),
    ],
)
def test_a_signal_to_all_processes_ends_them_with_one_line(retrieval, start, signum, doing, words):
    run = start(*retrieval(), doing)
    until(lambda: len(processes(run.pid)) == 3)
    time.sleep(1)  # so that workers that hear of it have work ahead of them
    os.killpg(run.pid, signum)
    status, said = ending(run)
    line = said.splitlines()[-1]  # a new run has noted that there is no checkpoint yet
    assert status == 128 + signum and said.count(signal.Signals(signum).name) == 1, said
    assert line.startswith(signal.Signals(signum).name) and words in line


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_training_run_at_once(tiny_config, start, tmp_path, signum):
    """The run is blocked in an iteration, so only the second signal can end it."""
    trace = tmp_path / "trace"
    arguments = command_line(tiny_config, tmp_path / "run", tmp_path)
    run = start("tests/helpers/troubled.py", *arguments, TRACE=trace, HOLD="1")
    until(trace.exists)
    run.send(signum)
    until(lambda: "heard" in trace.read_text())
    time.sleep(1.1)  # what comes sooner is the same signal, sent twice
    run.send(signum)
    status, said = ending(run)
    assert status == 128 + signum and "ended at once" in said.splitlines()[-1], said


def test_a_signal_that_is_sent_twice_at_once_is_one(monkeypatch):
    ended = mock.Mock()
    monkeypatch.setattr("engine.distributed.end_at_once", ended)
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and not ended.called


@pytest.mark.parametrize("signum, rank", [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_process_that_waits_for_the_others_says_so_and_obeys_signals(
    tiny_config, start, tmp_path, signum, rank
):
    arguments = command_line(tiny_config, tmp_path / "run", tmp_path)
    port = free_port()
    environment = {**as_torchrun(rank, 2), "MASTER_PORT": port, "NOTICE": 0.5}
    run = start("tests/helpers/troubled.py", *arguments, **environment)
    until(lambda: run.stderr().endswith("\n"))
    said = run.stderr()
    assert (
        f"rank {1 - rank} did not connect" in said
        and f"127.0.0.1:{port}" in said
        and "WORLD_SIZE" in said
    )
    run.send(signum)
    assert ending(run)[0] == 128 + signum


def test_data_workers_end_with_a_killed_run(retrieval, start):
    run = start(*retrieval(), "--evaluate")
    until(lambda: len(processes(run.pid)) == 3)
    run.send(signal.SIGKILL)
    assert ending(run) == (-signal.SIGKILL, "")


def test_the_processes_of_a_check_end_with_it(tiny_config, start, tmp_path):
    Image.new("RGB", (4000, 4000)).save(tmp_path / "large.png")
    images = [tmp_path / f"{number}.png" for number in range(400)]
    for image in images:
        image.symlink_to(tmp_path / "large.png")
    (tmp_path / "train.json").write_text(
        json.dumps([{"image": str(image), "caption": "a"} for image in images])
    )
    config = {**tiny_config, "train_file": str(tmp_path / "train.json"), "test_file": None}
    _, path, *_ = command_line(config, tmp_path / "run", tmp_path)
    check = start("-m", "tools.check", "pretrain", path, "--workers", 2)
    until(lambda: len(processes(check.pid)) == 3)
    check.send(signal.SIGTERM)
    status, said = ending(check)
    assert status == 128 + signal.SIGTERM and len(said.splitlines()) == 1, said


def test_all_processes_of_torchrun_say_the_same_once(start):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    _, said = ending(start(*torchrun, "VE.py", "--outptu_dir", "x"))
    assert said.count("did you mean --output_dir?") == 1, said


@pytest.mark.parametrize(
    "given, found, spins",
    [({}, "passive", "5000"), ({"OMP_WAIT_POLICY": "active"}, "active", "None")],
)
def test_scripts_choose_how_openmp_waits_before_torch_is_loaded_unless_the_environment_says(
    given, found, spins
):
    program = """
import os, sys
from engine.launch import run_script
before = os.environ.get("OMP_WAIT_POLICY")
names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
run_script(lambda: print(before, *map(os.environ.get, names), "torch" in sys.modules))
"""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment = {**kept, **given}
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert told.stdout.split() == [str(given.get("OMP_WAIT_POLICY")), found, spins, "False"], (
        told.stderr
    )


def test_a_name_that_is_not_utf8_can_be_printed():
    program = [
        sys.executable,
        "-c",
        "from engine.launch import run_script; run_script(lambda: print('a\\udcff'))",
    ]
    assert (
        subprocess.run(program, cwd=ROOT, capture_output=True, check=True).stdout == b"a\\udcff\n"
    )


class Bug(Dataset):
    """A data set whose code raises an error, which is of a class that Python raises for broken
    pipes too.
    """

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [ValueError, EOFError, ConnectionResetError, RuntimeError])
def test_a_bug_in_a_data_set_keeps_its_traceback_in_a_data_worker(error, workers):
    before = multiprocessing.active_children()
    with pytest.raises(error) as caught:
        list(
            Loader(
                Bug(error("DataLoader worker (pid")),
                None,
                workers=workers,
                device=torch.device("cpu"),
            )
        )
    assert type(caught.value) is error and (not workers or "in __getitem__" in str(caught.value))
    assert multiprocessing.active_children() == before


def test_a_data_worker_that_dies_while_the_others_start_is_noticed_at_the_next_batch(
    start, tmp_path
):
    program = """
import os, signal, time, torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Iterator
from dataset.loading import Loader, WorkerDied

start = Iterator._reset

def kill_one(self, *arguments, **options):
    os.kill(self._workers[0].pid, signal.SIGKILL)
    time.sleep(1)
    return start(self, *arguments, **options)

Iterator._reset = kill_one
Iterator._try_get_data.__defaults__ = (0.2,)  # how often it looks for dead workers
try:
    list(Loader(range(9), None, workers=2, device=torch.device("cpu")))
except WorkerDied:
    print("died")
"""
    (tmp_path / "program.py").write_text(program)
    script = start(tmp_path / "program.py")
    assert ending(script) == (0, "") and script.output.read_text() == "died\n"
