"""Draw the architecture of pre-training (Figure 1 of the paper) from a configuration.

Colors and lines are readable on light and dark pages, at a width of 800 pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.cli import Parser
from configs.config import Config
from configs.load import load_config, require
from engine.launch import run_script
from utils import InputError, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 8, 5.1  # inches, which are the units of all positions
INK, LINE = "#1b1f24", "#768390"  # on boxes, and outside of them
FILL = {
    "image": ("#cfe3fb", "#3b78c2"),
    "text": ("#d3efd5", "#3c8d48"),
    "multimodal": ("#e4d9f7", "#7a56c2"),
    "loss": ("#fde3c3", "#c77a1c"),
    "momentum": ("#e2e5ea", "#6f7a86"),
}

parser = Parser(__doc__, "--config configs/Pretrain.yaml --output docs/architecture.svg")
parser.add_argument(
    "--config", metavar="FILE", default="configs/Pretrain.yaml", help="configuration to draw"
)
parser.add_argument(
    "--output", metavar="FILE", type=Path, default="architecture.svg", help="picture to write"
)
parser.add_set()


class Box(NamedTuple):
    """A box of the figure.

    Attributes:
        kind: Key of FILL.
        place: Left, bottom, width and height.
        lines: Title and lines of text.
        layers: Number of bars that stand for layers.
    """

    kind: str
    place: tuple[float, float, float, float]
    lines: Sequence[str]
    layers: int = 0


def distilled(config: Config) -> list[str]:
    """Return the objectives that have soft targets of the momentum model."""
    if isinstance(config.distill, bool):
        return [name for name in config.objectives if name != "itm"] * config.distill
    return list(config.distill)


def list_encoders(config: Config) -> list[Box]:
    """Return the inputs and encoders of the model."""
    from dataset.text import SHORT_TOKENS

    bert, side = config.bert, config.resolution // config.patch_size
    fusion, layers = bert.fusion_layer, bert.num_hidden_layers
    size = f"width {bert.hidden_size}, {bert.num_attention_heads} heads"
    image = [
        "Image encoder",
        f"ViT, {config.vision_depth} layers",
        f"width {config.vision_width}",
        f"{config.vision_heads} heads",
    ]
    picture = f"{config.resolution} × {config.resolution} pixels"
    patches = f"{side} × {side} patches of {config.patch_size}²"
    tokens = [f"[CLS], at most {config.max_tokens or SHORT_TOKENS} tokens"]
    if "mlm" in config.objectives:
        tokens.append(f"MLM: {config.mlm_probability:.0%} masked")
    fused = ["Multimodal encoder", f"BERT layers {fusion + 1} to {layers}", size]
    text = ["Text encoder", f"BERT layers 1 to {fusion}", size]
    return [
        Box("image", (0.1, 0.05, 2, 0.62), ["Image", picture, patches]),
        Box("text", (3.3, 0.05, 2.2, 0.62), ["Text", *tokens]),
        Box("image", (0.1, 0.95, 2, 1.2), image, config.vision_depth),
        Box("text", (3.3, 0.95, 2.2, 1.2), text, fusion),
        Box("multimodal", (3.3, 3.25, 2.2, 0.8), fused, layers - fusion),
    ]


def list_objectives(config: Config) -> list[Box]:
    """Return the objectives, the momentum model and the queues."""
    boxes, pieces = [], config.bert.vocab_size
    if "itc" in config.objectives:
        contrast = f"[CLS] projected to {config.embed_dim}, temperature {config.temp:g}"
        queue = [f"{config.queue_size:,} image and", "text features: negatives"]
        boxes.append(Box("loss", (1, 2.45, 3.4, 0.5), ["ITC, image-text contrast", contrast]))
        boxes.append(Box("momentum", (5.92, 2.39, 1.72, 0.62), ["Queues", *queue]))
    if "itm" in config.objectives:
        boxes.append(Box("loss", (3.3, 4.4, 1.05, 0.62), ["ITM", "match or", "no match"]))
    if "mlm" in config.objectives:
        words = [f"{pieces:,}", "word pieces"] if isinstance(pieces, int) else ["masked", "words"]
        boxes.append(Box("loss", (4.45, 4.4, 1.05, 0.62), ["MLM", *words]))
    average = f"m ← {config.momentum:g} m + {1 - config.momentum:.3g} θ"
    copies = ["Momentum model", "copies m of the weights θ", "of encoders and heads", average]
    return [*boxes, Box("momentum", (5.92, 0.95, 1.98, 1.2), copies)]


def draw_box(axes: "Axes", box: Box) -> None:
    """Draw a box with its text, and a bar for each layer at its left."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    x, y, width, height = box.place
    fill, edge = FILL[box.kind]
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 1.2}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, edgecolor=edge, **style))
    step = (height - 0.16) / max(box.layers, 1)
    for layer in range(box.layers):
        bar = (x + 0.08, y + 0.08 + (layer + 0.1) * step), 0.22, 0.8 * step
        axes.add_patch(Rectangle(*bar, facecolor=edge, edgecolor="none"))
    middle = x + (width + 0.3 * bool(box.layers)) / 2
    for number, line in enumerate(box.lines):
        at = y + height / 2 + 0.18 * ((len(box.lines) - 1) / 2 - number)
        weight = "bold" if number == 0 else "normal"
        axes.text(middle, at, line, color=INK, weight=weight, ha="center", va="center", size=9)


def draw_arrow(axes: "Axes", *points: tuple[float, float], dashed: bool = False) -> None:
    """Draw an arrow along points."""
    x, y = zip(*points, strict=True)
    style: dict[str, Any] = {"color": LINE, "linewidth": 1.4}
    axes.plot(x, y, linestyle="--" if dashed else "-", **style)
    (x, y), end = points[-2:]
    start = end[0] + (x - end[0]) / 100, end[1] + (y - end[1]) / 100  # only the head is drawn
    style["arrowstyle"] = "-|>,head_width=0.2,head_length=0.4"
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def draw_label(axes: "Axes", place: tuple[float, float], text: str) -> None:
    """Draw text outside of the boxes, centered; an arrow may pass between two lines."""
    axes.text(*place, text, color=LINE, size=9, ha="center", va="center", linespacing=1.8)


def draw_arrows(axes: "Axes", config: Config) -> None:
    """Draw what each part sees."""
    soft = f"soft targets\nα {config.alpha:g}"
    draw_label(axes, (1.15, 4.93), "bars: layers, dashed: no gradient")
    draw_arrow(axes, (1.1, 0.67), (1.1, 0.95))
    draw_arrow(axes, (4.4, 0.67), (4.4, 0.95))
    draw_arrow(axes, (0.5, 2.15), (0.5, 3.65), (3.3, 3.65))
    draw_label(axes, (1.9, 3.82), "all patches, by cross-attention")
    draw_arrow(axes, (4.95, 2.15), (4.95, 3.25))
    draw_arrow(axes, (5.5, 0.36), (6.8, 0.36), (6.8, 0.95))
    draw_label(axes, (7.4, 0.5), "the same image\nand text")
    if "itc" in config.objectives:
        draw_arrow(axes, (1.45, 2.15), (1.45, 2.45))
        draw_arrow(axes, (3.85, 2.15), (3.85, 2.45))
        draw_arrow(axes, (6.7, 2.15), (6.7, 2.39), dashed=True)
        draw_arrow(axes, (5.92, 2.7), (4.4, 2.7), dashed=True)
        draw_label(axes, (5.45, 2.7), soft if "itc" in distilled(config) else "negatives\n")
    if "itm" in config.objectives:
        draw_arrow(axes, (3.83, 4.05), (3.83, 4.4))
        if "itc" in config.objectives and config.hard_negatives:
            draw_arrow(axes, (3.85, 2.95), (3.85, 3.25), dashed=True)
            draw_label(axes, (3.2, 3.1), "hard negatives")
    if "mlm" in config.objectives:
        draw_arrow(axes, (4.97, 4.05), (4.97, 4.4))
        if "mlm" in distilled(config):
            draw_arrow(axes, (7.77, 2.15), (7.77, 4.7), (5.5, 4.7), dashed=True)
            draw_label(axes, (6.7, 4.7), soft)


def draw_architecture(config: Config, path: Path) -> None:
    """Draw the architecture of pre-training to a file in the format of its suffix.

    Raises:
        InputError: The configuration lacks a key.
        TrainingStopped: The file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from engine.output_dir import writing

    require(config, "bert_config", "image_res")
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.axis("off")
    draw_arrows(axes, config)
    for box in [*list_encoders(config), *list_objectives(config)]:
        draw_box(axes, box)
    # the same configuration draws the same file
    metadata = {"Date": None} if path.suffix == ".svg" else None
    fixed = matplotlib.rc_context({"svg.hashsalt": "architecture", "font.family": "DejaVu Sans"})
    with fixed, writing(path), atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], transparent=True, metadata=metadata, dpi=200)


def main() -> None:
    """Draw the configuration of the command line."""
    args = parser.parse_args()
    from engine.output_dir import check_output

    if args.output.suffix not in (".svg", ".png", ".pdf"):
        raise InputError(f"--output {args.output}: a picture ends in .svg, .png or .pdf")
    check_output(args.output)
    draw_architecture(load_config(args.config, args.set), args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_script(main)
