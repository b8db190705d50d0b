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

from utils import InputError, run_script

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


def _pick(rows, count):
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def _open(image_root, name):
    return Image.open(os.path.join(image_root, name)).convert("RGB")


def _draw_text_queries(figure, queries, image_root, top):
    """A row for each caption: the caption, then its best images."""
    axes = figure.subplots(len(queries), top + 1, squeeze=False, width_ratios=[1.6] + [1] * top)
    for row, query in zip(axes, queries):
        for axis in row:
            axis.axis("off")
        row[0].text(0.5, 0.5, textwrap.fill(query["caption"], 28), ha="center", va="center", fontsize=11)
        for place, (axis, result) in enumerate(zip(row[1:], query["results"]), 1):
            axis.axis("on")
            axis.imshow(_open(image_root, result["image"]))
            axis.set_title(f"{place}: {result['score']:.1f}", fontsize=9, color=HIT if result["hit"] else MISS)
            _mark(axis, result["hit"])


def _draw_image_queries(figure, queries, image_root, top):
    """A row for each image: the image, then its best captions."""
    axes = figure.subplots(len(queries), 2, squeeze=False, width_ratios=[1, 5.6])
    for (picture, captions), query in zip(axes, queries):
        picture.imshow(_open(image_root, query["image"]))
        picture.axis("off")
        captions.axis("off")
        for place, result in enumerate(query["results"][:top]):
            caption = textwrap.shorten(result["caption"], 110, placeholder=" ...")
            captions.text(0.0, 0.9 - 0.8 * place / (top - 1), f"{result['score']:5.1f}  {caption}", fontsize=10, va="center",
                          color=HIT if result["hit"] else MISS)  # fmt: skip


def draw_retrieval(rankings, image_root, path, queries=5, top=5):
    """Text queries with their best images, then image queries with their best captions; green is a hit, red a miss."""
    texts, images = _pick(rankings["text_to_image"], queries), _pick(rankings["image_to_text"], queries)
    figure = plt.figure(figsize=(13, 2.05 * (len(texts) + len(images)) + 0.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[len(texts), len(images)])
    _draw_text_queries(upper, texts, image_root, top)
    _draw_image_queries(lower, images, image_root, top)
    figure.suptitle("queries and their best results with ITM scores: green is right, red is wrong", fontsize=13)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True, help="the folder of the run")
    parser.add_argument("--queries", type=int, default=5, help="queries of each direction in retrieval.png")
    args = parser.parse_args()
    folder = Path(args.output_dir)
    curves, result = folder / "tensorboard", folder / "result/retrieval.json"
    if not (curves.is_dir() or result.exists()):
        raise InputError(f"--output_dir {folder}: no run there, it has neither tensorboard nor result/retrieval.json")
    if curves.is_dir():
        draw_curves(read_curves(curves), folder / "curves.png")
        print(f"wrote {folder / 'curves.png'}")
    if result.exists():
        rankings = json.loads(result.read_text())
        draw_retrieval(rankings, rankings["image_root"], folder / "retrieval.png", args.queries)
        print(f"wrote {folder / 'retrieval.png'}")


if __name__ == "__main__":
    run_script(main)
