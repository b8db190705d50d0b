"""What a run survives: kills, full disks, dying processes and workers, damaged files, steps that go
wrong (tests/FAULTS.md).
"""

import contextlib
import errno
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import chaos
import numpy as np
import pytest
import torch
from chaos import assert_same_run
from conftest import ROOT, limit, log, refusal, tiny
from helpers.launch import launch, start
from helpers.training import CPU, at, command_line, run, signal_at, stop_at
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import engine.trainer
from configs.config import as_config
from dataset import loading
from dataset.build import build_dataset
from dataset.loading import EpochBatches, TrainBatches
from engine.checkpointing import (
    BEST,
    LAST,
    PREVIOUS,
    Checkpointer,
    copy_to_host,
    find_resume_file,
    newest_checkpoint,
)
from engine.launch import Interrupted
from engine.output_dir import make_output_dir
from engine.trainer import TrainState, create_train_state
from models import build_model
from models.contrastive import ContrastiveModel
from models.tokenizer import build_tokenizer
from models.weights import read_checkpoint, read_weights
from utils import InputError, TrainingStopped, atomic_write

# --------------------------------------------------------------------------------------------------
# files


def train_state(model, **progress):
    """The state of a run of a small model."""
    model.task, model.vocabulary, model.pretrained, model.ranking = "pretrain", None, [], None
    return TrainState(
        model=model,
        ddp_model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        schedule=None,
        config=as_config({}),
        device=CPU,
        seed=0,
        iterations=1,
        global_batch=1,
        **progress,
    )


def save(path, **progress):
    """Writes the checkpoint of a small model whose weights are the epoch."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, progress["epoch"])
    with Checkpointer(path.parent) as checkpointer:
        checkpointer.save(train_state(model, **progress), path.name, 0.1)


def test_a_device_and_a_folder_keep_their_places(tmp_path):
    os.mkfifo(tmp_path / "device")
    (tmp_path / "folder").mkdir()
    for name in ("device", "folder"):
        with (
            pytest.raises(OSError, match="not a regular file"),
            atomic_write(tmp_path / name) as file,
        ):
            file.write(b"instead of it")
    assert (tmp_path / "device").is_fifo() and {path.name for path in tmp_path.iterdir()} == {
        "device",
        "folder",
    }


def test_killed_at_any_instant_of_a_checkpoint_write(tmp_path):
    def survives(number, in_file):
        """Whether a save ends in a process that dies at byte `number` of a file, or at the
        number-th other operation.
        """
        folder = tmp_path / f"{number} {in_file}"
        folder.mkdir()
        for epoch in (1, 2):
            save(folder / LAST, epoch=epoch, iteration=5)

        def write():
            if in_file:
                # it kills, where Python has it ignored
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                limit(number)
            else:
                die = at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                call = die(lambda function, *args, **options: function(*args, **options))
                for name in ("fsync", "replace", "unlink", "chmod"):
                    setattr(os, name, functools.partial(call, getattr(os, name)))
            save(folder / LAST, epoch=3, iteration=5)

        process = multiprocessing.get_context("fork").Process(target=write)
        process.start()
        process.join()
        state = torch.load(newest_checkpoint(folder), weights_only=True)
        epoch = state["resume"]["epoch"]
        assert epoch in (2, 3) and (state["model"]["weight"] == epoch).all()
        # whatever has a checkpoint's name is a whole one
        for path in folder.glob("checkpoint_*.pth"):
            assert read_checkpoint(path)["resume"]["epoch"] in (1, 2, 3)
        make_output_dir(folder)
        assert not list(folder.glob(".*.tmp"))  # the next run clears away what was begun
        # what was reported as saved is what a run continues from
        assert process.exitcode <= 0  # 1 after an exception
        assert epoch == 3 or process.exitcode
        return process.exitcode == 0

    instants = list(itertools.takewhile(lambda number: not survives(number, False), range(1, 100)))
    assert len(instants) > 3  # two renames, two of fsync
    sizes = list(itertools.takewhile(lambda size: not survives(size, True), range(0, 10_000, 200)))
    assert len(sizes) > 10


def test_a_state_is_copied_as_it_is(tmp_path):
    """Tied weights stay one tensor, and what is not a tensor, or beside the items of a dict, stays
    too.
    """
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    state = {"model": model.state_dict(), "other": [{"step": 3, "mean": torch.ones(2)}, None]}
    torch.nn.init.constant_(model[0].weight, 1.0)
    copied = copy_to_host(state, {})
    torch.nn.init.constant_(model[0].weight, 2.0)
    assert copied["model"]._metadata == state["model"]._metadata
    assert copied["other"][0]["step"] == 3 and copied["other"][1] is None
    assert copied["model"]["1.weight"] is copied["model"]["0.weight"]
    assert (copied["model"]["1.weight"] == 1).all()


def flip(data, position, bit=1):
    """Return the data with one bit changed."""
    return data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]


def within_weights(data):
    """Return a position in the largest record of a zip file, behind its header."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        largest = max(file.infolist(), key=lambda info: info.file_size)
    return largest.header_offset + largest.file_size


DAMAGES = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "weights": lambda data: flip(data, within_weights(data)),
    "key resume": lambda data: flip(data, data.index(b"resume")),
    "key samples_seen": lambda data: flip(data, data.index(b"seen", data.index(b"resume"))),
    "version in the directory": lambda data: flip(data, data.rindex(b"PK\1\2") + 6, 64),
    "checksum": lambda data: flip(data, data.rindex(b"PK\1\2") + 16),
}


@pytest.fixture
def begun(begun_once, tmp_path):
    """A copy of the folder of a run that was stopped in its third iteration."""
    return shutil.copytree(begun_once, tmp_path / "begun")


@pytest.fixture(scope="module")
def begun_once(shapes, tmp_path_factory):
    stop_at(3, tiny(shapes), folder := tmp_path_factory.mktemp("begun"))
    return folder


@pytest.fixture(scope="module")
def ended(shapes, tmp_path_factory):
    """The folder of a run that was stopped in its last iteration, the twelfth."""
    stop_at(12, {**tiny(shapes), "save_every": 4}, folder := tmp_path_factory.mktemp("ended"))
    (folder / "checkpoint_01.pth").unlink()  # the same state as the last one
    return folder


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tiny_config, ended, tmp_path, capsys, whole, damage):
    folder = shutil.copytree(ended, tmp_path / "run")
    last = folder / LAST
    last.write_bytes(damage(last.read_bytes()))
    run({**tiny_config, "save_every": 4}, folder, resume=True)
    assert f"note: checkpoint {last}" in capsys.readouterr().err
    assert_same_run(whole, folder)


def test_no_flipped_bit_is_used_or_blocks_recovery(tmp_path, capsys):
    before = [tmp_path / PREVIOUS, tmp_path / "checkpoint_00.pth"]
    for epoch, path in enumerate([before[1], tmp_path / LAST, tmp_path / LAST]):
        save(path, epoch=epoch, iteration=5)
    last, random = tmp_path / LAST, np.random.default_rng(0)
    data = last.read_bytes()
    for position in random.integers(len(data), size=100).tolist() + list(
        range(len(data) - 90, len(data), 4)
    ):
        last.write_bytes(flip(data, position, 1 << random.integers(8)))
        found = newest_checkpoint(tmp_path)
        if found == last:  # the flip is in a field that nothing reads, and all checksums agree
            assert all(
                torch.equal(*pair)
                for pair in zip(
                    read_weights(last).values(),
                    torch.load(io.BytesIO(data), weights_only=True)["model"].values(),
                    strict=True,
                )
            )
        else:
            assert found in before
    capsys.readouterr()


def test_a_run_of_another_seed_is_not_continued(tiny_config, begun):
    state = torch.load(begun / LAST, weights_only=True)
    state["resume"]["seed"] += 1
    torch.save(state, begun / LAST)
    assert "--seed" in refusal(run, tiny_config, begun, True)


@pytest.mark.parametrize("entry", ["resume", "optimizer", "config"])
@pytest.mark.parametrize("value", [None, 5, [1], {"a": 1}, torch.zeros(2)], ids=str)
def test_an_entry_of_another_form_is_named(tiny_config, begun, entry, value):
    state = torch.load(begun / LAST, weights_only=True)
    torch.save({**state, entry: value}, begun / LAST)
    message = refusal(run, tiny_config, begun, True)
    assert f"{begun / LAST}" in message and entry[:6] in message


def test_without_an_undamaged_checkpoint_nothing_is_overwritten(tmp_path):
    (tmp_path / LAST).write_bytes(b"PK\x03\x04 half a file")
    assert "remove the damaged files to start a new run" in refusal(
        find_resume_file, tmp_path, "", True
    )
    assert "holds a run already" in refusal(find_resume_file, tmp_path, "", False)


def full_disk(first, last):
    """Wraps a step so that files stay below 20 kB from the first to the last of its calls."""
    return lambda step: at(first, lambda: limit(20_000))(at(last + 1, lambda: limit(None))(step))


def test_a_full_disk_within_an_epoch_is_survived(tiny_config, tmp_path, capfd, whole):
    try:
        run({**tiny_config, "save_every": 2}, tmp_path, forward=full_disk(3, 5))
    finally:
        limit(None)
    assert (
        "cannot write" in (message := capfd.readouterr().err)
        and "the next save follows after 2 iterations" in message
    )
    assert_same_run(whole, tmp_path)


def test_a_full_disk_at_the_end_of_an_epoch_stops_the_run_and_keeps_what_was_saved(
    tiny_config, tmp_path, whole
):
    config = {**tiny_config, "save_every": 4}
    try:
        with pytest.raises(
            TrainingStopped,
            match="cannot write .*checkpoint_01.pth.*earlier checkpoints are untouched",
        ):
            run(config, tmp_path, forward=full_disk(11, 1000))
    finally:
        limit(None)
    assert newest_checkpoint(tmp_path).name == LAST
    run(config, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_a_checkpoint_that_cannot_be_written_stops_the_run_at_the_next_step(
    tiny_config, tmp_path, monkeypatch
):
    def fail(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    started, steps, save = [], [], Checkpointer.save
    monkeypatch.setattr("torch.save", fail)
    monkeypatch.setattr(
        Checkpointer, "save", lambda *args, **keep: started.append(args[0]) or save(*args, **keep)
    )

    def noted(forward):
        # the first of epoch 1
        return at(7, lambda: started[0]._wait())(
            lambda *args, **options: steps.append(1) or forward(*args, **options)
        )

    with pytest.raises(
        TrainingStopped,
        match="cannot write .*checkpoint_00.pth: No space left.*earlier checkpoints are",
    ):
        run(tiny_config, tmp_path, forward=noted)
    assert len(steps) == 7


def test_a_checkpoint_has_the_state_at_its_save_though_training_goes_on(
    tiny_config, tmp_path, monkeypatch, whole
):
    gate, save = threading.Event(), torch.save
    monkeypatch.setattr("torch.save", lambda *args: gate.wait(60) and save(*args))

    def end():
        threading.Timer(0.3, gate.set).start()
        raise ValueError("on purpose")

    # in iteration 5; the write of iteration 3's begins later
    with pytest.raises(ValueError, match="on purpose"):
        run({**tiny_config, "save_every": 4}, tmp_path, forward=at(6, end))
    assert read_checkpoint(newest_checkpoint(tmp_path))["resume"]["iteration"] == 4
    run({**tiny_config, "save_every": 4}, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize(
    "how, ended",
    [
        ("end", contextlib.nullcontext()),
        ("signal", pytest.raises(Interrupted)),
        ("error in validation", pytest.raises(ValueError)),
        ("signal in validation", pytest.raises(Interrupted)),
    ],
)
def test_what_ends_a_run_waits_for_the_write(tiny_config, tmp_path, monkeypatch, how, ended):
    save = torch.save
    monkeypatch.setattr("torch.save", lambda *args: time.sleep(0.3) or save(*args))

    def validate():
        if how == "error in validation":
            raise ValueError("on purpose")
        if how == "signal in validation":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"val_score": 1.0}, "val_score"

    config = {**tiny_config, "scheduler": {**tiny_config["scheduler"], "epochs": 1}}
    with ended:
        run(config, tmp_path, forward=signal_at(3) if how == "signal" else None, validate=validate)
    found = {
        path.name: read_checkpoint(path)["resume"]["iteration"] for path in tmp_path.glob("*.pth")
    }
    assert found == {"end": {BEST: 0, LAST: 0}, "signal": {LAST: 3}}.get(how, {LAST: 6})
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    "how, ended",
    [
        ("error", pytest.raises(ValueError)),
        ("signal", pytest.raises(TrainingStopped, match="No sp")),
    ],
)
def test_a_write_that_fails_is_reported_whatever_ends_the_run(
    tiny_config, tmp_path, monkeypatch, caplog, how, ended
):
    def fail(state, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def validate():  # after the save of the epoch
        if how == "error":
            raise ValueError("on purpose")
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val_score": 1.0}, "val_score"

    monkeypatch.setattr("torch.save", fail)
    with ended:
        run(tiny_config, tmp_path, validate=validate)
    assert ("cannot write" in caplog.text and "No space left" in caplog.text) == (how == "error")


def test_an_output_dir_that_vanishes_stops_the_run(tiny_config, tmp_path):
    with pytest.raises(
        TrainingStopped, match=f"cannot write {tmp_path / 'run'}/.*: No such file or directory"
    ):
        run(tiny_config, tmp_path / "run", forward=at(9, lambda: shutil.rmtree(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_clock_jumps_do_not_matter(tiny_config, tmp_path, monkeypatch, whole):
    config = {**tiny_config, "save_every": 4}
    with monkeypatch.context() as patch:
        jumps = random.Random(0)
        patch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
        stop_at(9, config, tmp_path)
    for age, path in enumerate(sorted(tmp_path.glob("checkpoint_*.pth"), reverse=True)):
        os.utime(path, (1e9 * age, 1e9 * age))  # checkpoint_00 is the youngest by its date
    assert newest_checkpoint(tmp_path).name == LAST
    (tmp_path / LAST).unlink()
    assert newest_checkpoint(tmp_path).name == PREVIOUS
    run(config, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_old_checkpoints_are_rotated_by_count(tiny_config, tmp_path):
    config = {
        **tiny_config,
        "keep_checkpoints": 2,
        "scheduler": {**tiny_config["scheduler"], "epochs": 4},
    }
    run(config, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint_02.pth",
        "checkpoint_03.pth",
        LAST,
    ]


def test_the_newest_checkpoint_is_the_one_that_has_seen_most(tmp_path):
    # 15 iterations of 4, and from there with a batch of 8: 3 more, which make the 11th of 8
    save(tmp_path / "checkpoint_99.pth", epoch=0, iteration=15, samples_seen=60)
    save(tmp_path / LAST, epoch=0, iteration=10, samples_seen=84)
    assert newest_checkpoint(tmp_path).name == LAST


def test_resuming_another_file_in_the_folder_of_a_run_is_refused(tmp_path):
    save(tmp_path / LAST, epoch=1)
    assert "leave out --checkpoint to continue that run" in refusal(
        find_resume_file, tmp_path, "elsewhere/checkpoint_00.pth", True
    )


def test_resuming_with_another_optimizer_is_refused(tiny_config, begun):
    for change in ({"opt": "sgd"}, {"temp_lr_scale": 0.1}):
        config = {**tiny_config, "optimizer": {**tiny_config["optimizer"], **change}}
        assert "was saved with another optimizer" in refusal(run, config, begun, True)


def test_within_an_epoch_the_data_must_stay(tiny_config, begun, sharded, tmp_path):
    (entries,) = (json.loads(Path(file).read_text()) for file in tiny_config["train_file"])
    (tmp_path / "fewer.json").write_text(json.dumps(entries[:40]))
    config = {**tiny_config, "train_file": [str(tmp_path / "fewer.json")]}
    assert "number of entries of train_file changed from 48 to 40" in refusal(
        run, config, begun, True
    )
    config = {**tiny_config, "train_file": [sharded]}
    stop_at(3, config, tmp_path / "shards")
    assert "shuffle_buffer" in refusal(
        run, {**config, "shuffle_buffer": 1}, tmp_path / "shards", True
    )


def test_resuming_takes_the_new_weight_decay(tiny_config, begun):
    optimizer = {**tiny_config["optimizer"], "weight_decay": 0.5}
    run({**tiny_config, "optimizer": optimizer}, begun, resume=True)
    groups = torch.load(begun / LAST, weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.5]


def test_a_checkpoint_of_an_older_torch_resumes(tiny_config, tmp_path, whole):
    stop_at(9, tiny_config, tmp_path)
    state = torch.load(tmp_path / LAST, weights_only=True)
    for group in state["optimizer"]["param_groups"]:  # as torch 1.8 had them
        for name in group.keys() - {"params", "lr", "betas", "eps", "weight_decay", "amsgrad"}:
            del group[name]
    torch.save(state, tmp_path / LAST)
    run(tiny_config, tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_two_runs_cannot_write_to_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.output_dir.LOCK_TIMEOUT", 0.3)
    code = (
        "import os, sys, time; from engine.output_dir import make_output_dir; "
        "make_output_dir(sys.argv[1]); os.fork() or os._exit(bool(sys.stdin.read())); "
        "print('held', flush=True); time.sleep(60)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], **pipes, cwd=ROOT) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is writing there"):
            make_output_dir(tmp_path)
        holder.kill()
        # a killed run holds nothing, though a process forked from it is still there
        make_output_dir(tmp_path)


# --------------------------------------------------------------------------------------------------
# processes


def test_killed_at_random_and_restarted_equals_undisturbed(tmp_path):
    config = chaos.write_run(tmp_path, epochs=6)
    arguments = ["--config", config, "--output_dir", tmp_path / "whole", "--device", "cpu"]
    trace = str(tmp_path / "whole.trace")
    whole = launch("tests/helpers/troubled.py", *arguments, TRACE=trace)
    assert whole.returncode == 0, whole.stderr
    (iterations,) = map(len, chaos.lives(tmp_path / "whole.trace"))
    kinds = ["data worker", "everything"]  # tests/test_nodes.py kills one process
    chaos.disturb(
        config, tmp_path / "parts", tmp_path / "parts.trace", kinds, random.Random(3), longest=1
    )
    chaos.check(tmp_path / "whole", tmp_path / "parts", tmp_path / "parts.trace", iterations)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_resumes_without_being_told(tmp_path, monkeypatch, capsys, variable):
    (tmp_path / "run").mkdir()
    save(last := tmp_path / "run" / LAST, epoch=1, iteration=5)
    monkeypatch.setenv(variable, "1")
    assert find_resume_file(tmp_path / "run", "", resume=False) == last
    # of --resume --checkpoint X only the first start begins at X
    assert find_resume_file(tmp_path / "run", "x.pth", resume=True) == last
    assert find_resume_file(tmp_path / "new", "x.pth", resume=True) == Path("x.pth")
    assert find_resume_file(tmp_path / "new", "", resume=False) is None
    assert "has no checkpoint yet, so a new run starts" in capsys.readouterr().err
    monkeypatch.setenv(variable, "0")
    assert "holds a run already" in refusal(find_resume_file, tmp_path / "run", "", False)
    monkeypatch.setenv(variable, "abc")
    assert f"{variable}=abc" in refusal(find_resume_file, tmp_path / "run", "", False)


@pytest.fixture
def pair(tmp_path):
    """Starts troubled.py in two processes without a launcher that looks after them; returns them.

    They are killed in the end.
    """
    started = []

    def call(arguments, timeout, **variables):
        started.extend(
            start(
                tmp_path, "tests/helpers/troubled.py", *arguments, "--timeout", timeout, **variables
            )
        )
        return started

    yield call
    for process in started:
        process.kill()


def end_of(process, error):
    """The exit status of a process, None if it does not end, and what it has written to the file of
    its stderr.
    """
    process.join(120)
    return process.exitcode, error.read_text()


def test_a_checkpoint_that_cannot_be_written_stops_all_processes(tiny_config, pair, tmp_path):
    """Within the epoch the main process's clock says when all save, though the other's stands
    still.
    """
    config = {**tiny_config, "batch_size": 4, "save_every": "0.0001 minutes"}
    processes = pair(command_line(config, tmp_path / "run", tmp_path), timeout=60, FULL="1")
    for rank, process in enumerate(processes):
        status, message = end_of(process, tmp_path / f"{rank}.err")
        assert status == 1 and "error: cannot write " in message and "No space left" in message, (
            message
        )
    saved = read_checkpoint(newest_checkpoint(tmp_path / "run"))
    assert saved["resume"]["epoch"] == 0 and saved["resume"]["iteration"] > 1
    assert len(saved["optimizer"]["state"]) > 10


@pytest.mark.parametrize("differs", ["train_file", "the key queue_size"])
def test_ranks_that_differ_in_data_or_configuration_are_refused(
    tiny_config, shapes, pair, tmp_path, differs
):
    (tmp_path / "other").mkdir()
    (tmp_path / "more.json").write_text(
        json.dumps(json.loads((shapes / "pretrain.json").read_text()) * 2)
    )
    keys = (
        {"train_file": [str(tmp_path / "more.json")]}
        if differs == "train_file"
        else {"queue_size": 40}
    )
    other = command_line(
        {**tiny_config, "batch_size": 4, **keys}, tmp_path / "run", tmp_path / "other"
    )
    arguments = command_line({**tiny_config, "batch_size": 4}, tmp_path / "run", tmp_path)
    for rank, process in enumerate(pair(arguments, timeout=60, OTHER=str(other[1]))):
        status, message = end_of(process, tmp_path / f"{rank}.err")
        assert status == 2 and f"\nerror: {differs} is " in f"\n{message}", message
        assert (
            "rank 0" in message
            and "rank 1" in message
            and not (tmp_path / "run/config.yaml").exists()
        )


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_dies_or_hangs_the_other_ends_within_the_timeout(
    tiny_config, pair, tmp_path, signum
):
    config = {
        **tiny_config,
        "batch_size": 4,
        "scheduler": {**tiny_config["scheduler"], "epochs": 1000},
        "keep_checkpoints": 1,
    }
    trace = tmp_path / "trace"
    first, second = pair(
        command_line(config, tmp_path / "run", tmp_path), timeout=8, TRACE=str(trace)
    )
    deadline = time.monotonic() + 120
    while not (trace.exists() and len(trace.read_text().splitlines()) > 14):
        assert first.exitcode is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(second.pid, signum)
    status, message = end_of(first, tmp_path / "0.err")
    assert status == 1
    assert "Traceback" in message and "rank 0: if another rank failed first" in message
    assert newest_checkpoint(tmp_path / "run") is not None


def test_an_error_in_one_process_ends_all_and_is_shown(tiny_config, pair, tmp_path):
    arguments = command_line({**tiny_config, "batch_size": 4}, tmp_path / "run", tmp_path)
    first, second = pair(arguments, timeout=60, ERROR="broken on purpose")
    status, message = end_of(second, tmp_path / "1.err")
    assert status == 1 and "ValueError: broken on purpose" in message
    status, message = end_of(first, tmp_path / "0.err")
    assert status == 1 and "rank 0: if another rank failed first" in message


def test_a_signal_before_validation_ends_all_processes_after_the_save(
    tiny_config, shapes, tmp_path, pretrained
):
    """The signal comes to the second process in the last iteration, while the first one saves
    slowly.
    """
    config = {
        **tiny_config,
        "train_file": [str(shapes / "retrieval_train.json")],
        "batch_size": 4,
        "num_workers": 0,
    }
    config["val_file"] = config["test_file"]
    arguments = command_line(config, tmp_path / "run", tmp_path)
    ended = launch(
        "tests/helpers/troubled.py",
        *arguments,
        "--checkpoint",
        pretrained,
        SCRIPT="Retrieval",
        SLOW="3",
        SIGNAL="1",
    )
    assert (
        ended.returncode != 0
        and "before the validation of epoch 0; continue with --resume" in ended.stderr
    ), ended.stderr
    assert newest_checkpoint(tmp_path / "run").name == LAST


def dying_worker(dataset, index, times, notes):
    """Makes a data worker that reads the sample die, the given number of times; notes: a folder
    that counts them.
    """
    plain = dataset.read

    def read(i):
        if i == index and len(list(notes.iterdir())) < times:
            (notes / f"{os.getpid()}").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(i)

    dataset.read = read
    return dataset


def batches_of(config, dataset):
    batches = TrainBatches(
        dataset, build_tokenizer(config["tokenizer"]), config, device=CPU, seed=1
    )
    batches.begin(0)
    return batches


@pytest.fixture
def impatient(monkeypatch):
    """Let torch (2.x) look for dead data workers every 0.2 seconds instead of 5."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def test_a_dead_data_worker_is_replaced_and_nothing_is_lost(
    tiny_config, tmp_path, capsys, impatient
):
    config = {**tiny_config, "num_workers": 2}
    whole = [
        batch.files
        for batch in batches_of(config, build_dataset("pretrain", "train", config, seed=1))
    ]
    dataset = dying_worker(
        build_dataset("pretrain", "train", config, seed=1), 7, times=2, notes=tmp_path
    )
    assert [batch.files for batch in batches_of(config, dataset)] == whole
    assert capsys.readouterr().err.count("a data worker died") == 2


def test_data_workers_that_die_without_end_stop_the_run(tiny_config, tmp_path, impatient):
    config = {**tiny_config, "num_workers": 1}
    dataset = dying_worker(
        build_dataset("pretrain", "train", config, seed=1), 7, times=1000, notes=tmp_path
    )
    with pytest.raises(
        TrainingStopped, match="4 failures in a row: a data worker died.*num_workers.*--shm-size"
    ):
        list(batches_of(config, dataset))


@pytest.fixture
def hanging(monkeypatch, tmp_path):
    """Makes data workers hang before they begin, the given number of them, and gives up soon."""
    notes = tmp_path / "hanging"
    notes.mkdir()
    begin = loading.begin_worker

    def hang(times):
        def begin_or_hang():
            if len(list(notes.iterdir())) < times:
                (notes / f"{os.getpid()}").write_text("")
                time.sleep(3600)
            begin()

        monkeypatch.setattr(loading, "begin_worker", begin_or_hang)
        monkeypatch.setattr(loading, "START_TIMEOUT", 0.5)

    return hang


def test_data_workers_that_hang_before_they_begin_are_started_again(
    tiny_config, hanging, monkeypatch, caplog
):
    config = {**tiny_config, "num_workers": 2}
    dataset = build_dataset("pretrain", "train", config, seed=1)
    whole = [batch.files for batch in batches_of(config, dataset)]
    hanging(times=1)
    monkeypatch.setattr(loading, "MAX_STARTS", 100)  # a slow machine needs more than two
    assert [batch.files for batch in batches_of(config, dataset)] == whole
    assert "did not begin" in caplog.text


@pytest.mark.parametrize(
    "load", [batches_of, lambda config, data: loading.test_loader(data, config, device=CPU)]
)
def test_data_workers_that_never_begin_stop_the_run(tiny_config, hanging, caplog, load):
    config = {**tiny_config, "num_workers": 1}
    dataset = build_dataset("pretrain", "train", config, seed=1)
    hanging(times=1000)
    with pytest.raises(TrainingStopped, match="3 attempts.*num_workers"):
        list(load(config, dataset))
    assert caplog.text.count("starting the workers again") == loading.MAX_STARTS


def test_three_processes_resume_exactly(tiny_config, tmp_path):
    """Three ranks, because the sum of two numbers does not depend on their order."""
    config = {
        **tiny_config,
        "batch_size": 2,
        "num_workers": 1,
        "test_file": None,
        "save_every": "3 iterations",
        "scheduler": {**tiny_config["scheduler"], "epochs": 3},
    }
    whole = launch("Pretrain.py", *command_line(config, tmp_path / "whole", tmp_path), processes=3)
    assert whole.returncode == 0, whole.stderr
    arguments = command_line(config, tmp_path / "parts", tmp_path)
    # an epoch has 8 iterations. INTERRUPT: a signal to one process near the end of the first epoch,
    # after which all processes stop at the same iteration; SIGNAL: a signal at the end of the
    # second; MISHAP: a kill in the middle of the third
    epochs = []
    for trouble in ({"INTERRUPT": "1"}, {"SIGNAL": "1"}, {"MISHAP": "22"}):
        stopped = launch(
            "tests/helpers/troubled.py", *arguments, "--resume", processes=3, **trouble
        )
        assert stopped.returncode and (
            "MISHAP" in trouble or "continue with --resume" in stopped.stderr
        ), stopped.stderr
        epochs.append(read_checkpoint(newest_checkpoint(tmp_path / "parts"))["resume"]["epoch"])
    rest = launch("Pretrain.py", *arguments, "--resume", processes=3)
    assert rest.returncode == 0 and epochs == [1, 2, 2], rest.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_another_number_of_processes_goes_on_with_the_samples_not_yet_seen(
    tiny_config, sharded, tmp_path
):
    config = {**tiny_config, "train_file": [sharded], "batch_size": 4, "test_file": None}
    arguments = command_line(config, tmp_path / "run", tmp_path)
    stopped = launch("tests/helpers/troubled.py", *arguments, INTERRUPT="1")
    assert "continue with --resume" in stopped.stderr, stopped.stderr
    seen = torch.load(tmp_path / "run" / LAST, weights_only=True)["resume"]
    assert seen["epoch"] == 1 and seen["samples_seen"] == 8 * seen["iteration"] > 0
    resumed = launch(
        "tests/helpers/troubled.py",
        *arguments,
        "--resume",
        processes=3,
        FILES=str(tmp_path / "files"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (
        "continues with 3" in resumed.stderr
        and "every sample of the epoch is still seen once" in resumed.stderr
    )
    state = torch.load(tmp_path / "run/checkpoint_01.pth", weights_only=True)
    assert state["epoch"] == 1 and len(log(tmp_path / "run")) == 2
    # what the two processes had seen of the epoch, and what the three have
    dataset = build_dataset("pretrain", "train", config)
    first = EpochBatches(len(dataset), 8, seed=42, order=dataset.order)
    first.begin(1)
    files = [dataset[index].file for batch in list(first)[: seen["iteration"]] for index in batch]
    files += [file for path in tmp_path.glob("files*") for file in path.read_text().split()]
    left = len(dataset) - 8 * seen["iteration"]
    assert len(files) == len(set(files)) == len(dataset) - left % 12


# --------------------------------------------------------------------------------------------------
# numbers


def change_losses(numbers, change):
    """Wraps a step so that change is applied to each of its losses in some of its calls."""

    def wrap(step):
        calls = iter(range(1, 1000))

        def stepped(*args, **options):
            losses, number = step(*args, **options), next(calls)
            return (
                {name: change(loss) for name, loss in losses.items()}
                if number in numbers
                else losses
            )

        return stepped

    return wrap


def times(factor):
    return lambda loss: loss * factor


@pytest.mark.parametrize("opt", ["adamW", "sgd"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_reported(
    tiny_config, tmp_path, capfd, opt, factor
):
    config = {
        **tiny_config,
        "max_skipped_steps": 2,
        "optimizer": {**tiny_config["optimizer"], "opt": opt},
    }
    model = run(config, tmp_path / "run", forward=change_losses({3, 8}, times(factor)))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    entries = log(tmp_path / "run")
    assert [entry.get("train_skipped_steps") for entry in entries] == [1, 1]
    assert all(
        map(torch.isfinite, (torch.tensor(v) for v in entries[0].values() if isinstance(v, float)))
    )
    lines = (tmp_path / "run/bad_steps.txt").read_text().splitlines()
    assert len(lines) == 2 and "not finite in epoch 0 iteration 2: the step was skipped" in lines[0]
    assert lines[0].count(".jpg") == 8 and "loss_mlm" in lines[0]
    assert capfd.readouterr().err.count("the step was skipped") == 2
    with pytest.raises(
        TrainingStopped, match="3 steps were not finite, and max_skipped_steps is 2"
    ) as error:
        run(config, tmp_path / "again", forward=change_losses({3, 8, 10}, times(factor)))
    message = str(error.value)
    assert (
        "loss_itm" in message
        and "not finite in epoch 1 iteration 3" in message
        and message.count(".jpg") == 8
    )
    assert f"the last checkpoint in {tmp_path / 'again'}" in message and "\n" not in message
    assert all(value.isfinite().all() for value in read_weights(tmp_path / "again" / LAST).values())


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(
    tiny_config, tmp_path, monkeypatch
):
    states, train_step = [], engine.trainer.train_step

    def keep(state, *args):
        moments = state.optimizer.state_dict()["state"].items()
        values = {f"{i} {key}": v for i, values in moments for key, v in values.items()}
        weights = state.model.state_dict().items()
        values |= {n: v for n, v in weights if "_m." not in n and "queue" not in n}
        states.append({name: value.clone() for name, value in values.items()})
        return train_step(state, *args)

    monkeypatch.setattr("engine.trainer.train_step", keep)
    config = {**tiny_config, "max_skipped_steps": 1}
    run(config, tmp_path, forward=change_losses({4}, times(float("nan"))))
    steps = states[1:]
    # after 3 and after 4 iterations
    assert all(torch.equal(steps[2][name], steps[3][name]) for name in steps[0])
    assert not any(
        torch.equal(steps[3][name], steps[4][name]) for name in steps[0] if name.endswith("step")
    )
    assert not torch.equal(
        steps[3]["visual_encoder.cls_token"], steps[4]["visual_encoder.cls_token"]
    )


def test_features_that_are_not_finite_do_not_stay_in_the_queues(tiny_config, tmp_path, monkeypatch):
    encode = ContrastiveModel.encode_text
    calls = iter(range(1, 1000))

    def broken(self, text, momentum=False):
        embeds, feat = encode(self, text, momentum)
        if momentum and next(calls) == 3:
            feat[0, 0] = float("nan")
        return embeds, feat

    monkeypatch.setattr(ContrastiveModel, "encode_text", broken)
    run({**tiny_config, "max_skipped_steps": 1}, tmp_path)
    assert [entry.get("train_skipped_steps") for entry in log(tmp_path)] == [1, None]
    assert all(value.isfinite().all() for value in read_weights(tmp_path / LAST).values())


def test_gradients_that_are_not_finite_are_found_though_losses_are(tiny_config, tmp_path):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    with pytest.raises(TrainingStopped, match="grad_norm not finite in epoch 0 iteration 4"):
        run(tiny_config, tmp_path, forward=change_losses({5}, Explode.apply))


def test_same_seed_same_result_with_several_threads(tiny_config, tmp_path):
    def run_twice():
        torch.set_num_threads(2)
        for name in ("one", "other"):
            run(tiny_config, tmp_path / name)

    # in a process of its own: once OpenMP has threads, a fork of this process would hang
    process = multiprocessing.get_context("fork").Process(target=run_twice)
    process.start()
    process.join()
    assert not process.exitcode
    assert_same_run(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    "device, key, switched", [("cpu", False, True), ("meta", True, True), ("meta", False, False)]
)
def test_the_switch_makes_other_devices_deterministic_too(
    tiny_config, tmp_path, device, key, switched
):
    torch.use_deterministic_algorithms(False)
    config = {
        **tiny_config,
        "deterministic": key,
        "optimizer": {**tiny_config["optimizer"], "opt": "nothing"},
    }
    model = build_model("pretrain", tiny_config)
    # raised before the first computation
    with pytest.raises(InputError, match="optimizer: opt 'nothing'"):
        create_train_state(model, range(1), config, device=torch.device(device), seed=0)
    assert torch.are_deterministic_algorithms_enabled() is switched


def test_the_learning_rate_follows_the_rule_for_another_global_batch(tiny_config, tmp_path, capsys):
    config = {**tiny_config, "scheduler": {**tiny_config["scheduler"], "epochs": 1}}
    for name, reference, said in (
        ("plain", None, "learning rate 0.001, as configured"),
        ("scaled", 32, "learning rate 0.0005, 0.001 x sqrt(8 / reference_batch 32)"),
    ):
        run({**config, "reference_batch": reference}, tmp_path / name)
        assert (
            f"global batch 8: world size 1 x batch_size 8 x accumulate 1; {said}"
            in capsys.readouterr().err
        )
    rates = [entry["train_lr"] for name in ("plain", "scaled") for entry in log(tmp_path / name)]
    assert rates[1] == pytest.approx(rates[0] / 2)
    saved = torch.load(tmp_path / "scaled" / LAST, weights_only=True)
    assert saved["config"]["optimizer"]["lr"] == 1e-3 and saved["config"]["reference_batch"] == 32


@pytest.mark.parametrize(
    "keys, said",
    [
        (
            {"warmup_iters": 13},
            "the warm-up takes 13 iterations, but only 12 are available",
        ),
        (
            {"warmup_iters": None, "warmup_epochs": 1},
            "the warm-up takes 100 iterations, but only 6 are available",
        ),
        ({"warmup_iters": 12}, None),
        ({"warmup_iters": 13, "warmup_lr": 1e-3}, None),  # nothing changes during it
    ],
)
def test_a_warm_up_beyond_the_end_is_said(tiny_config, tmp_path, capsys, keys, said):
    run({**tiny_config, "scheduler": {**tiny_config["scheduler"], **keys}}, tmp_path)
    err = capsys.readouterr().err
    assert said in err if said else "warm-up" not in err
