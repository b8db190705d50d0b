"""Drawing: curves of a run, rankings of retrieval, heat maps and pseudo-targets, each from arrays and text to a file."""

import math
import os
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dataset.images import load_image

matplotlib.rcParams["text.parse_math"] = False  # a $ in a caption is a dollar

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

    curves: name -> (steps, values), arrays [N], at least one of them a name that TITLES knows.
    """
    names = [name for name in TITLES if name in curves]
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
# pictures of one example; lengths are in inches, from the upper left corner

DPI = 110
GAP, MARGIN = 0.1, 0.2
LINE = 0.27  # height of a line of text
PAGE = 13.0  # width of a full row
PANEL, SMALL_PANEL = 2.1, 1.6  # side of a square panel, others have the same area; small ones where there are many
MANY = 10


class _Page:
    """A figure of width and height inches to place pictures and text on."""

    def __init__(self, width, height):
        self.width, self.height = width, height
        self.figure = plt.figure(figsize=(width, height))

    def picture(self, pixels, x, y, width, height):
        axis = self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))
        axis.imshow(pixels, aspect="auto")
        axis.axis("off")

    def text(self, text, x, y, size=11, **style):
        """Text whose upper left corner is at (x, y), unless style aligns it otherwise."""
        style = {"va": "top", "ha": "left", **style}
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **style)

    def bar(self, x, y, width, height, color):
        corner = x / self.width, 1 - (y + height) / self.height
        self.figure.add_artist(plt.Rectangle(corner, width / self.width, height / self.height, color=color, linewidth=0))

    def save(self, path):
        self.figure.savefig(path, dpi=DPI)
        plt.close(self.figure)


def _characters(width, size):
    """How many letters of a font size fit into a width; wide ones need 0.6 of the size each."""
    return max(1, int(width * 72 / (0.6 * size)))


def _wrap(text, width, size):
    return textwrap.wrap(text, _characters(width, size)) or [""]


def _fitting(text, width, size, smallest=7):
    """A line of text and the font size, at most `size`, at which it is not wider than `width`; cut if it is far too long."""
    longest = _characters(width, smallest)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text, min(size, width * 72 / (0.6 * len(text)))


def _resized(image, width, height):
    """image uint8 [H, W, 3] -> the pixels of a panel of width x height inches."""
    size = round(width * DPI), round(height * DPI)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def overlay(image, heat):
    """Blends a heat map over its image: image uint8 [H, W, 3], heat float [h, w] -> uint8 [H, W, 3].

    As in the released code: the map, stretched from its least to its greatest value, is bicubically resized; hot places are
    opaque, cold ones clear. A map of one value leaves the image as it is.
    """
    heat = np.asarray(heat, dtype=np.float32)
    heat = (heat - heat.min()) / (np.ptp(heat) or 1)
    heat = np.asarray(Image.fromarray(heat).resize(image.shape[1::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    weight = heat[..., None] ** 0.7
    return ((1 - weight) * image + weight * 255 * matplotlib.colormaps["jet"](heat)[..., :3]).round().astype(np.uint8)


def draw_heat_maps(images, panels, title, path):
    """The image and one panel for each heat map, in rows as Figures 4 to 6; of two images the second is below the first.

    images: one or two, uint8 [H, W, 3]; panels: list of (label, heat maps [h, w] of the images), of which the first is that
    of the whole text; title: lines of text.
    """
    aspects = [image.shape[1] / image.shape[0] for image in images]
    side = PANEL if len(panels) < MANY else SMALL_PANEL
    width = min(max(side * math.prod(aspects) ** (0.5 / len(aspects)), 1.3), 5)
    heights = [width / aspect for aspect in aspects]
    left = MARGIN + (LINE if len(images) > 1 else 0)
    cells = [("image" if len(images) == 1 else "images", None), *panels]
    columns = max(2, int((PAGE - left - MARGIN + GAP) / (width + GAP)))
    bands = math.ceil(len(cells) / columns)
    columns = math.ceil(len(cells) / bands)
    row_width = columns * (width + GAP) - GAP
    page_width = max(left + row_width + MARGIN, 4.5)
    lines = [line for text in title for line in _wrap(text, page_width - 2 * MARGIN, 13)]
    top = MARGIN + len(lines) * LINE
    band_height = LINE + sum(heights) + GAP * len(heights)
    page = _Page(page_width, top + bands * band_height + MARGIN)
    for number, line in enumerate(lines):
        page.text(line, page_width / 2, MARGIN / 2 + number * LINE, size=13, ha="center")
    left += (page_width - left - MARGIN - row_width) / 2
    shown = [_resized(image, width, height) for image, height in zip(images, heights)]
    for number, (label, heats) in enumerate(cells):
        x, y = left + number % columns * (width + GAP), top + number // columns * band_height
        label, size = _fitting(label, width, 12)
        style = {"style": "italic", "color": "#555555"} if number < 2 else {}  # the others are words of the text
        page.text(label, x + width / 2, y + LINE - 0.05, size, ha="center", va="bottom", **style)
        y += LINE
        for place, (pixels, height) in enumerate(zip(shown, heights)):
            page.picture(pixels if heats is None else overlay(pixels, heats[place]), x, y, width, height)
            if len(images) > 1 and number % columns == 0:
                page.text(("first", "second")[place], left - 0.07, y + height / 2, rotation=90, ha="right", va="center")
            y += height + GAP
    page.save(path)


def draw_pseudo_targets(image, words, texts, title, texts_title, path):
    """Figure 2: beside the image the candidates for each masked word of its caption, below them the candidate texts.

    image uint8 [H, W, 3]; words: list of (word, its candidates); texts: the candidates for the whole caption, perhaps none.
    A candidate has text, score (a word's is a probability) and hit, true where it is what the caption has.
    """
    aspect = image.shape[1] / image.shape[0]
    width = min(max(3 * aspect**0.5, 2), 4.5)
    height = width / aspect
    cell_width, cell_height = 1.7, LINE * 1.3 + 0.2 * len(words[0][1]) + GAP
    left = MARGIN + width + 0.3
    columns = min(int((PAGE - left - MARGIN) / cell_width), len(words))
    page_width = max(left + columns * cell_width + MARGIN, 9)
    rows = math.ceil(len(words) / columns)
    lines = [line for text in title for line in _wrap(text, page_width - 2 * MARGIN, 13)]
    entries = [(line, number == 0, candidate) for candidate in texts
               for number, line in enumerate(_wrap(candidate.text, page_width - 2 * MARGIN - 0.7, 11))]  # fmt: skip
    top = MARGIN + len(lines) * LINE
    middle = top + max(height, rows * cell_height) + 0.2
    page = _Page(page_width, middle + (LINE * 1.3 + 0.22 * len(entries) if texts else 0) + MARGIN)
    for number, line in enumerate(lines):
        page.text(line, MARGIN, MARGIN / 2 + number * LINE, size=13)
    page.picture(_resized(image, width, height), MARGIN, top, width, height)
    for number, (word, candidates) in enumerate(words):
        x, y = left + number % columns * cell_width, top + number // columns * cell_height
        label, size = _fitting(word, cell_width - 0.2, 12)
        page.text(label, x, y + LINE - 0.05, size, va="bottom", weight="bold")
        for place, candidate in enumerate(candidates):
            at = y + LINE + 0.2 * place
            page.bar(x, at + 0.01, (cell_width - 0.2) * candidate.score, 0.18, "#c9dcf2")
            label, size = _fitting(candidate.text, cell_width - 0.65, 10)
            color = HIT if candidate.hit else "black"
            page.text(label, x + 0.03, at + 0.1, size, va="center", color=color)
            page.text(f"{candidate.score:.2f}", x + cell_width - 0.22, at + 0.1, 9, ha="right", va="center", color=color)
    if texts:
        page.text(texts_title, MARGIN, middle, 12, weight="bold")
    for number, (line, first, candidate) in enumerate(entries):
        y, color = middle + LINE * 1.2 + 0.22 * number, HIT if candidate.hit else "black"
        if first:
            page.text(f"{candidate.score:.2f}", MARGIN, y, 11, color=color)
        page.text(line, MARGIN + 0.6, y, 11, color=color)
    page.save(path)
