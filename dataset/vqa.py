"""Visual question answering data: questions about images with the annotators' answers."""

import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from msgspec import Meta
from torch import Tensor

from configs.config import Config, as_config
from dataset.base import EntryDataset, test_options, train_options
from dataset.entries import Entry, Texts, read_json
from dataset.store import Entries
from dataset.text import MAX_QUESTION_WORDS, SHORT_TOKENS, pre_question, tokenize, without_halves
from utils import InputError, Text

# key of the image folder for each value of an entry's `dataset`
Source = Literal["vqa", "vg"]
ROOTS: dict[Source, str] = {"vqa": "vqa_root", "vg": "vg_root"}
VG_WEIGHT = 0.5  # weight of a Visual Genome answer, which has one annotator
_Answers = Annotated[list[Annotated[str, Meta(pattern=r"\S")]], Meta(min_length=1)]


class Asked(Entry):
    """A question about an image."""

    image: str
    question: str

    @property
    def root(self) -> str:
        """The configuration key of the image folder."""
        return ROOTS[self.dataset]  # ty: ignore[missing-attribute]  # a field of subclasses

    @property
    def texts(self) -> list[str]:
        """The question."""
        return [self.question]

    @classmethod
    def clean(cls, text: str, max_words: int | None = None) -> str:
        """Clean up a question."""
        return pre_question(text, max_words or cls.max_words)


class TrainingQuestion(Asked):
    """A training question with its annotators' answers, one answer in Visual Genome."""

    wanted = (
        'VQA trains on entries {"image": path, "question": text, "dataset": "vqa", "answer": list'
        ' of texts} or {"image": path, "question": text, "dataset": "vg", "answer": text}'
    )
    max_tokens = SHORT_TOKENS
    dataset: Source
    answer: str | Texts

    def check(self, first: Self) -> None:
        """Raise InputError if the question is blank or the answers have the wrong form."""
        super().check(first)
        if isinstance(self.answer, list) != (self.dataset == "vqa"):
            raise InputError(
                f"'answer' is {reprlib.repr(self.answer)} although 'dataset' is {self.dataset!r}"
            )


class Question(Asked):
    """A question for testing, with or without the answers of the annotators."""

    wanted = (
        'a VQA test needs entries {"image": path, "question": text, "question_id": text or number}'
        ' and may have "dataset": "vqa" or "vg", and with "vqa" also "answer": list of texts'
    )
    max_words: ClassVar[int] = MAX_QUESTION_WORDS
    question_id: str | int
    dataset: Source = "vqa"
    answer: str | Texts | None = None
    answer_type: str | None = None

    def check(self, first: Self) -> None:
        """Raise InputError if the question is blank or the answers cannot be scored."""
        super().check(first)
        if self.dataset == "vg" and self.answer is not None:
            raise InputError(
                "an answer of Visual Genome has only one annotator, so it cannot be scored"
            )
        if isinstance(self.answer, str):
            raise InputError(f"'answer' is {reprlib.repr(self.answer)}, not a list")


FORMS = {"train": TrainingQuestion, "val": Question, "test": Question}


class VQASample(NamedTuple):
    """A training sample: a question with its answers."""

    image: Tensor  # uint8 [3, R, R]
    question: str
    answers: list[str]
    weights: list[float]  # of the answers
    file: str
    skipped: list[str] = []


class VQABatch(NamedTuple):
    """A training batch of questions with their answers."""

    image: Tensor  # uint8 [B, 3, R, R]
    question: Text  # [B, L]
    answer: Text  # [A, L'], all answers of the first question, then of the second, and so on
    n: Tensor  # number of answers of each question [B]
    weights: Tensor  # [A]
    files: list[str]
    skipped: list[str]


def load_answer_list(path: str) -> list[str]:
    """Read the candidate answers, a JSON list of strings.

    Raises InputError if the list is empty or has an answer twice.
    """
    answers = read_json(path, _Answers, "answer_list must name a JSON list of answers")
    repeated, count = Counter(answers).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"answer_list: {path} has {reprlib.repr(repeated)} {count} times; keep it once"
        )
    return answers


def reachable_answers(config: Config | dict) -> list[str]:
    """Return the candidate answers of a configuration, [] if answer_list does not exist."""
    path = as_config(config).answer_list
    return load_answer_list(path) if path and Path(path).is_file() else []


class VQADataset(EntryDataset):
    """Questions of JSON lists; a test item is (image uint8 [3, R, R], question).

    Args:
        files: JSON lists.
        roots: Image folders vqa_root and vg_root.
        eos: Text that ends every answer.
        answers: Candidate answers of the ranking, if any.
        **options: Further arguments of `EntryDataset`.

    Attributes:
        answer_list: The candidate answers.

    Raises:
        InputError: A list is wrong, or a root that its entries need is missing.
    """

    def __init__(
        self,
        files: Sequence[str],
        roots: dict[str, str | None],
        *,
        eos: str,
        answers: list[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        entries = Entries(files, Question if seed is None else TrainingQuestion)
        roots = {key: roots[key] for key in sorted({entry.root for entry in entries})}
        super().__init__(entries, roots, seed=seed, **options)
        self.eos, self.answer_list = eos, answers
        for key, root in self.roots.items():
            if root is None:
                raise InputError(
                    f"the configuration lacks the key {key}; set it to the folder of the images"
                    f" that {files[0]} names"
                )
        if seed is None:
            self._check_questions()

    def _check_questions(self) -> None:
        """Raise InputError if two questions have one id, or if only some have answers."""
        ids, unanswered = set(), []
        for i, entry in enumerate(self.entries):
            if entry.question_id in ids:
                raise InputError(
                    f"{self.where(i)}: an earlier entry has the same question_id"
                    f" {entry.question_id!r}; remove one of the two"
                )
            ids.add(entry.question_id)
            if entry.answer is None:
                unanswered.append(i)
        if 0 < len(unanswered) < len(self):
            raise InputError(
                f"{self.where(unanswered[0])} has no 'answer', but other entries have; give"
                " answers to all entries or to none"
            )

    def read(self, index: int) -> VQASample | tuple[Tensor, str]:
        """Read a sample: VQASample in training, (image, question) in testing."""
        entry, (file,) = self.entry(index), self.files(index)
        image, question = self.transform(self.load(file)), self.clean(index, entry.question)
        if self.seed is None:
            return image, question
        if entry.dataset == "vg":
            shares = {entry.answer: VG_WEIGHT}
        else:
            counts = Counter(entry.answer)
            shares = {answer: count / len(entry.answer) for answer, count in counts.items()}
        answers = [answer + self.eos for answer in shares]
        return VQASample(image, question, answers, list(shares.values()), file)

    def collate(self, samples: list[VQASample], tokenizer: Any) -> VQABatch:
        """Collate training samples, with texts padded to the longest one."""
        images, questions, answers, weights, files, skipped = zip(*samples, strict=True)
        return VQABatch(
            torch.stack(images),
            tokenize(questions, tokenizer, self.max_tokens),
            tokenize(sum(answers, []), tokenizer),
            torch.tensor(list(map(len, answers))),
            torch.tensor(sum(weights, [])),
            list(files),
            sum(skipped, []),
        )

    def collate_questions(
        self, samples: list[tuple[Tensor, str]], tokenizer: Any
    ) -> tuple[Tensor, Text]:
        """Collate test samples to images [B, 3, R, R] and questions [B, L]."""
        images, questions = zip(*samples, strict=True)
        return torch.stack(images), tokenize(questions, tokenizer, self.max_tokens)

    def longest_answer(self, tokenizer: Any) -> int:
        """Return the length of the longest training answer in word pieces, without [CLS]."""
        answers = set()
        for entry in self.entries:
            answers.update([entry.answer] if entry.dataset == "vg" else entry.answer)
        texts = [without_halves(answer + self.eos) for answer in answers]
        return max(map(len, tokenizer(texts, truncation=True)["input_ids"])) - 1

    def annotations(self) -> list[dict[str, Any]]:
        """Return the entries for `metrics.vqa_accuracy`, [] if the files hold no answers."""
        keys = ("question_id", "answer", "answer_type")
        entries = [
            {key: value for key in keys if (value := getattr(entry, key)) is not None}
            for entry in self.entries
        ]
        return entries if "answer" in entries[0] else []


def train_set(config: Config, seed: int) -> VQADataset:
    """Build the training set of VQA."""
    options: dict[str, Any] = {**train_options(config, seed), "roots": _roots(config)}
    return VQADataset(config.files("train"), eos=config.eos, **options)


def test_set(config: Config, split: str) -> VQADataset:
    """Build a test set of VQA. Raises InputError if a validation set has no answers."""
    files, path = config.files(split), config.answer_list
    answers = load_answer_list(path) if path else None
    options: dict[str, Any] = {**test_options(config), "roots": _roots(config)}
    dataset = VQADataset(files, eos=config.eos, answers=answers, **options)
    if split == "val" and not dataset.annotations():
        raise InputError(
            f"val_file {files[0]} has no answers to compare with; leave val_file out to use the"
            " last epoch as the result"
        )
    return dataset


def _roots(config: Config) -> dict[str, str | None]:
    return {key: getattr(config, key) for key in ROOTS.values()}
