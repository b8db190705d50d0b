"""Fine-tunes ALBEF for visual question answering (Section 5) and answers the questions of the test file."""

from argparse import SUPPRESS

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/VQA.yaml", "--checkpoint ALBEF.pth --set k_test=64")
# accepted for released command lines, without effect: the decoder starts from the multimodal encoder of --checkpoint
flags.add_argument("--text_decoder", help=SUPPRESS)
if __name__ == "__main__":
    begin_script(flags)

import functools
import json
from pathlib import Path

import torch

from dataset.text import tokenize
from engine import autocast
from evaluation.divide import divided, gathered
from engine.task import run_task
from evaluation.metrics import vqa_accuracy
from utils import atomic_write, is_main


def step(model, batch, alpha, update_momentum):
    """The losses of a batch by name."""
    question, answer = batch.question, batch.answer
    return model(batch.image, question, answer, batch.n, batch.weights, alpha=alpha, update_momentum=update_momentum)


@torch.no_grad()
def answers(model, dataset, tokenizer, config, device):
    """An answer to every question: the likeliest of answer_list, or without one what beam search generates."""
    candidates = None
    if dataset.answer_list:
        candidates = tokenize([answer + config["eos"] for answer in dataset.answer_list], tokenizer).to(device)
    collate = functools.partial(dataset.collate_questions, tokenizer=tokenizer)
    found = {}
    with autocast(config, device):
        for numbers, (image, question) in divided(dataset, config, device, "questions", collate):
            if candidates:
                best, _ = model.rank_answers(image, question, candidates, config["k_test"])
                texts = [dataset.answer_list[number] for number in best[:, 0].tolist()]
            else:
                texts = [tokenizer.decode(ids) for ids in model.generate(image, question, config["num_beams"])]
            found.update(zip(numbers, texts))
    return gathered(found)


def evaluate(model, dataset, tokenizer, config, device):
    """VQA accuracy in percent, overall and by answer type, if the file holds answers; and the results file's content."""
    model.eval()
    texts = answers(model, dataset, tokenizer, config, device)
    results = [{"question_id": entry.question_id, "answer": text} for entry, text in zip(dataset.entries, texts)]
    annotations = dataset.annotations()
    if not annotations:
        return {}, results
    accuracy = vqa_accuracy(results, annotations)
    by_type = {f"acc_{kind}": value for kind, value in accuracy["per_answer_type"].items()}
    return {"acc": accuracy["overall"], **by_type}, results


def show(output_dir, title, split, epoch, metrics, results, dataset):
    """result/vqa_result_epoch%d.json, as the official server takes it, and the accuracy if there is one."""
    if not is_main():
        return
    name = "vqa_result" if split == "test" else f"vqa_{split}_result"
    path = Path(output_dir) / "result" / f"{name}_epoch{epoch}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(results, file)
    print(f"VQA, {title}: {len(results)} answers in {path}")
    if metrics:
        print("VQA accuracy " + ", ".join(f"{name.removeprefix('acc_').replace('acc', 'overall')} {value:.2f}%"
                                          for name, value in metrics.items()))


def main():
    run_task("vqa", flags.parse_args(), step, evaluate, "acc", show)


if __name__ == "__main__":
    run_script(main)
