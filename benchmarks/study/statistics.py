"""What rows say: means, and paired differences over tasks with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kinprune.pair_statistics import levels
from kinprune.pair_statistics import rank_correlation as spearman

Row = Mapping[str, Any]
DRAWS = 10_000
LEAST_TASKS = 5


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its 95 % interval, in points, over ``tasks`` tasks.

    Of fewer than ``LEAST_TASKS`` an interval says nothing: none is shown, and nothing is sure.
    """

    mean: float
    low: float
    high: float
    tasks: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.tasks >= LEAST_TASKS and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        interval = f" ({self.low:+.1f} to {self.high:+.1f})" if self.tasks >= LEAST_TASKS else ""
        return f"{self.mean:+.1f}{interval}"


def merge(rows: Sequence[Row]) -> list[Row]:
    """Rows of the same run made one: what was trained for other numbers of steps later joins its row."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["protocol"], row["stage"], *row["classes"], row["method"], row["keep"], row["shots"], row["sources"])
        if key in found:
            earlier = found[key]
            seconds = {**earlier.get("seconds", {}), **row.get("seconds", {})}
            found[key] = {**earlier, "accuracy": {**earlier["accuracy"], **row["accuracy"]}, "seconds": seconds}
        else:
            found[key] = dict(row)
    return list(found.values())


def of_stage(rows: Sequence[Row], stage: str) -> list[Row]:
    """The rows of a stage: *validation* or *test*."""
    return [row for row in rows if row["stage"] == stage]


def at_home(rows: Sequence[Row]) -> list[Row]:
    """The rows at a tenth of the units, with all the bank and as many images as the protocol gives."""
    return [row for row in rows if row["keep"] == 0.1 and not row["shots"] and not row["sources"]]


def at_sizes(rows: Sequence[Row]) -> list[Row]:
    """The rows at any share of the units, all else as ``at_home``, of the tasks that were run at several."""
    plain = [row for row in rows if not row["shots"] and not row["sources"]]
    ratios: dict[tuple[Any, ...], set[float]] = {}
    for row in plain:
        ratios.setdefault(tuple(row["classes"]), set()).add(row["keep"])
    return [row for row in plain if len(ratios[tuple(row["classes"])]) > 1]


def steps_to(rows: Sequence[Row], method: str, share: float = 0.99) -> int | None:
    """After how few steps a method has ``share`` of its mean accuracy after 60; None where one is not known."""
    means = {steps: accuracies(rows, method, steps) for steps in (0, 15, 60)}
    if not all(means.values()):
        return None
    last = np.mean(list(means[60].values()))
    return next(steps for steps, values in means.items() if np.mean(list(values.values())) >= share * last)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties at their middle rank; NaN where one of the two does not vary."""
    weights = np.ones(len(first))
    return spearman(levels(np.array(first)), levels(np.array(second)), weights)


def accuracies(rows: Sequence[Row], method: str, steps: int) -> dict[tuple[Any, ...], float]:
    """A method's test accuracy after so many steps, by task, keep ratio, shots and sources hidden or not."""
    return {
        (tuple(row["classes"]), row["keep"], row["shots"]): row["accuracy"][str(steps)]
        for row in rows
        if row["method"] == method and str(steps) in row["accuracy"]
    }


def difference(first: Mapping[Any, float], second: Mapping[Any, float]) -> Difference | None:
    """``first`` minus ``second`` over the tasks that both have; None where there is none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    values = 100 * np.array([first[task] - second[task] for task in both])
    drawn = np.random.default_rng(0).choice(values, (DRAWS, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(float(values.mean()), float(low), float(high), len(both))
