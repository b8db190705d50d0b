"""Check all data that a task's configuration names, and report what is wrong.

    python -m dataset.check pretrain configs/Pretrain.yaml --report report.json

A run refuses the first wrong entry of a list, and replaces or refuses unusable samples
(docs/faults.md). This command reads to the end, decodes every image once, and counts. If there is
no problem, it also builds the data sets of the task's script, so the script accepts the data.
"""

from configs.flags import Flags, at_least
from engine.launch import begin_script, run_script
from models import MODELS
from utils import cores

flags = Flags(
    "Check all files that a task reads.", "pretrain configs/Pretrain.yaml --report report.json"
)
flags.add_argument(
    "task", choices=list(MODELS), metavar="TASK", help=f"task to check for: {', '.join(MODELS)}"
)
flags.add_argument("config", metavar="CONFIG", help="YAML file of the task")
flags.add_set()
flags.add_argument(
    "--processes",
    type=at_least(1),
    metavar="N",
    default=cores(),
    help="processes that decode images",
)
flags.add_argument(
    "--images",
    type=at_least(0),
    metavar="N",
    help="decode N evenly spaced images of every file (default: all)",
)
flags.add_argument("--report", metavar="FILE", help="JSON file to write all problems and counts to")
if __name__ == "__main__":
    begin_script(flags)

import contextlib
import io
import itertools
import json
import os
import sys
import warnings
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from configs.effects import refuse_unread
from configs.schema import load_config, read_bert_config
from configs.tasks import find_task
from dataset.attributes import read_boxes
from dataset.base import evenly
from dataset.build import build_dataset
from dataset.cache import locate
from dataset.caption import Pair
from dataset.entries import check_entry, digest, read_json_list, where
from dataset.grounding import Expression, GroundingPair
from dataset.images import FORMATS, ImageError, absolute, decode_image, read_image
from dataset.loading import check_length
from dataset.nlvr import Statement
from dataset.pool import begin_worker, in_processes
from dataset.refer import load_detections, load_refer
from dataset.relevance import Ad
from dataset.retrieval import CaptionedImage, RetrievalPair
from dataset.shards import Shards, expand, image_and_captions, read_sample
from dataset.text import is_blank, without_halves
from dataset.ve import Entailment
from dataset.vqa import ROOTS, Question, TrainingQuestion, load_answer_list
from evaluation.metrics import count_vqa_formulas, describe_vqa_formulas
from utils import InputError, atomic_write

# problems, repeated entries and unknown words that are printed
SHOWN, EXAMPLES, UNKNOWN_SHOWN = 20, 3, 10
UNKNOWN_LENGTH = 30  # characters of an unknown word that are kept
IMAGES_AT_A_TIME = 16  # per job of a process
# pixels of the shorter side at which the bins of the histogram begin
SIDES = (64, 128, 256, 512, 1024)
BINS = [
    f"<{SIDES[0]}",
    *(f"{start}-{end - 1}" for start, end in itertools.pairwise(SIDES)),
    f">={SIDES[-1]}",
]
TITLE_WIDTH, BAR_WIDTH = 17, 30  # characters
BAR = {"leave": False, "file": sys.stdout, "dynamic_ncols": True, "mininterval": 1}


class Form(NamedTuple):
    """The content of a list: its title in the report and the class of its entries."""

    title: str
    entry: type = None


PAIRS = Form("image-caption pairs for pre-training", Pair)
IMAGES = Form("images with captions for a retrieval test", CaptionedImage)
STATEMENTS, ENTAILMENT = Form("NLVR2", Statement), Form("visual entailment", Entailment)
ADS = Form("queries and ads", Ad)
# by data set, as build_dataset names them; validation sets have the form of test sets
FORMS = {
    "pretrain_train": PAIRS,
    "nlvr_pretrain_train": PAIRS,
    "retrieval_train": Form("captions for retrieval", RetrievalPair),
    "retrieval_test": IMAGES,
    "vqa_train": Form("questions to train on", TrainingQuestion),
    "vqa_test": Form("questions to test on", Question),
    "ve_train": ENTAILMENT,
    "ve_test": ENTAILMENT,
    "nlvr_train": STATEMENTS,
    "nlvr_test": STATEMENTS,
    "relevance_train": ADS,
    "relevance_test": ADS,
    "grounding_train": Form("referring expressions to train on", GroundingPair),
    "grounding_test": Form("referring expressions to test on", Expression),
    "attributes_test": Form("boxes with attributes to test on"),
}
SHARDS = Form("WebDataset shards of image-caption pairs for pre-training", Pair)


def data_sets(task):
    """Return the data sets of a task, "task_split" by the key of their files."""
    row = find_task(task)
    names = {"train_file": f"{task}_train"} if row.trains else {}
    for split, key in row.files.items():
        names[key] = f"{'retrieval' if task == 'pretrain' else task}_{split}"
    return names


class Check:
    """The state of a check: settings that every file needs, and the problems found so far."""

    def __init__(self, task, config, images, compute):
        # names: the task's data sets by the key of their files; images: how many of each file to
        # look at, None for all
        self.names = data_sets(task)
        self.task, self.config, self.images = task, config, images
        self._compute = compute  # of in_processes
        self.problems, self.notes = [], []  # problems: {file, entry, problem}
        self.tokenizer = self.refer = None  # None if they cannot be loaded
        # whether a key's image folder is missing; paths
        self.lost_roots, self.trained_images = {}, set()

    def add(self, path, entry, problem):
        """Record a problem, an error or a text. path:

        None for a key of the configuration; entry: index in a list, key in a shard.
        """
        problem = str(problem).removeprefix(place(path, entry)).lstrip(": ")
        self.problems.append({"file": path, "entry": entry, "problem": problem})

    def is_lost(self, root, path, entry):
        """Return whether the image folder of a key is missing.

        Record the problem when an entry first needs the folder.
        """
        if root not in self.lost_roots:
            folder = self.config[root]
            self.lost_roots[root] = folder is None or folder != "" and not os.path.isdir(folder)
            if folder is None:
                self.add(
                    path,
                    entry,
                    f"the configuration lacks the key {root}, the folder of the images of such entries",
                )
            elif self.lost_roots[root]:
                self.add(
                    None,
                    None,
                    f"{root}: folder {folder} does not exist; set {root} to the folder that the image paths "
                    "of the lists start from",
                )
        return self.lost_roots[root]

    @contextlib.contextmanager
    def noting(self, path=None):
        """Within it an InputError is a problem, and ends the block."""
        try:
            yield
        except InputError as error:
            self.add(path, None, error)

    def look_at(self, length, job, name):
        """Yield look(job(i)) for indices below length in order, computed in processes.

        Raises TrainingStopped if one dies.
        """
        jobs = map(job, tqdm(evenly(length, self.images), desc=name, unit="img", **BAR))
        chunks = iter(lambda: list(itertools.islice(jobs, IMAGES_AT_A_TIME)), [])
        yield from itertools.chain.from_iterable(
            self._compute(look_at_all, ((some[0][1], some) for some in chunks))
        )


def place(path, entry):
    """How messages name an entry of a list or shard, or the file as such."""
    return (
        (path or "")
        if entry is None
        else where(path, entry)
        if isinstance(entry, int)
        else f"{path}: sample {entry}"
    )


# --------------------------------------------------------------------------------------------------
# in the processes that decode


class Seen(NamedTuple):
    """An image that was looked at: of an entry of a list, or in a sample of the shards."""

    index: int  # of the entry or sample
    path: str  # of the image, or of the shard
    key: str | None = None  # of a sample, as the following two
    captions: tuple = ()
    digest: int = 0
    error: InputError | None = None  # why the sample cannot be used
    kind: str = ""  # why the image cannot be used: in short,
    problem: str = ""  # and in full
    format: str = "other"  # of the file, and its mode
    side: int = 0  # the shorter one, in pixels
    rotated: bool = False  # by EXIF
    animated: bool = False


def begin():
    """What a process that decodes images starts with."""
    begin_worker()
    warnings.simplefilter("ignore")  # Pillow warns often of damaged files
    torch.set_num_threads(1)


def look(job):
    """Decode an image or a sample as a run does. job: (index, path), for a sample with its Position.

    Return Seen.
    """
    seen, data = Seen(*job[:2]), None
    try:
        if job[2:]:
            sample = read_sample(job[2])
            seen = seen._replace(key=sample["__key__"])
            data, captions = image_and_captions(sample, place(seen.path, seen.key))
            seen = seen._replace(captions=captions, digest=digest((data, captions)))
        data = read_image(seen.path) if data is None else data
        seen = seen._replace(side=min(decode_image(data, seen.path).shape[1:]))
        with contextlib.suppress(Exception), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # the pixels are readable, but the other data of the file may be damaged
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
            animated = getattr(image, "is_animated", False)
            seen = seen._replace(
                format=f"{image.format} {image.mode}", rotated=rotated, animated=animated
            )
    except InputError as error:
        seen = seen._replace(error=error)
    except ImageError as error:
        seen = seen._replace(kind=error.kind, problem=error.problem)
    return seen


def look_at_all(jobs):
    """Run `look` on several jobs. jobs: (path of the first one, list of jobs).

    Return a list of Seen.
    """
    return list(map(look, jobs[1]))


# --------------------------------------------------------------------------------------------------
# counts, printed lines and the report of a file


class Tally:
    """Counts of the entries, texts and images of a list, or of all shards together."""

    def __init__(self, check, key, file, form):
        self.check, self.form, self.training = check, form, key == "train_file"
        self.max_words = check.config["max_words"] or (form.entry and form.entry.max_words)
        self.max_tokens = check.config["max_tokens"] or (form.entry and form.entry.max_tokens)
        # what is printed and reported
        self.rows, self.result = [], {"key": key, "file": file, "form": form.title}
        self.entries = self.read = 0  # with --images, not all samples of shards are read
        self.lost_roots = set()  # keys of image folders that are missing
        # entries and images that cannot be used, by kind
        self.wrong, self.unusable = Counter(), Counter()
        self.digests, self.indices = array("Q"), array("Q")  # of each usable entry
        self.words, self.pieces = array("L"), array("L")  # of each text
        self.all_words, self.unknown = 0, Counter()
        self.sides, self.formats, self.traits = Counter(), Counter(), Counter()  # of each image
        self.formulas = Counter()  # of questions to test on

    def refuse(self, path, entry, error):
        """Count an entry that cannot be used."""
        self.wrong[error.kind] += 1
        self.check.add(path, entry, error)

    def add_entry(self, path, entry, index, captions, value):
        """Count an entry and its captions; value: its digest."""
        if not all([self._add_text(caption) for caption in captions]):
            self.refuse(
                path,
                entry,
                InputError("a caption is empty after clean-up: correct or remove it", "empty text"),
            )
        self.indices.append(index)
        self.digests.append(value)

    def _add_text(self, text):
        """Count a text; returns whether anything is left of it after clean-up."""
        words = self.form.entry.clean(text, sys.maxsize).split(" ")
        kept = without_halves(" ".join(words[: self.max_words]))
        usable = not is_blank(kept)
        self.words.append(len(words) if usable else 0)
        if tokenizer := self.check.tokenizer:
            encoding = tokenizer.backend_tokenizer.encode(kept)
            self.pieces.append(len(encoding.ids))
            # the first piece is [CLS]
            self.all_words += encoding.word_ids[-1] + 1 if encoding.word_ids[1:] else 0
            for piece, (start, end) in zip(encoding.ids, encoding.offsets):
                if piece == tokenizer.unk_token_id:  # a word that the vocabulary cannot spell
                    self.unknown[kept[start : min(end, start + UNKNOWN_LENGTH)]] += 1
        return usable

    def add_image(self, path, entry, name, seen):
        """Count an image that was looked at."""
        if seen.kind:
            self.unusable[seen.kind] += 1
            self.check.add(path, entry, f"{name}: {seen.problem}")
            return
        self.sides[sum(seen.side >= start for start in SIDES)] += 1
        self.formats[seen.format] += 1
        small = seen.side < (self.check.config["image_res"] or 0)
        self.traits.update(small=small, rotated=seen.rotated, animated=seen.animated)

    def row(self, title, text, **numbers):
        """Add a line to the printed rows, and numbers to the report."""
        self.rows.append(f"  {title:<{TITLE_WIDTH}}{text}")
        self.result.update(numbers)

    def report(self, name, images, title=None):
        """Print the counts and return them.

        name(index): name of an entry; images: images that the entries name; title: default the
        title of the form.
        """
        self._report_entries(name)
        self._report_texts()
        if self.formulas:
            self.row(
                "accuracy", describe_vqa_formulas(self.formulas), vqa_formulas=dict(self.formulas)
            )
        self._report_images(images)
        say(
            "",
            f"{self.result['key']} {self.result['file']}",
            f"  {title or self.form.title}",
            *self.rows,
        )
        return self.result

    def _report_entries(self, name):
        sample = f", {self.read:,} read" if self.read < self.entries else ""
        self.row(
            "entries",
            f"{self.entries:,}{sample}{_unusable(self.wrong, self.read)}",
            entries=self.entries,
            entries_read=self.read,
            wrong=dict(self.wrong.most_common()),
        )
        digests, first, which = np.unique(self.digests, return_index=True, return_inverse=True)
        earlier = first[which]  # the first entry with the digest of each
        later = np.flatnonzero(earlier < np.arange(len(earlier))).tolist()
        examples = [
            f"{name(self.indices[i])} as {name(self.indices[earlier[i]])}" for i in later[:EXAMPLES]
        ]
        self.result.update(duplicates=len(later), first_duplicates=examples)
        if later:
            self.row(
                "repeated",
                f"{_part(len(later), self.read)}: {', '.join(examples)}{', ...' * (len(later) > EXAMPLES)}",
            )

    def _report_texts(self):
        self.row("texts", f"{len(self.words):,}", texts=len(self.words))
        if self.words:
            self._report_lengths("words", self.words, self.max_words)
        if self.pieces:
            most = self.check.tokenizer.model_max_length
            self._report_lengths("word_pieces", self.pieces, min(self.max_tokens or most, most))
            count, most = self.unknown.total(), dict(self.unknown.most_common(UNKNOWN_SHOWN))
            of_words, of_pieces = count / max(1, self.all_words), count / sum(self.pieces)
            shown = ": " * bool(most) + ", ".join(
                f"{word} {times:,}" for word, times in most.items()
            )
            self.row(
                "unknown words",
                f"{_percent(of_words)} ({_percent(of_pieces)} of the word pieces){shown}",
                unknown_words={
                    "count": count,
                    "share_of_words": of_words,
                    "share_of_word_pieces": of_pieces,
                    "most_frequent": most,
                },
            )
            if of_words > 0.5:
                self.check.notes.append(
                    f"{self.result['key']} {self.result['file']}: the vocabulary lacks {_percent(of_words)} of "
                    "the words; python -m tools.vocabulary makes one from captions"
                )

    def _report_lengths(self, key, lengths, limit):
        lengths = np.frombuffer(lengths, lengths.typecode)
        low, median, p95, high = np.quantile(
            lengths, [0, 0.5, 0.95, 1], method="inverted_cdf"
        ).tolist()
        cut = float((lengths > limit).mean())
        text = f"{low:,} to {high:,}, median {median:,}, 95% up to {p95:,}; {_percent(cut)} cut at {limit:,}"
        numbers = {
            "min": low,
            "median": median,
            "p95": p95,
            "max": high,
            "limit": limit,
            "cut": cut,
        }
        self.row(key.replace("_", " "), text, **{key: numbers})

    def _report_images(self, images):
        total, also_trained = (
            len(images),
            0 if self.training else len(self.check.trained_images.intersection(images)),
        )
        usable, bad = self.sides.total(), self.unusable.total()
        looked_at, limit, image_res = (
            usable + bad,
            self.check.config["max_skipped"],
            self.check.config["image_res"],
        )
        self.result.update(
            images=total,
            looked_at=looked_at,
            unusable=dict(self.unusable.most_common()),
            folders_missing=sorted(self.lost_roots),
            images_also_trained_on=also_trained,
            shorter_side={name: self.sides[i] for i, name in enumerate(BINS)},
            image_res=image_res,
            smaller_than_image_res=self.traits["small"],
            formats=dict(self.formats.most_common()),
            exif_rotated=self.traits["rotated"],
            animated=self.traits["animated"],
        )
        if self.lost_roots:
            self.row(
                "images",
                f"not looked at in {', '.join(sorted(self.lost_roots))}, which does not exist",
            )
        if total:
            shown = "all" if looked_at == total else f"{looked_at:,}"
            self.row("images", f"{total:,}, {shown} looked at{_unusable(self.unusable, looked_at)}")
        if self.training and bad > limit * looked_at:
            self.row("", f"more than max_skipped ({_percent(limit)}): training would stop")
        if also_trained:
            self.row("", f"{_part(also_trained, total)} are in train_file too")
        if usable:
            self._report_usable_images(usable, image_res)

    def _report_usable_images(self, usable, image_res):
        for i, count in sorted(self.sides.items()):
            title = "shorter side" if i == min(self.sides) else ""
            bar = "#" * round(count / usable * BAR_WIDTH)
            self.row(title, f"{BINS[i]:<10}{count:>10,}  {_percent(count / usable):>6}  {bar}")
        if image_res:
            self.row(
                "", f"{_part(self.traits['small'], usable)} smaller than image_res {image_res}"
            )
        self.row(
            "formats", ", ".join(f"{name} {count:,}" for name, count in self.formats.most_common())
        )
        rotated, animated = self.traits["rotated"], self.traits["animated"]
        self.row("EXIF-rotated", f"{rotated:,}{', used as they are stored' * bool(rotated)}")
        self.row("animated", f"{animated:,}{', of which the first frame is used' * bool(animated)}")


def _unusable(counts, whole):
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
    return f"; {_part(counts.total(), whole)} cannot be used: {kinds}" if counts else ""


def _part(count, whole):
    return f"{count:,} ({_percent(count / max(1, whole))})"


def _percent(share):
    return "0%" if share == 0 else "<0.1%" if share < 0.001 else f"{share:.1%}"


def say(*lines):
    """Print lines, of which none has a character that a terminal could not show or would obey."""
    for line in lines:
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line.rstrip()))


# --------------------------------------------------------------------------------------------------
# lists and shards


def unreadable(key, file):
    """Print that a list, or none of some shards, can be read -> what the report says of it."""
    say("", f"{key} {file}", "  cannot be read")
    return {"key": key, "file": file}


def check_list(check, path, key, questions):
    """Check a JSON list of the task, its texts and its images. Return its part of the report.

    questions: {id: whether it has an answer} of the questions to test on; the questions of this
    list are added.
    """
    form = FORMS[check.names[key].replace("_val", "_test")]
    for needed in ("refcoco_data", "det_file") if form.entry is Expression else ():
        if check.config[needed] is None:
            check.add(
                path,
                None,
                f"the configuration lacks the key {needed}, which referring expressions are tested with",
            )
    tally = Tally(check, key, path, form)
    images = _count_entries(tally, path, questions)
    if not tally.entries:
        return unreadable(key, path)
    if tally.training:
        check.trained_images.update(images)
    return _report_images(tally, path, images, "entry {}".format)


def _report_images(tally, path, images, name):
    """Decode the images of a file, {path: index of the first entry that names it}, and report the
    counts.
    """
    paths = list(images)
    for seen in tally.check.look_at(
        len(paths), lambda i: (images[paths[i]], paths[i]), os.path.basename(path)
    ):
        tally.add_image(path, seen.index, f"image {seen.path}", seen)
    joined = len(tally.indices) - len(images)
    if tally.form.entry is CaptionedImage and joined > 0 and not tally.lost_roots:
        tally.row(
            "joined",
            f"{joined:,} entries with an image of an earlier entry: their captions are of one image",
            entries_joined=joined,
        )
    return tally.report(name, images)


def check_boxes(check, path, key):
    """Check a file of attributes in boxes, up to its first mistake, and its images -> what the
    report says of it.
    """
    tally, images = Tally(check, key, path, FORMS["attributes_test"]), {}
    with check.noting(path):
        for index, box in enumerate(read_boxes(path)[1]):
            tally.entries, tally.read = tally.entries + 1, tally.read + 1
            tally.add_entry(path, index, index, (), digest((box.image, box.pixels)))
            if check.is_lost("image_root", path, index):
                tally.lost_roots.add("image_root")
            else:
                images.setdefault(absolute(check.config["image_root"], box.image), index)
        return _report_images(tally, path, images, "box {}".format)
    return unreadable(key, path)


def _count_entries(tally, path, questions):
    """Count the entries of a list -> {path of an image: index of the first entry that names it}."""
    check, images, first = tally.check, {}, None
    with check.noting(path):
        for index, entry in tqdm(
            enumerate(read_json_list(path)), desc=os.path.basename(path), unit=" entries", **BAR
        ):
            tally.entries, tally.read = tally.entries + 1, tally.read + 1
            try:
                checked = check_entry(entry, tally.form.entry, path, index, first=first)
                if isinstance(checked, Expression) and check.refer:
                    checked.check_ref(check.refer)
            except InputError as error:
                tally.refuse(path, index, error)
                continue
            first = first or checked
            value = digest((checked.images, checked.texts, entry.get("label"), entry.get("ref_id")))
            tally.add_entry(path, index, index, checked.texts, value)
            if isinstance(checked, Question):
                if checked.question_id in questions:
                    problem = f"another entry has the question_id {checked.question_id!r} too: give it its own"
                    tally.refuse(path, index, InputError(problem, "repeated 'question_id'"))
                questions[checked.question_id] = checked.answer is not None
                if checked.answer is not None:
                    annotation = {"question_id": checked.question_id, "answer": checked.answer}
                    tally.formulas.update(count_vqa_formulas([annotation]))
            root = checked.root
            if check.is_lost(root, path, index):
                tally.lost_roots.add(root)
            else:
                for image in checked.images:
                    images.setdefault(absolute(check.config[root], image), index)
    return images


def check_shards(check, paths):
    """Check the samples of WebDataset shards -> what the report says of all of them together."""
    counts, file = {}, paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"
    for path in paths:
        with check.noting(path):
            counts[path] = len(Shards([path], 1))
    if not counts:
        return unreadable("train_file", file)
    shards, ends = Shards(list(counts), 1), list(itertools.accumulate(counts.values()))

    def name(index):
        shard, number = locate(index, ends)
        return f"number {number} of {os.path.basename(shards.paths[shard])}"

    tally = Tally(check, "train_file", file, SHARDS)
    tally.entries, others = len(shards), sum(shards.others)
    if others:
        tally.row(
            "others",
            f"{others:,} files that are in no sample, as their names have no suffix or they are links",
            files_in_no_sample=others,
        )
    for seen in check.look_at(
        len(shards), lambda i: (i, (position := shards.position(i)).path, position), "shards"
    ):
        tally.read += 1
        if seen.error:
            tally.refuse(seen.path, seen.key, seen.error)
        else:
            tally.add_entry(seen.path, seen.key, seen.index, seen.captions, seen.digest)
            tally.add_image(seen.path, seen.key, "image", seen)
    return {
        "shards": counts,
        **tally.report(name, range(len(shards)), f"{SHARDS.title}: {len(paths)}"),
    }


def check_lists(check):
    """Check the lists that the task reads, and print the result of each.

    Return their parts of the report.
    """
    results = []
    for key, name in check.names.items():
        lists, shards, questions = [], [], {}
        for file in check.config[key] or []:
            with check.noting():
                shards_too = name in ("pretrain_train", "nlvr_pretrain_train")
                more = expand([file]) if shards_too else ([file], [])
                lists, shards = lists + more[0], shards + more[1]
        with check.noting():
            expand(shards)  # none may be named twice
        for path in lists:
            boxes = name.startswith("attributes")
            results.append(
                check_boxes(check, path, key) if boxes else check_list(check, path, key, questions)
            )
        results += [check_shards(check, list(dict.fromkeys(shards)))] if shards else []
        without = sum(not answered for answered in questions.values())
        if 0 < without < len(questions):
            check.add(
                None,
                None,
                f"{key}: {without} questions have no 'answer', though {len(questions) - without} have: give "
                "all of them answers, or none",
            )
        elif without and key == "val_file":
            check.add(
                None,
                None,
                "val_file has no answers to compare with: leave val_file out, the last epoch is then the "
                "result",
            )
    return results


def check_others(check, tokenizer_of):
    """Open the other files that the task reads. Return {key: description}.

    A file that cannot be opened is a problem. If the hub cannot be reached, it is a note, because
    the configuration may be right.
    """
    config, found = check.config, {}
    for root in filter(config.get, ROOTS.values() if check.task == "vqa" else ["image_root"]):
        found[root] = (
            config[root] if os.path.isdir(config[root]) else f"{config[root]}: does not exist"
        )

    def load(key, describe, function, *arguments):
        name = config[key] if isinstance(config[key], str) else "in the configuration"
        try:
            loaded = function(*arguments)
            found[key] = f"{name}: {describe(loaded)}"
            return loaded
        except InputError as error:
            # a file name is not of the hub
            if error.kind == "network" and not os.path.splitext(name)[1]:
                found[key] = f"{name}: not looked at, the hub cannot be reached"
                check.notes.append(str(error))
            else:
                found[key] = f"{name}: cannot be used"
                check.add(None, None, error)

    if config["bert_config"] is None:
        check.add(
            None,
            None,
            "the configuration lacks the key bert_config: add it, or pass --set bert_config=...",
        )
    elif load(
        "bert_config",
        lambda bert: f"{bert['num_hidden_layers']} layers",
        read_bert_config,
        config["bert_config"],
    ):
        key = "tokenizer" if config["tokenizer"] else "text_encoder"
        check.tokenizer = load(
            key, lambda tokenizer: f"{len(tokenizer)} word pieces", tokenizer_of, config
        )
    if check.task == "vqa" and config["answer_list"]:
        load(
            "answer_list",
            lambda answers: f"{len(answers)} answers",
            load_answer_list,
            config["answer_list"],
        )
    if check.task == "grounding" and config["refcoco_data"]:
        check.refer = load(
            "refcoco_data",
            lambda refer: f"{len(refer.refs)} refs",
            load_refer,
            config["refcoco_data"],
            config["refer_dataset"],
        )
    if check.refer and config["det_file"]:
        load(
            "det_file",
            lambda boxes: f"boxes of {len(boxes)} images",
            load_detections,
            config["det_file"],
            check.refer,
        )
    return found


def main():
    """Check the data of a configuration from the command line; exits with status 1 if there are
    problems.
    """
    args = flags.parse_args()
    refuse_unread(args.task, args.set)
    config = load_config(args.config, args.set)
    names = data_sets(args.task)
    keys = list(names)
    if not any(config[key] for key in keys):
        raise InputError(
            f"{args.config} names no file that {args.task} reads, with none of the keys {', '.join(keys)}"
        )
    # dataset/ knows nothing of models/: the tokenizer is handed in, by this command as by the
    # scripts
    from models.tokenizer import tokenizer_of

    with contextlib.ExitStack() as stack:
        if args.report:
            try:
                report = stack.enter_context(atomic_write(args.report, "w"))
            except OSError as error:
                raise InputError(
                    f"--report {args.report}: cannot write there ({error.strerror}), name another file"
                ) from None
        check = Check(
            args.task, config, args.images, stack.enter_context(in_processes(args.processes, begin))
        )
        others = check_others(check, tokenizer_of)
        say(
            f"{args.task} {args.config}",
            *(f"  {key:<{TITLE_WIDTH}}{value}" for key, value in others.items()),
        )
        results = check_lists(check)
        for key, name in names.items() if not check.problems else ():
            with check.noting():
                if config[key]:
                    # raises problems of whole lists
                    dataset = build_dataset(args.task, name.rpartition("_")[2], config)
                    if key == "train_file":
                        check_length(len(dataset), config["batch_size"], world_size=1)
        if args.report:
            found = {
                "task": args.task,
                "config": args.config,
                "others": others,
                "files": results,
                "notes": check.notes,
            }
            json.dump(
                {"problems": check.problems, "count": len(check.problems), **found},
                report,
                indent=1,
            )
    say("", *(f"note: {note}" for note in check.notes))
    if not check.problems:
        say("No problems.")
        return
    say(
        f"{len(check.problems):,} problem{'s' * (len(check.problems) > 1)}; docs/faults.md says what a run makes of each"
    )
    say(
        *(
            f"{place(of['file'], of['entry'])}: {of['problem']}".removeprefix(": ")
            for of in check.problems[:SHOWN]
        )
    )
    if len(check.problems) > SHOWN:
        say(
            f"... and {len(check.problems) - SHOWN:,} more; {args.report or '--report FILE.json'} lists them all"
        )
    sys.exit(1)


if __name__ == "__main__":
    run_script(main)
