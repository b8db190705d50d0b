"""An index of images: features by path, kept up to date with folders, searched by a text or an
example (docs/search.md).
"""

import hashlib
import itertools
import os
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from configs.config import as_config
from dataset.images import FORMATS, ImageError, load_image
from dataset.images import SUFFIXES as IMAGE_SUFFIXES
from engine.device import autocast
from engine.processes import find_device
from engine.saving import writing
from evaluation.divide import divide, progress_bar
from inference.inputs import Images, check_number
from inference.model import Inference, as_float, most_similar
from models.contrastive import feature_similarity
from models.weights import SUFFIXES, find_checkpoint, is_momentum, is_repository, read_checkpoint
from utils import InputError, alone, atomic_write, make_output_dir, printable

FILE, UNUSABLE = "index.pt", "unusable.txt"
# seconds from one save to the next, at least; of the time that goes into saves, at most
SAVE_EVERY, SAVE_SHARE = 10, 0.05
COUNTED = 8  # suffixes that messages name
ROWS = 4096  # that near_copies compares with as many others at a time


class Index(NamedTuple):
    """Images in the order of their paths, and the model that their features are of."""

    paths: list  # absolute
    # float16 [N, D], normalized; read from a file they lie in a mapping of it
    features: torch.Tensor
    sizes: torch.Tensor  # int64 [N], bytes of the file
    dates: torch.Tensor  # int64 [N], when the file was changed, in nanoseconds
    checkpoint: str  # absolute path or hub repository
    weights: str  # SHA-256 of the weights
    task: str
    config: dict
    left: int  # images that an interrupted update has not come to


class Changes(NamedTuple):
    """What an update did, in images."""

    total: int  # that the index has now
    kept: int
    embedded: int
    removed: int
    unusable: list  # [(path, problem), ...]


# --------------------------------------------------------------------------------------------------
# files


def read_index(folder):
    """Return the Index in a folder. Raises InputError."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no index there, it lacks {FILE}: Search.py index makes one")
    try:
        content = read_checkpoint(path)
        index = Index(
            content.pop("paths").numpy().tobytes().decode("utf-8", "surrogateescape").split("\0"),
            **content,
        )
        if any(
            len(part) != len(index.paths) for part in (index.features, index.sizes, index.dates)
        ):
            raise ValueError("parts of different lengths")
    except Exception as error:  # whatever torch and pickle raise for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be read as an index ({reason}): remove {folder} and index anew"
        ) from None
    return index


def write_index(folder, index, unusable):
    """Write an Index and a list of unusable images, [(path, problem), ...]. Raises TrainingStopped
    if it cannot be written.

    The file is replaced by a rename, so a reader finds either the old or the new one, even after a
    failure.
    """
    path, names = Path(folder) / FILE, "\0".join(index.paths).encode("utf-8", "surrogateescape")
    with writing(path, "what was saved before is untouched", (OSError, RuntimeError)):
        with atomic_write(path) as file:
            torch.save(
                {**index._asdict(), "paths": torch.frombuffer(bytearray(names), dtype=torch.uint8)},
                file,
            )
        with atomic_write(path.with_name(UNUSABLE)) as file:
            file.write(
                "".join(
                    f"{printable(path)}: {problem}\n" for path, problem in sorted(unusable)
                ).encode()
            )


def open_index(folder):
    """Make the folder of an index, hold it until this process ends, and return the Index there,
    None if there is none yet.

    Raises InputError where another process holds it, it cannot be written to, or has other files.
    """
    folder = Path(folder)
    made = (folder / FILE).is_file()
    if (
        not made
        and folder.is_dir()
        and any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise InputError(f"--to {folder}: has other files, but no index: name a folder of its own")
    make_output_dir(folder, patience=1, flag="--to")
    return read_index(folder) if made else None


# --------------------------------------------------------------------------------------------------
# the model


def hash_weights(model):
    """Return the SHA-256 of the weights of an Inference model, the same whatever file they come
    from.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.model.state_dict().items()):
        if not is_momentum(name):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_weights(model, index, folder):
    """Return hash_weights(model).

    Raises InputError where the index in a folder, None for no index, is of other weights.
    """
    weights = hash_weights(model)
    if index and weights != index.weights:
        raise InputError(
            f"{folder}: made with weights {index.weights[:12]} of {index.checkpoint}, and {model.source} has "
            f"{weights[:12]}: name the checkpoint it was made with, or make another index with this one"
        )
    return weights


def load_model_of(index, folder, device=None, checkpoint=None):
    """Return the Inference model that an index, in a folder, was made with. Raises InputError.

    checkpoint: where its weights lie now, by default where they lay then. device: as load_model
    takes it.
    """
    source = checkpoint or index.checkpoint
    if not (checkpoint or os.path.exists(source) or is_repository(source)):
        raise InputError(
            f"{folder}: its checkpoint {source} is gone: say by --checkpoint where it lies now"
        )
    config = index.config
    if Path(config["tokenizer"] or "").suffix in SUFFIXES:  # the checkpoint has the vocabulary
        config = {**config, "tokenizer": str(find_checkpoint(source))}
    model = Inference(index.task, config, source, find_device(device))
    check_weights(model, index, folder)
    return model


# --------------------------------------------------------------------------------------------------
# indexing


def find_images(folders):
    """Find the images in folders and their subfolders by suffix.

    Names that begin with a dot are skipped, links are followed. Returns {path: (size, date)} sorted
    by path, [(path, problem), ...] for unreadable links and folders, and a Counter of the suffixes
    of all other files. Raises InputError if one of `folders` cannot be read or has no image.
    """
    # taken: real path of a folder -> path by which it was visited
    found, problems, others, taken = {}, [], {}, {}
    for root in folders:
        if not os.path.isdir(root):
            raise InputError(
                f"{root}: {'is a file' if os.path.exists(root) else 'does not exist'}, name a folder of images"
            )
        errors, images = [], 0
        for folder, own, names in _folders_below(os.path.abspath(root), errors.append):
            kinds = {
                os.path.join(folder, name): os.path.splitext(name)[1].lower()
                for name in names
                if name[0] != "."
            }
            paths = [path for path, suffix in kinds.items() if suffix in IMAGE_SUFFIXES]
            if taken.setdefault(own, folder) != folder:
                images += len(paths)  # the same folder was visited before
                continue
            others.update(
                (path, suffix) for path, suffix in kinds.items() if suffix not in IMAGE_SUFFIXES
            )
            for path in paths:
                try:
                    state = os.stat(path)
                except OSError as error:
                    errors.append(error)
                    continue
                found[path], images = (state.st_size, state.st_mtime_ns), images + 1
        problems += [(error.filename, error.strerror) for error in errors]
        if not images:
            why = f"by the suffixes of {', '.join(FORMATS)}"
            if errors:
                why = f"{errors[0].filename}: {errors[0].strerror}"
            elif others:
                why += f"; other files: {count_others(Counter(others.values()))}"
            raise InputError(f"{root}: no image in it or below ({why})")
    return dict(sorted(found.items())), problems, Counter(others.values())


def count_others(others):
    """Describe the Counter of other files' suffixes that find_images returns."""
    most = sorted(others.items(), key=lambda row: (-row[1], row[0]))[:COUNTED]
    counts = [f"{count} {suffix or 'without suffix'}" for suffix, count in most]
    return ", ".join([*counts, *["..."] * (len(others) > COUNTED)])


def _folders_below(root, onerror):
    """Yield (path, path without links, names of files) of a folder and those below, each once."""
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=onerror, followlinks=True):
        own = os.path.realpath(folder)
        if own in seen:
            subfolders.clear()
            continue
        seen.add(own)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        yield folder, own, names


class _Files(Images):
    """Image files as a data set: (uint8 [3, R, R], ""), or (None, problem) of one that cannot be
    used.
    """

    def __getitem__(self, index):
        try:
            return self.transform(load_image(self.images[index])), ""
        except ImageError as error:
            return None, error.problem


def _collate(samples):
    """Samples of _Files -> (the usable images uint8 [B, 3, R, R], None if there are none; the
    problems of all samples).
    """
    images, problems = zip(*samples)
    usable = [image for image in images if image is not None]
    return torch.stack(usable) if usable else None, problems


@alone()
def update_index(folder, index, model, images, problems, prune=False):
    """Add images and problems, both from find_images, to the index of a folder. Return the Changes.

    index: from open_index. Images that are new or have another size or date are embedded. prune:
    remove indexed images that are not among `images`. Progress is saved from time to time, and if a
    signal or an error ends the call. Raises InputError if the model is not the model of the index
    or no image is usable, and TrainingStopped if the index cannot be written.
    """
    model.require("embed_images")
    weights, checkpoint = check_weights(model, index, folder), model.source
    checkpoint = str(checkpoint) if is_repository(checkpoint) else os.path.abspath(checkpoint)
    if index and not prune:
        known = dict(zip(index.paths, zip(index.sizes.tolist(), index.dates.tolist())))
        images = dict(sorted({**known, **images}.items()))
    paths, states, rows = (
        list(images),
        torch.tensor(list(images.values())),
        _unchanged(index, images),
    )
    features, done = (
        torch.empty(len(paths), model.config["embed_dim"], dtype=torch.float16),
        rows >= 0,
    )
    if index:
        features[done] = index.features[rows[done]]
    todo, unusable, waits = (~done).nonzero().squeeze(1), list(problems), 0
    kept, left, saved = len(paths) - len(todo), len(todo), time.monotonic()

    def save():
        if done.any():
            names, (sizes, dates) = (
                [path for path, usable in zip(paths, done.tolist()) if usable],
                states[done].T.contiguous(),
            )
            made = Index(
                names,
                features[done],
                sizes,
                dates,
                checkpoint,
                weights,
                model.task,
                as_config(model.config).to_dict(),
                left,
            )
            write_index(folder, made, unusable)
        return time.monotonic()

    try:
        for part, usable, values, failures in _embed(model, [paths[i] for i in todo.tolist()]):
            features[todo[usable]], done[todo[usable]] = values, True
            unusable += failures
            left -= len(part)
            if (now := time.monotonic()) - saved > max(SAVE_EVERY, waits):
                saved = save()
                waits = (saved - now) / SAVE_SHARE
    finally:
        save()
    if not done.any():
        raise InputError(
            f"none of {len(paths)} images can be used, such as {': '.join(unusable[-1])}"
        )
    removed = len(set(index.paths) - images.keys()) if index else 0
    return Changes(int(done.sum()), kept, int(done.sum()) - kept, removed, unusable)


def _unchanged(index, images):
    """Return the rows of images in an Index, int64 [M], -1 for one that it lacks or that has
    changed since.
    """
    known = {}
    if index:
        known = dict(
            zip(
                index.paths,
                zip(zip(index.sizes.tolist(), index.dates.tolist()), range(len(index.paths))),
            )
        )
    found = (known.get(path, (None, -1)) for path in images)
    return torch.tensor(
        [row if then == now else -1 for (then, row), now in zip(found, images.values())]
    )


@torch.no_grad()
def _embed(model, paths):
    """Yield for each batch (all indices, indices of usable images, their features float16 [U, D],
    [(path, problem), ...]).
    """
    with autocast(model.config, model.device):
        for part, (pixels, problems) in divide(
            _Files(paths, model.transform), model.config, model.device, "images", _collate
        ):
            usable = [i for i, problem in zip(part, problems) if not problem]
            values = (
                model.model.encode_image(pixels)[1]
                if usable
                else torch.empty(0, model.config["embed_dim"])
            )
            yield (
                part,
                usable,
                values.half().cpu(),
                [(paths[i], problem) for i, problem in zip(part, problems) if problem],
            )


# --------------------------------------------------------------------------------------------------
# searching


def search(index, model, text=None, image=None, k=20, rerank=None):
    """Return the k best existing images of an Index, [(path, score), ...], the best first.

    text: a description; image: an example, as for Inference.embed_images. With both, candidates are
    ranked by the mean of the similarities. rerank: number of candidates (default: k_test) that are
    ranked by the text's matching logit (ITM), which is their score. The others follow by
    similarity, which is their score. Without a text, similarity ranks all. Raises InputError.
    """
    if text is None and image is None:
        raise InputError("nothing to search for: give a text, an image or both")
    check_number(k, "k", 1)
    features = [] if text is None else [model.embed_texts(text)]
    features += [] if image is None else [model.embed_images(image)]
    query = torch.stack(features).mean(dim=0)
    rerank = (
        0
        if text is None
        else model.config["k_test"]
        if rerank is None
        else check_number(rerank, "rerank", 0)
    )
    scores, (best,) = most_similar(query[None], index.features, max(k, rerank), model.device)
    found = [(index.paths[i], score) for i, score in zip(best.tolist(), scores[0].tolist())]
    here = [os.path.isfile(path) for path, _ in found]
    if not any(here):
        raise InputError(
            f"{found[0][0]}: gone, as are all images that fit: index anew, or see to the disk they are on"
        )
    found, features = list(itertools.compress(found, here)), index.features[best[here]]
    if rerank:
        paths = [path for path, _ in found]
        ranked = model.rank(paths, text, k, rerank, image_features=features, text_features=query)
        found = [(paths[i], score) for i, score in ranked]
    return found[:k]


def near_copies(index, threshold, device):
    """Return groups of images that look alike, [[(path, similarity), ...], ...].

    An image belongs to the group of the earlier image most similar to it, if the similarity reaches
    the threshold, above 0; the first of a group has 1.
    """
    features, groups = index.features, {}
    nearest, highest = torch.arange(len(features)), torch.ones(len(features))
    for start in progress_bar(range(0, len(features), ROWS), "comparing"):
        part = slice(start, start + ROWS)
        rows = as_float(features[part]).to(device)
        values, best = (
            torch.zeros(len(rows), device=device),
            torch.zeros(len(rows), dtype=torch.long, device=device),
        )
        for first in range(0, start + 1, ROWS):
            sim = feature_similarity(rows, as_float(features[first : first + ROWS]).to(device))
            sim = sim.tril(-1) if first == start else sim  # with earlier ones alone
            more, column = sim.max(dim=1)
            values, best = values.maximum(more), torch.where(more > values, first + column, best)
        close = (values >= threshold).cpu()
        nearest[part][close], highest[part][close] = best.cpu()[close], values.cpu()[close]
    roots = nearest.tolist()
    for i, similarity in enumerate(highest.tolist()):
        roots[i] = roots[roots[i]]  # an earlier image is already the root of its group
        groups.setdefault(roots[i], []).append((index.paths[i], similarity))
    return [group for group in groups.values() if len(group) > 1]
