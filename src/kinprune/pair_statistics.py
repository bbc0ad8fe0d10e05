"""Statistics over pairs of things that many pairs share: weighted, so that the things can be drawn again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Places = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
"""How often the things are drawn again, and how much of what comes of it an interval holds."""

LEAST = 8
"""Fewer things than this are too few to be drawn again: there is no interval then."""


@dataclass(frozen=True)
class Estimate:
    """A number and the interval it lies in; None where it is not defined (no such pair, nothing varies)."""

    value: float | None
    low: float | None = None
    high: float | None = None


def all_pairs(items: int) -> int:
    """How many pairs so many things make."""
    return items * (items - 1) // 2


def draw_pairs(items: int, most: int, seed: int) -> tuple[Places, Places]:
    """All pairs of ``items`` things, or ``most`` of them drawn without repetition: ``first < second``, int64 ``[p]``.

    Memory is of the order of ``most``, however many pairs there are.
    """
    total = all_pairs(items)
    numbers = np.arange(total) if total <= most else np.sort(np.random.default_rng(seed).choice(total, most, False))
    # Pair number t is (t - j (j - 1) / 2, j) for the largest j with j (j - 1) / 2 <= t; the root may be one off.
    second = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    second -= second * (second - 1) // 2 > numbers
    second += second * (second + 1) // 2 <= numbers
    return numbers - second * (second - 1) // 2, second


def levels(values: NDArray[Any]) -> Places:
    """The place of each value among the distinct ones, from the least: what ranks and ties need to know."""
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def rank_correlation(first: Places, second: Places, weights: Floats) -> float:
    """Spearman's correlation, ties at their middle rank, of ``levels`` ``[p]`` where a pair counts ``weights`` times.

    Whole weights give what that many copies of each pair would. NaN where one of the two does not vary.
    """
    total = weights.sum()
    if total <= 0:
        return float("nan")
    a, b = (ranks - (weights @ ranks) / total for ranks in (_ranks(first, weights), _ranks(second, weights)))
    spread = (weights @ (a * a)) * (weights @ (b * b))
    # Ranks are multiples of 1/2: what is left of equal ones after rounding is far below one rank.
    return float(weights @ (a * b) / np.sqrt(spread)) if spread > 1e-12 * total**2 else float("nan")


def tail_weights(order: Places, weights: Floats, share: float, *, top: bool) -> Floats:
    """The weights ``[p]`` that pairs have in the lowest or highest ``share`` of all by their ``levels``.

    Pairs of one level that are only partly in have an equal part in it, so that ties need no order.
    """
    totals = np.bincount(order, weights)
    until = np.cumsum(totals)
    before = until[-1] - until if top else until - totals
    inside = np.clip(share * until[-1] - before, 0, totals)
    return np.asarray(weights * np.divide(inside, totals, out=np.zeros_like(totals), where=totals > 0)[order])


def draw_again(
    statistic: Callable[[Floats], Floats], items: int, first: Places, second: Places, *, seed: int
) -> Floats | None:
    """``statistic(weights [p])`` ``[k]`` for each of RESAMPLES draws of the things with replacement: ``[r, k]``.

    The things are drawn, not the pairs: pairs that share one are not independent, and drawing pairs would make
    intervals far too narrow. A pair counts as often as both of its things together (the vertex bootstrap of Snijders
    and Borgatti, Connections 22, 1999); a thing drawn twice makes no pair with itself. None where there are fewer
    things than LEAST.
    """
    if items < LEAST:
        return None
    random = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(items, size=items), minlength=items)
        found.append(statistic((times[first] * times[second]).astype(np.float64)))
    return np.stack(found)


def estimate(value: float, drawn: Floats | None) -> Estimate:
    """A value and the middle LEVEL of what was drawn ``[r]``; no interval where a tenth of that is not defined."""
    if not np.isfinite(value):
        return Estimate(None)
    known = None if drawn is None else drawn[np.isfinite(drawn)]
    if drawn is None or known is None or len(known) < 0.9 * len(drawn):
        return Estimate(float(value))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def _ranks(order: Places, weights: Floats) -> Floats:
    totals = np.bincount(order, weights)
    return np.asarray((np.cumsum(totals) - totals + (totals + 1) / 2)[order])
