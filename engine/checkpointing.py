"""Checkpoints of a run: write them atomically, find the newest, resume from it."""

import copy
import logging
import math
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch

from configs.config import Config, as_config
from configs.load import save_interval
from engine.launch import Interrupted
from engine.output_dir import writing
from models.weights import (
    check_vocabulary,
    load_weights,
    named_tensors,
    read_checkpoint,
    read_ranking,
)
from utils import (
    InputError,
    TrainingStopped,
    atomic_write,
    environment_number,
    gather_lists,
    is_main,
    permitted,
    world_size,
)

if TYPE_CHECKING:
    from engine.trainer import TrainState

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"
FAILURES = (OSError, RuntimeError)  # of torch.save if a file cannot be written
KEPT = "earlier checkpoints are untouched"

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
        skipped: Number of unusable entries of the epoch.
        best: The best epoch, None before the first validation.
    """

    epoch: int = 0
    iteration: int = 0
    samples_seen: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    skipped_steps: int = 0
    skipped_steps_before: int = 0
    skipped: int = 0
    best: Best | None = None

    def begin_next_epoch(self) -> None:
        """Set the progress to the beginning of the next epoch."""
        self.epoch, self.iteration, self.samples_seen = self.epoch + 1, 0, 0
        self.skipped_steps_before += self.skipped_steps
        self.sums, self.counted, self.skipped_steps, self.skipped = {}, 0, 0, 0


PROGRESS = [key.name for key in fields(Progress)]


@dataclass(kw_only=True)
class SavedRun(Progress):
    """The entry `resume` of a checkpoint.

    Attributes:
        seed: Random seed of the run.
        world_size: Number of ranks.
        entries: Number of entries of the training set.
        pretrained: Parameters that the run began with weights for.
        task: Name of the task.
    """

    seed: int
    world_size: int
    entries: int | None
    pretrained: list[str]
    task: str


class SavedGroup(msgspec.Struct):
    """Numbers of the parameters of a group in the state of an optimizer."""

    params: list[int]


class SavedOptimizer(msgspec.Struct):
    """The entry `optimizer` of a checkpoint."""

    state: dict[int, dict[str, Any]]
    param_groups: list[SavedGroup]


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
        snapshot = copy_to_host(self._state_dict(state, lr), {})
        # later work on this stream follows the copies; only the thread has to wait for them
        on_gpu = state.device.type == "cuda"
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
        self._pending = self._thread.submit(self._write, path, snapshot, copied, keep, optional)
        return path

    def _state_dict(self, state: "TrainState", lr: float) -> dict[str, Any]:
        saved = SavedRun(
            **{name: getattr(state, name) for name in PROGRESS},
            seed=state.seed,
            world_size=world_size(),
            entries=self.entries,
            pretrained=list(state.model.pretrained),
            task=state.model.task,
        )
        content = {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "lr_scheduler": {"lr": lr},
            "config": state.config.to_dict(),
            # the last epoch that has begun
            "epoch": state.epoch - 1 if state.iteration == 0 else state.epoch,
            "resume": asdict(saved),
        }
        if state.model.vocabulary:
            content["tokenizer_json"] = state.model.vocabulary
        if state.model.ranking:
            content["ranking"] = msgspec.to_builtins(state.model.ranking)
        return content

    def _write(
        self,
        path: Path,
        snapshot: dict[str, Any],
        copied: torch.cuda.Event | None,
        keep: int | None,
        optional: bool,
    ) -> None:
        """Write a checkpoint, then remove an old epoch, then update checkpoint_last.pth."""
        if copied:
            copied.synchronize()
        last = path.with_name(LAST)
        try:
            with writing(path, KEPT, FAILURES), atomic_write(path) as file:
                torch.save(snapshot, file)
                file.flush()
                if path == last and path.exists():
                    os.replace(path, path.with_name(PREVIOUS))
            if keep:
                old = path.with_name(f"checkpoint_{snapshot['epoch'] - keep:02d}.pth")
                old.unlink(missing_ok=True)
            if path != last:
                with writing(last, KEPT), atomic_write(last) as file, open(path, "rb") as source:
                    shutil.copyfileobj(source, file)
        except TrainingStopped as error:
            if not optional:
                raise
            # a full disk may be emptied before the next save; stopping would lose the progress
            every = f"{self.minutes:g} minutes" if self.minutes else f"{self.iterations} iterations"
            logger.warning("%s, training goes on, and the next save follows after %s", error, every)

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


def copy_to_host(value: Any, copies: dict[tuple[Any, ...], torch.Tensor]) -> Any:
    """Copy the tensors of a nested state into host memory, pinned if they are on a GPU.

    The call does not wait for a GPU: the copies are complete once its stream has run all work
    queued so far. torch keeps pinned memory for the next copies when these are freed.

    Args:
        value: A tensor, or dicts and lists of tensors and plain values.
        copies: An empty dict; it collects the copy of each distinct tensor.

    Returns:
        The copied state. Tied weights are one tensor in it.
    """
    if isinstance(value, torch.Tensor):
        memory = value.data_ptr(), value.dtype, value.shape, value.stride()
        if memory not in copies:
            copies[memory] = value.to("cpu", non_blocking=True, copy=True)
        return copies[memory]
    if isinstance(value, dict):
        copied = copy.copy(value)  # a state dict has attributes in addition to items
        copied.update({key: copy_to_host(item, copies) for key, item in value.items()})
        return copied
    if isinstance(value, (list, tuple)):
        return type(value)(copy_to_host(item, copies) for item in value)
    return value


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
        InputError: On all ranks, if the run would overwrite the checkpoints of another, or all
            checkpoints are damaged.
    """
    # torchrun's is set only on the node that caused the restart
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    restart = any(gather_lists([any(environment_number(name, 0) for name in counts)]))
    files = gather_lists([run_files(output_dir)])[0]  # as rank 0 sees the folder
    if files and (restart or (resume and not checkpoint)):
        newest = gather_lists([newest_checkpoint(output_dir) if is_main() else None])[0]
        if newest is None:
            raise InputError(
                f"--resume: {files[0]} is damaged, and {output_dir} has no undamaged checkpoint;"
                " remove the damaged files to start a new run"
            )
        return newest
    if files:
        remedy = "leave out --checkpoint" if resume else "add --resume"
        raise InputError(
            f"--output_dir {output_dir} holds a run already ({files[0].name}); {remedy} to continue"
            " that run, name another folder, or remove this folder"
        )
    if resume and checkpoint:
        return Path(checkpoint)
    if resume or restart:
        reason = "--resume" if resume else "restart"
        logger.warning("%s: %s has no checkpoint yet, so a new run starts", reason, output_dir)
    return None


@permitted()
def run_files(folder: Path | str) -> list[Path]:
    """Return the checkpoints in a run's folder, checkpoint_last.pth first."""
    folder = Path(folder)
    epochs = sorted(folder.glob("checkpoint_[0-9]*.pth"))
    named = (folder / LAST, folder / PREVIOUS, folder / BEST)
    return [*filter(Path.exists, named), *epochs]


def newest_checkpoint(folder: Path | str) -> Path | None:
    """Return the undamaged checkpoint of a run's folder with the most progress, by its content.

    A note names each damaged one. A file of other code comes first, so that `resume` refuses it
    before the run overwrites it. None if there is no undamaged checkpoint.
    """
    for path in sorted(run_files(folder), key=_progress, reverse=True):
        if is_whole(path):
            return path
        logger.warning("checkpoint %s is damaged, because its checksums do not match", path)
    return None


def _progress(path: Path) -> tuple[float, int]:
    """Return the epoch and its samples seen, infinity for a file that is damaged or not a run's."""
    try:
        saved = _read_entry(read_checkpoint(path), "resume", SavedRun, path)
        return saved.epoch, saved.samples_seen
    except InputError:
        return math.inf, 0


def is_whole(path: Path) -> bool:
    """Return whether a checkpoint can be read and matches the checksums that torch.save wrote."""
    try:
        read_checkpoint(path)
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # zipfile raises errors of many classes for damaged records
        return False


# --------------------------------------------------------------------------------------------------
# resuming


def saved_pretrained(path: Path) -> list[str]:
    """Return the parameters that a saved run began with weights for, which its optimizer groups."""
    return _read_entry(read_checkpoint(path), "resume", SavedRun, path).pretrained


def _read_entry(content: Mapping[str, Any], key: str, kind: type[T], path: Path) -> T:
    """Return an entry of a checkpoint as an object of a type. Raises InputError."""
    try:
        return msgspec.convert(content.get(key), kind)
    # msgspec 0.22 raises the latter for a tensor in place of a dict
    except (msgspec.ValidationError, AttributeError) as error:
        raise InputError(
            f"--resume: {path}: the entry {key!r} is not one that a run saves ({error}), so its run"
            f" cannot be continued; to start a new run from its weights, add --checkpoint {path}"
            " --output_dir OTHER"
        ) from None


def resume(path: Path, state: "TrainState", entries: int | None = None) -> None:
    """Restore model, optimizer and progress of a saved run in place.

    Options of the optimizer, such as weight_decay, keep their values.

    Args:
        path: The checkpoint.
        state: The run, at its beginning.
        entries: Number of entries of the training set, which must not change within an epoch.

    Raises:
        InputError: The checkpoint does not fit the run.
    """
    content, config = read_checkpoint(path), state.config
    saved = _read_entry(content, "resume", SavedRun, path)
    optimizer = _read_entry(content, "optimizer", SavedOptimizer, path)
    values = _read_entry(content, "config", dict[str, Any], path)
    saved_config = as_config(values, f"configuration of {path}")
    groups = state.optimizer.state_dict()["param_groups"]
    params = [group["params"] for group in groups]
    is_other = saved_config.optimizer.opt.lower() != config.optimizer.opt.lower()
    if is_other or params != [group.params for group in optimizer.param_groups]:
        raise InputError(
            f"--resume: {path} was saved with another optimizer or other parameters; restore the"
            " keys optimizer, objectives, distill and the keys of the model, or start a new run"
            f" from its weights with --checkpoint {path} --output_dir OTHER"
        )
    if saved.seed != state.seed:
        raise InputError(
            f"--resume: {path} was trained with --seed {saved.seed}, not {state.seed}; give"
            f" --seed {saved.seed}, or name another --output_dir"
        )
    if saved.samples_seen:
        _check_same_epoch(path, "the number of entries of train_file", saved.entries, entries)
        if any(name.endswith(".tar") for name in config.train_file or ()):
            buffer = saved_config.shuffle_buffer
            _check_same_epoch(path, "shuffle_buffer", buffer, config.shuffle_buffer)
    check_vocabulary(state.model, content, path)
    load_weights(state.model, named_tensors(content, path), path)
    state.optimizer.load_state_dict({"state": optimizer.state, "param_groups": groups})
    for name in PROGRESS:
        setattr(state, name, getattr(saved, name))
    state.model.ranking = read_ranking(content, path)
    _log_differences(saved, saved_config, config)


def _check_same_epoch(path: Path, what: str, then: Any, now: Any) -> None:
    """Raise InputError if the rest of the epoch cannot be located."""
    if then != now:
        raise InputError(
            f"--resume: {path} was saved within an epoch, and {what} changed from {then} to {now};"
            " undo the change until the epoch is complete"
        )


def _log_differences(saved: SavedRun, saved_config: Config, config: Config) -> None:
    if saved.world_size != world_size():
        logger.warning(
            "the run was saved by %d processes and continues with %d; every sample of the epoch is"
            " still seen once, in another order",
            saved.world_size,
            world_size(),
        )
    # the vocabulary was compared above
    then, now = saved_config.to_dict(), config.to_dict()
    changed = [key for key in now if key != "tokenizer" and then[key] != now[key]]
    if changed:
        logger.warning(
            "keys that differ from the configuration of the saved run: %s", ", ".join(changed)
        )
