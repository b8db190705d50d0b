"""Write docs/results.md: the claims of experiments/paper.yaml, their tests, and the numbers."""

import csv
import io
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from PIL import Image

from configs.config import Config
from configs.load import load_config
from experiments.claims import LEVEL, Finding, find, paper_effect
from experiments.report import MISSING, chance, runs_of, shown, value, values
from experiments.rows import Claim, Experiments, Row, Rows, expand
from utils import atomic_write
from visualize.curves import read_curves
from visualize.draw import Effect, draw_effects, draw_lines

PAPER_CONFIG = "configs/Pretrain_4M.yaml"
NOT_RUN = "Not run yet."
PICTURE_WIDTH = 1000  # pixels of the figures beside the page
FIGURES = {
    "figure2": "Figure 2: the words that the momentum model expects in place of the last word of a"
    " caption. The last word of the caption is in brackets.",
    "figure4": "Figure 4: Grad-CAM on cross-attention of the model fine-tuned for grounding. The"
    " box of the model is solid, the true box is dotted.",
    "figure5": "Figure 5: Grad-CAM on cross-attention of the VQA model, and the answers of that"
    " model.",
    "figure6": "Figure 6: Grad-CAM on cross-attention of the pre-trained model for the words of a"
    " caption. The maps of a caption share one scale.",
}

Cell = tuple[str, str]  # a row of the file and a metric


class NumberTable(NamedTuple):
    """A table of the mean ± standard deviation over seeds.

    Attributes:
        title: Heading above the table.
        text: Text below the heading.
        header: Names of the columns.
        lines: Label, cell or None for each column, and the paper's numbers of the first columns.
    """

    title: str
    text: str
    header: Sequence[str]
    lines: Sequence[tuple[str, Sequence[Cell | None], Sequence[float | None]]]


def recalls(*rows: str) -> list[Cell]:
    """Return the cells of TR of all rows and of IR of all rows."""
    return [(row, f"test_{side}_r_mean") for side in ("txt", "img") for row in rows]


def accuracies(row: str) -> list[Cell]:
    """Return the cells of visual entailment and VQA after fine-tuning."""
    return [(f"{row}/VE", "test_acc"), (f"{row}/VQA", "test_acc")]


def splits(row: str, prefix: str = "") -> list[Cell]:
    """Return the cells of grounding."""
    return [(row, f"{prefix}{split}_d") for split in ("val", "testA", "testB")]


def ranking(prefix: str) -> list[Cell]:
    """Return the cells of fine-tuned retrieval without and with parts of the method."""
    return [
        (f"{row}/ranking", f"test_{prefix}{side}_r_mean")
        for row in ("downstream", "full", "uniform")
        for side in ("txt", "img")
    ]


TABLES = (
    NumberTable(
        "Table 1: the proposed methods",
        "MoD is momentum distillation, and ITM_hard has contrastive hard negatives. Full is"
        " ITC_MoD + MLM_MoD + ITM_hard. TR (text retrieval) and IR (image retrieval) are means of"
        " R@1, R@5 and R@10. Here they are zero-shot, in four galleries of 500 images with one"
        " caption each. ITC selects 16 candidates, and ITM re-ranks them, so a model without ITC"
        " has no TR and IR. The numbers in brackets are the paper's. Its TR and IR are after"
        " fine-tuning on Flickr30K.",
        ["TR", "IR", "visual entailment", "VQA"],
        [
            ("MLM + ITM", [None, None, *accuracies("mlm_itm")], (93.96, 88.55, 77.06, 71.40)),
            (
                "ITC + MLM + ITM",
                [*recalls("itc/zero_shot"), *accuracies("itc")],
                (96.55, 91.69, 79.15, 73.29),
            ),
            (
                "ITC + MLM + ITM_hard",
                [*recalls("hard/zero_shot"), *accuracies("hard")],
                (97.01, 92.16, 79.77, 73.81),
            ),
            (
                "ITC_MoD + MLM + ITM_hard",
                [*recalls("itc_mod/zero_shot"), *accuracies("itc_mod")],
                (97.33, 92.43, 79.99, 74.06),
            ),
            (
                "Full",
                [*recalls("full/zero_shot"), *accuracies("full")],
                (97.47, 92.58, 80.12, 74.42),
            ),
            (
                "Full + MoD in fine-tuning",
                [None, None, *accuracies("downstream")],
                (97.83, 92.65, 80.30, 74.54),
            ),
        ],
    ),
    NumberTable(
        "Table 6: candidates that ITM re-ranks, and negatives in fine-tuning",
        "Here ITM re-ranks k = 4, 16 and 64 candidates among 500 images. The numbers in brackets"
        " are the paper's for 16, 128 and 256 candidates among 1,000 images.",
        [
            "TR",
            "IR",
            "TR, no distillation",
            "IR, no distillation",
            "TR, uniform negatives",
            "IR, uniform negatives",
        ],
        [
            ("ITC alone", ranking("itc_"), (97.30, 90.95)),
            ("k = 4", ranking("k4_"), (98.60, 93.64)),
            ("k = 16", ranking("k16_"), (98.57, 93.99, None, None, 98.22, 93.68)),
            ("k = 64", ranking(""), (98.57, 93.95)),
        ],
    ),
    NumberTable(
        "Table 5: grounding by Grad-CAM",
        "The table has the percentage of expressions for which the chosen box has an IoU of at"
        " least 0.5 with the true box.",
        ["val", "testA", "testB"],
        [
            ("ITC, last block", splits("grounding/itc2"), (51.58, 60.09, 40.19)),
            ("ITM, layer before the last", splits("grounding/itm2"), ()),
            ("ITM, last layer", splits("grounding"), ()),
            ("the paper: ITM, third of six layers", [None] * 3, (58.46, 65.89, 46.25)),
            ("random object", splits("baselines", "test_grounding_object_"), ()),
        ],
    ),
    NumberTable(
        "Caption noise and momentum distillation",
        "The runs measure zero-shot retrieval after pre-training with 0%, 30% and 60% noisy"
        " captions.",
        ["TR, one-hot targets", "TR, distilled", "IR, one-hot targets", "IR, distilled"],
        [
            ("0%", recalls("noise00/hard/zero_shot", "noise00/full/zero_shot"), ()),
            ("30%", recalls("hard/zero_shot", "full/zero_shot"), ()),
            ("60%", recalls("noise60/hard/zero_shot", "noise60/full/zero_shot"), ()),
        ],
    ),
    NumberTable(
        "Query-ad relevance",
        "The table has the ROC AUC in percent (chance 50). The published number is of another"
        " metric.",
        ["image and words", "another ad's image", "another ad's words"],
        [
            (
                "fine-tuned",
                [
                    ("relevance", f"test_auc{suffix}")
                    for suffix in ("", "_other_image", "_other_words")
                ],
                (),
            )
        ],
    ),
    NumberTable(
        "Choice of the momentum",
        "The paper's momentum of 0.995 averages the weights over about 200 steps, which is less"
        " than a thousandth of the paper's pre-training. The same share of the 2,000 steps here is"
        " one or two steps. So these runs compare smaller momenta by zero-shot retrieval on 500"
        " validation scenes. No claim uses their seed. alpha, the weight of the distilled targets,"
        " is 0.4 as in the paper unless a row names another value.",
        ["TR", "IR"],
        [
            ("momentum 0.5", recalls("momentum/0.5/validation"), ()),
            ("momentum 0.95", recalls("momentum/0.95/validation"), ()),
            ("momentum 0.99", recalls("momentum/0.99/validation"), ()),
            ("momentum 0.95, alpha 0.2", recalls("momentum/0.95/alpha0.2/validation"), ()),
        ],
    ),
)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table with these cells."""
    yield f"| {' | '.join(header)} |"
    yield "|" + " --- |" * len(header)
    yield from (f"| {' | '.join(line)} |" for line in lines)


def signed(number: float | None) -> str:
    """Return a difference in points as text."""
    return MISSING if number is None else f"{number:+.1f}"


def summary(experiments: Experiments, findings: Mapping[str, Finding], rows: Rows) -> Iterator[str]:
    """Yield the lines that begin the page."""
    titles: dict[str, list[str]] = {}
    for title, finding in findings.items():
        verdict = "waiting" if finding.verdict.endswith("seeds") else finding.verdict
        titles.setdefault(verdict, []).append(title)

    def named(verdict: str) -> str:
        return ", ".join(titles.get(verdict, ())) or "none"

    for verdict in ("supported", "contradicted", "inconclusive"):
        yield f"{verdict.capitalize()}: {named(verdict)}."
    reasons = (f"{title}, because {reason}" for title, reason in experiments.left_out.items())
    if "waiting" in titles:
        yield f"Not decided until all seeds are run: {named('waiting')}."
    yield f"Not tested: {'; '.join(reasons) or 'none'}."
    found = values("grounding", "val_d", rows)
    guessed = values("baselines", "test_grounding_object_val_d", rows)
    if found and guessed and fmean(found.values()) < fmean(guessed.values()):
        yield (
            f"Grounding did not come out: the model finds {shown(found)}% of the objects, while a"
            f" random object of the image is the right one in {shown(guessed)}%."
        )
    complete = [row for row in rows.values() if row.complete]
    minutes = sum(row.minutes for row in complete)
    machines = sorted({row.read_record()["machine"] for row in complete}) or ["no machine yet"]
    yield (
        f"{len(complete)} of {len(rows)} [runs](results/runs.csv) are complete. They took"
        f" {minutes:.0f} minutes in total, each on {' or '.join(machines)}."
    )


def scenes(row: Row, split: str) -> str:
    """Return the number of scenes of a data row's split as text."""
    path = Path(row.keys.creates)
    return f"{json.loads(path.read_bytes())[split]:,}" if path.exists() else MISSING


def set_up(rows: Rows) -> Iterator[str]:
    """Yield the table of the set-up: pre-training of the paper and of the row `full`."""
    (run, *_) = runs_of("full", rows)
    here = load_config(run.keys.config, run.keys.overrides)
    paper = load_config(PAPER_CONFIG)

    def describe(config: Config) -> list[str]:
        bert = config.bert_config
        return [
            f"{config.vision_depth} blocks of width {config.vision_width},"
            f" images of {config.image_res} x {config.image_res} pixels,"
            f" patches of {config.patch_size} x {config.patch_size}",
            f"{bert.fusion_layer} layers of width {bert.hidden_size}",
            f"{bert.num_hidden_layers - bert.fusion_layer} layers",
            str(config.scheduler.epochs),
            f"queue of {config.queue_size:,}",
            f"{config.momentum}",
            f"{config.alpha}",
        ]

    names = ["image encoder", "text encoder", "multimodal encoder", "epochs", "negatives of ITC"]
    names += ["momentum of the momentum model", "alpha, the weight of the distilled targets"]
    lines = [
        ["pre-training images", "4.0 million", scenes(rows["noise/30"], "train")],
        *zip(names, describe(paper), describe(here), strict=True),
        ["fine-tuning images", "the data sets of each task", scenes(rows["tasks"], "train")],
        ["test images", "the data sets of each task", scenes(rows["tasks"], "test")],
        ["seeds", "not stated", str(len(runs_of("full", rows)))],
    ]
    yield from ["## Set-up", "", *markdown(["", "paper", "here"], lines), ""]


def claim_table(
    claims: Mapping[str, Claim], findings: Mapping[str, Finding], folder: Path
) -> Iterator[str]:
    """Yield the table of the claims, and draw the forest plot."""
    lines, points = [], {}
    for title, finding in findings.items():
        claim = claims[title]
        mean = finding.mean if finding.effects else None
        low, high = finding.interval or (None, None)
        interval = f" ({signed(low)} to {signed(high)})" if finding.interval else ""
        p = f"{finding.p:.4f}" if finding.p >= 0.001 else "below 0.001"
        p = MISSING if finding.verdict.endswith("seeds") else p
        paper = paper_effect(claim)
        cells = [signed(mean) + interval, p, signed(paper), finding.verdict]
        lines.append([f"{title}: {claim.text} ({claim.source})", *cells])
        if mean is not None:
            points[title] = Effect(mean, finding.interval, paper, finding.verdict)
    yield from ["## Claims", ""]
    if points:
        draw_effects(points, folder / "claims.png")
        picture = f"{folder.name}/claims.png"
        yield from [f"![Effect of each claim with its 95% interval]({picture})", ""]
    yield from [
        "`experiments/paper.yaml` defines each claim, its direction and its numbers. It was"
        " written before the runs. A claim compares two sides, and a side is the mean of its"
        " numbers. The effect is the difference of the two sides in points, computed for each seed"
        " and averaged over the seeds. The effect of distillation against noise is the difference"
        " of two such differences. The interval is the 95% t interval. p is corrected for the"
        f" number of claims by Holm's method. If p is below {LEVEL}, the sign of the effect decides"
        " whether a claim is supported or contradicted. Otherwise the claim is inconclusive. A"
        " claim of equality is supported if two one-sided t tests against its margin have a p below"
        f" {LEVEL}. It is contradicted if the interval is outside of the margin.",
        "",
        *markdown(["claim", "effect", "p", "effect in the paper", "verdict"], lines),
        "",
    ]


def number_table(table: NumberTable, rows: Rows) -> Iterator[str]:
    """Yield a table of numbers with a line of chance, or without any number a line that says so."""
    yield from [f"## {table.title}", "", table.text, ""]
    columns = list(zip(*(cells for _, cells, _ in table.lines), strict=True))
    if not any(values(*cell, rows) for column in columns for cell in column if cell):
        yield from [NOT_RUN, ""]
        return
    text = []
    for label, cells, paper in table.lines:
        numbers = [shown(values(*cell, rows)) if cell else MISSING for cell in cells]
        known = [f" [{number:.2f}]" if number else "" for number in paper]
        text.append([label, *(a + b for a, b in zip_longest(numbers, known, fillvalue=""))])
    guesses = []
    for column in columns:
        found = (chance(runs_of(row, rows)[0], metric) for row, metric in filter(None, column))
        guesses.append(next((f"{guess:.1f}" for guess in found if guess is not None), MISSING))
    if set(guesses) != {MISSING}:
        text.append(["chance", *guesses])
    yield from [*markdown(["", *table.header], text), ""]


def blind_baselines(rows: Rows) -> Iterator[str]:
    """Yield the numbers that are reached without one of the inputs."""

    def rule(name: str) -> str:
        return shown(values("baselines", f"test_{name}", rows))

    def tuned(row: str) -> list[str]:
        return [shown(values(*cell, rows)) for cell in accuracies(row)]

    lines = [
        ["most frequent answer of all", rule("ve_majority"), rule("vqa_majority"), MISSING],
        ["most frequent answer for each text", rule("ve_text"), rule("vqa_text"), MISSING],
        ["most frequent answer for each place of the curtain", rule("ve_curtain"), *[MISSING] * 2],
        [
            "most frequent answer for each text and place of the curtain",
            rule("ve_text_and_curtain"),
            *[MISSING] * 2,
        ],
        ["random detected box", *[MISSING] * 2, rule("grounding_box_val_d")],
        ["random object", *[MISSING] * 2, rule("grounding_object_val_d")],
        ["`full` fine-tuned on texts alone", *tuned("without_image"), MISSING],
        ["`full` fine-tuned on images alone", *tuned("without_text"), MISSING],
        ["`full`", *tuned("full"), shown(values("grounding", "val_d", rows))],
    ]
    yield from [
        "## Blind baselines",
        "",
        "The table has test accuracies in percent. In visual entailment a curtain hides a quadrant"
        " of each picture, and each sentence occurs once with each label. In VQA each question is"
        " asked about two pictures with different answers. So the text alone does not determine"
        " the answer.",
        "",
        *markdown(["", "visual entailment", "VQA", "grounding, val"], lines),
        "",
    ]


def information(rows: Rows, folder: Path) -> Iterator[str]:
    """Yield the curves of the bound on mutual information, of the first seed."""
    names = {"itc": "ITC + MLM + ITM", "hard": "ITC + MLM + ITM_hard", "full": "Full"}
    curves = {}
    for row, label in names.items():
        log = runs_of(row, rows)[0].folder / "tensorboard"
        found = read_curves(log) if log.is_dir() else {}
        if "mi_bound" in found:
            curves[label] = found["mi_bound"]
    if curves:
        draw_lines(curves, "mi_bound", folder / "mutual_information.png")
        yield from [
            "## Section 4: the bound on mutual information",
            "",
            "The bound is log(number of candidates) minus the InfoNCE loss of ITC with one-hot"
            " targets, in nats. The curves are of the first seed.",
            "",
            f"![Bound on mutual information over training]({folder.name}/mutual_information.png)",
            "",
        ]


def figures(rows: Rows, folder: Path) -> Iterator[str]:
    """Yield the figures whose rows are complete, and copy them beside the page."""
    complete = {name: text for name, text in FIGURES.items() if rows[name].complete}
    if complete:
        yield from [
            "## Figures 2 and 4 to 6",
            "",
            "Each figure shows the first entry of each of the first six images in its test file,"
            " without any selection. Green marks right results, red marks wrong ones.",
            "",
        ]
    for name, text in complete.items():
        with Image.open(rows[name].folder / "figure.png") as image:
            copy = image.convert("RGB")
        copy.thumbnail((PICTURE_WIDTH, copy.height))
        # the default method, median cut, turns the colors of small objects into gray
        copy = copy.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=1)
        copy.save(folder / f"{name}.png", optimize=True)
        yield from [f"![{text}]({folder.name}/{name}.png)", "", text, ""]


def run_list(experiments: Experiments, rows: Rows) -> str:
    """Return a CSV table of the runs: minutes, the numbers that claims use, and the command."""
    used: dict[str, set[str]] = {}
    for claim in experiments.claims.values():
        for number in (*claim.plus, *claim.minus):
            row, _, metric = number.partition(" ")
            used.setdefault(row, set()).add(metric)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "minutes", "metrics", "python"])
    for name, row in rows.items():
        found = {metric: value(row, metric) for metric in sorted(used.get(row.group, ()))}
        metrics = " ".join(f"{key}={number:.2f}" for key, number in found.items() if number)
        spent = f"{row.minutes:.1f}" if row.complete else ""
        writer.writerow([name, spent, metrics, shlex.join(row.command)])
    return file.getvalue()


def write_page(experiments: Experiments, path: Path) -> None:
    """Write the page of an experiment file.

    Args:
        experiments: Content of the file.
        path: File of the page. Its pictures go to the folder of the same name beside it.
    """
    rows = expand(experiments)
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    findings = find(experiments.claims, rows)
    lines = [
        "# The paper's claims on drawn scenes",
        "",
        f"Small models, pre-trained on drawn scenes, test {len(findings)} claims of the paper:",
        "",
        *(f"- {line}" for line in summary(experiments, findings, rows)),
        "",
        "`make paper` runs all rows of `experiments/paper.yaml` and writes this page. A second call"
        " repeats no complete run.",
        "",
        *claim_table(experiments.claims, findings, folder),
        *set_up(rows),
        *blind_baselines(rows),
        *(line for table in TABLES for line in number_table(table, rows)),
        *information(rows, folder),
        *figures(rows, folder),
    ]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines).rstrip("\n") + "\n")
    with atomic_write(folder / "runs.csv", "w") as file:
        file.write(run_list(experiments, rows))
    print(f"wrote {path}")
