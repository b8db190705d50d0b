"""Draw curves, rankings, attributes, heat maps and pseudo-targets to files."""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from dataset.base import evenly
from dataset.images import Exif, load_image
from engine.output_dir import writing
from utils import atomic_write, percent
from visualize.fonts import set_fonts

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
VERDICT_COLORS = {"supported": HIT, "contradicted": MISS, "inconclusive": "#d98a00"}
# the colors of heat maps: cold is clear, and the hottest lets the object shine through
_COLORS = matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, 256))
_COLORS[:, 3] = np.linspace(0, 0.65, 256)
HEAT = ListedColormap(_COLORS, "heat")


def _save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of its file name. Raises TrainingStopped."""
    set_fonts(figure)
    with writing(Path(path)), atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or None, dpi=DPI, bbox_inches="tight")


def _average(values: np.ndarray) -> np.ndarray:
    """Return the moving average [N] of values [N] over a fortieth of them."""
    window = np.ones(len(values) // 80 * 2 + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_curves(curves: Mapping[str, Sequence[np.ndarray]], path: str | Path) -> None:
    """Draw a panel for each scalar in TITLES: raw values and, except for lr, their moving average.

    Args:
        curves: Steps and values [N] by name; one of the names is in TITLES.
        path: File to write.
    """
    names = [name for name in TITLES if name in curves]
    rows = math.ceil(len(names) / 3)
    figure = Figure(figsize=(14, 3.6 * rows), layout="constrained")
    for place, name in enumerate(names, 1):
        steps, values, *_ = curves[name]
        axis = figure.add_subplot(rows, 3, place, title=TITLES[name], xlabel="iteration")
        axis.plot(steps, values, color="#9db8d9", linewidth=0.8)
        smooth = values if name == "lr" else _average(values)  # the schedule has no noise
        axis.plot(steps, smooth, color="#1f4e8c", linewidth=1.8)
        axis.grid(alpha=0.3)
        settled = values[len(values) // 50 :]  # the first steps would squeeze the rest into a line
        margin = 0.05 * (settled.max() - settled.min() or abs(settled.max()) or 1)
        axis.set_ylim(settled.min() - margin, settled.max() + margin)
    _save(figure, path)


def draw_lines(curves: Mapping[str, Sequence[np.ndarray]], name: str, path: str | Path) -> None:
    """Draw a scalar of several runs in one panel.

    Args:
        curves: Steps and values [N] by run.
        name: Name of the scalar in TITLES.
        path: File to write.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.add_subplot(title=TITLES[name], xlabel="iteration")
    for run, (steps, values, *_) in curves.items():
        axis.plot(steps, _average(values), label=run)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


class Effect(NamedTuple):
    """A difference to draw.

    Attributes:
        mean: The difference.
        interval: Its interval, None if unknown.
        reference: A published difference, None if there is none.
        verdict: Key of VERDICT_COLORS, gray for others.
    """

    mean: float
    interval: tuple[float, float] | None
    reference: float | None
    verdict: str


def draw_effects(effects: Mapping[str, Effect], path: str | Path) -> None:
    """Draw differences with their intervals, a line each (forest plot).

    Args:
        effects: The differences by label.
        path: File to write.
    """
    figure = Figure(figsize=(9, 0.8 + 0.38 * len(effects)), layout="constrained")
    axis = figure.add_subplot(xlabel="difference in points (◇ the paper's)")
    for y, effect in enumerate(effects.values()):
        color = VERDICT_COLORS.get(effect.verdict, "gray")
        if effect.interval:
            axis.plot(effect.interval, (y, y), color=color, linewidth=2)
        axis.plot(effect.mean, y, "o", color=color)
        if effect.reference is not None:
            axis.plot(effect.reference, y, "D", color="black", fillstyle="none", markersize=5)
        axis.annotate(
            effect.verdict,
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            color=color,
            fontsize=9,
        )
    axis.set_yticks(range(len(effects)), list(effects))
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=5)
    ticks = [-20, -10, -5, -2, 0, 2, 5, 10, 20, 40]
    axis.set_xticks(ticks, map(str, ticks))
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _show_texts(axis: Axes, lines: Sequence[tuple[str, str]], **style: Any) -> None:
    """Show lines of text with their colors, evenly spaced over an empty panel."""
    axis.axis("off")
    for i, (text, color) in enumerate(lines):
        axis.text(y=1 - (i + 0.5) / len(lines), s=text, color=color, va="center", **style)


def _show_image(axis: Axes, *path: str, exif: Exif = "upright") -> None:
    axis.imshow(load_image(os.path.join(*path), exif).permute(1, 2, 0).numpy())


def draw_retrieval(
    rankings: Mapping[str, Any], path: str | Path, queries: int = 5, top: int = 5
) -> None:
    """Draw texts with their best images, and images with their best captions, by ITM and ITC.

    Args:
        rankings: Content of result/retrieval.json. The ranking that a validation measured to be
            better comes first.
        path: File to write.
        queries: Number of queries of each direction, spread over all of them.
        top: Number of results of each query.
    """
    root, shown = rankings["image_root"], _better_first(rankings)
    texts, images = (
        [rankings[kind][i] for i in evenly(len(rankings[kind]), queries)]
        for kind in ("text_to_image", "image_to_text")
    )
    rows = 2 * len(texts) + len(images)
    figure = Figure(figsize=(13, 2.05 * rows + 1), layout="constrained")
    grid = figure.add_gridspec(rows, top + 1, width_ratios=[1.6] + [1] * top)
    for row, query in enumerate(texts):
        caption = textwrap.fill(query["caption"], 28), "black"
        axis = figure.add_subplot(grid[2 * row : 2 * row + 2, 0])
        _show_texts(axis, [caption], x=0.5, ha="center", fontsize=11)
        for line, (name, key) in enumerate(shown, 2 * row):
            for place, result in enumerate(query[key][:top], 1):
                axis = figure.add_subplot(grid[line, place], xticks=[], yticks=[])
                _show_result(axis, root, result, f"{name} {place}")
    for row, query in enumerate(images, 2 * len(texts)):
        axis = figure.add_subplot(grid[row, 0], xticks=[], yticks=[], frame_on=False)
        _show_image(axis, root, query["image"])
        halves = grid[row, 1:].subgridspec(1, 2)
        for column, (name, key) in enumerate(shown):
            lines = [(name, "black")]
            for result in query[key][:top]:
                caption = textwrap.shorten(result["caption"], 54, placeholder=" ...")
                score = f"{percent(result['probability']):>6}"
                lines.append((f"{score}  {caption}", HIT if result["hit"] else MISS))
            _show_texts(figure.add_subplot(halves[column]), lines, x=0, fontsize=9)
    figure.suptitle("\n".join(_about_rankings(rankings)), fontsize=12)
    _save(figure, path)


def draw_query(
    rankings: Mapping[str, Any], query: Mapping[str, Any], path: str | Path, top: int = 5
) -> None:
    """Draw a caption with its best images in one row, readable at a width of 800 pixels.

    Args:
        rankings: Content of result/retrieval.json.
        query: The entry of the caption in its `text_to_image`.
        path: File to write.
        top: Number of images.
    """
    name, key = _better_first(rankings)[0]
    figure = Figure(figsize=(8, 2.35), layout="constrained")
    for place, result in enumerate(query[key][:top], 1):
        axis = figure.add_subplot(1, top, place, xticks=[], yticks=[])
        _show_result(axis, rankings["image_root"], result, str(place), fontsize=12)
    figure.suptitle("\n".join(textwrap.wrap(f"“{query['caption']}”", 70)), fontsize=14)
    best = f"the best of {len(rankings['image_to_text']):,} images by {name}, with probabilities"
    figure.supxlabel(f"{best}; green: right, red: wrong", fontsize=11)
    _save(figure, path)


def _better_first(rankings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the names of both rankings and their keys, the measured better one first."""
    names, measured = [("ITM", "results"), ("ITC", "itc_results")], rankings["ranking"]
    return names[::-1] if measured and measured["by"] == "itc" else names


def _show_result(
    axis: Axes, root: str, result: Mapping[str, Any], place: str, fontsize: float = 9
) -> None:
    """Show a found image in a frame whose color tells whether it is a hit."""
    _show_image(axis, root, result["image"])
    color = HIT if result["hit"] else MISS
    axis.set_title(f"{place}: {percent(result['probability'])}", fontsize=fontsize, color=color)
    axis.spines[:].set(color=color, linewidth=3.5)


def _about_rankings(rankings: Mapping[str, Any]) -> list[str]:
    """Return the title of retrieval.png."""
    lines = [
        "queries and their best results; green: right, red: wrong",
        f"ITM: probability of a match; the {rankings['k']} most similar candidates are ordered by"
        " its logit",
        "ITC: probability by similarity, a softmax over all candidates",
    ]
    if measured := rankings["ranking"]:
        scores = f"{measured['itc']:.1f}% by ITC, {measured['itm']:.1f}% by ITM"
        better = measured["by"].upper()
        lines.append(f"{better} ranked better in the validation; mean recall: {scores}")
    return lines


def draw_attributes(result: Mapping[str, Any], path: str | Path, count: int = 5) -> None:
    """Draw boxes in their images with their best and worst attributes.

    Args:
        result: Content of result/attributes.json.
        path: File to write.
        count: Number of boxes, spread over all of them.
    """
    chosen = [result["boxes"][i] for i in evenly(len(result["boxes"]), count)]
    figure = Figure(figsize=(13, 2.05 * len(chosen) + 0.6), layout="constrained")
    grid = figure.add_gridspec(len(chosen), 3, width_ratios=[1, 2, 2])
    for row, box in enumerate(chosen):
        axis = figure.add_subplot(grid[row, 0], xticks=[], yticks=[], frame_on=False)
        _show_image(axis, result["image_root"], box["image"], exif="stored")  # as its boxes
        x, y, w, h = box["box"]
        style: dict[str, Any] = {"fill": False, "edgecolor": "#ff2d9b", "linewidth": 2.5}
        axis.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, **style))
        for column, (kind, right) in enumerate((("best", 1), ("worst", 0)), 1):
            axis = figure.add_subplot(grid[row, column], title=kind if row == 0 else None)
            lines = []
            for number, score, label in box[kind]:
                text = f"{score:.3f}  {result['attributes'][number]['name']}"
                color = "#888888" if label < 0 else HIT if label == right else MISS
                lines.append((textwrap.shorten(text, 60, placeholder=" ..."), color))
            _show_texts(axis, lines, x=0, fontsize=10)
    figure.suptitle(
        "boxes with their best and worst attributes; green: right, red: wrong, gray: not labeled",
        fontsize=13,
    )
    _save(figure, path)


def _small(image: np.ndarray) -> np.ndarray:
    """Return an image uint8 [H, W, 3] with no more pixels than a panel can show."""
    picture = Image.fromarray(image)
    picture.thumbnail((600, 600))
    return np.asarray(picture)


def _fit(text: str, inches: float, size: float) -> tuple[str, float]:
    """Return a text and the font size up to `size` at which it fits.

    A text is cut to 36 characters, or to the number that fits at `size` if that is more.
    """
    room = inches * 72 / 0.6  # a wide letter takes 0.6 of the font size
    limit = max(36, int(room / size))
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return text, min(size, room / len(text))


def _show_heat(axis: Axes, image: np.ndarray, heat: np.ndarray, scale: PowerNorm) -> AxesImage:
    """Show a heat map [h, w] over a pale image [H, W, 3] and return its artist."""
    extent = 0, image.shape[1], image.shape[0], 0
    gray = image.mean(axis=2, keepdims=True)
    axis.imshow((51 + 0.4 * (image + gray)).astype(np.uint8), extent=extent)
    return axis.imshow(
        heat, HEAT, scale, extent=extent, interpolation="catrom", interpolation_stage="data"
    )


def draw_heat_maps(
    images: Sequence[np.ndarray],
    panels: Sequence[tuple[str, np.ndarray]],
    title: Sequence[str],
    path: str | Path,
) -> None:
    """Draw the image and a panel for each heat map, as in Figures 4 to 6.

    All heat maps share one scale, from 0 to their largest value.

    Args:
        images: One or two images, uint8 [H, W, 3]; the second is drawn below the first.
        panels: Labels and heat maps [h, w] of each image, the whole text first.
        title: Lines of text.
        path: File to write.
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
    images = [_small(image) for image in images]
    # a square root shows weak heat
    scale = PowerNorm(0.5, 0, max(heats.max() for _, heats in panels) or 1)
    for number, (label, heats) in enumerate([("image" if rows == 1 else "images", None), *panels]):
        column = axes[number // columns * rows :, number % columns]
        # the others are words of the text
        style = {"style": "italic", "color": "#555555"} if number < 2 else {}
        label, size = _fit(label, width, 12)
        column[0].set_title(label, fontsize=size, pad=4, **style)
        for i, (axis, image) in enumerate(zip(column, images, strict=False)):
            if heats is None:
                axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            else:
                heat = _show_heat(axis, image, heats[i], scale)
            if rows > 1 and number % columns == 0:
                place = {"transform": axis.transAxes, "rotation": 90, "ha": "right", "va": "center"}
                axis.text(-0.03, 0.5, ("first", "second")[i], **place)
    figure.colorbar(
        heat, ax=axes, label="attention × gradient", format="%.2g", aspect=25, fraction=0.05
    )
    figure.suptitle("\n".join(title), fontsize=13, wrap=True)
    _save(figure, path)


class Panel(NamedTuple):
    """An image with a title, perhaps with a heat map and a box.

    Attributes:
        image: The image, uint8 [H, W, 3].
        heat: Heat map [h, w], None for the plain image.
        title: Title.
        right: Whether the model is right, None if that is unknown. It is the color of the title.
        boxes: Boxes [x, y, w, h] in pixels, the model's first, then dashed the true one.
        hottest: Largest value of the scale of the heat map, by default its own.
    """

    image: np.ndarray
    heat: np.ndarray | None
    title: str
    right: bool | None = None
    boxes: Sequence[Sequence[float]] = ()
    hottest: float | None = None


def draw_panels(rows: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Draw panels in rows."""
    columns, width = max(map(len, rows)), WIDTH / max(map(len, rows))
    figure = Figure(figsize=(WIDTH, (width + 0.5) * len(rows)), layout="compressed")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for of_row, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(of_row, panels, strict=False):
            if panel.heat is None:
                height, side = panel.image.shape[:2]
                axis.imshow(_small(panel.image), extent=(0, side, height, 0))
            else:
                hottest = panel.heat.max() if panel.hottest is None else panel.hottest
                scale = PowerNorm(0.5, 0, hottest or 1)
                _show_heat(axis, panel.image, panel.heat, scale)
            color = "black" if panel.right is None else HIT if panel.right else MISS
            for (x, y, w, h), line in zip(panel.boxes, ("-", ":"), strict=False):
                axis.add_patch(
                    Rectangle((x, y), w, h, fill=False, ec=color, linewidth=3, linestyle=line)
                )
            axis.set_title("\n".join(textwrap.wrap(panel.title, 36)), fontsize=11, color=color)
    _save(figure, path)


def _draw_candidates(axis: Axes, title: str, candidates: Sequence[Any], inches: float) -> None:
    """Draw candidates with bars and probabilities; green is a hit."""
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
        axis.text(1, i, percent(candidate.score), fontsize=9, ha="right", va="center", color=color)


def draw_pseudo_targets(
    image: np.ndarray,
    words: Sequence[tuple[str, Sequence[Any]]],
    texts: Sequence[Any],
    title: Sequence[str],
    texts_title: str,
    path: str | Path,
) -> None:
    """Draw Figure 2: an image, and candidates for each masked word and for the whole caption.

    Args:
        image: The image, uint8 [H, W, 3].
        words: Words and their candidates, as `visualize.explain.word_targets` returns them.
        texts: Candidates for the whole caption, perhaps none.
        title: Lines of text.
        texts_title: Title of `texts`.
        path: File to write.
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
        _draw_candidates(axis, word, candidates, width)
    if texts:
        axis = figure.add_subplot(grid[rows, :])
        _draw_candidates(axis, texts_title, texts, width * (columns + 2))
    figure.suptitle("\n".join(title), fontsize=13, x=0, ha="left", wrap=True)
    _save(figure, path)
