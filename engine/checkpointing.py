"""Checkpoints of a run: write them atomically, find the newest, resume from it."""

import contextlib
import copy
import hashlib
import logging
import mmap
import os
import re
import shutil
import struct
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from configs.config import Config
from configs.load import save_interval
from engine.launch import Interrupted
from engine.output_dir import writing
from models.weights import check_vocabulary, load_weights, named_tensors, read_checkpoint
from utils import (
    InputError,
    TrainingStopped,
    atomic_write,
    environment_number,
    gather_lists,
    is_main,
    world_size,
)

if TYPE_CHECKING:
    from engine.trainer import TrainState

# a zip file ends with a record of 22 bytes, which begins and ends with these bytes; its comment is
# the SHA-256 in hexadecimal
DIGEST_SIZE = 64
END_OF_ZIP, COMMENT_LENGTH = b"PK\5\6", struct.pack("<H", DIGEST_SIZE)
DAMAGED = "checkpoint {} is damaged: its SHA-256 does not match"
LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"

logger = logging.getLogger(__name__)


@dataclass
class Best:
    """The best epoch so far and its validation score."""

    score: float
    epoch: int


@dataclass(kw_only=True)
class Progress:
    """Progress of a run and the records of its current epoch, equal on all ranks.

    Attributes:
        epoch: Epoch that is being trained.
        iteration: Optimizer steps of the epoch that are done.
        samples_seen: Samples of the epoch that are done, over all ranks.
        sums: For each metric the sum over the epoch's `counted` iterations.
        counted: Iterations of the epoch whose metrics are finite.
        skipped_steps: Iterations of the epoch whose metrics are not finite.
        skipped_steps_before: Skipped iterations of earlier epochs.
        skipped: Reasons why entries of the epoch were unusable.
        best: The best epoch, None before the first validation.
    """

    epoch: int = 0
    iteration: int = 0
    samples_seen: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    skipped_steps: int = 0
    skipped_steps_before: int = 0
    skipped: list[str] = field(default_factory=list)
    best: Best | None = None

    def begin_next_epoch(self) -> None:
        """Set the progress to the beginning of the next epoch."""
        self.epoch, self.iteration, self.samples_seen = self.epoch + 1, 0, 0
        self.skipped_steps_before += self.skipped_steps
        self.sums, self.counted, self.skipped_steps, self.skipped = {}, 0, 0, []


PROGRESS = [key.name for key in fields(Progress)]


# --------------------------------------------------------------------------------------------------
# writing


class Checkpointer:
    """Saves a run while it trains on.

    A save copies the state to host memory, and a thread of rank 0 writes the copy. At most one
    write is pending: the next save waits for it, and so does leaving the context. Every rank must
    call `save` and `finish`, at the same places.

    Args:
        output_dir: Folder of the checkpoints.
        save_every: The configuration key.
        entries: Number of entries of the training set.
    """

    def __init__(
        self, output_dir: Path | str, save_every: int | str = 0, entries: int | None = None
    ) -> None:
        self.output_dir, self.entries = Path(output_dir), entries
        self.minutes, self.iterations = save_interval(save_every)
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: Future[None] | None = None
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        self._thread.shutdown()
        if failure := self._wait():
            if error is None or isinstance(error, Interrupted):
                raise TrainingStopped(failure) from None
            logger.warning("%s", failure)

    def save(
        self,
        state: "TrainState",
        name: str,
        lr: float,
        *,
        keep: int | None = None,
        optional: bool = False,
    ) -> Path:
        """Take a snapshot of the state now and write it in a background thread.

        The file has the released keys (model, optimizer, lr_scheduler, config, epoch) and keys for
        exact resuming. It is renamed to `name` once it is complete on the disk, and then copied to
        checkpoint_last.pth. Random states need no key, because every iteration is seeded.

        Args:
            state: The run.
            name: Name of the file.
            lr: Learning rate of the last iteration.
            keep: Number of epochs whose checkpoint_%02d.pth stay, None for all.
            optional: Log a note if the file cannot be written, instead of stopping the run.

        Returns:
            The path of the file.

        Raises:
            TrainingStopped: On all ranks, if the previous file could not be written. Earlier
                checkpoints are untouched.
        """
        self.finish()
        path = self.output_dir / name
        if not is_main():
            return path
        self._saved_at = time.monotonic()
        snapshot = copy_to_host(self._state_dict(state, lr), self._buffers, {})
        # later work on this stream follows the copies; only the thread has to wait for them
        on_gpu = state.device.type == "cuda"
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        self._pending = self._thread.submit(self._write, path, snapshot, copied, keep, optional)
        return path

    def _state_dict(self, state: "TrainState", lr: float) -> dict[str, Any]:
        progress = asdict(Progress(**{name: getattr(state, name) for name in PROGRESS}))
        more = {
            "seed": state.seed,
            "world_size": world_size(),
            "entries": self.entries,
            "pretrained": list(state.model.pretrained),
        }
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "lr_scheduler": {"lr": lr},
            "config": state.config.to_dict(),
            # the last epoch that has begun
            "epoch": state.epoch - 1 if state.iteration == 0 else state.epoch,
            "resume": {**progress, **more, "task": state.model.task},
        }
        if state.model.vocabulary:
            content["tokenizer_json"] = state.model.vocabulary
        if state.model.ranking:
            content["ranking"] = state.model.ranking
        return content

    def _write(
        self,
        path: Path,
        snapshot: dict[str, Any],
        copied: torch.cuda.Event | None,
        keep: int | None,
        optional: bool,
    ) -> None:
        """Write a checkpoint, then update checkpoint_last.pth, then remove old epochs."""
        if copied:
            copied.synchronize()
        try:
            with _writing_checkpoint(path), atomic_write(path, "w+b") as file:
                torch.save(snapshot, file)
                add_digest(file)
                file.flush()
                if path.name == LAST and path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
            if path.name != LAST:
                copy_to_last(path)
            if keep:
                rotate(path.parent, snapshot["epoch"], keep)
        except TrainingStopped as error:
            if not optional:
                raise
            # a full disk may be emptied before the next save; stopping would lose the progress
            every = f"{self.minutes:g} minutes" if self.minutes else f"{self.iterations} iterations"
            logger.warning("%s; training goes on, and saves again after %s", error, every)

    def _wait(self) -> str:
        """Wait for the pending write of this process. Return why it failed, "" if it did not."""
        error = self._pending.exception() if self._pending else None
        if error and not isinstance(error, TrainingStopped):
            raise error
        return str(error or "")

    def finish(self) -> None:
        """Wait for the pending write. Raises TrainingStopped on all ranks if it failed."""
        failures = gather_lists([self._wait()])
        self._pending = None
        if any(failures):
            raise TrainingStopped(failures[0])

    def has_failed(self) -> bool:
        """Return whether the pending write of this process has failed."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def is_late(self) -> bool:
        """Return whether save_every minutes have passed, by the clock of rank 0; True once."""
        waited = time.monotonic() - self._saved_at
        late = is_main() and self.minutes > 0 and waited >= 60 * self.minutes
        if late:
            self._saved_at = time.monotonic()
        return late

    def is_due(self, iteration: int) -> bool:
        """Return whether to save after an iteration by the number of iterations."""
        return self.iterations > 0 and (iteration + 1) % self.iterations == 0


def copy_to_host(
    value: Any,
    buffers: dict[tuple[Any, ...], torch.Tensor],
    copies: dict[tuple[Any, ...], torch.Tensor],
    path: tuple[Any, ...] = (),
) -> Any:
    """Copy the tensors of a nested state into host memory, pinned if they are on a GPU.

    The call does not wait for a GPU: the copies are complete once its stream has run all work
    queued so far.

    Args:
        value: A tensor, or dicts and lists of tensors and plain values.
        buffers: Memory of an earlier copy by path in the state, reused and extended.
        copies: An empty dict; it collects the copy of each distinct tensor.
        path: Path of `value` in the state.

    Returns:
        The copied state. Tied weights are one tensor in it.
    """
    if isinstance(value, torch.Tensor):
        memory = value.data_ptr(), value.dtype, value.shape, value.stride()
        if memory not in copies:
            buffer = buffers.get(path)
            if buffer is None or (buffer.dtype, buffer.shape) != (value.dtype, value.shape):
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                buffers[path] = buffer
            copies[memory] = buffer.copy_(value, non_blocking=True)
        return copies[memory]
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes beside its items
        copied.update(
            {key: copy_to_host(item, buffers, copies, (*path, key)) for key, item in value.items()}
        )
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(
            copy_to_host(item, buffers, copies, (*path, i)) for i, item in enumerate(value)
        )
    return value


def _writing_checkpoint(path: Path) -> contextlib.AbstractContextManager[None]:
    # torch.save raises OSError or RuntimeError
    return writing(path, "earlier checkpoints are untouched", (OSError, RuntimeError))


def add_digest(file: IO[Any]) -> None:
    """Append the SHA-256 of a zip file as its comment. The file is open to read and write."""
    file.seek(-2, os.SEEK_END)
    file.write(COMMENT_LENGTH)
    file.seek(0)
    # IO of typeshed has no readinto
    digest = hashlib.file_digest(file, "sha256")  # ty: ignore[no-matching-overload]
    file.write(digest.hexdigest().encode())


def copy_to_last(path: Path) -> None:
    """Copy a checkpoint to checkpoint_last.pth. Raises TrainingStopped."""
    last = path.with_name(LAST)
    with _writing_checkpoint(last), atomic_write(last) as file, open(path, "rb") as source:
        shutil.copyfileobj(source, file)


def rotate(folder: Path, epoch: int, keep: int) -> None:
    """Remove the checkpoint_%02d.pth of all but the last `keep` epochs up to `epoch`."""
    for path in folder.glob("checkpoint_*.pth"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pth", path.name)
        if number and int(number[1]) <= epoch - keep:
            with contextlib.suppress(OSError):  # a failure need not stop the run
                path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# finding


def find_resume_file(output_dir: Path | str, checkpoint: str, resume: bool) -> Path | None:
    """Return the file that a run continues from; every rank must call it.

    A restart by torchrun or Slurm resumes like the flag. It continues from the run's own
    checkpoints, even if --resume --checkpoint began with those of another run.

    Args:
        output_dir: Folder of the run.
        checkpoint: Checkpoint of the run that --resume continues, "" for the newest undamaged one
            of `output_dir`.
        resume: The flag --resume.

    Returns:
        The file, None for a new run.

    Raises:
        InputError: On all ranks, if the run would overwrite the checkpoints of another.
    """
    # torchrun's is set only on the node that caused the restart
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    restart = any(gather_lists([any(environment_number(name, 0) for name in counts)]))
    result: Path | InputError | None = None
    if is_main():
        try:
            result = _find_resume_file(Path(output_dir), checkpoint, resume, restart)
        except InputError as error:
            result = error
    result = gather_lists([result])[0]
    if isinstance(result, InputError):
        raise result
    return result


def _find_resume_file(
    output_dir: Path, checkpoint: str, resume: bool, restart: bool
) -> Path | None:
    if restart or (resume and not checkpoint):
        if newest := newest_checkpoint(output_dir):
            return newest
    elif any(_read_progress(output_dir)):
        remedy = (
            "leave out --checkpoint to continue it" if resume else "add --resume to continue it"
        )
        raise InputError(
            f"--output_dir {output_dir} holds a run already ({run_files(output_dir)[0].name}):"
            f" {remedy}, name another folder, or remove it"
        )
    if resume and checkpoint:
        return Path(checkpoint)
    if resume or restart:
        reason = "--resume" if resume else "restart"
        logger.warning("%s: %s has no checkpoint yet, a new run starts", reason, output_dir)
    return None


def is_run_file(path: Path) -> bool:
    """Return whether a path has the name of a run's checkpoint."""
    return bool(re.fullmatch(r"checkpoint_(\d+|last|previous|best)\.pth", path.name))


def run_files(folder: Path | str) -> list[Path]:
    """Return the files in a folder that have the name of a run's checkpoint."""
    return sorted(filter(is_run_file, Path(folder).glob("checkpoint_*.pth")))


def _read_progress(folder: Path) -> tuple[list[tuple[int, int, bool, Path]], list[str]]:
    """Return (epoch, samples seen, is LAST, path) of each checkpoint, and errors of damaged ones.

    Raises:
        InputError: A checkpoint has no state of a run: a run in this folder would replace it.
    """
    saves, damaged = [], []
    for path in run_files(folder):
        try:
            resume = read_checkpoint(path).get("resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        if not isinstance(resume, dict) or not {"epoch", "samples_seen"} <= resume.keys():
            if not has_right_digest(path):
                damaged.append(DAMAGED.format(path))
                continue
            raise InputError(
                f"--output_dir {folder}: {path} has the weights but not the state of a run, as"
                " other code and tools.export write it; a run here would overwrite it. To start"
                f" from its weights: --checkpoint {path} --output_dir OTHER"
            )
        # by samples, because the size of an iteration may have changed
        saves.append((resume["epoch"], resume["samples_seen"], path.name == LAST, path))
    return saves, damaged


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the undamaged checkpoint of a folder with the most progress, by its content.

    A note names each damaged one.

    Returns:
        The file, None if there is no checkpoint.

    Raises:
        InputError: All checkpoints are damaged, or one has no state of a run.
    """
    saves, damaged = _read_progress(folder)
    for *_, path in sorted(saves, reverse=True):
        if not has_right_digest(path):
            damaged.append(DAMAGED.format(path))
            continue
        for message in damaged:
            logger.warning("%s; resuming from %s", message, path)
        return path
    if damaged:
        raise InputError(
            f"--resume: {damaged[0]}; there is no other checkpoint to resume from: remove it to"
            " start a new run"
        )
    return None


def has_right_digest(path: Path) -> bool:
    """Return whether a checkpoint's content matches its recorded SHA-256."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content[-22 - DIGEST_SIZE : -DIGEST_SIZE]
        if not (end.startswith(END_OF_ZIP) and end.endswith(COMMENT_LENGTH)):
            return True  # other code wrote it without a digest
        with memoryview(content) as view:
            digest = hashlib.sha256(view[:-DIGEST_SIZE]).hexdigest().encode()
        return digest == content[-DIGEST_SIZE:]


# --------------------------------------------------------------------------------------------------
# resuming


def saved_pretrained(path: Path) -> list[str]:
    """Return the parameters that a saved run began with weights for, which its optimizer groups."""
    return (read_checkpoint(path).get("resume") or {}).get("pretrained", [])


def resume(path: Path, state: "TrainState", entries: int | None = None) -> None:
    """Restore model, optimizer and progress of a saved run in place.

    Args:
        path: The checkpoint.
        state: The run, at its beginning.
        entries: Number of entries of the training set, which must not change within an epoch.

    Raises:
        InputError: The checkpoint does not fit the run.
    """
    content = read_checkpoint(path)
    for key in ("optimizer", "resume", "config"):
        if not isinstance(content.get(key), dict):
            raise InputError(
                f"--resume: {path} has no {key}, so it cannot be continued; --checkpoint alone"
                " starts from its weights"
            )
    saved, saved_config, config = content["resume"], content["config"], state.config
    if saved_config["optimizer"]["opt"].lower() != config.optimizer.opt.lower():
        raise _other_optimizer(path)
    check_vocabulary(state.model, content, path)
    load_weights(state.model, named_tensors(content, path), path)
    load_optimizer(state.optimizer, content["optimizer"], path)
    if saved["seed"] != state.seed:
        raise InputError(
            f"--resume: {path} has --seed {saved['seed']}, not {state.seed}: use that seed, or"
            " name another --output_dir"
        )
    for name in PROGRESS:
        setattr(state, name, saved[name])
    state.best = saved["best"] and Best(**saved["best"])
    state.model.ranking = content.get("ranking")
    if state.samples_seen:
        _check_same_epoch(path, saved, saved_config, config, entries)
    if saved["world_size"] != world_size():
        logger.warning(
            "the run was saved by %d processes and continues with %d: every sample of the epoch is"
            " still seen once, in another order",
            saved["world_size"],
            world_size(),
        )
    # the vocabulary was compared above
    now = config.to_dict()
    changed = [key for key in now if key != "tokenizer" and saved_config.get(key) != now[key]]
    if changed:
        logger.warning("the configuration differs from the saved run's in %s", ", ".join(changed))


def _check_same_epoch(
    path: Path,
    saved: dict[str, Any],
    saved_config: dict[str, Any],
    config: Config,
    entries: int | None,
) -> None:
    """Raise InputError if the rest of the epoch cannot be located: its data or order changed."""
    kept = [("the number of entries of train_file", entries, saved["entries"])]
    if any(name.endswith(".tar") for name in config.train_file or []):
        then = saved_config.get("shuffle_buffer")
        kept.append(("shuffle_buffer", config.shuffle_buffer, then))
    for what, now, then in kept:
        if now != then:
            raise InputError(
                f"--resume: {path} was saved within an epoch, and {what} changed from {then} to"
                f" {now}: change it when the epoch is over"
            )


def _other_optimizer(path: Path) -> InputError:
    return InputError(
        f"--resume: {path} holds the state of another optimizer, or of other parameters: leave"
        " optimizer, objectives, distill and the model as they were, or start from its weights with"
        " --checkpoint alone"
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load the state of an optimizer. Options such as weight_decay keep their values.

    Args:
        optimizer: The optimizer.
        state: Its saved state.
        path: Path of the checkpoint, for the message.

    Raises:
        InputError: The state is of another optimizer.
    """
    for group, options in zip(state["param_groups"], optimizer.param_groups, strict=False):
        # an older torch may have had fewer options
        group |= {name: value for name, value in options.items() if name != "params"}
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError):
        raise _other_optimizer(path) from None
