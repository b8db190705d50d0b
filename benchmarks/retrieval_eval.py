"""Scores a second of re-ranking with the full-size model at 384 px, fast path (ALBEF.rerank) against plain path.

A score is one (query, candidate) pair of one direction. The plain path (benchmarks/plain.py) takes query by query, computes each
image's keys and values anew for every candidate and pads every text to 30 tokens, as the released evaluation does; it is
timed on part of the queries. Texts have 7 to 17 tokens, 12 on average. Both paths run in one process, one after the other.

    python benchmarks/retrieval_eval.py [--images 8] [--texts 480] [--k 128]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import plain
from dataset.text import MAX_TOKENS
from models import build_model
from utils import Text
from models.alignment import NO_CANDIDATE
from stopwatch import seconds
from configs.schema import load_config

DATA_SETS = {"COCO 5K": (5000, 25010, 256), "Flickr30K 1K": (1000, 5000, 128)}  # images, texts, k of the paper


def delivered(scores):
    """How many scores of both directions were computed."""
    return sum(int((direction != NO_CANDIDATE).sum()) for direction in scores)


def encoded(model, images, texts, device):
    """Embeddings and features of random images and texts, as rerank takes them."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(7, 18, (texts,), generator=generator)
    mask = (torch.arange(MAX_TOKENS) < lengths[:, None]).long()
    input_ids = torch.randint(1000, 30000, (texts, MAX_TOKENS), generator=generator) * mask
    input_ids[:, 0] = 101
    text = Text(input_ids, mask).to(device)
    image = torch.randn(images, 3, config["image_res"], config["image_res"], generator=generator).to(device)
    image_embeds, image_feat = model.encode_image(image)
    text_embeds, text_feat = model.encode_text(text)
    return image_embeds, image_feat, text_embeds, text_feat, text.attention_mask


def duration(time):
    """Seconds as text."""
    return f"{time / 3600:.2f} h" if time >= 3600 else f"{time / 60:.1f} min"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--texts", type=int, default=480)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--plain_queries", type=int, default=2, help="queries of each direction that the plain path is timed on")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(ROOT / "configs/Retrieval_coco.yaml", [f"bert_config={ROOT / 'configs/config_bert.json'}"])
    torch.manual_seed(0)
    model = build_model("retrieval", config).to(device).eval()
    inputs = encoded(model, args.images, args.texts, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"re-ranking {args.images} images x {args.texts} texts at {config['image_res']} px, k {args.k}, {name}, "
          f"torch {torch.__version__}")
    print(f"{'path':8}{'precision':>10}{'scores':>9}{'seconds':>9}{'scores/s':>10}{'vs plain':>10}{'vs plain fp32':>15}"
          + "".join(f"{name:>14}" for name in DATA_SETS))
    rates = {}
    for precision in ("fp32", "bf16"):
        for path in ("plain", "fast"):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                if path == "plain":
                    warm_up = lambda: plain.rerank(model, *inputs, args.k, queries=1)
                    rerank = lambda: plain.rerank(model, *inputs, args.k, queries=args.plain_queries)
                else:
                    warm_up = lambda: model.rerank(*(x[:2] for x in inputs), args.k)
                    rerank = lambda: model.rerank(*inputs, args.k)
                warm_up()
                scores = []
                (elapsed,) = seconds(lambda: scores.extend(rerank()), device, 1)
            count = delivered(scores)
            rates[path, precision] = rate = count / elapsed
            # each pair is scored once: both directions' candidates without those they share, which only real data can tell
            pairs = int(((scores[0] != NO_CANDIDATE) | (scores[1].T != NO_CANDIDATE)).sum()) if path == "fast" else count
            at_most = [(images * min(k, texts) + texts * min(k, images)) * elapsed / pairs for images, texts, k in DATA_SETS.values()]
            print(f"{path:8}{precision:>10}{count:9}{elapsed:9.1f}{rate:10.1f}{rate / rates['plain', precision]:10.1f}"
                  f"{rate / rates['plain', 'fp32']:15.1f}" + "".join(f"{duration(value):>14}" for value in at_most), flush=True)
    print("the last columns extrapolate to all pairs of both directions; candidates that the two share cost the fast path less")


if __name__ == "__main__":
    main()
