"""Measure seconds per question of ranking VQA answers with the full-size model, fast and plain.

The fast path is VQA.rank_answers. As in the released code, the plain path (tests/helpers/plain.py)
pads every candidate to the longest answer of the list, and decodes all of its tokens with a
separate copy of the question's states. Before the ranking, both paths encode the questions with
their images, which is timed separately. The answers are random and have 1 to 4 word pieces, like
the answers of VQA's list. Both paths run in one process, one after the other.

    python benchmarks/vqa_ranking.py [--questions 4] [--answers 3128] [--k 128]
"""

import argparse

import torch
from bench import DEVICE, MACHINE, full_size_config, random_text, seconds
from helpers import plain

from models import build_model

SEP = 102
QUESTION_TOKENS, ANSWER_TOKENS = 9, 6
SHARES = torch.tensor([0.6, 0.28, 0.09, 0.03])  # of answers of 1 to 4 word pieces


def random_answers(count, generator):
    """Return the Text of `count` answers [CLS] pieces [SEP]; a third begins as another one does."""
    lengths = torch.multinomial(SHARES, count, replacement=True, generator=generator) + 3
    answers = random_text(lengths, ANSWER_TOKENS, generator)
    answers.input_ids[:, 1] = torch.randint(
        1000, 1000 + 2 * count // 3, (count,), generator=generator
    )
    answers.input_ids[torch.arange(count), lengths - 1] = SEP
    return answers


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--answers", type=int, default=3128)
    parser.add_argument("--k", type=int, default=128)
    args = parser.parse_args()
    config = full_size_config("VQA", "distill=false")
    torch.manual_seed(0)
    model = build_model("vqa", config).to(DEVICE).eval()
    generator = torch.Generator().manual_seed(0)
    answers = random_answers(args.answers, generator).to(DEVICE)
    shape = args.questions, 3, config.image_res, config.image_res
    image = torch.randn(shape, generator=generator).to(DEVICE)
    question = random_text(
        torch.full((args.questions,), QUESTION_TOKENS), QUESTION_TOKENS, generator
    ).to(DEVICE)
    paths = {
        "image and question": lambda: model.encode_question(image, question),
        "ranking, plain": lambda: plain.rank_answers(model, image, question, answers, args.k),
        "ranking, fast": lambda: model.rank_answers(image, question, answers, args.k),
    }
    size = f"{args.answers} answers for {args.questions} questions, {config.image_res} px"
    print(f"ranking {args.k} of {size}, {MACHINE}")
    print(f"{'path':22}{'precision':>10}{'s/question':>12}{'vs plain':>10}{'vs plain fp32':>15}")
    plain_fp32 = None
    for precision in ("fp32", "bf16"):
        times = {}
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            for path, function in paths.items():
                function()
                times[path] = min(seconds(function, 2)) / args.questions
        encoding = times.pop("image and question")
        print(f"{'image and question':22}{precision:>10}{encoding:12.3f}")
        base = times["ranking, plain"] - encoding
        plain_fp32 = plain_fp32 or base
        for path, time in times.items():
            ranking = time - encoding
            cells = f"{ranking:12.3f}{base / ranking:10.1f}{plain_fp32 / ranking:15.1f}"
            print(f"{path:22}{precision:>10}{cells}", flush=True)


if __name__ == "__main__":
    main()
