"""An index of images that is kept up to date with folders and searched by a text or an example.

An index is a folder of three files. features.npy has the features, float16 [N, D]; images.jsonl
has the path, size, time of change and hash of the image of each row; index.json has the digest of
the model, its configuration and the number of missing images.
"""

import contextlib
import itertools
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import torch
from PIL import Image
from scipy.fft import dctn
from torch import Tensor
from torch.utils.data import Dataset

from configs.config import as_config
from dataset.images import FORMATS, Exif, ImageError, load_image
from dataset.images import SUFFIXES as IMAGE_SUFFIXES
from engine.output_dir import make_output_dir, writing
from engine.precision import autocast, find_device
from evaluation.distributed import iter_rank_share, progress_bar
from inference.model import Inference, as_float, most_similar
from models.contrastive import feature_similarity
from models.weights import SUFFIXES, find_checkpoint, is_momentum, is_repository
from utils import InputError, alone, atomic_write, hash_contents, permitted

INDEX, FEATURES, IMAGES = "index.json", "features.npy", "images.jsonl"
SAVE_EVERY = 30  # seconds
SIDE, WAVES = 32, 12  # of a hash: pixels, and waves that are kept, in each direction
ROWS = 256  # images that near_copies compares at a time with all others


class Row(NamedTuple):
    """An image of an index.

    Attributes:
        path: Absolute path.
        size: Size of the file in bytes.
        mtime_ns: Time of change of the file in nanoseconds.
        hash: Hash of the image, see `hash_picture`.
    """

    path: str
    size: int
    mtime_ns: int
    hash: Annotated[str, msgspec.Meta(pattern=f"^[0-9a-f]{{{WAVES**2 // 4}}}$")]

    @property
    def state(self) -> tuple[int, int]:
        """Size and time of change, which differ if the file has changed."""
        return self.size, self.mtime_ns


class About(msgspec.Struct):
    """The content of INDEX: the token of the other files, and attributes of Index."""

    token: str
    checkpoint: str
    digest: str
    task: str
    config: dict[str, Any]
    left: int


class Index(NamedTuple):
    """Images sorted by path, their features, and the identity of the model.

    Attributes:
        rows: The images.
        features: Normalized features, float16 [N, D], memory-mapped if they are read from a file.
        checkpoint: Absolute path or hub repository of the model.
        digest: Digest of the weights and the vocabulary.
        task: Task of the weights.
        config: Configuration of the model.
        left: Number of images that an interrupted update has not indexed.
    """

    rows: list[Row]
    features: np.ndarray
    checkpoint: str
    digest: str
    task: str
    config: dict[str, Any]
    left: int

    @property
    def paths(self) -> list[str]:
        """Paths of the images."""
        return [row.path for row in self.rows]


class Changes(NamedTuple):
    """Numbers of images that an update kept, embedded and removed, and the unusable ones."""

    kept: int
    embedded: int
    removed: int
    unusable: list[tuple[str, str]]


class Hit(NamedTuple):
    """An image that a search found.

    Attributes:
        path: Absolute path.
        similarity: Similarity to the query (ITC), from -1 to 1.
        itc: Probability by ITC, the softmax over all images of the index.
        match: Probability that image and text match (ITM), None if the image was not re-ranked.
    """

    path: str
    similarity: float
    itc: float
    match: float | None = None

    @property
    def score(self) -> float:
        """Probability that ranks the image: by ITM if it was re-ranked, else by ITC."""
        return self.itc if self.match is None else self.match


class Copy(NamedTuple):
    """An image of a group of near-copies.

    Attributes:
        path: Absolute path.
        likeness: Share of equal bits of the hashes of this image and an earlier one of the group.
    """

    path: str
    likeness: float


# --------------------------------------------------------------------------------------------------
# files


def read_index(folder: str | Path) -> Index:
    """Read the index in a folder. Raises InputError if it is missing or damaged."""
    folder = Path(folder)
    while True:
        about = _read_about(folder)
        try:
            return _read_files(folder, about)
        except (OSError, ValueError, TypeError) as error:
            if about == _read_about(folder):  # otherwise an update has just replaced the files
                raise InputError(
                    f"{folder}: the index is damaged ({error}); remove it and index the images"
                    " again"
                ) from None


def _read_about(folder: Path) -> About:
    """Return the content of index.json. Raises InputError."""
    try:
        # json, because msgspec refuses paths that are not UTF-8
        about = msgspec.convert(json.loads((folder / INDEX).read_bytes()), About)
        about.config = as_config(about.config, f"{folder / INDEX}: config").to_dict()
        return about
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: no index there, {INDEX} is missing; make one with tools.search index"
        ) from None
    except ValueError as error:
        raise InputError(
            f"{folder / INDEX}: not the file of an index ({error}); remove {folder} and index the"
            " images again"
        ) from None
    except OSError as error:
        raise InputError(
            f"{folder / INDEX}: cannot be read ({error}); name the folder of an index"
        ) from None


def _read_files(folder: Path, about: About) -> Index:
    lines = _read_file(folder, IMAGES, about.token, Path.read_text).splitlines()
    features = _read_file(folder, FEATURES, about.token, lambda path: np.load(path, mmap_mode="r"))
    rows = msgspec.convert([[*Row(**json.loads(line))] for line in lines], list[Row])
    shape = len(rows), about.config["embed_dim"]
    if not rows or features.shape != shape or features.dtype != np.float16:
        raise ValueError("its files do not belong together")
    about_model = about.checkpoint, about.digest, about.task, about.config, about.left
    return Index(rows, features, *about_model)


def _read_file(folder: Path, name: str, token: str, read: Callable[[Path], Any]) -> Any:
    """Read a file of the index with this token."""
    with contextlib.suppress(FileNotFoundError):
        return read(folder / f".{token}.{name}")
    return read(folder / name)


def write_index(folder: str | Path, index: Index) -> None:
    """Write an index.

    The rename of index.json replaces the whole index: readers look for files with its token first.
    So an interrupted call leaves either the previous or the new index.

    Args:
        folder: Folder of the index.
        index: The index.

    Raises:
        TrainingStopped: The disk is full or cannot be written.
    """
    folder, token = Path(folder), secrets.token_hex(4)
    about = About(token, index.checkpoint, index.digest, index.task, index.config, index.left)
    with writing(folder / INDEX, "the previous index is untouched"):
        with atomic_write(folder / f".{token}.{FEATURES}") as file:
            header = np.lib.format.header_data_from_array_1_0(index.features)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(index.features))
        with atomic_write(folder / f".{token}.{IMAGES}", "w") as file:
            file.writelines(f"{json.dumps(row._asdict())}\n" for row in index.rows)
        with atomic_write(folder / INDEX, "w") as file:
            json.dump(msgspec.structs.asdict(about), file, indent=2)
        _finish(folder, token)


def _finish(folder: Path, token: str) -> None:
    """Rename the files with a token, and remove the files of interrupted calls."""
    for name in (FEATURES, IMAGES):
        for path in folder.glob(f".????????.{name}"):
            if path.name == f".{token}.{name}":
                os.replace(path, folder / name)
            else:
                path.unlink()


@permitted()
def open_index(folder: str | Path) -> Index | None:
    """Create the folder of an index and lock it until this process ends.

    Returns:
        The index in the folder, None if there is none yet.

    Raises:
        InputError: Another process has the lock, the folder cannot be written to, or it has other
            files.
    """
    folder = Path(folder)
    exists = (folder / INDEX).is_file()
    if not exists and folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise InputError(f"--output {folder}: has files but no index; name an empty or new folder")
    make_output_dir(folder, flag="--output")
    if not exists:
        return None
    index = read_index(folder)
    _finish(folder, _read_about(folder).token)
    return index


# --------------------------------------------------------------------------------------------------
# the model


def check_model(model: Inference, index: Index | None, folder: str | Path) -> str:
    """Return the digest of a model, which is equal for all formats of its file.

    Raises:
        InputError: The index in the folder was made with other weights, another vocabulary or
            another value of the key exif.
    """
    weights = (
        content
        for name, value in sorted(model.model.state_dict().items())
        if not is_momentum(name)
        for content in (name.encode(), value.cpu().flatten().view(torch.uint8).numpy())
    )
    digest = hash_contents(itertools.chain([model.model.vocabulary.encode()], weights))
    if index and digest != index.digest:
        raise InputError(
            f"{folder}: the index was made with another model than {model.source}; name the"
            f" checkpoint {index.checkpoint}, or make another index"
        )
    if index and index.config["exif"] != model.config.exif:
        raise InputError(
            f"{folder}: the index was made with another orientation of photos; add --set"
            f" exif={index.config['exif']}, or make another index"
        )
    return digest


def load_model_of(
    index: Index, folder: str | Path, device: str | None = None, checkpoint: str | None = None
) -> Inference:
    """Load the model of an index.

    Args:
        index: The index.
        folder: Folder of the index, for messages.
        device: Device as `load_model` takes it.
        checkpoint: Path of the checkpoint. Default: its path when the index was made.

    Raises:
        InputError: The checkpoint is missing or has changed.
    """
    source = checkpoint or index.checkpoint
    if not (checkpoint or os.path.exists(source) or is_repository(source)):
        raise InputError(
            f"{folder}: its checkpoint {source} does not exist; give its path with --checkpoint"
        )
    config = index.config
    if Path(config["tokenizer"] or "").suffix in SUFFIXES:  # the checkpoint has the vocabulary
        config = {**config, "tokenizer": str(find_checkpoint(source))}
    model = Inference(index.task, config, source, find_device(device))
    check_model(model, index, folder)
    return model


# --------------------------------------------------------------------------------------------------
# indexing


def find_images(
    folders: Sequence[str | Path],
) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]], Counter]:
    """Find the images in folders at any depth, by suffix.

    Names that begin with a dot are skipped, links are followed.

    Returns:
        Size and time of change by path, in the order of the paths; unreadable links and folders
        with their problems; and a count of the suffixes of other files.

    Raises:
        InputError: A folder cannot be read or has no image.
    """
    found, others, errors = {}, {}, []
    for root in folders:
        try:
            os.listdir(root)
        except OSError as error:
            raise InputError(f"{root}: {error.strerror}; name a folder of images") from None
        files = [
            (path, real, os.path.splitext(path)[1].lower())
            for path, real in _files_below(os.path.abspath(root), errors.append)
        ]
        images = [(path, real) for path, real, suffix in files if suffix in IMAGE_SUFFIXES]
        if not images:
            counts = count_suffixes(Counter(suffix for *_, suffix in files))
            raise InputError(
                f"{root}: no {', '.join(FORMATS)} image in this folder or below it (other files:"
                f" {counts or 'none'}); name a folder of images"
            )
        others |= {real: suffix for _, real, suffix in files if suffix not in IMAGE_SUFFIXES}
        for path, real in images:
            try:
                state = os.stat(path)
                found.setdefault(real, (path, (state.st_size, state.st_mtime_ns)))
            except OSError as error:
                errors.append(error)
    problems = {error.filename: error.strerror for error in errors}
    return dict(sorted(found.values())), list(problems.items()), Counter(others.values())


def _files_below(root: str, onerror: Callable[[OSError], None]) -> Iterator[tuple[str, str]]:
    """Yield the path of each file, and its path without links to folders."""
    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=onerror, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        for name in names:
            if name[0] != ".":
                yield os.path.join(folder, name), os.path.join(real, name)


def count_suffixes(others: Counter) -> str:
    """Describe the eight largest counts of suffixes."""
    return ", ".join(
        f"{count} {suffix or 'without suffix'}" for suffix, count in others.most_common(8)
    )


class _Files(Dataset):
    """Image files as values, hash and problem; either the values or the problem are empty."""

    def __init__(self, paths: list[str], transform: Callable[[Tensor], Tensor], exif: Exif) -> None:
        self.paths, self.transform, self.exif = paths, transform, exif

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str, str]:
        try:
            pixels = self.transform(load_image(self.paths[index], self.exif))
        except ImageError as error:
            return None, "", error.problem
        return pixels, hash_picture(pixels), ""


def _collate(
    samples: list[tuple[Tensor | None, str, str]],
) -> tuple[Tensor | None, list[str], list[str]]:
    """Return usable images uint8 [B, 3, R, R], None if there are none, all hashes and problems."""
    images, hashes, problems = (list(column) for column in zip(*samples, strict=True))
    usable = [image for image in images if image is not None]
    return torch.stack(usable) if usable else None, hashes, problems


def hash_picture(pixels: Tensor) -> str:
    """Return a perceptual hash of an image uint8 [3, H, W], in hexadecimal digits.

    Its bits tell whether each of the lowest frequencies of the gray image, a square of WAVES x
    WAVES coefficients of the cosine transform, is above their median. They hardly change if the
    image is resized or encoded again.
    """
    gray = Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")
    values = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float64)
    waves = dctn(values, norm="ortho")[:WAVES, :WAVES]
    return np.packbits(waves > np.median(waves)).tobytes().hex()


@alone()
def update_index(
    folder: str | Path,
    index: Index | None,
    model: Inference,
    images: dict[str, tuple[int, int]],
    *,
    prune: bool = False,
) -> Changes:
    """Embed images that are new or have changed, and write the index.

    Progress is saved from time to time, and if a signal or an error ends the call.

    Args:
        folder: Folder of the index.
        index: From `open_index`.
        model: Model of the index.
        images: Size and time of change by path, from `find_images`.
        prune: Whether to remove indexed images that are not in `images`.

    Raises:
        InputError: The index was made with another model, or no image is usable.
        TrainingStopped: The index cannot be written.
    """
    model.require("embed_images")
    digest = check_model(model, index, folder)
    source = str(model.source) if is_repository(model.source) else os.path.abspath(model.source)
    about = source, digest, model.task, model.config.to_dict()
    pairs = zip(index.rows, index.features, strict=True) if index else ()
    before = {row.path: (row, feature) for row, feature in pairs}
    if not prune:
        indexed = {path: row.state for path, (row, _) in before.items()}
        images = dict(sorted({**indexed, **images}.items()))
    rows = {path: pair for path, pair in before.items() if images.get(path) == pair[0].state}
    todo = {path: state for path, state in images.items() if path not in rows}
    kept, left, unusable, saved = len(rows), len(todo), [], time.monotonic()
    try:
        for embedded, failures in _embed(model, todo):
            rows |= embedded
            unusable += failures
            left -= len(embedded) + len(failures)
            if time.monotonic() - saved > SAVE_EVERY:
                _write(folder, rows, *about, left)
                saved = time.monotonic()
    finally:
        _write(folder, rows, *about, left)
    if not rows:
        raise InputError(
            f"none of {len(images)} images can be used, for example {': '.join(unusable[-1])}"
        )
    return Changes(kept, len(rows) - kept, len(before.keys() - images.keys()), unusable)


def _write(folder: str | Path, rows: dict[str, tuple[Row, np.ndarray]], *about: Any) -> None:
    """Write the index of rows and their features; `about` are the other attributes of Index."""
    if rows:
        images, features = zip(*(rows[path] for path in sorted(rows)), strict=True)
        write_index(folder, Index(list(images), np.stack(features), *about))


@torch.no_grad()
def _embed(
    model: Inference, images: dict[str, tuple[int, int]]
) -> Iterator[tuple[dict[str, tuple[Row, np.ndarray]], list[tuple[str, str]]]]:
    """Yield for each batch the rows and features [D] by path, and the paths with problems."""
    data = _Files([*images], model.transform, model.config.exif)
    with autocast(model.config, model.device):
        for part, (pixels, hashes, problems) in iter_rank_share(
            data, model.config, model.device, "images", _collate
        ):
            named = list(zip((data.paths[i] for i in part), hashes, problems, strict=True))
            usable = [
                Row(path, *images[path], value) for path, value, problem in named if not problem
            ]
            values = model.model.encode_image(pixels)[1].half().cpu().numpy() if usable else []
            embedded = {
                row.path: (row, features) for row, features in zip(usable, values, strict=True)
            }
            yield embedded, [(path, problem) for path, _, problem in named if problem]


# --------------------------------------------------------------------------------------------------
# searching


def search(
    index: Index,
    model: Inference,
    text: str | None = None,
    image: Any = None,
    *,
    k: int = 20,
    rerank: int | None = None,
    threshold: float | None = None,
) -> list[Hit]:
    """Search an index for a text, an example image or both, and leave out deleted images.

    The `rerank` most similar images are ranked by their ITM logit, as in the evaluation, and the
    others follow by similarity. Without a text, similarity ranks all.

    Args:
        index: The index.
        model: Its model, from `load_model_of`.
        text: Description of the images.
        image: Example, as `Inference.embed_images` takes it. With a text, the similarity is the
            mean of both.
        k: Number of hits.
        rerank: Number of candidates to re-rank. Default: `default_rerank` of the model.
        threshold: Smallest probability, of a match (ITM) or by ITC if nothing is re-ranked.

    Raises:
        InputError: There is nothing to search for, or all images are gone.
    """
    if text is None and image is None:
        raise InputError("nothing to search for; give a text, an image or both")
    features = [] if text is None else [model.embed_texts(text)]
    features += [] if image is None else [model.embed_images(image)]
    rerank = model.default_rerank if rerank is None else rerank
    rerank = 0 if text is None else rerank
    query = torch.stack(features).mean(dim=0, keepdim=True)
    sim, best = most_similar(query, index.features, max(k, rerank), model.device)
    probs = model.similarity_probs(sim, query, index.features)
    found = zip(best[0].tolist(), sim[0].tolist(), probs[0].tolist(), strict=True)
    hits = [Hit(index.rows[i].path, *scores) for i, *scores in found]
    existing = [hit for hit in hits if os.path.isfile(hit.path)]
    if not existing:
        raise InputError(
            f"the images of all hits are missing, such as {hits[0].path}; index the images again"
        )
    if text is not None and rerank:
        existing = _rerank(model, existing[:rerank], text) + existing[rerank:]
        # the others have no probability of a match
        existing = existing if threshold is None else existing[:rerank]
    return [hit for hit in existing if threshold is None or hit.score >= threshold][:k]


def _rerank(model: Inference, hits: list[Hit], text: str) -> list[Hit]:
    """Return hits with their probability of a match, ranked by their ITM logit."""
    logits, probs = model.match_logits([hit.path for hit in hits], text)
    order = logits.argsort(descending=True, stable=True).tolist()
    return [hits[i]._replace(match=probs[i].item()) for i in order]


def describe_scores(model: Inference, hits: Sequence[Hit], total: int) -> list[str]:
    """Describe the probabilities of hits, and the ranking that ordered them.

    Args:
        model: Model of the index.
        hits: Hits of a search.
        total: Number of images in the index.
    """
    by_match = any(hit.match is not None for hit in hits)
    lines = [f"ITC: probability by similarity, a softmax over all {total:,} images"]
    if by_match:
        lines.insert(0, "ITM: probability that image and text match")
    order = f"ranked by {'the logit of ITM, then images without ITM by ITC' if by_match else 'ITC'}"
    if measured := model.ranking:
        order += f"; in the validation after training {measured.by.upper()} ranked better, with a"
        order += f" mean recall of {measured.itc:.1f}% by ITC and {measured.itm:.1f}% by ITM"
    return [*lines, order]


def near_copies(index: Index, threshold: float, device: torch.device) -> list[list[Copy]]:
    """Return groups of images whose hashes are alike.

    An image joins the group of the earlier image that is most like it.

    Args:
        index: The index.
        threshold: Smallest share of equal bits, above 0.5.
        device: Device of the computation.

    Returns:
        The images of each group; the likeness of the first one is 1.
    """
    hashes = np.frombuffer(bytes.fromhex("".join(row.hash for row in index.rows)), np.uint8)
    bits = np.unpackbits(hashes.reshape(len(index.rows), -1), axis=1)
    # the product of two rows of 1 and -1: number of equal bits minus number of different bits
    signs, roots, groups = as_float(bits).mul(2).sub(1).to(device), [], {}
    for start in progress_bar(range(0, len(signs), ROWS), "comparing"):
        stop = start + ROWS
        # 0 for an image itself and later ones, which is the product of unrelated hashes
        products = feature_similarity(signs[start:stop], signs[:stop]).tril(start - 1)
        likeness = products / (2 * bits.shape[1]) + 0.5
        for value, nearest in zip(*map(Tensor.tolist, likeness.max(dim=1)), strict=True):
            number, close = len(roots), value >= threshold
            # an earlier image is already the root of its group
            roots.append(roots[nearest] if close else number)
            copy = Copy(index.rows[number].path, value if close else 1.0)
            groups.setdefault(roots[number], []).append(copy)
    return [group for group in groups.values() if len(group) > 1]
