"""Measure scores per second of re-ranking with the full-size model at 384 px, fast and plain.

A score belongs to one pair of a query and a candidate, in one direction. The fast path is
ContrastiveModel.rerank. As in the released evaluation, the plain path (tests/helpers/plain.py)
takes one query at a time, computes an image's keys and values again for every candidate, and pads
every text to 30 tokens. It is timed on part of the queries. Texts have 7 to 17 tokens, 12 on
average. Both paths run in one process, one after the other.

    python benchmarks/retrieval_eval.py [--images 8] [--texts 480] [--k 128]
"""

import argparse

import torch
from bench import DEVICE, MACHINE, full_size_config, random_text, seconds
from helpers import plain

from dataset.text import MAX_TOKENS
from models import build_model
from models.contrastive import NO_CANDIDATE

# images, texts, k of the paper
DATA_SETS = {"COCO 5K": (5000, 25010, 256), "Flickr30K 1K": (1000, 5000, 128)}
PLAIN_QUERIES = 2  # of each direction, that the plain path is timed on


def encoded(model, images, texts):
    """Return the embeddings and features of random images and texts, as rerank takes them."""
    generator, size = torch.Generator().manual_seed(0), model.config.image_res
    text = random_text(
        torch.randint(7, 18, (texts,), generator=generator), MAX_TOKENS, generator
    ).to(DEVICE)
    image = torch.randn(images, 3, size, size, generator=generator).to(DEVICE)
    return *model.encode_image(image), *model.encode_text(text), text.attention_mask


def duration(time):
    """Return seconds as text."""
    return f"{time / 3600:.2f} h" if time >= 3600 else f"{time / 60:.1f} min"


def measure(rerank, precision):
    """Return the numbers of scores and of image-text pairs with a score, and the seconds."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
        rerank(1)  # a first call takes longer
        scores = []
        (elapsed,) = seconds(lambda: scores.extend(rerank(None)), 1)
    i2t, t2i = (direction != NO_CANDIDATE for direction in scores)
    return int(i2t.sum() + t2i.sum()), int((i2t | t2i.T).sum()), elapsed


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--texts", type=int, default=480)
    parser.add_argument("--k", type=int, default=128)
    args = parser.parse_args()
    config = full_size_config("Retrieval_coco")
    torch.manual_seed(0)
    model = build_model("retrieval", config).to(DEVICE).eval()
    inputs = encoded(model, args.images, args.texts)
    paths = {
        "plain": lambda queries: plain.rerank(model, *inputs, args.k, queries or PLAIN_QUERIES),
        "fast": lambda queries: model.rerank(*(x[:queries] for x in inputs), args.k),
    }
    size = f"{args.images} images x {args.texts} texts at {config.image_res} px, k {args.k}"
    print(f"re-ranking {size}, {MACHINE}")
    columns = f"{'path':8}{'precision':>10}{'scores':>9}{'seconds':>9}{'scores/s':>10}"
    columns += f"{'vs plain':>10}{'vs plain fp32':>15}"
    print(columns + "".join(f"{name:>14}" for name in DATA_SETS))
    all_pairs = [
        images * min(k, texts) + texts * min(k, images) for images, texts, k in DATA_SETS.values()
    ]
    rates = {}
    for precision in ("fp32", "bf16"):
        for path, rerank in paths.items():
            count, pairs, elapsed = measure(rerank, precision)
            rates[path, precision] = rate = count / elapsed
            # the fast path scores a pair of both directions once; only real data has the share
            pairs = pairs if path == "fast" else count
            ratios = rate / rates["plain", precision], rate / rates["plain", "fp32"]
            cells = f"{count:9}{elapsed:9.1f}{rate:10.1f}{ratios[0]:10.1f}{ratios[1]:15.1f}"
            cells += "".join(f"{duration(n * elapsed / pairs):>14}" for n in all_pairs)
            print(f"{path:8}{precision:>10}{cells}", flush=True)
    print(
        "the last columns extrapolate to all pairs of both directions; the fast path takes less"
        " time if both directions share pairs, because it scores a shared pair once"
    )


if __name__ == "__main__":
    main()
