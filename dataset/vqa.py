"""Visual question answering data: questions about images with the annotators' answers."""

import json
import os
import reprlib
from collections import Counter
from typing import NamedTuple

import torch

from dataset.annotations import Entries, check_entry, where
from dataset.samples import Samples
from dataset.text import MAX_QUESTION_WORDS, MAX_WORDS, SHORT_TOKENS, is_blank, pre_question, tokenize
from dataset.images import load_image
from utils import InputError, Text

ROOTS = {"vqa": "vqa_root", "vg": "vg_root"}  # key of the image folder for each value of an entry's `dataset`
VG_WEIGHT = 0.5  # of an answer of Visual Genome, which has one annotator


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    question: str
    answers: list
    weights: list  # of the answers
    file: str
    skipped: list = []


class VQABatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    question: Text  # [B, L]
    answer: Text  # [A, L'], the answers of each question after those of the one before
    n: list  # number of answers of each question
    weights: torch.Tensor  # [A]
    files: list
    skipped: list


def load_answer_list(path):
    """The candidates of ranking, a JSON list of strings. Raises InputError if it is empty or has an answer twice."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            answers = json.load(file)
    except OSError as error:
        raise InputError(f"answer_list: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"answer_list: {path} is not valid JSON: {error}") from None
    if not isinstance(answers, list) or not answers:
        raise InputError(f"answer_list: {path} is {'empty' if answers == [] else 'no list'}; it must be a JSON list of answers")
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(f"answer_list: {where(path, number)} is {reprlib.repr(answer)}, it must be an answer")
    repeated, count = Counter(answers).most_common(1)[0]
    if count > 1:
        raise InputError(f"answer_list: {path} has {reprlib.repr(repeated)} {count} times; every answer may be there once")
    return answers


def max_question_words(training):
    """Words that are kept of a question."""
    return MAX_WORDS if training else MAX_QUESTION_WORDS


def vqa_entry(entry, path, number, training):
    """A checked entry of VQADataset, with `dataset` filled in. Raises InputError."""
    check_entry(entry, {"image": str, "question": str}, path, number)
    kind = entry.get("dataset", None if training else "vqa")
    if not isinstance(kind, str) or kind not in ROOTS:
        raise InputError(f"{where(path, number)}: its dataset is {reprlib.repr(kind)}, it must be {' or '.join(ROOTS)}",
                         "wrong 'dataset'")
    if is_blank(pre_question(entry["question"], max_question_words(training))):
        raise InputError(f"{where(path, number)}: its question {reprlib.repr(entry['question'])} is empty after clean-up",
                         "empty text")
    if training or "answer" in entry:
        check_entry(entry, {"answer": list if kind == "vqa" else str}, path, number)
    if not training:
        check_entry(entry, {"question_id": (int, str)}, path, number)
        if kind == "vg" and "answer" in entry:
            raise InputError(f"{where(path, number)}: an answer of Visual Genome has one annotator and cannot be scored; leave "
                             "such entries, or their answers, out of val_file and test_file", "wrong 'answer'")
    return {**entry, "dataset": kind}


class VQADataset(Samples):
    """Questions of files of {image, question, question_id, dataset: vqa or vg, answer: list (vqa) or string (vg)}.

    To test on, the answers may be missing, and so may `dataset`, which then is vqa; each question is an item
    (image uint8 [3, R, R], question). roots: vqa_root and vg_root; eos ends every answer; answer_list: the candidates of
    ranking, if there are. Raises InputError for an entry without what the task needs.
    """

    def __init__(self, files, roots, transform, eos, seed=None, answer_list=None):
        super().__init__(seed)
        self.transform, self.eos, self.answer_list = transform, eos, answer_list
        self.max_words = max_question_words(seed is not None)
        used, ids, answered = set(), set(), []

        def checked(entry, path, number):
            entry = vqa_entry(entry, path, number, seed is not None)
            used.add(ROOTS[entry["dataset"]])
            if seed is None and entry["question_id"] in ids:
                raise InputError(f"{where(path, number)}: another entry has the question_id {entry['question_id']!r} too")
            ids.add(entry.get("question_id"))
            answered.append("answer" in entry)
            return entry

        self.entries = Entries(files, checked)
        self.roots = {key: roots[key] for key in sorted(used)}
        for key, root in self.roots.items():
            if root is None:
                raise InputError(f"the configuration lacks the key {key}, the folder of images that {files[0]} refers to")
        self._answered = all(answered)
        if any(answered) and not self._answered:
            raise InputError(f"{self.where(answered.index(False))} has no 'answer', though others have: give all of them "
                             "answers, or none")

    def __len__(self):
        return len(self.entries)

    def files(self, index):
        entry = self.entries[index]
        return [os.path.join(self.roots[ROOTS[entry["dataset"]]], entry["image"])]

    def where(self, index):
        return self.entries.where(index)

    def read(self, index):
        entry = self.entries[index]
        (file,) = self.files(index)
        image, question = self.transform(load_image(file)), pre_question(entry["question"], self.max_words)
        if self.seed is None:
            return image, question
        if entry["dataset"] == "vg":
            shares = {entry["answer"]: VG_WEIGHT}
        else:
            shares = {answer: count / len(entry["answer"]) for answer, count in Counter(entry["answer"]).items()}
        return Sample(image, question, [answer + self.eos for answer in shares], list(shares.values()), file)

    def collate(self, samples, tokenizer):
        """Samples -> VQABatch; texts are padded to the longest of the batch."""
        return VQABatch(
            torch.stack([sample.image for sample in samples]),
            tokenize([sample.question for sample in samples], tokenizer, SHORT_TOKENS),
            tokenize([answer for sample in samples for answer in sample.answers], tokenizer),
            [len(sample.answers) for sample in samples],
            torch.tensor([weight for sample in samples for weight in sample.weights]),
            [sample.file for sample in samples], [reason for sample in samples for reason in sample.skipped],
        )  # fmt: skip

    def collate_questions(self, samples, tokenizer):
        """Samples to test on -> images [B, 3, R, R] and the questions' Text [B, L]."""
        return torch.stack([image for image, _ in samples]), tokenize([question for _, question in samples], tokenizer)

    def annotations(self):
        """The entries as metrics.vqa_accuracy takes them; [] if the files hold no answers."""
        return list(self.entries) if self._answered else []
