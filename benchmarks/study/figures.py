"""Rows to figures: SVG files, the same for the same rows and the same matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.costs import OTHERS, Costs
from benchmarks.study.statistics import LEAST_TASKS, Row, accuracies, at_home, difference, of_stage
from benchmarks.study.tables import DEFAULT

Rows = Mapping[str, Sequence[Row]]
"""The rows of each protocol."""

CURVES = (DEFAULT, "smsp, the broad task alone", "all neighbours", "taylor", "random", "l1")
STEPS = (0, 15, 60)
STYLE = {
    **{"svg.fonttype": "none", "svg.hashsalt": "kinprune", "font.size": 9, "font.family": "sans-serif"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25},
}
COLOURS = ("#0b6e4f", "#d1495b", "#30638e", "#edae49", "#7a5195", "#8d99ae")


def draw_leads(rows: Rows, path: Path) -> None:
    """By how much the default leads every method, with intervals: a panel a protocol, a mark a number of steps."""
    found = {name: _leads(at_home(of_stage(one, "test"))) for name, one in rows.items()}
    methods = list(dict.fromkeys(method for leads in found.values() for method, _ in leads))
    figure, panels = _panels(len(rows), height=1.2 + 0.27 * len(methods), sharey=True)
    for panel, (name, leads) in zip(panels, found.items(), strict=True):
        panel.axvline(0, color="#333", linewidth=0.8)
        for place, steps in enumerate(STEPS):
            drawn = [(methods.index(method), lead[steps]) for method, lead in leads if steps in lead]
            if not drawn:
                continue
            across = np.array([lead.mean for _, lead in drawn])
            reach = np.array([[lead.mean - lead.low, lead.high - lead.mean] for _, lead in drawn]).T
            up = [row + 0.22 * (place - 1) for row, _ in drawn]
            label = "before any step" if steps == 0 else f"after {steps} steps"
            dots = {"fmt": "o", "markersize": 3.5, "linewidth": 1.2, "color": COLOURS[place]}
            panel.errorbar(across, up, xerr=reach, label=label, **dots)
        panel.set(title=name, xlabel="lead of the default, points", yticks=range(len(methods)))
        panel.set_yticklabels(methods)
    panels[0].invert_yaxis()
    _save(figure, path)


def _leads(rows: Sequence[Row]) -> list[tuple[str, dict[int, Any]]]:
    """Each method's rows beside the default's, by steps."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        by_steps = {
            steps: difference(accuracies(rows, DEFAULT, steps), accuracies(rows, method, steps)) for steps in STEPS
        }
        known = {steps: lead for steps, lead in by_steps.items() if lead is not None and lead.tasks >= LEAST_TASKS}
        if method != DEFAULT and known:
            found.append((method, known))
    return found


def draw_steps(rows: Rows, path: Path) -> None:
    """Mean accuracy against fine-tuning steps at a tenth of the units; tasks that all of the methods have."""
    figure, panels = _panels(len(rows))
    for panel, (name, one) in zip(panels, rows.items(), strict=True):
        chosen = at_home(of_stage(one, "test"))
        for method, colour in zip(CURVES, COLOURS, strict=True):
            values = {steps: accuracies(chosen, method, steps) for steps in STEPS}
            if all(values.values()):
                means = [_mean(values[steps]) for steps in STEPS]
                panel.plot(STEPS, means, marker="o", markersize=3, color=colour, label=method)
        wholes = {tuple(row["classes"]): row["whole"] for row in chosen}
        if wholes:
            whole = 100 * float(np.mean(list(wholes.values())))
            panel.axhline(whole, color="#333", linestyle="--", linewidth=0.8, label="whole model")
        panel.set(title=name, xlabel="steps", xticks=STEPS, ylabel="accuracy, %")
    _save(figure, path)


def draw_varied(rows: Rows, path: Path, what: str, methods: Sequence[str], steps: int, label: str) -> None:
    """Mean accuracy against ``what`` of a row is varied: *keep*, *shots* or *sources*. None is the protocol's own.

    Protocols where nothing was varied yet have no panel; without any, nothing is written.
    """
    found = {name: _curves(one, what, methods, steps) for name, one in rows.items()}
    found = {name: curves for name, curves in found.items() if curves}
    if not found:
        return
    figure, panels = _panels(len(found))
    for panel, (name, curves) in zip(panels, found.items(), strict=True):
        for method, colour in zip(methods, COLOURS, strict=False):
            if method in curves:
                panel.plot(*curves[method], marker="o", markersize=3, color=colour, label=method)
        panel.set(title=name, xlabel=label, ylabel=f"accuracy after {steps} steps, %", xscale="log")
    _save(figure, path)


def _curves(
    rows: Sequence[Row], what: str, methods: Sequence[str], steps: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Of each method the values of ``what`` and the mean accuracy at each, over the tasks that were run at all."""
    own = {"keep": 0.1, "shots": 100, "sources": max((row["records"] for row in rows), default=1) - 1}
    others = [key for key in ("keep", "shots", "sources") if key != what]
    chosen = [
        row for row in of_stage(rows, "test") if all(row[key] == (0.1 if key == "keep" else None) for key in others)
    ]
    curves = {}
    for method in methods:
        by_value: dict[float, dict[Any, float]] = {}
        for row in chosen:
            if row["method"] == method and str(steps) in row["accuracy"]:
                value = own[what] if row[what] is None else row[what]
                by_value.setdefault(value, {})[tuple(row["classes"])] = row["accuracy"][str(steps)]
        common = set.intersection(*map(set, by_value.values())) if by_value else set()
        if common and len(by_value) > 1:
            means = [_mean({task: by_value[value][task] for task in common}) for value in sorted(by_value)]
            curves[method] = (sorted(by_value), means)
    return curves


def draw_costs(costs: Mapping[str, Costs], path: Path) -> None:
    """Seconds for so many tasks, the bank's building included, beside pruning each from scratch."""
    figure, panels = _panels(len(costs))
    numbers = np.unique(np.geomspace(1, 1000, 40).round())
    for panel, (name, found) in zip(panels, costs.items(), strict=True):
        lines = {
            "a bank, then adapt": (found.bank, found.adapt, "-"),
            "a bank of the broad task alone, then adapt": (found.broad, found.adapt, "-"),
            **{method: (0.0, found.others[method], "--") for method in OTHERS if method in found.others},
        }
        for (method, (once, each, style)), colour in zip(lines.items(), COLOURS, strict=False):
            panel.plot(numbers, (once + numbers * each) / 3600, linestyle=style, color=colour, label=method)
        panel.set(title=name, xlabel="tasks served", ylabel="hours on a core", xscale="log", yscale="log")
    _save(figure, path)


def _panels(count: int, height: float = 3.0, **options: Any) -> tuple[Figure, list[Axes]]:
    with plt.rc_context(STYLE):
        size = (3.4 * max(count, 1), height)
        figure, panels = plt.subplots(1, max(count, 1), figsize=size, layout="constrained", **options)
    return figure, list(np.atleast_1d(panels))


def _mean(values: Mapping[Any, float]) -> float:
    return 100 * float(np.mean(list(values.values())))


def _save(figure: Figure, path: Path) -> None:
    """One legend for all panels, below them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {label: mark for axes in figure.axes for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    with plt.rc_context(STYLE):
        if named:
            columns = max(1, min(len(named), int(figure.get_figwidth() / 2)))
            figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
