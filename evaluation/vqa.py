"""VQA: choose each answer from a list by its likelihood, or generate it; accuracy."""

import functools
from typing import Any

import torch
from torch import Tensor

from configs.config import Config, as_config
from dataset.text import tokenize
from engine.precision import autocast
from evaluation.distributed import iter_rank_share, merge_results
from evaluation.metrics import (
    count_vqa_formulas,
    describe_vqa_formulas,
    require_finite,
    vqa_accuracy,
)
from evaluation.report import Report
from models.tokenizer import Tokenizer
from models.vqa import VQA
from utils import Text


def tokenize_answers(answers: list[str], model: VQA, tokenizer: Tokenizer) -> Text:
    """Tokenize candidate answers, each with eos, to input_ids [A, L] on the model's device."""
    device = model.bert.embeddings.position_ids.device
    return tokenize([answer + model.config.eos for answer in answers], tokenizer).to(device)


def answer_questions(
    model: VQA,
    image: Tensor,
    question: Text,
    answers: list[str] | None,
    tokens: Text | None,
    tokenizer: Tokenizer,
) -> list[list[tuple[str, float]]]:
    """Answer the questions of a batch.

    Args:
        model: A VQA model.
        image: Images [B, 3, H, W].
        question: Questions [B, L].
        answers: The candidates. The best k_test of them are ranked. If there are none, one answer
            is generated with num_beams.
        tokens: The candidates from `tokenize_answers`.
        tokenizer: The tokenizer.

    Returns:
        For each question (answer, probability) pairs, the best first. The probability is the
        softmax over the ranked candidates, or the product over a generated answer's tokens.
    """
    if answers and tokens:
        best, probs = model.rank_answers(image, question, tokens, model.config.k_test)
        rows = zip(best.tolist(), probs.tolist(), strict=True)
        return [[(answers[i], p) for i, p in zip(*row, strict=True)] for row in rows]
    ids, log_probs = model.generate(image, question, model.config.num_beams)
    probs = log_probs.exp().tolist()
    return [[(tokenizer.decode(row), p)] for row, p in zip(ids, probs, strict=True)]


@torch.no_grad()
def answer_all(
    model: VQA, dataset: Any, tokenizer: Tokenizer, config: Config, device: torch.device
) -> list[str]:
    """Return the best answer to every question of a VQADataset, on all ranks.

    Raises:
        NotFinite: On all ranks, if the probability of an answer is not finite.
    """
    answers = dataset.answer_list
    tokens = tokenize_answers(answers, model, tokenizer) if answers else None
    collate = functools.partial(dataset.collate_questions, tokenizer=tokenizer)
    results: dict[int, tuple[str, float]] = {}
    with autocast(config, device):
        for indices, batch in iter_rank_share(dataset, config, device, "questions", collate):
            ranked = answer_questions(model, *batch, answers, tokens, tokenizer)
            results.update((i, row[0]) for i, row in zip(indices, ranked, strict=True))
    texts, probs = zip(*merge_results(results), strict=True)
    require_finite(probs, lambda index: f"question {dataset.entry(index).question_id}")
    return list(texts)


def evaluate(
    model: VQA,
    dataset: Any,
    tokenizer: Tokenizer,
    config: Config | dict[str, Any],
    device: torch.device,
    report: Report | None = None,
) -> dict[str, float]:
    """Evaluate a VQA model.

    The report is the accuracy and result/vqa_result_epoch%d.json, as the official server takes it.

    Args:
        model: The model.
        dataset: A VQADataset.
        tokenizer: The tokenizer.
        config: The configuration.
        device: Device of the model.
        report: Destination of the report, None for no report.

    Returns:
        The accuracy in percent, "acc" and by answer type "acc_TYPE"; {} without annotated answers.

    Raises:
        NotFinite: The probability of an answer is not finite.
    """
    model.eval()
    texts = answer_all(model, dataset, tokenizer, as_config(config), device)
    results = [
        {"question_id": entry.question_id, "answer": text}
        for entry, text in zip(dataset.entries, texts, strict=True)
    ]
    metrics, annotations = {}, dataset.annotations()
    if annotations:
        accuracy = vqa_accuracy(results, annotations)
        by_type = accuracy["per_answer_type"].items()
        metrics = {"acc": accuracy["overall"], **{f"acc_{kind}": value for kind, value in by_type}}
    if report:
        name = "vqa_result" if report.split == "test" else f"vqa_{report.split}_result"
        path = report.write(f"{name}_epoch{report.epoch}.json", results)
        print(f"VQA, {report.title}: {len(results)} answers in {path}")
    if report and metrics:
        print("VQA accuracy:", ", ".join(f"{name} {value:.2f}%" for name, value in metrics.items()))
        formulas = describe_vqa_formulas(count_vqa_formulas(annotations))
        print(f"VQA accuracy is computed {formulas}")
    return metrics


def chance_metrics(dataset: Any) -> dict[str, float]:
    """Return the accuracy of the best answer of the list, given to every question.

    It is {} if a VQADataset has no list of answers or no annotated answers.
    """
    annotations = dataset.annotations()
    constant = [
        [{"question_id": entry["question_id"], "answer": answer} for entry in annotations]
        for answer in dataset.answer_list or ()
    ]
    if not (constant and annotations):
        return {}
    return {"acc": max(vqa_accuracy(same, annotations)["overall"] for same in constant)}
