"""Reads all that a task's configuration names, before a run does, and reports what is wrong with it.

    python -m dataset.check configs/Pretrain.yaml --report report.json

A run refuses the first wrong entry of a list, and replaces or refuses samples that it cannot use (docs/faults.md). This goes on
to the end, decodes every image, and counts. A list is read twice, for its entries and texts and then for its images, so that
an entry takes a few bytes of memory, whatever it holds.
"""

import bisect
import contextlib
import functools
import itertools
import json
import os
import re
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from dataset.annotations import PAIR_KEYS, check_entry, grouped_entry, read_json_values, where
from dataset.grounding import check_expression
from dataset.labeled import labeled_entry
from dataset.nlvr import nlvr_entry
from dataset.refer import load_detections, load_refer
from dataset.retrieval import captioned_image
from dataset.shards import Shards, expand
from dataset.survey import Images, Texts, digest, look_at_files, look_at_samples, prepare_process
from dataset.text import MAX_TOKENS, MAX_WORDS, SHORT_TOKENS, pre_caption, pre_question
from dataset.ve import ve_entry
from dataset.vqa import ROOTS, load_answer_list, max_question_words, vqa_entry
from dataset.workers import in_processes
from configs.flags import Flags
from configs.schema import ANNOTATION_KEYS, load_config, read_bert_config
from utils import InputError, atomic_write, cores, run_script

SHOWN = 20  # problems that are printed
EXAMPLES = 3  # of entries that are the same
HEAD = 100  # entries that tell of which form a list is
TITLE_WIDTH, BAR_WIDTH = 17, 30  # characters
IMAGES_A_JOB = 16
EMPTY = "empty text", "a caption is empty after clean-up: correct or remove it"


class Form(NamedTuple):
    """A kind of list. read(entry, path, number) -> (key of the image folder, image paths, texts), or InputError."""

    title: str
    read: Callable
    max_tokens: int | None  # None: what the model takes
    clean: Callable = pre_caption
    max_words: int = MAX_WORDS


class Findings:
    """Problems: how many, the first ones, and all of them in the report, as there may be one for every image; notes."""

    def __init__(self, report=None):
        self.count, self.first, self.notes, self._report = 0, [], [], report

    def add(self, path, entry, problem):
        """path: None for a key of the configuration; entry: number in a list, key in a shard, None for the file as such."""
        if self._report:
            self._report.write(",\n" if self.count else "\n")
            json.dump({"file": path, "entry": entry, "problem": problem}, self._report)
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{_place(path, entry)}: {problem}".removeprefix(": "))

    def add_error(self, path, entry, error):
        """Adds the message of an error, which may name its place itself."""
        self.add(path, entry, str(error).removeprefix(_place(path, entry)).removeprefix(":").strip())


class Context(NamedTuple):
    """What the check of every file needs."""

    config: dict
    findings: Findings
    jobs: Callable  # of in_processes
    images: int | None  # how many of every file are looked at, None for all
    tokenizer: object  # None where it cannot be built
    refer: object  # likewise
    lost_roots: list  # keys of image folders that do not exist
    trained_images: list  # digests of the images of each list to train on, as far as they were checked


class Split(NamedTuple):
    """What the files of train_file, val_file or test_file have in common."""

    key: str
    training: bool
    question_ids: set  # to test on
    answered: Counter  # whether a question to test on has an answer


def _place(path, entry):
    if isinstance(entry, int):
        return where(path, entry)
    return (path or "") if entry is None else f"{path}: sample {entry}"


# ---------------------------------------------------------------------------------------------------------------------
# forms of lists


def form_of(entry, training):
    """The name in `forms` of an entry's form, by its keys; None if they are those of no task."""
    if not isinstance(entry, dict):
        return None
    for key, name in (("question", "vqa"), ("images", "nlvr"), ("sentence", "ve"), ("text", "grounding")):
        if key in entry:
            return name
    if "caption" not in entry:
        return None
    grouped = "image_id" in entry and not isinstance(entry["caption"], list)
    return ("retrieval" if grouped else "pretrain") if training else "retrieval test"


def forms(training, refer=None):
    """{name: Form} of the lists to train or to test on; refer: from load_refer, None if there is none."""

    def pair(entry, path, number):
        check_entry(entry, PAIR_KEYS, path, number)
        captions = entry["caption"]
        return "image_root", [entry["image"]], captions if isinstance(captions, list) else [captions]

    def grouped(form, entry, path, number):
        image, text, _ = grouped_entry(entry, form, path, number)
        return "image_root", [image], [text]

    def expression(entry, path, number):
        if refer and not training:
            check_expression(entry, path, number, refer)
        return grouped("grounding", entry, path, number)

    def captioned(entry, path, number):
        captioned_image(entry, path, number)
        return "image_root", [entry["image"]], entry["caption"]

    def labeled(check, entry, path, number):
        return "image_root", labeled_entry(check, entry, path, number)["images"], [entry["sentence"]]

    def question(entry, path, number):
        kind = vqa_entry(entry, path, number, training)["dataset"]
        return ROOTS[kind], [entry["image"]], [entry["question"]]

    part, use = functools.partial, "to train on" if training else "to test on"
    question_tokens = SHORT_TOKENS if training else None
    return {
        "pretrain": Form("image-caption pairs for pre-training", pair, SHORT_TOKENS),
        "retrieval": Form("captions with image_id for retrieval", part(grouped, "retrieval"), MAX_TOKENS),
        "retrieval test": Form("images with captions for a retrieval test", captioned, MAX_TOKENS),
        "grounding": Form(f"referring expressions {use}", expression, MAX_TOKENS),
        "ve": Form(f"visual entailment {use}", part(labeled, ve_entry), None),
        "nlvr": Form(f"NLVR2 {use}", part(labeled, nlvr_entry), None),
        "vqa": Form(f"questions {use}", question, question_tokens, pre_question, max_question_words(training)),
    }


def _bar(*iterable, **options):
    return tqdm(*iterable, leave=False, file=sys.stdout, dynamic_ncols=True, mininterval=1, **options)


# ---------------------------------------------------------------------------------------------------------------------
# lists and shards


def _form_name(path, training):
    """The form of most of the first entries of a list, None if that is no task's or none can be read."""
    names = Counter()
    with contextlib.suppress(InputError):  # noted where the list is checked
        for _, entry in itertools.islice(read_json_values(path), HEAD):
            names[form_of(entry, training)] += 1
    return max(names, key=names.get, default=None)


def check_list(path, split, context):
    """Checks a JSON list, its texts and its images -> what the report says of it."""
    findings, config = context.findings, context.config
    result = {"key": split.key, "file": path}
    name = _form_name(path, split.training)
    if name is None:
        with _noting(findings, path):
            next(read_json_values(path))
            raise InputError("most of its first entries have not the keys of any task's list: name such a list")
        return result
    if name == "grounding" and not split.training:
        for key in ("refcoco_data", "det_file"):
            if config[key] is None:
                findings.add(path, None, f"the configuration lacks the key {key}, which referring expressions are tested with")
    form = forms(split.training, context.refer)[name]
    texts = Texts(form.clean, form.max_words, form.max_tokens, context.tokenizer)
    wrong, lost = Counter(), set(context.lost_roots)
    entries, numbers, digests, images = 0, array("Q"), array("Q"), array("Q")
    with _bar(desc=os.path.basename(path), unit=" entries") as bar, _noting(findings, path):
        for number, entry in read_json_values(path):
            entries += 1
            bar.update()
            try:
                root, files, captions = _read(form, entry, path, number)
            except InputError as error:
                wrong[error.kind] += 1
                findings.add_error(path, number, error)
                continue
            problems = [] if all([texts.add(caption) for caption in captions]) else [EMPTY]
            if name == "vqa" and not split.training:
                problems += _question_problems(entry, split)
            for kind, problem in problems:
                wrong[kind] += 1
                findings.add(path, number, problem)
            if config[root] is None and root not in lost:
                lost.add(root)
                findings.add(path, number, f"the configuration lacks the key {root}, the folder of the images of such entries")
            numbers.append(number)
            digests.append(digest((files, captions, entry.get("label"), entry.get("ref_id"))))
            images.extend(map(digest, _image_paths(root, files, lost, config)))
    different, first = np.unique(np.frombuffer(images, np.uint64), return_index=True)
    trained = np.concatenate([np.empty(0, np.uint64), *context.trained_images])
    if split.training:
        context.trained_images.append(different)
    return {
        **result, "form": form.title, "entries": entries, "wrong": dict(wrong.most_common()),
        **_repeated(digests, lambda i: f"entry {numbers[i]}"), **texts.summary(),
        "images": len(different), "folders_missing": sorted(lost),
        "images_also_trained_on": 0 if split.training else int(np.isin(different, trained).sum()),
        **_check_images(path, form, lost, _evenly(np.sort(first), context.images), context),
    }  # fmt: skip


@contextlib.contextmanager
def _noting(findings, path):
    """Within it, what makes the rest of a file unreadable is a problem."""
    try:
        yield
    except InputError as error:
        findings.add_error(path, None, error)


def _read(form, entry, path, number):
    check_entry(entry, {}, path, number)
    return form.read(entry, path, number)


def _question_problems(entry, split):
    """[(kind, problem)] of a question to test on that others have a part in."""
    split.answered["answer" in entry] += 1
    if entry["question_id"] in split.question_ids:
        return [("repeated 'question_id'", f"another entry has the question_id {entry['question_id']!r} too: give it its own")]
    split.question_ids.add(entry["question_id"])
    return []


def _image_paths(root, files, lost, config):
    return [] if root in lost else [os.path.join(config[root], file) for file in files]


def _evenly(items, count):
    """`count` of the items, evenly spaced, or all."""
    if count is None or count >= len(items):
        return items
    return items[np.linspace(0, len(items) - 1, count).astype(int)]


def _repeated(digests, name):
    """How many digests are the same as an earlier one, and the first of them; name(i) is what to call number i."""
    values = np.frombuffer(digests, np.uint64)
    order = np.argsort(values, kind="stable")
    later = np.sort(order[1:][values[order[1:]] == values[order[:-1]]])
    first = [f"{name(i)} as {name(int(np.argmax(values == values[i])))}" for i in later[:EXAMPLES].tolist()]
    return {"duplicates": len(later), "first_duplicates": first}


def _check_images(path, form, lost, places, context):
    """Looks at the images that stand at these places, increasing, in the sequence of all that the entries name."""

    def chosen():
        wanted, place = iter(places.tolist()), 0
        following = next(wanted, None)
        with contextlib.suppress(InputError):  # noted before
            for number, entry in read_json_values(path) if following is not None else ():
                try:
                    root, files, _ = _read(form, entry, path, number)
                except InputError:
                    continue
                for image in _image_paths(root, files, lost, context.config):
                    if place == following:
                        yield number, image
                        following = next(wanted, None)
                    place += 1

    images, found = Images(context.config["image_res"]), chosen()
    batches = iter(lambda: list(itertools.islice(found, IMAGES_A_JOB)), [])
    with _bar(total=len(places), desc=f"images of {os.path.basename(path)}", unit="img") as bar:
        for batch in context.jobs(look_at_files, batches):
            for number, image, look in batch:
                images.add(look)
                if look.reason:
                    context.findings.add(path, number, f"image {image}: {look.problem}")
            bar.update(len(batch))
    return images.summary()


def check_shards(paths, context):
    """Checks the samples of WebDataset shards -> what the report says of all of them together."""
    findings, shards = context.findings, []
    for path in _bar(paths, desc="scanning shards", unit="shard"):
        with _noting(findings, path):
            shards.append(Shards([path], 1))
    counts = {shard.paths[0]: len(shard) for shard in shards}
    starts = np.cumsum([0, *counts.values()]).tolist()
    chosen = _evenly(np.arange(starts[-1]), context.images)
    texts = Texts(pre_caption, MAX_WORDS, SHORT_TOKENS, context.tokenizer)
    images, wrong, places, digests = Images(context.config["image_res"]), Counter(), array("Q"), array("Q")

    def jobs():
        for shard, start, end in zip(shards, starts, starts[1:]):
            numbers = (chosen[slice(*np.searchsorted(chosen, [start, end]))] - start).tolist()
            for i in range(0, len(numbers), IMAGES_A_JOB):
                yield shard.paths[0], [(number, *shard.place(number)[1:]) for number in numbers[i : i + IMAGES_A_JOB]]

    def name(i):
        shard = bisect.bisect(starts, places[i]) - 1
        return f"number {places[i] - starts[shard]} of {os.path.basename(list(counts)[shard])}"

    first = dict(zip(counts, starts))
    with _bar(total=len(chosen), desc="samples of shards", unit="img") as bar:
        for path, samples, end in context.jobs(look_at_samples, jobs()):
            for number, key, error, look, captions, value in samples:
                bar.update()
                if error:
                    wrong[error.kind] += 1
                    findings.add_error(path, key, error)
                    continue
                if not all([texts.add(caption) for caption in captions]):
                    wrong[EMPTY[0]] += 1
                    findings.add(path, key, EMPTY[1])
                images.add(look)
                if look.reason:
                    findings.add(path, key, f"image: {look.problem}")
                places.append(first[path] + number)
                digests.append(value)
            if end:
                findings.add_error(path, None, end)
    return {
        "key": "train_file", "file": paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}", "shards": counts,
        "form": f"{len(paths)} WebDataset shards of image-caption pairs for pre-training",
        "entries": starts[-1], "entries_read": len(chosen), "wrong": dict(wrong.most_common()),
        **_repeated(digests, name), **texts.summary(), "images": starts[-1], **images.summary(),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# what else a configuration names


def check_others(config, findings, tokenizer_of):
    """Opens what else the configuration names -> ({key: what it is}, tokenizer, refer, keys of folders that do not exist).

    What cannot be opened is a problem, and None is in its place. A hub that cannot be reached is no fault of the configuration.
    """
    found, lost = {}, []
    for root in ("image_root", *ROOTS.values()):
        if config[root]:
            found[root] = config[root]
            if not os.path.isdir(config[root]):
                lost.append(root)
                found[root] += ": does not exist"
                findings.add(None, None, f"{root}: folder {config[root]} does not exist; set {root} to the folder that the "
                                         "image paths of the lists start from")

    def load(key, describe, function, *arguments):
        name = config[key] if isinstance(config[key], str) else "in the configuration"
        try:
            loaded = function(*arguments)
        except InputError as error:
            if _hub_is_away(name, str(error)):
                found[key] = f"{name}: not looked at, the hub cannot be reached"
                findings.notes.append(str(error))
            else:
                found[key] = f"{name}: cannot be used"
                findings.add(None, None, str(error))
            return None
        found[key] = f"{name}: {describe(loaded)}"
        return loaded

    tokenizer = refer = None
    if config["bert_config"] is None:
        findings.add(None, None, "the configuration lacks the key bert_config: add it, or pass --set bert_config=...")
    elif load("bert_config", lambda bert: f"{bert['num_hidden_layers']} layers", read_bert_config, config["bert_config"]):
        key = "tokenizer" if config["tokenizer"] else "text_encoder"
        tokenizer = load(key, lambda tokenizer: f"{len(tokenizer)} word pieces", tokenizer_of, config)
    if config["answer_list"]:
        load("answer_list", lambda answers: f"{len(answers)} answers", load_answer_list, config["answer_list"])
    if config["refcoco_data"]:
        refer = load("refcoco_data", lambda refer: f"{len(refer.refs)} refs", load_refer, config["refcoco_data"])
    if config["det_file"] and refer:
        load("det_file", lambda boxes: f"boxes of {len(boxes)} images", load_detections, config["det_file"], refer)
    return found, tokenizer, refer, lost


def _hub_is_away(name, problem):
    """Whether what is wrong with a hub name is the network; a file name is none, nor one that the hub refuses."""
    away = re.search("the hub (cannot be reached|does not give it)", problem)
    return bool(away) and not Path(name).suffix and not re.search(r"\b4\d\d\b", problem)


def check(context):
    """Checks the lists that the configuration names, printing what it finds of each -> what the report says of them."""
    results = []
    for key in ANNOTATION_KEYS:
        names = context.config[key] or []
        split = Split(key, key == "train_file", set(), Counter())
        lists, shards = _expand(names, context.findings) if split.training else (names, [])
        checks = [functools.partial(check_list, path, split) for path in lists]
        checks += [functools.partial(check_shards, shards)] if shards else []
        for checked in checks:
            results.append(checked(context))
            say("", *describe(results[-1], context.config["max_skipped"]))
        without, answered = split.answered[False], split.answered[True]
        if without and answered:
            context.findings.add(None, None, f"{key}: {without} questions have no 'answer', though {answered} have: give all "
                                             "of them answers, or none")
        if key == "val_file" and without and not answered:
            context.findings.add(None, None, "val_file has no answers to compare with: leave val_file out, the last epoch is "
                                             "then the result")
    return results


def _expand(names, findings):
    """JSON lists and shards of train_file, what there is of them."""
    try:
        return expand(names)
    except InputError as error:
        findings.add_error(None, None, error)
    lists, shards = [], {}
    for name in names:
        with contextlib.suppress(InputError):
            more = expand([name])
            lists += more[0]
            shards |= dict.fromkeys(more[1])
    return lists, list(shards)


# ---------------------------------------------------------------------------------------------------------------------
# the printed report


def say(*lines):
    """Prints lines, of which none has a character that a terminal could not show or would obey."""
    for line in lines:
        print("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def describe(result, max_skipped):
    """Lines for people that say what check_list or check_shards found."""
    lines = [f"{result['key']} {result['file']}"]
    if "form" not in result:
        return [*lines, "  cannot be read"]
    lines.append(f"  {result['form']}")

    def row(title, content):
        lines.append(f"  {title:<{TITLE_WIDTH}}{content}")

    entries, looked_at = result.get("entries_read", result["entries"]), result["looked_at"]
    sample = f", {entries:,} read" if entries < result["entries"] else ""
    row("entries", f"{result['entries']:,}{sample}{_counts(result['wrong'], entries)}")
    if result["duplicates"]:
        more = ", ..." if result["duplicates"] > EXAMPLES else ""
        row("repeated", f"{_part(result['duplicates'], entries)}: {', '.join(result['first_duplicates'])}{more}")
    row("texts", f"{result['texts']:,}")
    for key in ("words", "word_pieces"):
        if key in result:
            row(key.replace("_", " "), "{min:,} to {max:,}, median {median:,}, 95% up to {p95:,}; ".format(**result[key])
                                       + f"{_percent(result[key]['cut'])} cut at {result[key]['limit']:,}")
    if "unknown_words" in result:
        unknown = result["unknown_words"]
        most = ", ".join(f"{word} {count:,}" for word, count in unknown["most_frequent"].items())
        row("unknown words", f"{_percent(unknown['share_of_words'])} ({_percent(unknown['share_of_word_pieces'])} of the word "
                             f"pieces){': ' * bool(most)}{most}")
    if result.get("folders_missing"):
        row("images", f"not looked at in {', '.join(result['folders_missing'])}, which does not exist")
    if not result["images"]:
        return lines
    unusable = sum(result["unusable"].values())
    seen = "all" if looked_at == result["images"] else f"{looked_at:,}"
    row("images", f"{result['images']:,}, {seen} looked at{_counts(result['unusable'], looked_at)}")
    if result["key"] == "train_file" and unusable > max_skipped * looked_at:
        row("", f"more than max_skipped ({_percent(max_skipped)}): training would stop")
    if result.get("images_also_trained_on"):
        row("", f"{_part(result['images_also_trained_on'], result['images'])} are in train_file too")
    if looked_at == unusable:
        return lines
    sides, usable = result["shorter_side"], looked_at - unusable
    for i, (name, count) in enumerate((name, count) for name, count in sides.items() if count):
        bar = "#" * round(count / usable * BAR_WIDTH)
        row("" if i else "shorter side", f"{name:<10}{count:>10,}  {_percent(count / usable):>6}  {bar}".rstrip())
    if result["image_res"]:
        row("", f"{_part(result['smaller_than_image_res'], usable)} smaller than image_res {result['image_res']}")
    row("formats", ", ".join(f"{name} {count:,}" for name, count in result["formats"].items()))
    row("EXIF-rotated", f"{result['exif_rotated']:,}{', used as they are stored' * bool(result['exif_rotated'])}")
    row("animated", f"{result['animated']:,}{', of which the first frame is used' * bool(result['animated'])}")
    return lines


def _counts(counts, whole):
    """What cannot be used, by kind."""
    if not counts:
        return ""
    return f"; {_part(sum(counts.values()), whole)} cannot be used: {', '.join(f'{n:,} {kind}' for kind, n in counts.items())}"


def _part(count, whole):
    return f"{count:,} ({_percent(count / max(1, whole))})"


def _percent(share):
    return "0%" if share == 0 else "<0.1%" if share < 0.001 else f"{share:.1%}"


# ---------------------------------------------------------------------------------------------------------------------
# command line


def main():
    """Checks the data of a configuration from the command line; exits with status 1 if there are problems."""
    flags = Flags("Check all files that the configuration of a task names.")
    flags.add_argument("config", help="YAML file of a task")
    flags.add_set()
    flags.add_argument("--processes", type=int, metavar="N", default=cores(), help="that decode images; by default one a core")
    flags.add_argument("--images", type=int, metavar="N", help="look at N evenly spaced images of every file only")
    flags.add_argument("--report", metavar="FILE", help="JSON file to write all problems and counts to")
    args = flags.parse_args()
    if args.processes < 1 or (args.images is not None and args.images < 0):
        flags.error("--processes must be at least 1, and --images not negative")
    config = load_config(args.config, args.set)
    if not any(config[key] for key in ANNOTATION_KEYS):
        raise InputError(f"{args.config} names no list to check, with none of the keys {', '.join(ANNOTATION_KEYS)}")
    # dataset/ knows nothing of models/: the tokenizer is handed in, by this command as by the scripts
    from models.tokenizer import tokenizer_of

    with contextlib.ExitStack() as stack:
        report = None
        if args.report:
            try:
                report = stack.enter_context(atomic_write(args.report, "w"))
            except OSError as error:
                raise InputError(f"--report {args.report}: cannot write there ({error.strerror}), name another file") from None
            report.write('{"problems": [')
        findings = Findings(report)
        others, tokenizer, refer, lost = check_others(config, findings, tokenizer_of)
        say(args.config, *(f"  {key:<{TITLE_WIDTH}}{value}" for key, value in others.items()))
        jobs = stack.enter_context(in_processes(args.processes, prepare_process))
        results = check(Context(config, findings, jobs, args.images, tokenizer, refer, lost, []))
        if report:
            rest = {"count": findings.count, "notes": findings.notes, "config": args.config, "others": others, "files": results}
            report.write(f"\n], {json.dumps(rest, indent=1)[1:]}\n")
    say("", *(f"note: {note}" for note in findings.notes))
    if not findings.count:
        say("No problems.")
        return
    plural = "s" if findings.count > 1 else ""
    say(f"{findings.count:,} problem{plural}; docs/faults.md says what a run makes of each", *findings.first)
    if findings.count > SHOWN:
        listed = f"{args.report} lists them all" if args.report else "--report FILE.json lists them all"
        say(f"... and {findings.count - SHOWN:,} more; {listed}")
    sys.exit(1)


if __name__ == "__main__":
    run_script(main)
