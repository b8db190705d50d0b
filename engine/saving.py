"""Checkpoints of a run: written whole or not at all, rotated, found again after any failure,
resumed from.
"""

import contextlib
import copy
import hashlib
import mmap
import os
import re
import shutil
import struct
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import torch
from tqdm import tqdm

from configs.config import as_config
from configs.load import save_config, save_interval
from models.weights import check_vocabulary, load_weights, named_tensors, read_checkpoint
from models.tokenizer import VOCABULARY
from utils import (
    TEMPORARY,
    InputError,
    Interrupted,
    TrainingStopped,
    atomic_write,
    environment_number,
    gather_lists,
    is_main,
    world_size,
)

# a zip file ends with a record of 22 bytes, which begins and ends with these bytes; its comment is
# the SHA-256 in hexadecimal
DIGEST_SIZE = 64
END_OF_ZIP, COMMENT_LENGTH = b"PK\5\6", struct.pack("<H", DIGEST_SIZE)
LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"


@dataclass
class Position:
    """Where a run stands, the same on all processes: the next iteration to do, and what the epoch
    has recorded so far.
    """

    epoch: int = 0
    iteration: int = 0
    seen: int = 0  # samples of the epoch that all processes together have seen
    sums: dict = field(default_factory=dict)  # name -> sum over the epoch's `counted` iterations
    counted: int = 0
    skipped_steps: int = 0  # of the epoch
    skipped_steps_before: int = 0  # of earlier epochs
    skipped: list = field(default_factory=list)  # why entries could not be used, of the epoch
    # score and epoch of the best validation so far, if there is validation
    best: dict = field(default_factory=dict)

    def following(self):
        """Return the position at the beginning of the next epoch."""
        skipped_steps = self.skipped_steps_before + self.skipped_steps
        return Position(self.epoch + 1, skipped_steps_before=skipped_steps, best=self.best)


# --------------------------------------------------------------------------------------------------
# writing


@contextlib.contextmanager
def writing(path, kept="", failures=OSError):
    """Context that writes a file of a run. Raises TrainingStopped for `failures`.

    kept: part of the message that names the unharmed files.
    """
    try:
        yield
    except failures as error:
        # torch.save says that a position is not the expected one, and the operating system why
        reason = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None)
        reason = reason or (
            f"is the disk full? ({error})" if isinstance(error, RuntimeError) else error
        )
        raise TrainingStopped(f"cannot write {path}: {reason}{kept and '; '}{kept}") from None


def save_settings(model, config, folder):
    """Write config.yaml and its vocabulary tokenizer.json, which a model of this run needs beside
    its weights.

    Raises TrainingStopped.
    """
    if model.vocabulary:
        config = {**as_config(config).to_dict(), "tokenizer": VOCABULARY}
        with writing(folder / VOCABULARY), atomic_write(folder / VOCABULARY) as file:
            file.write(model.vocabulary.encode())
    with writing(folder / "config.yaml"):
        save_config(config, folder)


def _writing_checkpoint(path):
    # torch.save raises either
    return writing(path, "earlier checkpoints are untouched", (OSError, RuntimeError))


class Saver:
    """Saves a run while it trains on: what changes is copied to host memory, and a thread of the
    main process writes the copy.

    At most one write is under way: a save that comes while one is being written waits for it, and
    so does leaving the context: a run that ends in any way leaves no write undone. Every process
    must call save and finish, at the same places. save_every: as the configuration has it.
    """

    def __init__(self, save_every):
        self.minutes, self.iterations = save_interval(save_every)
        self.every = (
            f"{self.minutes:g} minutes" if self.minutes else f"{self.iterations} iterations"
        )
        # the latest write, until it is known how it ended
        self.thread, self.write = ThreadPoolExecutor(1, "save"), None
        self.buffers = {}

    def __enter__(self):
        self.begun = monotonic()
        return self

    def __exit__(self, _, error, trace):
        self.thread.shutdown()
        if failure := self.wait():
            if error is None or isinstance(error, Interrupted):
                raise TrainingStopped(failure) from None
            print(f"note: {failure}", file=sys.stderr, flush=True)

    def save(
        self,
        path,
        model,
        optimizer,
        config,
        position,
        seed,
        lr,
        entries=None,
        keep=None,
        otherwise="",
    ):
        """Take a snapshot of the state and write it in a background thread.

        The file has the released keys (model, optimizer, lr_scheduler, config, epoch) and our keys
        for exact resuming. When it is complete and on the disk, it is renamed to path and then
        LAST, and rotate follows. entries: of the training set. epoch: the last epoch that has
        begun. Random states need no key, because every iteration is seeded (utils.seed_everything).
        If the file cannot be written, existing files stay, and the next save or finish raises
        TrainingStopped. With `otherwise` a note with this text is printed instead. Raises
        TrainingStopped for the previous write, on all processes.
        """
        self.finish()
        if not is_main():
            return
        self.begun = monotonic()
        on_gpu = next(model.parameters()).is_cuda
        done = position.iteration == 0
        own = {"seed": seed, "world_size": world_size(), "entries": entries, "task": model.task}
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": {"lr": lr},
            "config": as_config(config).to_dict(),
            "epoch": position.epoch - 1 if done else position.epoch,
            "resume": {**asdict(position), **own},
            **({"tokenizer_json": model.vocabulary} if model.vocabulary else {}),
        }
        state = copy_to_host(state, self.buffers, {})
        # what follows on this stream comes after the copies; only the thread has to wait for them
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        self.write = self.thread.submit(_write, path, state, copied, keep, otherwise)

    def wait(self):
        """Wait for the write that this process has under way.

        Return why it failed, "" if it did not.
        """
        error = self.write and self.write.exception()
        if error and not isinstance(error, TrainingStopped):
            raise error
        return str(error or "")

    def finish(self):
        """Wait for the write that is under way; every process must call it.

        Raises TrainingStopped on all if it failed.
        """
        failures = gather_lists([self.wait()])
        self.write = None
        if any(failures):
            raise TrainingStopped(failures[0])

    def failed(self):
        """Whether a write has ended badly, as the process that wrote knows."""
        return self.write is not None and self.write.done() and self.write.exception() is not None

    def late(self):
        """Whether save_every minutes have passed since the last save, by the main process's clock.

        It is said once.
        """
        late = is_main() and self.minutes > 0 and monotonic() - self.begun >= 60 * self.minutes
        if late:
            self.begun = monotonic()
        return late


def copy_to_host(value, buffers, copies, path=()):
    """Copy the tensors of a state of dicts and lists into host memory, pinned for GPU tensors.
    Return the copied state.

    buffers: by path in the state; missing ones are created, and later copies reuse them. copies:
    {}, filled with the copy of each distinct tensor. The call does not wait for a GPU: the copies
    are complete once its stream has run all work queued so far.
    """
    if isinstance(value, torch.Tensor):
        shown = value.data_ptr(), value.dtype, value.shape, value.stride()
        if shown not in copies:  # tied weights are also one tensor in the file
            buffer = buffers.get(path)
            if buffer is None or (buffer.dtype, buffer.shape) != (value.dtype, value.shape):
                buffers[path] = buffer = torch.empty_like(
                    value, device="cpu", pin_memory=value.is_cuda
                )
            copies[shown] = buffer.copy_(value, non_blocking=True)
        return copies[shown]
    if isinstance(value, dict):
        copied = copy.copy(value)  # with what a state dict has beside its items
        copied.update(
            {
                key: copy_to_host(inner, buffers, copies, (*path, key))
                for key, inner in value.items()
            }
        )
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(
            copy_to_host(inner, buffers, copies, (*path, i)) for i, inner in enumerate(value)
        )
    return value


def _write(path, state, copied, keep, otherwise):
    """Write a checkpoint, atomically, and do what must follow in this order; copied: the event to
    wait for. See Saver.save.
    """
    if copied:
        copied.synchronize()
    try:
        with _writing_checkpoint(path), atomic_write(path, "w+b") as file:
            torch.save(state, file)
            add_digest(file)
            file.flush()
            _keep_previous(path.parent)
        if path.name != LAST:
            make_last(path)
        if keep:
            rotate(path.parent, state["epoch"], keep)
    except TrainingStopped as error:
        if not otherwise:
            raise
        tqdm.write(f"note: {error}; {otherwise}", file=sys.stderr)


def add_digest(file: BinaryIO) -> None:
    """Append the SHA-256 of a zip file as its comment. file: open for reading and writing."""
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT_LENGTH)
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.write(digest.encode())


def _keep_previous(folder):
    """The last checkpoint gets a second name, under which it stays when a newer one takes the
    first.
    """
    if (folder / LAST).exists():
        try:
            _link(folder / LAST, folder / PREVIOUS)
        except OSError:  # a file system without links
            os.replace(folder / LAST, folder / PREVIOUS)


def _link(source, target):
    """Make target another name of source, atomically.

    Raises OSError where the file system has no links.
    """
    temporary = target.with_name(f".{target.name}.link{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)
    # rename(2) leaves it where both are names of one file already
    temporary.unlink(missing_ok=True)


def make_last(path):
    """Make checkpoint_last.pth the same file as path, without writing it again where the file
    system allows.

    Raises TrainingStopped if it cannot be written.
    """
    last = path.with_name(LAST)
    with _writing_checkpoint(last):
        try:
            _link(path, last)
        except OSError:
            with atomic_write(last) as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file)


def rotate(folder, epoch, keep):
    """Remove the checkpoint_%02d.pth of all but the last `keep` epochs up to `epoch`.

    The best and the last have own names.
    """
    for path in Path(folder).glob("checkpoint_*.pth"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pth", path.name)
        if number and int(number[1]) <= epoch - keep:
            with contextlib.suppress(OSError):  # what cannot be removed stays
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# finding


def find_resume_file(output_dir, checkpoint, wanted):
    """Return the file that a run continues from, None for a new one; every process must call it.

    wanted: --resume was given; a restart by torchrun or Slurm means it too. It is the checkpoint of
    output_dir that is furthest in the run and undamaged. With checkpoint, --resume begins there,
    but a restart goes on with what the run itself has saved since. Raises InputError, on all
    processes, where a run would overwrite the checkpoints of another.
    """
    # torchrun's only on the node that caused the restart
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    restart = any(gather_lists([any(environment_number(name, 0) for name in counts)]))
    found = None
    if is_main():
        try:
            found = _find_resume_file(Path(output_dir), checkpoint, wanted, restart)
        except InputError as error:
            found = error
    found = gather_lists([found])[0]
    if isinstance(found, InputError):
        raise found
    return found


def _find_resume_file(output_dir, checkpoint, wanted, restart):
    if restart or (wanted and not checkpoint):
        if found := newest_checkpoint(output_dir):
            return found
    elif any(_saves_of(output_dir)):
        remedy = (
            "leave out --checkpoint to continue it" if wanted else "add --resume to continue it"
        )
        raise InputError(
            f"--output_dir {output_dir} holds a run already ({run_files(output_dir)[0].name}): {remedy}, name "
            "another folder, or remove it"
        )
    if wanted and checkpoint:
        return Path(checkpoint)
    if wanted or restart:
        why = "--resume" if wanted else "restart"
        print(f"note: {why}: {output_dir} holds no checkpoint yet, so a new run starts", flush=True)
    return None


def is_run_file(path):
    """Whether a path has the name of a run's checkpoint."""
    return bool(re.fullmatch(r"checkpoint_(\d+|last|previous|best)\.pth", path.name))


def run_files(folder):
    """Return the checkpoints of a run's folder, or of what was one of other code."""
    return sorted(filter(is_run_file, Path(folder).glob("checkpoint_*.pth")))


def _saves_of(folder):
    """Return a folder's checkpoints as (epoch, seen samples of it, whether it is LAST, path), and
    the problems of damaged ones.

    Raises InputError for a checkpoint without the state of a run, because a run in this folder
    would replace it.
    """
    saves, damaged = [], []
    for path in run_files(folder):
        try:
            resume = read_checkpoint(path).get("resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        if not isinstance(resume, dict) or not {"epoch", "seen"} <= resume.keys():
            if reason := _damage(path):
                damaged.append(f"checkpoint {path} is damaged: {reason}")
                continue
            raise InputError(
                f"--output_dir {folder}: {path} has the weights but not the state of a run, as other code and "
                "tools.export write it; a run here would overwrite it. To start from its weights: --checkpoint "
                f"{path} --output_dir OTHER"
            )
        # by samples, because the size of an iteration may have changed
        saves.append((resume["epoch"], resume["seen"], path.name == LAST, path))
    return saves, damaged


def newest_checkpoint(folder):
    """Return the undamaged checkpoint of a run's folder with the most progress, according to its
    content, not its date.

    Returns None if there is no checkpoint. A note names each damaged one. Raises InputError if all
    are damaged, or if one has no state of a run.
    """
    saves, damaged = _saves_of(folder)
    for *_, path in sorted(saves, reverse=True):
        if reason := _damage(path):
            damaged.append(f"checkpoint {path} is damaged: {reason}")
            continue
        for message in damaged:
            print(f"note: {message}; going on from {path}", flush=True)
        return path
    if damaged:
        raise InputError(
            f"--resume: {damaged[0]}; there is no other checkpoint to go on from: remove it to start anew"
        )
    return None


def _damage(path):
    """Return the damage of a .pth file according to its digest, else its checksums; "" if there is
    none.
    """
    try:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            end = content[-22 - DIGEST_SIZE : -DIGEST_SIZE]
            if end.startswith(END_OF_ZIP) and end.endswith(COMMENT_LENGTH):
                with memoryview(content) as view:
                    digest = hashlib.sha256(view[:-DIGEST_SIZE]).hexdigest().encode()
                return "" if digest == content[-DIGEST_SIZE:] else "its digest does not agree"
        with zipfile.ZipFile(path) as file:  # a file without a digest
            record = file.testzip()
    except Exception as error:  # a damaged file can raise any exception
        return str(error) or type(error).__name__
    return f"the checksum of {record} does not agree" if record else ""


# --------------------------------------------------------------------------------------------------
# resuming


def resume(path, model, optimizer, config, seed, entries=None):
    """Restore model and optimizer of a saved run. Return its Position. Raises InputError if the
    file does not fit.

    entries: number of entries of the training set, which must not change within an epoch.
    """
    state = read_checkpoint(path)
    lacking = [
        key for key in ("optimizer", "resume", "config") if not isinstance(state.get(key), dict)
    ]
    if lacking:
        raise InputError(
            f"--resume: {path} has no {lacking[0]}, so it cannot be continued; --checkpoint alone starts from "
            "its weights"
        )
    saved, saved_config = state["resume"], state["config"]
    config = as_config(config).to_dict()
    if saved_config["optimizer"]["opt"].lower() != config["optimizer"]["opt"].lower():
        raise _other_optimizer(path)
    check_vocabulary(model, state, path)
    load_weights(model, named_tensors(state, path), path)
    load_optimizer(optimizer, state["optimizer"], path)
    position = Position(
        **{key.name: saved[key.name] for key in fields(Position) if key.name in saved}
    )
    if saved["seed"] != seed:
        raise InputError(
            f"--resume: {path} is of a run with --seed {saved['seed']}, not {seed}: give that seed, or name "
            "another --output_dir"
        )
    if position.seen:
        _check_same_epoch(path, saved, saved_config, config, entries)
    if is_main():
        if saved["world_size"] != world_size():
            print(
                f"note: the run was saved by {saved['world_size']} processes and goes on with {world_size()}: every sample "
                "of the epoch is still seen once, in another order"
            )
        # the vocabulary was compared above
        if changed := [
            key for key in config if key != "tokenizer" and saved_config.get(key) != config[key]
        ]:
            print(f"note: the configuration differs from the saved run's in {', '.join(changed)}")
    return position


def _check_same_epoch(path, saved, saved_config, config, entries):
    """Raise InputError if the rest of the epoch cannot be located, because the data or its order
    changed.
    """
    kept = [("the number of entries of train_file", entries, saved["entries"])]
    if any(name.endswith(".tar") for name in config["train_file"] or []):
        kept.append(
            ("shuffle_buffer", config["shuffle_buffer"], saved_config.get("shuffle_buffer"))
        )
    for what, now, then in kept:
        if now != then:
            raise InputError(
                f"--resume: {path} was saved within an epoch, in which {what} was {then} and must not change to "
                f"{now}: change it when the epoch is over"
            )


def _other_optimizer(path):
    return InputError(
        f"--resume: {path} holds the state of another optimizer, or of other parameters: leave optimizer, "
        "objectives, distill and the model as they were, or start from its weights with --checkpoint alone"
    )


def load_optimizer(optimizer, state, path):
    """Load the state of an optimizer.

    Options such as weight_decay are not loaded. path: of the checkpoint, for the InputError if its
    state does not fit.
    """
    for group, own in zip(state["param_groups"], optimizer.param_groups):
        # an older torch may have had fewer
        group |= {name: value for name, value in own.items() if name != "params"}
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError):
        raise _other_optimizer(path) from None
