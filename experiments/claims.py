"""Tests of the claims of an experiment file: effects by seed, intervals, verdicts.

Every comparison is paired by seed: runs of the same seed have the same initialization, the same
order of the data and the same test items.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from experiments.report import Numbers, runs_of, values
from experiments.rows import Claim, Rows
from utils import InputError

LEVEL = 0.05  # of all claims of a page together


class Finding(NamedTuple):
    """The result of a claim.

    Attributes:
        effects: Effect of each seed in points.
        seeds: Number of seeds that the claim is to have.
        interval: 95% t interval of the mean effect, None for fewer than two seeds.
        p: p value after Holm's correction, 1 until all seeds are there.
        verdict: supported, contradicted, inconclusive, or the number of missing seeds.
    """

    effects: Numbers
    seeds: int
    interval: tuple[float, float] | None
    p: float
    verdict: str

    @property
    def mean(self) -> float:
        """The mean effect."""
        return statistics.fmean(self.effects.values())


def effects(claim: Claim, rows: Rows) -> tuple[Numbers, int]:
    """Return the effect of each seed whose runs are complete, and the number of all seeds.

    Raises:
        InputError: A number is not "ROW METRIC", or its row does not exist.
    """
    sides: list[list[Numbers]] = [[], []]
    seeds: set[int | None] | None = None
    for side, numbers in zip(sides, (claim.plus, claim.minus), strict=True):
        for number in numbers:
            row, _, metric = number.partition(" ")
            runs = {run.seed for run in runs_of(row, rows)}
            if not metric or not runs:
                raise InputError(
                    f"claim {claim.text!r}: {number!r} does not have the form ROW METRIC, or the"
                    " file lacks this row; correct the claim"
                )
            seeds = runs if seeds is None else seeds & runs
            side.append(values(row, metric, rows))
    seeds = seeds or set()
    complete = [seed for seed in seeds if all(seed in of for side in sides for of in side)]
    plus, minus = (
        {seed: statistics.fmean(of[seed] for of in side) for seed in complete} for side in sides
    )
    return {seed: claim.times * (plus[seed] - minus[seed]) for seed in complete}, len(seeds)


def p_value(effects: Sequence[float], margin: float | None) -> float:
    """Return the p value of effects: of a mean of 0, or of a mean outside of a margin.

    A claim of a difference is tested by a two-sided t test, a claim of equality by two one-sided
    ones.
    """
    if margin is None:
        p = float(stats.ttest_1samp(effects, 0).pvalue)
        return 1.0 if np.isnan(p) else p  # without any difference
    above = stats.ttest_1samp(effects, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(effects, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number by Holm's method."""
    order, corrected, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def judge(claims: Iterable[Claim], measured: Iterable[tuple[Numbers, int]]) -> list[Finding]:
    """Return the finding of each claim from its effects and its number of seeds."""
    pairs = list(zip(claims, measured, strict=True))
    raw = [
        p_value(list(found.values()), claim.margin) if len(found) == seeds else 1.0
        for claim, (found, seeds) in pairs
    ]
    return [
        _finding(claim, found, seeds, p)
        for (claim, (found, seeds)), p in zip(pairs, holm(raw), strict=True)
    ]


def _finding(claim: Claim, found: Numbers, seeds: int, p: float) -> Finding:
    """Return the finding of a claim from its corrected p value."""
    interval = None
    if len(found) > 1:
        low, high = stats.ttest_1samp(list(found.values()), 0).confidence_interval(1 - LEVEL)
        interval = float(low), float(high)
    if len(found) < seeds or interval is None:
        return Finding(found, seeds, interval, p, f"{len(found)} of {seeds} seeds")
    low, high = interval
    if claim.margin is not None:
        outside = low > claim.margin or high < -claim.margin
        verdict = "supported" if p < LEVEL else "contradicted" if outside else "inconclusive"
    elif p < LEVEL:
        verdict = "supported" if low + high > 0 else "contradicted"
    else:
        verdict = "inconclusive"
    return Finding(found, seeds, interval, p, verdict)


def find(claims: Mapping[str, Claim], rows: Rows) -> dict[str, Finding]:
    """Return the finding of each claim by title. Raises InputError."""
    findings = judge(claims.values(), [effects(claim, rows) for claim in claims.values()])
    return dict(zip(claims, findings, strict=True))


def paper_effect(claim: Claim) -> float | None:
    """Return the paper's difference, None if the paper has no numbers."""
    if not claim.paper:
        return None
    return statistics.fmean(claim.paper["plus"]) - statistics.fmean(claim.paper["minus"])
