"""Pictures of a run: curves.png from its TensorBoard files, retrieval.png from its result/retrieval.json."""

import argparse
import json
import os
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import InputError, load_config, run_script

HIT, MISS = "#2a9d4a", "#c9302c"
TITLES = {
    "loss_ita": "image-text contrastive loss (Eq. 6)", "loss_itm": "image-text matching loss (Eq. 4)",
    "loss_mlm": "masked language modeling loss (Eq. 7)", "mi_bound": "mutual information of image and text, at least (nats)",
    "temp": "temperature", "lr": "learning rate",
}  # fmt: skip


def read_curves(folder):
    """Scalars of a run's TensorBoard files: name without train/ -> (steps, values)."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    curves = {}
    for tag in accumulator.Tags()["scalars"]:
        events = accumulator.Scalars(tag)
        curves[tag.removeprefix("train/")] = np.array([e.step for e in events]), np.array([e.value for e in events])
    return curves


def smooth(values, window):
    """Centered moving average whose window shrinks at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_curves(curves, path):
    """One panel for each scalar that TITLES knows, the raw values pale behind their moving average."""
    names = [name for name in TITLES if name in curves]
    if not names:
        raise InputError(f"{path.parent / 'tensorboard'}: no curves there yet, train first")
    rows = (len(names) + 2) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(14, 3.6 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        steps, values = curves[name]
        axis.plot(steps, values, color="#9db8d9", linewidth=0.8)
        axis.plot(steps, smooth(values, max(1, len(values) // 40)), color="#1f4e8c", linewidth=1.8)
        axis.set_title(TITLES[name], fontsize=11)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        settled = values[len(values) // 50 :]  # the first steps would squeeze the rest into a line
        margin = 0.05 * (settled.max() - settled.min() or abs(settled.max()) or 1)
        axis.set_ylim(settled.min() - margin, settled.max() + margin)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mark(axis, hit):
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(HIT if hit else MISS)
        spine.set_linewidth(3.5)


def draw_retrieval(rankings, image_root, path, queries=5, top=5):
    """Text queries with their best images, then image queries with their best captions; green is a hit, red a miss."""
    t2i, i2t = ([rows[i] for i in np.linspace(0, len(rows) - 1, min(queries, len(rows))).astype(int)]
                for rows in (rankings["text_to_image"], rankings["image_to_text"]))
    figure, axes = plt.subplots(
        len(t2i) + len(i2t), top + 1, figsize=(2.3 * (top + 1) + 1, 2.25 * (len(t2i) + len(i2t))),
        squeeze=False, layout="constrained", width_ratios=[1.5] + [1] * top,
    )  # fmt: skip
    for row, query in zip(axes, t2i):
        row[0].axis("off")
        row[0].text(0.5, 0.5, textwrap.fill(query["caption"], 26), ha="center", va="center", fontsize=11)
        for axis in row[1:]:
            axis.axis("off")
        for place, (axis, result) in enumerate(zip(row[1:], query["results"]), 1):
            axis.axis("on")
            axis.imshow(Image.open(os.path.join(image_root, result["image"])).convert("RGB"))
            axis.set_title(f"{place}: {result['score']:.1f}", fontsize=9, color=HIT if result["hit"] else MISS)
            _mark(axis, result["hit"])
    for row, query in zip(axes[len(t2i) :], i2t):
        row[0].imshow(Image.open(os.path.join(image_root, query["image"])).convert("RGB"))
        row[0].axis("off")
        for axis in row[1:]:
            axis.axis("off")
        for place, result in enumerate(query["results"][:top]):
            row[1].text(
                0.0, 0.9 - 0.8 * place / (top - 1), f"{result['score']:5.1f}  {result['caption']}", fontsize=10, va="center",
                color=HIT if result["hit"] else MISS, transform=row[1].transAxes,
            )  # fmt: skip
    figure.suptitle("queries and their top results with ITM scores: green is right, red is wrong", fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True, help="the folder of the run")
    parser.add_argument("--queries", type=int, default=5, help="queries of each direction in retrieval.png")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    if not (folder / "tensorboard").is_dir():
        raise InputError(f"--output_dir {folder}: no run there, it has no folder tensorboard")
    draw_curves(read_curves(folder / "tensorboard"), folder / "curves.png")
    print(f"wrote {folder / 'curves.png'}")
    result = folder / "result/retrieval.json"
    if result.exists():
        config = load_config(folder / "config.yaml")
        draw_retrieval(json.loads(result.read_text()), config["image_root"], folder / "retrieval.png", args.queries)
        print(f"wrote {folder / 'retrieval.png'}")


if __name__ == "__main__":
    run_script(main)
