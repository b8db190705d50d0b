"""Checkpoints of a run: written whole or not at all, rotated, found again after whatever happened, resumed from."""

import contextlib
import itertools
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer

from models.checkpoint import load_weights, named_tensors, read_checkpoint
from utils import TEMPORARY, InputError, TrainingStopped, atomic_write, gather_lists, is_main, remake_output_dir, world_size

LAST, PREVIOUS, BEST = "checkpoint_last.pth", "checkpoint_previous.pth", "checkpoint_best.pth"


class Position(NamedTuple):
    """Where a run stands, the same on all processes: the next iteration to do, and what the epoch has recorded so far."""

    epoch: int = 0
    iteration: int = 0
    seen: int = 0  # samples of the epoch that all processes together have seen
    sums: dict = {}  # name -> sum over the epoch's `counted` iterations
    counted: int = 0
    recent: list = []  # sums of losses of the latest iterations, of this epoch and before
    spikes: int = 0  # of the epoch
    skipped_steps: int = 0  # of the epoch
    skipped_steps_before: int = 0  # of earlier epochs
    skipped: list = []  # why entries could not be used, of the epoch
    best: dict = {}  # score and epoch of the best validation so far, if there is validation


@contextlib.contextmanager
def _writing(path):
    """Turns what goes wrong when path is written into TrainingStopped."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise TrainingStopped(f"cannot write {path}: {error}; earlier checkpoints are untouched") from None


def save_checkpoint(path, model, optimizer_state, config, position, seed, lr, entries=None, task=None):
    """Writes the released keys (model, optimizer, lr_scheduler, config, epoch) and ours for exact resuming, atomically.

    optimizer_state: from `optimizer_state`; entries: of the training set; task: of the model. epoch is the last one that was
    begun. Random states need no key: every iteration seeds itself (utils.seed_everything). Raises TrainingStopped where it
    cannot be written; what was there stays.
    """
    done = position.iteration == 0
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer_state,
        "lr_scheduler": {"lr": lr},
        "config": config,
        "epoch": position.epoch - 1 if done else position.epoch,
        "resume": {**position._asdict(), "seed": seed, "world_size": world_size(), "entries": entries, "task": task},
    }
    with _writing(path):
        remake_output_dir(path.parent)
        with atomic_write(path) as file:
            torch.save(state, file)
            file.flush()
            _keep_previous(path.parent)


def optimizer_state(optimizer):
    """optimizer.state_dict(), whole on the main process also where it is sharded; to be called on all processes."""
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer.state_dict()
    # what consolidate_state_dict does, which hands one process's part after the other through every GPU
    groups = optimizer.param_groups
    index = {param: i for i, param in enumerate(itertools.chain.from_iterable(group["params"] for group in groups))}
    own = {
        index[param]: {name: value.cpu() for name, value in values.items()} for param, values in optimizer.optim.state.items()
    }
    parts = [None] * world_size() if is_main() else None
    dist.gather_object(own, parts)
    if not is_main():
        return None
    state = {i: values for part in parts for i, values in part.items()}
    groups = [{**group, "params": [index[param] for param in group["params"]]} for group in groups]
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def _keep_previous(folder):
    """The last checkpoint gets a second name, under which it stays when a newer one takes the first."""
    if (folder / LAST).exists():
        try:
            _link(folder / LAST, folder / PREVIOUS)
        except OSError:  # a file system without links
            os.replace(folder / LAST, folder / PREVIOUS)


def _link(source, target):
    """Makes target another name of source, atomically. Raises OSError where the file system has no links."""
    temporary = target.with_name(f".{target.name}.link{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    os.link(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # rename(2) leaves it where both are names of one file already


def make_last(path):
    """Makes checkpoint_last.pth the same file as path, without writing it again where the file system allows.

    Raises TrainingStopped where it cannot be written.
    """
    with _writing(path.with_name(LAST)):
        try:
            _link(path, path.with_name(LAST))
        except OSError:
            with atomic_write(path.with_name(LAST)) as file, open(path, "rb") as source:
                shutil.copyfileobj(source, file)


def rotate(folder, epoch, keep):
    """Removes the checkpoint_%02d.pth of all but the last `keep` epochs up to `epoch`. The best and the last have own names."""
    for path in Path(folder).glob("checkpoint_*.pth"):
        number = re.fullmatch(r"checkpoint_(\d+)\.pth", path.name)
        if number and int(number[1]) <= epoch - keep:
            with contextlib.suppress(OSError):  # what cannot be removed stays
                path.unlink(missing_ok=True)


def is_restart():
    """Whether torchrun or Slurm has started this run anew after a failure."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def find_resume_file(output_dir, checkpoint, wanted):
    """The file that a run continues from, None for a new one. wanted: --resume was given; a restart means it too.

    It is the checkpoint of output_dir that is furthest in the run and undamaged. With checkpoint, --resume begins there, but
    a restart goes on with what the run itself has saved since. Raises InputError, on all processes, where a run would
    overwrite the checkpoints of another.
    """
    # torchrun tells of a restart only on the node that caused it
    restart = any(gather_lists([is_restart()]))
    found, refusal = None, None
    if is_main():
        try:
            found = _find_resume_file(Path(output_dir), checkpoint, wanted, restart)
        except InputError as error:
            refusal = error
    found, refusal = gather_lists([(found, refusal)])[0]
    if refusal:
        raise refusal
    return found


def _find_resume_file(output_dir, checkpoint, wanted, restart):
    if restart or (wanted and not checkpoint):
        if found := newest_checkpoint(output_dir):
            return found
    elif any(_saves_of(output_dir)):
        remedy = "leave out --checkpoint to continue it" if wanted else "add --resume to continue it"
        raise InputError(f"--output_dir {output_dir} holds a run already ({run_files(output_dir)[0].name}): {remedy}, name "
                         "another folder, or remove it")
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
    """The checkpoints of a run's folder, or of what was one of other code."""
    return sorted(filter(is_run_file, Path(folder).glob("checkpoint_*.pth")))


def _saves_of(folder):
    """A folder's checkpoints as (epoch, samples of it seen, whether it is LAST, path), and what is wrong with unreadable ones.

    Raises InputError for a checkpoint that no run can be continued from: a run in this folder would replace it.
    """
    saves, damaged = [], []
    for path in run_files(folder):
        try:
            resume = read_checkpoint(path).get("resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        if not resume:
            raise InputError(f"--output_dir {folder}: {path} has the weights but not the state of a run, as other code and "
                             "Export.py write it; a run here would overwrite it. To start from its weights: --checkpoint "
                             f"{path} --output_dir OTHER")
        # by samples: an iteration may have been of another size
        saves.append((resume["epoch"], _seen(resume), path.name == LAST, path))
    return saves, damaged


def newest_checkpoint(folder):
    """The undamaged checkpoint of a run's folder that is furthest in the run, by what is in it, not by the clock; or None.

    A damaged one is named and passed over. Raises InputError if there are only such, and for one that is not a run's.
    """
    saves, damaged = _saves_of(folder)
    for *_, path in sorted(saves, reverse=True):
        if reason := damage(path):
            damaged.append(f"checkpoint {path} is damaged: {reason}")
            continue
        for message in damaged:
            print(f"note: {message}; going on from {path}", flush=True)
        return path
    if damaged:
        raise InputError(f"--resume: {damaged[0]}; there is no other checkpoint to go on from: remove it to start anew")
    return None


def _seen(resume):
    """The samples seen of the epoch of a saved position; earlier versions kept its stretches, each with a layout of its own."""
    if "seen" in resume:
        return resume["seen"]
    return sum(batches * batch_size * processes for batches, batch_size, processes, _ in resume["phases"])


def damage(path):
    """What is wrong with the bytes of a .pth file, by the checksums in it; "" if nothing is."""
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return f"the checksum of {record} does not agree" if record else ""


def resume(path, model, optimizer, config, seed, entries=None):
    """Restores model, optimizer and position of a saved run. Raises InputError if the file is not one of a run that fits.

    entries: of the training set; within an epoch they must be as many as they were.
    """
    state = read_checkpoint(path)
    lacking = [key for key in ("optimizer", "resume", "config") if key not in state]
    if lacking:
        raise InputError(f"--resume: {path} has no {lacking[0]}, so it cannot be continued; --checkpoint alone starts from "
                         "its weights")
    if state["config"]["optimizer"]["opt"].lower() != config["optimizer"]["opt"].lower():
        raise _other_optimizer(path)
    load_weights(model, named_tensors(state, path), path)
    load_optimizer(optimizer, state["optimizer"], path)
    saved = {name: value for name, value in state["resume"].items() if name != "task"}
    if saved["best"] and "task" not in state["resume"] and model.task in ("ve", "nlvr", "grounding"):
        # earlier versions, which did not note the task, kept these accuracies as shares
        saved["best"] = {**saved["best"], "score": 100 * saved["best"]["score"]}
    seed_then, world_then, entries_then = (saved.pop(key) for key in ("seed", "world_size", "entries"))
    changed = [key for key in config if state["config"].get(key) != config[key]]
    seen = _seen(saved)
    if seen:
        kept = [("--seed", seed, seed_then), ("the number of entries of train_file", entries, entries_then)]
        if any(name.endswith(".tar") for name in config["train_file"] or []):
            kept.append(("shuffle_buffer", config["shuffle_buffer"], state["config"].get("shuffle_buffer")))
            if "phases" in saved:
                raise InputError(f"--resume: {path} was saved within an epoch of shards by an earlier version, which read them "
                                 "in another order: finish the epoch with that version, or start from its weights with "
                                 "--checkpoint")
        for what, now, then in kept:
            if now != then:
                raise InputError(f"--resume: {path} was saved within an epoch, the rest of which is found only if {what} is "
                                 f"{then} as it was then, not {now}: change it when the epoch is over")
    if is_main():
        if seed_then != seed:
            print("note: seed differs from the saved run's, the trajectory will not be the same")
        if world_then != world_size():
            print(f"note: the run was saved by {world_then} processes and goes on with {world_size()}: every sample of the "
                  "epoch is still seen once, in another order")
        if changed:
            print(f"note: the configuration differs from the saved run's in {', '.join(changed)}")
    saved.pop("phases", None)
    return Position(**{**saved, "seen": seen})


def _other_optimizer(path):
    return InputError(f"--resume: {path} holds the state of another optimizer, or of other parameters: leave optimizer, "
                      "objectives, distill and the model as they were, or start from its weights with --checkpoint alone")


def load_optimizer(optimizer, state, path):
    """optimizer.load_state_dict of a state that was saved whole, sharded or not, by any number of processes.

    Options such as weight_decay stay those of the optimizer. path: of the checkpoint, for the InputError if it does not fit.
    """
    for group, own in zip(state["param_groups"], optimizer.param_groups):
        group |= {name: value for name, value in own.items() if name != "params"}  # an older torch may have had fewer
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, IndexError):
        raise _other_optimizer(path) from None
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()  # a second copy of what the optimizer inside has
        for param, values in optimizer.optim.state.items():
            if "step" in values:  # it comes back on the CPU, where the fused optimizer of a GPU cannot use it
                values["step"] = values["step"].to(param.device)
