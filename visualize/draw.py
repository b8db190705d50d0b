"""Drawing: curves of a run, rankings, attributes, heat maps and pseudo-targets, each from arrays
and text to a file.
"""

import contextlib
import functools
import math
import os
import sys
import textwrap
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from dataset.images import load_image
from utils import InputError, atomic_write

DPI = 110
WIDTH = 12  # inches of a full row of panels
HIT, MISS = "#2a9d4a", "#c9302c"
TITLES = {
    "loss": "loss",
    "loss_ita": "image-text contrastive loss (Eq. 6)",
    "loss_itm": "image-text matching loss (Eq. 4)",
    "loss_mlm": "masked language modeling loss (Eq. 7)",
    "mi_bound": "lower bound of mutual information (nats)",
    "temp": "temperature",
    "lr": "learning rate",
}
# of a heat map, the same in every panel and in the color bar: cold is clear, and the hottest lets
# the object shine through
HEAT = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, 256))
HEAT[:, 3] = np.linspace(0, 0.65, 256)
HEAT = ListedColormap(HEAT, "heat")


@functools.cache
def _characters_of(font):
    """Return the characters of a font file, an empty set if it cannot be read."""
    try:
        return set(map(chr, FT2Font(font).get_charmap()))
    except (OSError, RuntimeError):
        return set()


@functools.cache
def _add_new_fonts():
    """Add fonts that were installed after matplotlib cached its list."""
    for font in set(font_manager.findSystemFonts()) - {
        entry.fname for entry in font_manager.fontManager.ttflist
    }:
        with contextlib.suppress(Exception):  # matplotlib also skips unusable fonts
            font_manager.fontManager.addfont(font)


def _find_fonts(characters):
    """Return families of installed fonts that together cover as many characters as possible."""
    families, lacking = [], set(characters)
    fonts = [
        font for font in font_manager.fontManager.ttflist if not font.name.startswith("Last Resort")
    ]
    while True:
        gained, *_, font = max(
            (
                (
                    len(lacking & _characters_of(font.fname)),
                    font.style == "normal",
                    font.weight == 400,
                    "Sans" in font.name,
                    font,
                )
                for font in fonts
            ),
            key=lambda row: row[:-1],
        )
        if not gained:
            return families
        families.append(font.name)
        lacking -= _characters_of(font.fname)


def _set_font(text):
    """Choose fonts for the characters of a matplotlib text. Return the characters that no installed
    font has.

    A box replaces each of them. A $ does not begin a formula.
    """
    text.set_parse_math(False)
    lacking = (
        set(text.get_text())
        - {"\n"}
        - _characters_of(font_manager.findfont(text.get_fontproperties()))
    )
    if not lacking:
        return set()
    _add_new_fonts()
    for family in _find_fonts(lacking):
        properties = text.get_fontproperties().copy()
        text.set_fontfamily([*text.get_fontfamily(), family])
        properties.set_family(family)
        lacking -= _characters_of(font_manager.findfont(properties))
    text.set_text(
        "".join(c if c not in lacking else "□" if c.isprintable() else " " for c in text.get_text())
    )
    return {c for c in lacking if c.isprintable()}


def _save(figure, path):
    """Write a figure in the format of its file name. Raises InputError."""
    if lacking := set().union(*map(_set_font, figure.findobj(Text))):
        scripts = {
            unicodedata.name(c, "unknown").split()[0] if c.isalpha() else "symbols" for c in lacking
        }
        print(
            f"note: {path}: no installed font has {', '.join(sorted(scripts))}, such as {min(lacking)}; install one, "
            "such as Noto (Debian: fonts-noto-core, fonts-noto-cjk)",
            file=sys.stderr,
        )
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format=Path(path).suffix[1:] or None, dpi=DPI, bbox_inches="tight")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}): make room, or name another place"
        ) from None
    except ValueError as error:  # a format that matplotlib does not know
        raise InputError(f"{path}: {error}") from None


def _average(values):
    """Return the moving average [N] of values [N] over a fortieth of them."""
    window = np.ones(len(values) // 80 * 2 + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_curves(curves, path):
    """Draw one panel per scalar that TITLES knows, the raw values pale behind their moving average.

    curves: name -> (steps, values, ...), arrays [N], at least one of them a name that TITLES knows.
    """
    names = [name for name in TITLES if name in curves]
    rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(14, 3.6 * rows), layout="constrained")
    for place, name in enumerate(names, 1):
        steps, values, *_ = curves[name]
        axis = figure.add_subplot(rows, 3, place, title=TITLES[name], xlabel="iteration")
        axis.plot(steps, values, color="#9db8d9", linewidth=0.8)
        axis.plot(steps, _average(values), color="#1f4e8c", linewidth=1.8)
        axis.grid(alpha=0.3)
        settled = values[len(values) // 50 :]  # the first steps would squeeze the rest into a line
        margin = 0.05 * (settled.max() - settled.min() or abs(settled.max()) or 1)
        axis.set_ylim(settled.min() - margin, settled.max() + margin)
    _save(figure, path)


def draw_lines(curves, name, path):
    """Draw a scalar that TITLES knows of several runs in one panel. curves: run -> (steps, values,
    ...), arrays [N].
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot(title=TITLES[name], xlabel="iteration")
    for run, (steps, values, *_) in curves.items():
        axis.plot(steps, _average(values), label=run)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def draw_retrieval(rankings, path, queries=5, top=5):
    """Draw text queries with their best images, then image queries with their best captions; green
    is a hit, red a miss.

    rankings: the content of result/retrieval.json; queries: how many of each direction, spread over
    all of them.
    """
    texts, images = (
        [rows[i] for i in np.linspace(0, len(rows) - 1, min(queries, len(rows))).astype(int)]
        for rows in (rankings["text_to_image"], rankings["image_to_text"])
    )
    rows = len(texts) + len(images)
    figure = Figure(figsize=(13, 2.05 * rows + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows, top + 1, width_ratios=[1.6] + [1] * top)

    def show_text(cell, *lines, **place):
        axis = figure.add_subplot(cell)
        axis.axis("off")
        for i, (text, color) in enumerate(lines):
            axis.text(y=1 - (i + 0.5) / len(lines), s=text, color=color, va="center", **place)

    def show_image(cell, name, **style):
        axis = figure.add_subplot(cell, xticks=[], yticks=[], **style)
        axis.imshow(load_image(os.path.join(rankings["image_root"], name)).permute(1, 2, 0).numpy())
        return axis

    for row, query in enumerate(texts):
        show_text(
            grid[row, 0],
            (textwrap.fill(query["caption"], 28), "black"),
            x=0.5,
            ha="center",
            fontsize=11,
        )
        for place, result in enumerate(query["results"][:top], 1):
            axis = show_image(grid[row, place], result["image"])
            color = HIT if result["hit"] else MISS
            axis.set_title(f"{place}: {result['score']:.1f}", fontsize=9, color=color)
            axis.spines[:].set(color=color, linewidth=3.5)
    for row, query in enumerate(images, len(texts)):
        show_image(grid[row, 0], query["image"], frame_on=False)
        lines = [
            (
                f"{result['score']:5.1f}  {textwrap.shorten(result['caption'], 110, placeholder=' ...')}",
                HIT if result["hit"] else MISS,
            )
            for result in query["results"][:top]
        ]
        show_text(grid[row, 1:], *lines, x=0, fontsize=10)
    figure.suptitle(
        "queries and their best results with ITM scores: green is right, red is wrong", fontsize=13
    )
    _save(figure, path)


def draw_attributes(result, path, count=5):
    """Draw boxes in their images with their best and worst attributes; green is right, red is
    wrong, gray is not labeled.

    result: the content of result/attributes.json; count: how many boxes, spread over all of them.
    """
    boxes, attributes = result["boxes"], result["attributes"]
    chosen = [boxes[i] for i in np.linspace(0, len(boxes) - 1, min(count, len(boxes))).astype(int)]
    figure = Figure(figsize=(13, 2.05 * len(chosen) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(chosen), 3, width_ratios=[1, 2, 2])
    for row, box in enumerate(chosen):
        axis = figure.add_subplot(grid[row, 0], xticks=[], yticks=[], frame_on=False)
        axis.imshow(
            load_image(os.path.join(result["image_root"], box["image"])).permute(1, 2, 0).numpy()
        )
        x, y, w, h = box["box"]
        axis.add_patch(
            Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor="#ff2d9b", linewidth=2.5)
        )
        for column, (kind, right) in enumerate((("best", 1), ("worst", 0)), 1):
            axis = figure.add_subplot(grid[row, column], title=kind if row == 0 else None)
            axis.axis("off")
            for i, (number, score, label) in enumerate(box[kind]):
                text = textwrap.shorten(
                    f"{score:.3f}  {attributes[number]['name']}", 60, placeholder=" ..."
                )
                color = "#888888" if label < 0 else HIT if label == right else MISS
                axis.text(
                    0, 1 - (i + 0.5) / len(box[kind]), text, color=color, va="center", fontsize=10
                )
    figure.suptitle(
        "boxes with their best and worst attributes: green is right, red is wrong, gray not labeled",
        fontsize=13,
    )
    _save(figure, path)


def _small(image):
    """Return an image uint8 [H, W, 3] with no more pixels than a panel can show."""
    picture = Image.fromarray(image)
    picture.thumbnail((600, 600))
    return np.asarray(picture)


def _pale(image):
    """Return an image [H, W, 3] with less color and contrast, on which the colors of heat stand
    out; uint8.
    """
    gray = image.mean(axis=2, keepdims=True)
    return (51 + 0.4 * (image + gray)).astype(np.uint8)


def _fit(text, inches, size):
    """Return a text, a very long one cut, and the largest font size up to `size` at which it fits
    into so many inches.
    """
    text = text if len(text) <= 36 else f"{text[:35]}…"
    # a wide letter takes 0.6 of the font size
    return text, min(size, inches * 72 / (0.6 * len(text)))


def _heat_scale(panels):
    """Return the scale that all heat maps of some panels share, of the square root, so that weak
    ones are seen.
    """
    return PowerNorm(0.5, 0, max(heats.max() for _, heats in panels) or 1)


def _show_heat(axis, image, heat, scale):
    """Show a heat map [h, w] over a pale image [H, W, 3] and return its artist."""
    extent = 0, image.shape[1], image.shape[0], 0
    axis.imshow(_pale(image), extent=extent)
    return axis.imshow(
        heat, HEAT, scale, extent=extent, interpolation="catrom", interpolation_stage="data"
    )


def paint_heat_maps(images, panels, height):
    """Return the panels of draw_heat_maps as pictures by themselves, [(label, the pictures of its
    images), ...].

    A picture is uint8 [height, W, 3]; images and panels: as for draw_heat_maps.
    """
    scale, columns = _heat_scale(panels), []
    for number, image in enumerate(map(_small, images)):
        canvas = FigureCanvasAgg(
            Figure((height * image.shape[1] / image.shape[0] / DPI, height / DPI), DPI)
        )
        axis = canvas.figure.add_axes((0, 0, 1, 1))
        axis.axis("off")
        shown, column = _show_heat(axis, image, panels[0][1][number], scale), []
        for _, heats in panels:
            shown.set_data(heats[number])
            canvas.draw()
            column.append(np.array(canvas.buffer_rgba())[..., :3])
        columns.append(column)
    return [(label, pictures) for (label, _), *pictures in zip(panels, *columns)]


def draw_heat_maps(images, panels, title, path):
    """Draw the image and one panel per heat map, in rows as Figures 4 to 6; of two images the
    second is below the first.

    All heat maps share one scale, from 0 to their largest value. images: one or two, uint8 [H, W,
    3]; panels: list of (label, heat maps [h, w] of the images), the whole text first; title: lines
    of text.
    """
    rows, count = len(images), 1 + len(panels)
    aspects = [image.shape[1] / image.shape[0] for image in images]
    width = np.clip(1.7 * math.prod(aspects) ** (0.5 / rows), 1.25, 5)
    bands = math.ceil(count / int(WIDTH / width))
    columns, heights = math.ceil(count / bands), [width / aspect for aspect in aspects]
    figure = Figure(
        figsize=(max(width * columns + 1, 6), bands * (sum(heights) + 0.3) + 1), layout="compressed"
    )
    axes = figure.subplots(bands * rows, columns, height_ratios=heights * bands, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    images, scale = [_small(image) for image in images], _heat_scale(panels)
    for number, (label, heats) in enumerate([("image" if rows == 1 else "images", None), *panels]):
        column = axes[number // columns * rows :, number % columns]
        # the others are words of the text
        style = {"style": "italic", "color": "#555555"} if number < 2 else {}
        label, size = _fit(label, width, 12)
        column[0].set_title(label, fontsize=size, pad=4, **style)
        for i, (axis, image) in enumerate(zip(column, images)):
            if heats is None:
                axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            else:
                heat = _show_heat(axis, image, heats[i], scale)
            if rows > 1 and number % columns == 0:
                axis.text(
                    -0.03,
                    0.5,
                    ("first", "second")[i],
                    transform=axis.transAxes,
                    rotation=90,
                    ha="right",
                    va="center",
                )
    figure.colorbar(
        heat, ax=axes, label="attention × gradient", format="%.2g", aspect=25, fraction=0.05
    )
    figure.suptitle("\n".join(title), fontsize=13, wrap=True)
    _save(figure, path)


def _draw_candidates(axis, title, candidates, score, inches):
    """Draw up to five candidates in `inches`, their scores as bars and as numbers in the format
    `score`; green is a hit.
    """
    axis.set(xlim=(0, 1), ylim=(4.5, -0.5))
    axis.axis("off")
    title, size = _fit(title, inches, 12)
    axis.set_title(title, fontsize=size, loc="left", weight="bold")
    axis.barh(
        range(len(candidates)), [candidate.score for candidate in candidates], 0.9, color="#c9dcf2"
    )
    for i, candidate in enumerate(candidates):
        color = HIT if candidate.hit else "black"
        text = "\n".join(textwrap.wrap(candidate.text, 100))
        _, size = _fit(candidate.text, inches - 0.6, 10)
        axis.text(0.01, i, text, fontsize=size, va="center", color=color)
        axis.text(
            1, i, score.format(candidate.score), fontsize=9, ha="right", va="center", color=color
        )


def draw_pseudo_targets(image, words, texts, title, texts_title, path):
    """Draw Figure 2: beside the image the candidates for each masked word of its caption, below
    them the candidate texts.

    image uint8 [H, W, 3]; words: list of (word, its candidates); texts: the candidates for the
    whole caption, perhaps none. A candidate has text, score (a probability for words) and hit, true
    if the caption has this text.
    """
    columns = min(max(3, len(words)), 5)  # of words; the image takes two more
    width = WIDTH / 7
    rows = max(
        math.ceil(len(words) / columns), min(round(2.2 * image.shape[0] / image.shape[1]), 3), 1
    )
    heights = [1.4] * rows + [2] * bool(texts)
    figure = Figure(figsize=(width * (columns + 2), sum(heights) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns + 2, height_ratios=heights)
    axis = figure.add_subplot(grid[:rows, :2], anchor="NW")
    axis.imshow(_small(image))
    axis.axis("off")
    for number, (word, candidates) in enumerate(words):
        axis = figure.add_subplot(grid[number // columns, 2 + number % columns])
        _draw_candidates(axis, word, candidates, "{:.1%}", width)
    if texts:
        _draw_candidates(
            figure.add_subplot(grid[rows, :]), texts_title, texts, "{:.2f}", width * (columns + 2)
        )
    figure.suptitle("\n".join(title), fontsize=13, x=0, ha="left", wrap=True)
    _save(figure, path)
