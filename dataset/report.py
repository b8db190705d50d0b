"""Reports on annotation files: problems, repeated entries, lengths of texts, sizes of images."""

import contextlib
import functools
import itertools
import os
import sys
import warnings
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from configs.config import Config
from configs.tasks import find_task
from dataset.attributes import Box, read_boxes
from dataset.base import evenly
from dataset.build import construct_dataset, find_form, split_keys
from dataset.cache import locate
from dataset.caption import Pair
from dataset.entries import Entry, digest, read_entries, where
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
from dataset.shards import Shards, expand, image_and_captions, read_sample
from dataset.text import NOTABLE, count_words, is_blank, without_halves
from dataset.vqa import ROOTS, Question
from evaluation.metrics import count_vqa_formulas
from utils import InputError

EXAMPLES, UNKNOWN_SHOWN = 3, 10  # repeated entries and unknown words in a report
# bins of the shorter side in pixels, by their last values
BINS = {63: "<64", 127: "64-127", 255: "128-255", 511: "256-511", 1023: "512-1023"}
LAST_BIN = ">=1024"


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


def decode(job: tuple, exif: Exif) -> dict[str, Any]:
    """Decode an image of a list, or of a sample of a shard, as a run does.

    Args:
        job: Path of the image or shard, index, and Position of the sample in its shard, if any.
        exif: As in `decode_image`.
    """
    path, index, *position = job
    seen: dict[str, Any] = {"index": index, "path": path}
    try:
        if position:
            sample = read_sample(*position)
            seen["key"] = sample["__key__"]
            data, seen["texts"] = image_and_captions(sample, name_entry(path, seen["key"]))
            seen["digest"] = digest((data, seen["texts"]))
        else:
            data = read_image(path)
        seen["side"] = min(decode_image(data, path, exif).shape[1:])
        seen["exif"] = has_orientation(data)
    except InputError as error:
        seen["error"] = error
    except ImageError as error:
        seen |= {"kind": error.kind, "problem": error.problem}
    return seen


class Check:
    """A check of all files that a task reads.

    Args:
        task: Name of the task.
        config: Configuration of the task.
        images: Number of evenly spaced images of each file to decode, None for all.
        run: Function of `in_processes` that runs jobs.

    Attributes:
        problems: Problems of entries, files and keys, as {file, entry, problem}.
        notes: Remarks that do not stop a run.
        tokenizer: Tokenizer that counts word pieces, None to count none.
        refer: Data set of REFER that expressions are compared with, if any.
    """

    def __init__(self, task: str, config: Config, images: int | None, run: Callable) -> None:
        self.task, self.config, self.images, self.run = find_task(task), config, images, run
        self.problems, self.notes, self.trained_images = [], [], set()
        self.tokenizer = self.refer = None
        self.files = split_keys(self.task)
        roots = ROOTS.values() if task == "vqa" else ["image_root"]
        self.roots = {root: getattr(config, root) for root in roots}
        self.missing_roots = {
            root for root, folder in self.roots.items() if not os.path.isdir(folder or os.curdir)
        }

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
        reports = []
        # grounding validates and tests on one file
        for key, split in {key: split for split, key in self.files.items()}.items():
            before, form, shards = len(self.problems), find_form(self.task, split), []
            for path in getattr(self.config, key) or ():
                with self.noting(path):
                    found = expand([path])[1] if form is Pair else []
                    for shard in found:
                        with self.noting(shard):
                            shards += Shards([shard], 1).paths
                    if not found:
                        reports.append(FileReport(self, key, path, form).read())
            if shards:
                file = " ... ".join(dict.fromkeys((shards[0], shards[-1])))
                shards = list(dict.fromkeys(shards))
                reports.append(FileReport(self, key, file, form).read_shards(shards))
            images = sum(sum(of["unusable"].values()) for of in reports if of["key"] == key)
            if len(self.problems) == before + images and getattr(self.config, key):
                self._construct([split for split in self.files if self.files[split] == key])
        return reports

    def _construct(self, splits: list[str]) -> None:
        """Build data sets as a script does, which finds problems of whole lists."""
        for split in splits:
            with self.noting():
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
        self.report: dict[str, Any] = {
            "key": key,
            "file": file,
            "form": form.__name__ if form else "Box",
        }
        self.counts = defaultdict(Counter)
        self.digests, self.indices = array("Q"), array("Q")  # of each usable entry
        self.words, self.pieces = array("L"), array("L")  # of each text
        self.all_words = self.small = self.turned = 0

    def read(self) -> dict[str, Any]:
        """Read a list or a file of boxes, and its images."""

        def refuse(number: int, error: InputError) -> None:
            self._refuse(error, self.path, number)

        if self.form is None:
            entries = read_boxes(self.path)[1]
        else:
            entries = list(read_entries(self.path, self.form, refuse=refuse))
        images, config = {}, self.check.config
        for index, entry in enumerate(entries):
            try:
                if isinstance(entry, Expression) and self.check.refer:
                    entry.check_ref(self.check.refer)
            except InputError as error:
                entry = refuse(index, error)
            if entry is None:
                continue
            if isinstance(entry, Box):
                root, paths, texts, value = "image_root", [entry.image], (), entry[:3]
            else:
                root, paths, texts = entry.root, entry.images, entry.texts
                value = paths, texts, getattr(entry, "label", 0), getattr(entry, "ref_id", 0)
            self._add_entry(self.path, index, index, texts, digest(value))
            if isinstance(entry, Question) and entry.answer is not None:
                annotation = {"question_id": entry.question_id, "answer": entry.answer}
                self.counts["vqa_formulas"].update(count_vqa_formulas([annotation]))
            if root not in self.check.missing_roots and getattr(config, root) is not None:
                for path in paths:
                    images.setdefault(absolute(getattr(config, root), path), index)
        paths = list(images)
        for seen in self._decode(len(paths), lambda i: (paths[i], images[paths[i]])):
            self._add_image(self.path, seen["index"], f"image {seen['path']}", seen)
        self.report["entries"] = self.report["entries_read"] = len(entries)
        return self._finish(paths, f"{'entry' if self.form else 'box'} {{}}".format)

    def read_shards(self, paths: list[str]) -> dict[str, Any]:
        """Read the samples of shards."""
        shards = Shards(paths, 1)
        ends = list(itertools.accumulate(shards.counts))
        self.report["shards"] = dict(zip(paths, shards.counts, strict=True))
        if any(shards.others):
            self.report["files_in_no_sample"] = sum(shards.others)

        def job(index: int) -> tuple:
            position = shards.position(index)
            return position.path, index, position

        def name(index: int) -> str:
            shard, number = locate(index, ends)
            return f"sample {number} of {os.path.basename(paths[shard])}"

        for seen in self._decode(len(shards), job):
            path, key = seen["path"], seen.get("key")
            if "error" in seen:
                self._refuse(seen["error"], path, key)
            else:
                self._add_entry(path, key, seen["index"], seen["texts"], seen["digest"])
                self._add_image(path, key, "image", seen)
        read = len(evenly(len(shards), self.check.images))
        self.report |= {"entries": len(shards), "entries_read": read}
        return self._finish(range(len(shards)), name)

    def _decode(self, length: int, job: Callable[[int], tuple]) -> Iterator[dict[str, Any]]:
        """Return an iterator of decode(job(i)) for indices below `length`, in worker processes."""
        indices, name = evenly(length, self.check.images), os.path.basename(self.path)
        bar = tqdm(indices, desc=name, unit="img", leave=False, disable=None, dynamic_ncols=True)
        boxes, exif = self.form in (None, Expression), self.check.config.exif
        run = functools.partial(decode, exif=exif_of_boxes(exif) if boxes else exif)
        return self.check.run(run, map(job, bar))

    def _refuse(self, error: InputError, path: str, entry: int | str | None) -> None:
        """Count an entry that cannot be used."""
        self.counts["wrong"][error.kind] += 1
        self.check.add(error, path, entry)

    def _add_entry(
        self, path: str, entry: int | str | None, index: int, texts: Iterable[str], value: int
    ) -> None:
        """Count an entry and its texts. value: digest of the entry."""
        self.digests.append(value)
        self.indices.append(index)
        if not all([self._add_text(text) for text in texts]):
            problem = "a caption is empty after clean-up; correct or remove it"
            self._refuse(InputError(problem, "empty text"), path, entry)

    def _add_text(self, text: str) -> bool:
        """Count a text. Return whether anything is left of it after clean-up."""
        words = self.form.clean(text, sys.maxsize).split(" ")
        limit = self.check.config.max_words or self.form.max_words
        kept = without_halves(" ".join(words[:limit]))
        usable = not is_blank(kept)
        self.words.append(len(words) if usable else 0)
        if tokenizer := self.check.tokenizer:
            pieces, count, unknown = count_words(kept, tokenizer)
            self.pieces.append(pieces)
            self.all_words += count
            self.counts["unknown"].update(unknown)  # words that the vocabulary cannot spell
        return usable

    def _add_image(
        self, path: str, entry: int | str | None, name: str, seen: dict[str, Any]
    ) -> None:
        """Count an image that was decoded."""
        if "kind" in seen:
            self.counts["unusable"][seen["kind"]] += 1
            self.check.add(f"{name}: {seen['problem']}", path, entry)
            return
        side = seen["side"]
        bins = (name for last, name in BINS.items() if side <= last)
        self.counts["shorter_side"][next(bins, LAST_BIN)] += 1
        self.turned += seen["exif"]
        self.small += side < (self.check.config.image_res or 0)

    def _finish(self, images: Sequence, name: Callable[[int], str]) -> dict[str, Any]:
        """Complete the report.

        Args:
            images: Paths of all images, or all samples.
            name: Function that returns the name of an entry.

        Returns:
            The report.
        """
        _, first, which = np.unique(self.digests, return_index=True, return_inverse=True)
        earlier = first[which]  # the first entry with the digest of each
        later = np.flatnonzero(earlier < np.arange(len(earlier))).tolist()
        pairs = [(self.indices[i], self.indices[earlier[i]]) for i in later[:EXAMPLES]]
        self.report |= {
            "wrong": dict(self.counts["wrong"].most_common()),
            "duplicates": len(later),
            "first_duplicates": [f"{name(i)} repeats {name(j)}" for i, j in pairs],
            "texts": len(self.words),
        }
        self._report_texts()
        self._report_images(images)
        return self.report

    def _report_texts(self) -> None:
        config, form = self.check.config, self.form
        if self.words:
            limit = config.max_words or form.max_words
            self.report["words"] = _describe_lengths(self.words, limit)
        if self.pieces:
            most = self.check.tokenizer.model_max_length
            limit = min(config.max_tokens or form.max_tokens or most, most)
            self.report["word_pieces"] = _describe_lengths(self.pieces, limit)
            unknown = self.counts["unknown"]
            share = unknown.total() / max(1, self.all_words)
            self.report["unknown_words"] = {
                "count": unknown.total(),
                "share_of_words": share,
                "share_of_word_pieces": unknown.total() / sum(self.pieces),
                "most_frequent": dict(unknown.most_common(UNKNOWN_SHOWN)),
            }
            if share > NOTABLE:
                self._note(
                    f"the vocabulary lacks {share:.1%} of the words; to make a vocabulary from"
                    " captions, run python -m tools.vocabulary"
                )

    def _report_images(self, images: Sequence) -> None:
        training = self.report["key"] == "train_file"
        trained = self.check.trained_images
        looked_at = self.counts["shorter_side"].total() + self.counts["unusable"].total()
        self.report |= {
            "vqa_formulas": dict(self.counts["vqa_formulas"]),
            "images": len(images),
            "looked_at": looked_at,
            "unusable": dict(self.counts["unusable"].most_common()),
            "images_also_trained_on": 0 if training else len(trained.intersection(images)),
            "shorter_side": {
                name: self.counts["shorter_side"][name] for name in (*BINS.values(), LAST_BIN)
            },
            "smaller_than_image_res": self.small,
            "with_exif_orientation": self.turned,
        }
        if training:
            trained.update(images)
            share = self.counts["unusable"].total() / max(1, looked_at)
            if share > self.check.config.max_skipped:
                self._note(
                    f"{share:.1%} of the images cannot be used, which is more than max_skipped"
                )

    def _note(self, text: str) -> None:
        self.check.notes.append(f"{self.report['key']} {self.path}: {text}")


def _describe_lengths(lengths: array, limit: int) -> dict[str, float]:
    """Return quantiles of the lengths of texts, and the share that exceeds the limit."""
    values = np.frombuffer(lengths, lengths.typecode)
    names = ("min", "median", "p95", "max")
    quantiles = np.quantile(values, [0, 0.5, 0.95, 1], method="inverted_cdf").tolist()
    cut = float((values > limit).mean())
    return {**dict(zip(names, quantiles, strict=True)), "limit": limit, "cut": cut}
