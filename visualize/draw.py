"""Drawing: curves of a run, rankings of retrieval, heat maps and pseudo-targets, each from arrays and text to a file."""

import math
import os
import textwrap
import warnings

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from PIL import Image

from dataset.images import load_image

matplotlib.rcParams["text.parse_math"] = False  # a $ in a caption is a dollar
warnings.filterwarnings("ignore", "Glyph .* missing")  # a box takes its place

HIT, MISS = "#2a9d4a", "#c9302c"
TITLES = {
    "loss": "loss", "loss_ita": "image-text contrastive loss (Eq. 6)", "loss_itm": "image-text matching loss (Eq. 4)",
    "loss_mlm": "masked language modeling loss (Eq. 7)", "mi_bound": "mutual information of image and text, at least (nats)",
    "temp": "temperature", "lr": "learning rate",
}  # fmt: skip


def smooth(values, window):
    """Centered moving average whose window shrinks at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def draw_curves(curves, path):
    """One panel for each scalar that TITLES knows, the raw values pale behind their moving average.

    curves: name -> (steps, values, ...), arrays [N], at least one of them a name that TITLES knows.
    """
    names = [name for name in TITLES if name in curves]
    rows = (len(names) + 2) // 3
    figure, axes = plt.subplots(rows, 3, figsize=(14, 3.6 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names):
        steps, values, *_ = curves[name]
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
    return load_image(os.path.join(image_root, name)).permute(1, 2, 0).numpy()


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



# ---------------------------------------------------------------------------------------------------------------------
# pictures of one example

DPI = 110
WIDTH = 12  # inches of a full row
# of a heat map, the same in every panel and in the color bar: cold is clear, and the hottest lets the object shine through
HEAT = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, 256))
HEAT[:, 3] = np.linspace(0, 0.65, 256)
HEAT = ListedColormap(HEAT, "heat")


def _small(image):
    """An image uint8 [H, W, 3] with no more pixels than a panel can show."""
    picture = Image.fromarray(image)
    picture.thumbnail((600, 600))
    return np.asarray(picture)


def _pale(image):
    """An image [H, W, 3] with less color and contrast, on which the colors of heat stand out; uint8."""
    gray = image.mean(axis=2, keepdims=True)
    return (51 + 0.4 * (image + gray)).astype(np.uint8)


def _label(axis, text, width, size, **style):
    """Titles a panel in the largest font, up to `size`, at which the text fits into `width` inches; cuts a very long one."""
    text = text if len(text) <= 32 else f"{text[:20]}…{text[-10:]}"
    size = min(size, width * 72 / (0.6 * len(text)))  # a wide letter takes 0.6 of the font size
    axis.set_title(text, fontsize=size, pad=4, **style)


def draw_heat_maps(images, panels, title, path):
    """The image and one panel for each heat map, in rows as Figures 4 to 6; of two images the second is below the first.

    All heat maps share one scale, from 0 to their largest value, by the square root so that weak ones are seen. images: one or
    two, uint8 [H, W, 3]; panels: list of (label, heat maps [h, w] of the images), of which the first is that of the whole text;
    title: lines of text.
    """
    rows, count = len(images), 1 + len(panels)
    aspects = [image.shape[1] / image.shape[0] for image in images]
    width = min(max((2 if count < 12 else 1.5) * math.prod(aspects) ** (0.5 / rows), 1.2), 5)
    bands = math.ceil(count / max(2, int(WIDTH / width)))
    columns, heights = math.ceil(count / bands), [width / aspect for aspect in aspects]
    size = max(width * columns + 1, 6), bands * (sum(heights) + 0.3) + 0.25 * len(title) + 0.5
    figure, axes = plt.subplots(bands * rows, columns, figsize=size, height_ratios=heights * bands, squeeze=False,
                                layout="compressed")  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    images, scale = [_small(image) for image in images], PowerNorm(0.5, 0, max(heats.max() for _, heats in panels) or 1)
    for number, (label, heats) in enumerate([("image" if rows == 1 else "images", None), *panels]):
        column = axes[number // columns * rows :, number % columns]
        style = {"style": "italic", "color": "#555555"} if number < 2 else {}  # the others are words of the text
        _label(column[0], label, width, 12, **style)
        for i, (axis, image) in enumerate(zip(column, images)):
            extent = 0, image.shape[1], image.shape[0], 0
            axis.imshow(image if heats is None else _pale(image), extent=extent)
            if heats is not None:
                heat = axis.imshow(heats[i], HEAT, scale, extent=extent, interpolation="catrom", interpolation_stage="data")
            if rows > 1 and number % columns == 0:
                axis.text(-0.03, 0.5, ("first", "second")[i], transform=axis.transAxes, rotation=90, ha="right", va="center")
    figure.colorbar(heat, ax=axes, label="attention × gradient", format="%.2g", aspect=25, fraction=0.05)
    figure.suptitle("\n".join(title), fontsize=13, wrap=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def draw_pseudo_targets(image, words, texts, title, texts_title, path):
    """Figure 2: beside the image the candidates for each masked word of its caption, below them the candidate texts.

    image uint8 [H, W, 3]; words: list of (word, its candidates); texts: the candidates for the whole caption, perhaps none.
    A candidate has text, score (a word's is a probability) and hit, true where it is what the caption has.
    """
    columns = min(max(2, len(words)), 5)  # of words; the image takes two more
    width = WIDTH / 7 * (columns + 2)
    lines = [(line, candidate, i == 0) for candidate in texts
             for i, line in enumerate(textwrap.wrap(candidate.text, int(10 * width)))]  # fmt: skip
    height = min(WIDTH / 4 * image.shape[0] / image.shape[1], 5)
    rows = max(math.ceil(len(words) / columns), round(height / 1.4))
    ratios = [1.4] * rows + [0.25 * len(lines) + 0.2]
    figure = plt.figure(figsize=(width, sum(ratios) + 0.8), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns + 2, height_ratios=ratios)
    axis = figure.add_subplot(grid[:rows, :2], anchor="NW")
    axis.imshow(_small(image))
    axis.axis("off")
    for number, (word, candidates) in enumerate(words):
        cell = grid[number // columns, 2 + number % columns]
        axis = figure.add_subplot(cell, xlim=(0, 1), ylim=(len(candidates) - 0.5, -0.5))
        axis.axis("off")
        _label(axis, word, 1.5, 12, loc="left", weight="bold")
        axis.barh(range(len(candidates)), [candidate.score for candidate in candidates], 0.9, color="#c9dcf2")
        for i, candidate in enumerate(candidates):
            color = HIT if candidate.hit else "black"
            axis.text(0.02, i, candidate.text, fontsize=min(10, 130 / len(candidate.text)), va="center", color=color)
            axis.text(1, i, f"{100 * candidate.score:.1f}%", fontsize=9, ha="right", va="center", color=color)
    if texts:
        axis = figure.add_subplot(grid[rows, :], xlim=(0, width), ylim=(len(lines) - 0.5, -0.5))
        axis.axis("off")
        axis.set_title(texts_title, fontsize=12, loc="left", weight="bold", pad=6)
        for i, (line, candidate, first) in enumerate(lines):
            color = HIT if candidate.hit else "black"
            axis.text(0, i, f"{candidate.score:.2f}" if first else "", fontsize=11, va="center", color=color)
            axis.text(0.5, i, line, fontsize=11, va="center", color=color)
    figure.suptitle("\n".join(title), fontsize=13, x=0, ha="left", wrap=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)
