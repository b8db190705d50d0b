"""Visual question answering data: questions about images with the annotators' answers."""

import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from msgspec import Meta

from dataset.annotations import Entries, Entry, Texts, read_json
from dataset.base import EntryDataset
from dataset.images import load_image
from dataset.text import MAX_QUESTION_WORDS, Limits, pre_question, tokenize, without_halves
from utils import InputError, Text

# key of the image folder for each value of an entry's `dataset`
ROOTS = {"vqa": "vqa_root", "vg": "vg_root"}
VG_WEIGHT = 0.5  # of an answer of Visual Genome, which has one annotator
_Answers = Annotated[list[Annotated[str, Meta(pattern=r"\S")]], Meta(min_length=1)]


class TrainingQuestion(Entry):
    """A question to train on, with the answers of the annotators, or the only one in Visual Genome."""

    wanted = (
        'VQA trains on entries {"image": path, "question": text} with "dataset": "vqa" and "answer": list of texts, or '
        '"dataset": "vg" and "answer": text'
    )
    image: str
    question: str
    dataset: Literal[*ROOTS]
    answer: str | Texts

    @property
    def root(self):
        return ROOTS[self.dataset]

    @property
    def texts(self):
        return [self.question]

    @classmethod
    def clean(cls, text, max_words=None):
        return pre_question(text, max_words or cls.max_words)

    def check(self):
        super().check()
        if isinstance(self.answer, list) != (self.dataset == "vqa"):
            raise InputError(f"'answer' is {reprlib.repr(self.answer)}", "wrong 'answer'")


class Question(Entry):
    """A question to test on, perhaps with the answers of the annotators."""

    wanted = (
        'a VQA test needs entries {"image": path, "question": text, "question_id": text or number} with, or without, '
        '"dataset": "vqa" or "vg" and, of vqa, "answer": list of texts'
    )
    image: str
    question: str
    question_id: str | int
    dataset: Literal[*ROOTS] = "vqa"
    answer: str | Texts | None = None
    answer_type: str | None = None
    max_words: ClassVar[int] = MAX_QUESTION_WORDS

    root, texts = TrainingQuestion.root, TrainingQuestion.texts

    @classmethod
    def clean(cls, text, max_words=None):
        return pre_question(text, max_words or cls.max_words)

    def check(self):
        super().check()
        if self.dataset == "vg" and self.answer is not None:
            raise InputError(
                "an answer of Visual Genome has one annotator and cannot be scored; leave such entries, or their "
                "answers, out",
                "wrong 'answer'",
            )
        if isinstance(self.answer, str):
            raise InputError(
                f"'answer' is {reprlib.repr(self.answer)}, not a list", "wrong 'answer'"
            )


class VQASample(NamedTuple):
    image: torch.Tensor  # uint8 [3, R, R]
    question: str
    answers: list
    weights: list  # of the answers
    file: str
    skipped: list = []


class VQABatch(NamedTuple):
    image: torch.Tensor  # uint8 [B, 3, R, R]
    question: Text  # [B, L]
    answer: Text  # [A, L'], all answers of the first question, then of the second, and so on
    n: torch.Tensor  # number of answers of each question [B]
    weights: torch.Tensor  # [A]
    files: list
    skipped: list


def load_answer_list(path):
    """The candidates of ranking, a JSON list of strings.

    Raises InputError if it is empty or has an answer twice.
    """
    answers = read_json(path, _Answers, "answer_list must name a JSON list of answers")
    repeated, count = Counter(answers).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"answer_list: {path} has {reprlib.repr(repeated)} {count} times; every answer may be there once"
        )
    return answers


def reachable_answers(config):
    """Return the answers of the key answer_list, [] where there is no such file.

    Raises InputError.
    """
    path = config["answer_list"]
    return load_answer_list(path) if path and Path(path).is_file() else []


class VQADataset(EntryDataset):
    """Questions of files of {image, question, question_id, dataset: vqa or vg, answer: list (vqa)
    or string (vg)}.

    To test on, the answers may be missing, and so may `dataset`, which then is vqa; each question
    is an item (image uint8 [3, R, R], question). roots: vqa_root and vg_root; eos ends every
    answer; answer_list: the candidates of ranking, if there are. Raises InputError for an entry
    without what the task needs.
    """

    def __init__(self, files, roots, transform, eos, seed=None, answer_list=None, limits=Limits()):
        entries = Entries(files, Question if seed is None else TrainingQuestion)
        used = sorted({entry.root for entry in entries})
        super().__init__(entries, {key: roots[key] for key in used}, transform, seed, limits=limits)
        self.eos, self.answer_list = eos, answer_list
        for key, root in self.roots.items():
            if root is None:
                raise InputError(
                    f"the configuration lacks the key {key}, the folder of images that {files[0]} refers to"
                )
        if seed is None:
            self._check_questions()

    def _check_questions(self):
        """Raise InputError for questions with one id, and where some of them have answers and
        others not.
        """
        ids, unanswered = set(), []
        for i, entry in enumerate(self.entries):
            if entry.question_id in ids:
                raise InputError(
                    f"{self.where(i)}: another entry has the question_id {entry.question_id!r} too"
                )
            ids.add(entry.question_id)
            if entry.answer is None:
                unanswered.append(i)
        if 0 < len(unanswered) < len(self):
            raise InputError(
                f"{self.where(unanswered[0])} has no 'answer', though others have: give all of them answers, or "
                "none"
            )

    def read(self, index):
        entry, (file,) = self.entry(index), self.files(index)
        image, question = self.transform(load_image(file)), self.clean(index, entry.question)
        if self.seed is None:
            return image, question
        if entry.dataset == "vg":
            shares = {entry.answer: VG_WEIGHT}
        else:
            shares = {
                answer: count / len(entry.answer) for answer, count in Counter(entry.answer).items()
            }
        return VQASample(
            image, question, [answer + self.eos for answer in shares], list(shares.values()), file
        )

    def collate(self, samples, tokenizer):
        """Samples -> VQABatch; texts are padded to the longest of the batch."""
        images, questions, answers, weights, files, skipped = zip(*samples)
        return VQABatch(
            torch.stack(images),
            tokenize(questions, tokenizer, self.limits.tokens),
            tokenize(sum(answers, []), tokenizer),
            torch.tensor(list(map(len, answers))),
            torch.tensor(sum(weights, [])),
            list(files),
            sum(skipped, []),
        )

    def collate_questions(self, samples, tokenizer):
        """Samples to test on -> images [B, 3, R, R] and the questions' Text [B, L]."""
        images, questions = zip(*samples)
        return torch.stack(images), tokenize(questions, tokenizer, self.limits.tokens)

    def longest_answer(self, tokenizer):
        """Return the number of word pieces of the longest answer to train on, eos included and
        [CLS] not.
        """
        answers = {
            text
            for entry in self.entries
            for text in ([entry.answer] if entry.dataset == "vg" else entry.answer)
        }
        ids = tokenizer([without_halves(answer + self.eos) for answer in answers], truncation=True)[
            "input_ids"
        ]
        return max(map(len, ids)) - 1

    def annotations(self):
        """The entries as metrics.vqa_accuracy takes them; [] if the files hold no answers."""
        known = ("question_id", "answer", "answer_type")
        entries = [
            {key: value for key in known if (value := getattr(entry, key)) is not None}
            for entry in self.entries
        ]
        return entries if "answer" in entries[0] else []
