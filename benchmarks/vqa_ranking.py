"""Seconds a question of ranking VQA answers with the full-size model, fast path (VQA.rank_answers) against plain path.

The plain path (benchmarks/plain.py) decodes every candidate whole, padded to the longest answer of the list, with its own copy of
the question's states, as the released code does. Both encode the questions with their images first, which is timed apart.
The answers are random and as long as those of VQA's list are: 1 to 4 word pieces, with the shares of --shares. Both paths run
in one process, one after the other.

    python benchmarks/vqa_ranking.py [--questions 4] [--answers 3128] [--k 128]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import plain
from models import build_model
from utils import Text
from stopwatch import seconds
from configs.schema import load_config

CLS, SEP = 101, 102
QUESTION_TOKENS = 9


def random_answers(count, shares, padded, generator):
    """Text of `count` answers [CLS] pieces [SEP], padded to `padded` ids; a third begins as another one does."""
    lengths = torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator) + 3
    ids = torch.randint(1000, 30000, (count, padded), generator=generator)
    ids[:, 1] = torch.randint(1000, 1000 + 2 * count // 3, (count,), generator=generator)
    ids[:, 0] = CLS
    places = torch.arange(padded)
    ids[places == lengths[:, None] - 1] = SEP
    mask = (places < lengths[:, None]).long()
    return Text(ids * mask, mask)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--answers", type=int, default=3128)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--shares", type=float, nargs=4, default=[0.6, 0.28, 0.09, 0.03], help="of answers of 1 to 4 pieces")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(ROOT / "configs/VQA.yaml", [f"bert_config={ROOT / 'configs/config_bert.json'}", "distill=false"])
    torch.manual_seed(0)
    model = build_model("vqa", config).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    answers = random_answers(args.answers, args.shares, 6, generator).to(device)
    image = torch.randn(args.questions, 3, config["image_res"], config["image_res"], generator=generator).to(device)
    ids = torch.randint(1000, 30000, (args.questions, QUESTION_TOKENS), generator=generator)
    question = Text(ids, torch.ones_like(ids)).to(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"ranking {args.k} of {args.answers} answers for {args.questions} questions, {config['image_res']} px, {name}, "
          f"torch {torch.__version__}")
    print(f"{'path':22}{'precision':>10}{'s/question':>12}{'vs plain':>10}{'vs plain fp32':>15}")
    times = {}
    for precision in ("fp32", "bf16"):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            paths = {
                "image and question": lambda: model.encode_question(image, question),
                "ranking, plain": lambda: plain.rank_answers(model, image, question, answers, args.k),
                "ranking, fast": lambda: model.rank_answers(image, question, answers, args.k),
            }
            for path, function in paths.items():
                function()
                times[path, precision] = min(seconds(function, device, 2)) / args.questions
                if path.startswith("ranking"):
                    times[path, precision] -= times["image and question", precision]
                elapsed = times[path, precision]
                ratios = ""
                if path.startswith("ranking"):
                    ratios = "".join(f"{times['ranking, plain', p] / elapsed:{width}.1f}" for p, width in ((precision, 10), ("fp32", 15)))
                print(f"{path:22}{precision:>10}{elapsed:12.3f}{ratios}", flush=True)


if __name__ == "__main__":
    main()
