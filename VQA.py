"""Fine-tunes ALBEF for visual question answering (Section 5) and answers the questions of the test
file.
"""

from argparse import SUPPRESS

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/VQA.yaml", "--checkpoint ALBEF.pth --set k_test=64")
# accepted for released command lines, without effect: the decoder starts from the multimodal
# encoder of --checkpoint
flags.add_argument("--text_decoder", help=SUPPRESS)
if __name__ == "__main__":
    begin_script(flags)

import functools

import torch

from engine import autocast
from engine.task import run_task
from evaluation.divide import divide, gather
from evaluation.metrics import (
    count_vqa_formulas,
    describe_vqa_formulas,
    require_finite,
    vqa_accuracy,
)
from evaluation.vqa import answer_questions, tokenize_answers


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(batch, alpha=alpha, update_momentum=update_momentum)


@torch.no_grad()
def answer_all(model, dataset, tokenizer, config, device):
    """Answer every question with the likeliest answer of answer_list, or by beam search if there is
    none.

    Raises NotFinite on all processes if the probability of an answer is not finite.
    """
    answers = dataset.answer_list
    tokens = tokenize_answers(answers, model, tokenizer) if answers else None
    collate = functools.partial(dataset.collate_questions, tokenizer=tokenizer)
    found = {}
    with autocast(config, device):
        for indices, (image, question) in divide(dataset, config, device, "questions", collate):
            answered = answer_questions(model, image, question, answers, tokens, tokenizer)
            found.update((index, candidates[0]) for index, candidates in zip(indices, answered))
    texts, probs = zip(*gather(found))
    require_finite(probs, lambda index: f"question {dataset.entry(index).question_id}")
    return list(texts)


def evaluate(model, dataset, tokenizer, config, device, report=None):
    """Return the VQA accuracy in percent, overall and by answer type, {} if the file holds no
    answers.

    Report it and result/vqa_result_epoch%d.json, as the official server takes it.
    """
    model.eval()
    texts = answer_all(model, dataset, tokenizer, config, device)
    results = [
        {"question_id": entry.question_id, "answer": text}
        for entry, text in zip(dataset.entries, texts)
    ]
    metrics, annotations = {}, dataset.annotations()
    if annotations:
        accuracy = vqa_accuracy(results, annotations)
        metrics = {"acc": accuracy["overall"]} | {
            f"acc_{kind}": value for kind, value in accuracy["per_answer_type"].items()
        }
    if report:
        name = "vqa_result" if report.split == "test" else f"vqa_{report.split}_result"
        path = report.write(f"{name}_epoch{report.epoch}.json", results)
        print(f"VQA, {report.title}: {len(results)} answers in {path}")
    if report and metrics:
        shown = {
            name.removeprefix("acc_").replace("acc", "overall"): value
            for name, value in metrics.items()
        }
        print("VQA accuracy " + ", ".join(f"{name} {value:.2f}%" for name, value in shown.items()))
        print(f"VQA accuracy is computed {describe_vqa_formulas(count_vqa_formulas(annotations))}")
    return metrics


def main():
    run_task("vqa", flags.parse_args(), step, evaluate, "acc")


if __name__ == "__main__":
    run_script(main)
