"""Check of the data of a task: all entries of its files, and the images that they name."""

import contextlib
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from configs.config import Config
from configs.tasks import find_task
from dataset.attributes import Box, read_boxes
from dataset.base import evenly
from dataset.build import construct_dataset, find_form, split_keys
from dataset.caption import Pair
from dataset.entries import Entry, read_entries, where
from dataset.grounding import Expression
from dataset.images import (
    Exif,
    ImageError,
    absolute,
    decode_image,
    exif_of_boxes,
    has_orientation,
    read_image,
)
from dataset.loading import check_length
from dataset.pool import begin_worker
from dataset.shards import Position, Shards, expand, image_and_captions, read_sample
from dataset.text import is_blank, without_halves
from dataset.vqa import ROOTS, Question
from evaluation.metrics import count_vqa_formulas
from utils import InputError


class Seen(NamedTuple):
    """The result of decoding an image.

    Attributes:
        kind: The reason why the image cannot be used, in a few words, "" if it can be used.
        problem: The reason in full.
        turned: Whether the image has an EXIF orientation.
    """

    kind: str = ""
    problem: str = ""
    turned: bool = False


def name_entry(path: str | None, entry: int | str | None) -> str:
    """Return the name of an entry of a list, a sample of a shard, or a file for messages."""
    path = path or ""
    if entry is None:
        return path
    return where(path, entry) if isinstance(entry, int) else f"{path}: sample {entry}"


def begin() -> None:
    """Initialize a process that decodes images."""
    begin_worker()
    warnings.simplefilter("ignore")  # Pillow warns often of damaged files
    torch.set_num_threads(1)


def decode(path: str, exif: Exif, data: bytes | None = None) -> Seen:
    """Decode an image as a run does.

    Args:
        path: The file.
        exif: As in `decode_image`.
        data: Content of the file, by default read from it.
    """
    try:
        data = read_image(path) if data is None else data
        decode_image(data, path, exif)
    except ImageError as error:
        return Seen(error.kind, error.problem)
    return Seen(turned=has_orientation(data))


def decode_sample(position: Position, exif: Exif) -> tuple[str, str, list[str], Seen]:
    """Read a sample of a shard as a run does.

    Returns:
        The path of the shard, the key of the sample, its captions, and the result for its image.
    """
    sample, path = read_sample(position), position.path
    key = sample["__key__"]
    where = name_entry(path, key)
    try:
        data, captions = image_and_captions(sample, where)
    except InputError as error:
        return path, key, [], Seen("wrong sample", str(error).removeprefix(f"{where}: "))
    return path, key, captions, decode(path, exif, data)


class Check:
    """A check of all files that a task reads.

    Args:
        task: Name of the task.
        config: Configuration of the task.
        images: Number of evenly spaced images of each file to decode, None for all.
        run: Function of `in_processes` that runs jobs.

    Attributes:
        problems: Problems of entries, files and keys, as {file, entry, problem}.
    """

    def __init__(self, task: str, config: Config, images: int | None, run: Callable) -> None:
        self.task, self.config, self.images, self.run = find_task(task), config, images, run
        self.problems: list[dict[str, Any]] = []
        self.files = split_keys(self.task)

    def add(
        self, problem: InputError | str, path: str | None = None, entry: int | str | None = None
    ) -> None:
        """Add a problem of an entry or a file; without `path`, of the configuration."""
        problem = str(problem).removeprefix(name_entry(path, entry)).lstrip(": ")
        self.problems.append({"file": path, "entry": entry, "problem": problem})

    @contextlib.contextmanager
    def noting(self, path: str | None = None) -> Iterator[None]:
        """Context that adds an InputError to the problems and ends its block."""
        try:
            yield
        except InputError as error:
            self.add(error, path)

    def report_files(self) -> list[dict[str, Any]]:
        """Check the annotation files of all splits and return a report on each."""
        roots = self._find_roots()
        reports = []
        # grounding validates and tests on one file
        for key, split in {key: split for split, key in self.files.items()}.items():
            before, form, shards, of_key = len(self.problems), find_form(self.task, split), [], []
            for path in getattr(self.config, key) or ():
                with self.noting(path):
                    found = expand([path])[1] if form is Pair else []
                    for shard in found:
                        with self.noting(shard):
                            shards += Shards([shard], 1).paths
                    if not found:
                        of_key.append(FileReport(self, key, path, form).read(roots))
            if shards:
                file = " ... ".join(dict.fromkeys((shards[0], shards[-1])))
                report = FileReport(self, key, file, form)
                of_key.append(report.read_shards(list(dict.fromkeys(shards))))
            images = sum(report["unusable"].total() for report in of_key)
            if len(self.problems) == before + images and getattr(self.config, key):
                self._construct([split for split in self.files if self.files[split] == key])
            reports += of_key
        return reports

    def _find_roots(self) -> dict[str, str]:
        """Return the image folders by their keys. Missing folders are problems."""
        keys = ROOTS.values() if self.task.name == "vqa" else ["image_root"]
        folders = {key: getattr(self.config, key) for key in keys}
        roots = {key: folder for key, folder in folders.items() if folder is not None}
        for key, folder in list(roots.items()):
            if not os.path.isdir(folder or os.curdir):
                self.add(f"{key}: folder {folder} does not exist; set {key} to another folder")
                del roots[key]
        return roots

    def _construct(self, splits: list[str]) -> None:
        """Build data sets as a script does, which finds problems of whole lists."""
        with self.noting():
            for split in splits:
                dataset = construct_dataset(self.task.name, split, self.config)
                if split == "train":
                    check_length(len(dataset), self.config.train_batch_size, world_size=1)


class FileReport:
    """The report on a list, or on all shards together.

    Args:
        check: The check that the file belongs to.
        key: Configuration key that names the file.
        file: Name of the file.
        form: Form of its entries, None for boxes with attributes.
    """

    def __init__(self, check: Check, key: str, file: str, form: type[Entry] | None) -> None:
        self.check, self.form, self.path = check, form, file
        self.report: dict[str, Any] = {"key": key, "file": file, "entries": 0, "wrong": 0}
        self.report |= {"images": 0, "looked_at": 0, "unusable": Counter()}
        self.report["with_exif_orientation"] = 0

    def read(self, roots: dict[str, str]) -> dict[str, Any]:
        """Read a list or a file of boxes, and its images in the folders `roots`."""
        if self.form is None:
            entries = read_boxes(self.path)[1]
        else:
            entries = list(read_entries(self.path, self.form, refuse=self._refuse))
        images: dict[str, int] = {}  # the first entry of each image
        for index, entry in enumerate(entries):
            if entry is None:
                continue
            if isinstance(entry, Box):
                root, paths = "image_root", [entry.image]
            else:
                root, paths = entry.root, entry.images
                self._check_texts(entry.texts, self.path, index)
            if root in roots:
                for path in paths:
                    images.setdefault(absolute(roots[root], path), index)
        paths = list(images)
        chosen = [paths[i] for i in evenly(len(paths), self.check.images)]
        for path, seen in zip(chosen, self._decode(decode, chosen), strict=True):
            self._add_image(seen, self.path, images[path], f"image {path}: ")
        questions = (
            {"question_id": entry.question_id, "answer": entry.answer}
            for entry in entries
            if isinstance(entry, Question) and entry.answer is not None
        )
        self.report |= {"entries": len(entries), "images": len(paths)}
        self.report["vqa_formulas"] = count_vqa_formulas(questions)
        return self.report

    def read_shards(self, paths: list[str]) -> dict[str, Any]:
        """Read the samples of shards."""
        shards = Shards(paths, 1)
        chosen = map(shards.position, evenly(len(shards), self.check.images))
        for path, key, captions, seen in self._decode(decode_sample, chosen):
            self._check_texts(captions, path, key)
            self._add_image(seen, path, key)
        self.report |= {"shards": len(paths), "entries": len(shards), "images": len(shards)}
        return self.report

    def _decode(self, function: Callable, items: Iterable) -> Iterator:
        """Return an iterator of function(item, exif) in worker processes."""
        name = os.path.basename(self.path)
        bar = tqdm(items, desc=name, unit="img", leave=False, disable=None, dynamic_ncols=True)
        boxes, exif = self.form in (None, Expression), self.check.config.exif
        run = functools.partial(function, exif=exif_of_boxes(exif) if boxes else exif)
        return self.check.run(run, bar)

    def _refuse(self, entry: int | str, error: InputError | str, path: str | None = None) -> None:
        """Count an entry that cannot be used."""
        self.report["wrong"] += 1
        self.check.add(error, path or self.path, entry)

    def _check_texts(self, texts: Iterable[str], path: str, entry: int | str) -> None:
        """Refuse an entry if one of its texts is empty after clean-up."""
        limit = self.check.config.max_words
        if any(is_blank(without_halves(self.form.clean(text, limit))) for text in texts):
            self._refuse(entry, "a text is empty after clean-up; correct or remove it", path)

    def _add_image(self, seen: Seen, path: str, entry: int | str, name: str = "") -> None:
        """Count an image. name: Name of the image in the entry, for messages."""
        self.report["looked_at"] += 1
        self.report["with_exif_orientation"] += seen.turned
        if seen.problem:
            self.report["unusable"][seen.kind] += 1
            self.check.add(f"{name}{seen.problem}", path, entry)
