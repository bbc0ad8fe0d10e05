"""Fill the tables of a page of evidence from the study's rows, and draw its figures.

    python -m benchmarks.study.evidence [--results DIR] [--page docs/evidence.md] [--figures docs/images]

The page's own words stay; what stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` is written anew.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.costs import Costs, costs_of
from benchmarks.study.running import read_rows
from benchmarks.study.statistics import (
    Row,
    accuracies,
    at_home,
    at_sizes,
    difference,
    of_stage,
    rank_correlation,
    steps_to,
)
from benchmarks.study.tables import DEFAULT, markdown, table

ROOT = Path(__file__).parents[2]
NAMES = {"vit": "ViT-tiny", "mobile": "MobileNetV2", "cnn-cifar": "ResNet-18"}
"""The protocols of the page, and what their figures call them."""
UNSEEN = {"vit-unseen": "ViT-tiny", "mobile-unseen": "MobileNetV2", "cnn-unseen": "ResNet-18"}
SHARED = {"vit-all-classes": "ViT-tiny", "mobile-all-classes": "MobileNetV2", "cnn-all-classes": "ResNet-18"}
"""Protocols of tasks that share classes with the bank's."""
SIZED = {
    "vit-broad": "ViT-tiny",
    "mobile-broad": "MobileNetV2",
    "cnn-cifar": "ResNet-18",
    "cnn-stream": "ResNet-18, stream too",
}
"""Protocols of several keep ratios."""
PARTS = {
    "kin's units, backbone's weights": "kin",
    "own units, kin's weights": "kin",
    "kin, no reconstruction": "kin",
    "kin, head from class means": "kin",
    "kin": "taylor",
    "taylor, no reconstruction": "taylor",
    "taylor, head from class means": "taylor",
}
"""Methods, and those that they differ from in one part."""
BLOCK = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Rows = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Results:
    """The rows of the page's protocols that have any, by protocol: at home, on ``unseen`` data sets, on tasks that have
    classes ``shared`` with the bank's, and ``sized`` at several keep ratios; and what the banks cost.
    """

    rows: Rows
    unseen: Rows
    shared: Rows
    sized: Rows
    costs: Mapping[str, Costs]


def tables(results: Results) -> dict[str, Callable[[], str]]:
    """Every table that a page may name."""
    rows = results.rows
    found: dict[str, Callable[[], str]] = {
        "steps": lambda: _steps(rows),
        "sizes": lambda: _sizes(results.sized),
        "shots": lambda: _varied(rows, "shots", 0),
        "sources": lambda: _varied(rows, "sources", 0),
        "similarity": lambda: _similarity(rows),
        "parts": lambda: _parts(rows),
        "unseen": lambda: _unseen(results.unseen),
        "shared": lambda: _shared(results.shared),
        "costs": lambda: _costs(results.costs),
    }
    for name, one in rows.items():
        for stage in ("test", "validation"):
            found[f"{stage} {name}"] = lambda one=one, stage=stage: table(at_home(of_stage(one, stage)))  # type: ignore[misc]
    return found


def fill(page: str, known: Mapping[str, Callable[[], str]]) -> str:
    """A page with its tables written anew; ValueError where it names one that nobody knows."""

    def written(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in known:
            raise ValueError(f"the page names the table {name!r}, expected one of {', '.join(sorted(known))}")
        return f"{match.group(1)}{known[name]()}{match.group(3)}"

    return BLOCK.sub(written, page)


def read_results(results: Path) -> Results:
    """What there is."""

    def read(names: Mapping[str, str]) -> Rows:
        return {name: found for name in names if (found := read_rows(results / f"{name}.jsonl"))}

    rows = read(NAMES)
    costs = {name: costs_of(results / f"{name}.bank.json", one) for name, one in rows.items()}
    known = {name: one for name, one in costs.items() if one is not None}
    sized = {name: some for name, one in read(SIZED).items() if (some := at_sizes(of_stage(one, "test")))}
    return Results(rows, read(UNSEEN), read(SHARED), sized, known)


def draw(results: Results, folder: Path) -> None:
    """All figures of the page."""
    from benchmarks.study import figures

    named = {NAMES[name]: one for name, one in results.rows.items()}
    figures.draw_leads(named, folder / "evidence-leads.svg")
    figures.draw_steps(named, folder / "evidence-steps.svg")
    small = {SIZED[name]: one for name, one in results.sized.items()}
    figures.draw_varied(small, folder / "evidence-sizes.svg", "keep", (DEFAULT, "taylor"), 15, "share of units kept")
    figures.draw_varied(named, folder / "evidence-shots.svg", "shots", (DEFAULT, "taylor"), 0, "images a class")
    figures.draw_varied(named, folder / "evidence-sources.svg", "sources", ("kin",), 0, "narrow source tasks")
    if results.costs:
        figures.draw_costs({NAMES[name]: one for name, one in results.costs.items()}, folder / "evidence-costs.svg")


def _steps(rows: Rows) -> str:
    tested = {name: at_home(of_stage(one, "test")) for name, one in rows.items()}
    lines = []
    for method in dict.fromkeys(row["method"] for one in tested.values() for row in one):
        found = [steps_to(one, method) for one in tested.values()]
        if any(steps is not None for steps in found):
            lines.append([method, *("" if steps is None else str(steps) for steps in found)])
    return markdown(["method", *(NAMES[name] for name in rows)], lines)


def _varied(rows: Rows, what: str, steps: int) -> str:
    """The methods at each value of what is varied, with the default's lead where there is another method."""
    lines = []
    others = [key for key in ("keep", "shots", "sources") if key != what]
    for name, one in rows.items():
        varied = [row for row in of_stage(one, "test") if row[what] not in (None, 0.1)]
        chosen = [row for row in varied if all(row[key] in (None, 0.1) for key in others)]
        for value in sorted({row[what] for row in chosen}):
            here = [row for row in chosen if row[what] == value]
            for method in sorted(dict.fromkeys(row["method"] for row in here), key=lambda name: name != DEFAULT):
                values = accuracies(here, method, steps)
                lead = difference(accuracies(here, DEFAULT, steps), values) if method != DEFAULT else None
                if values:
                    cells = [f"{value:g}", str(len(values)), _percent(values), str(lead or "")]
                    lines.append([NAMES[name], method, *cells])
    return markdown(["backbone", "method", what, "tasks", "accuracy", "lead of the default"], lines)


def _sizes(rows: Rows) -> str:
    """The default from one score mask and Taylor's prune for each size, largest first, on the tasks of both."""
    lines = []
    for name, one in rows.items():
        for keep in sorted({row["keep"] for row in one}, reverse=True):
            here = [row for row in one if row["keep"] == keep]
            for steps in (0, 15):
                ours, other = (accuracies(here, method, steps) for method in (DEFAULT, "taylor"))
                lead = difference(ours, other)
                if lead is not None:
                    both = ours.keys() & other.keys()
                    shown = [_percent({task: values[task] for task in both}) for values in (ours, other)]
                    lines.append([SIZED[name], f"{keep:g}", str(steps), str(lead.tasks), *shown, str(lead)])
    return markdown(["backbone", "keep", "steps", "tasks", DEFAULT, "taylor", "lead"], lines)


def _similarity(rows: Rows) -> str:
    """Whether nearer kin serve better: over tasks, their mean similarity beside the accuracy; and nearest or not."""
    lines = []
    for name, one in rows.items():
        tested = at_home(of_stage(one, "test"))
        kin = [row for row in tested if row["method"] == "kin"]
        if len(kin) < 3:
            continue
        nearness = [float(np.mean(row["details"]["similarity"])) for row in kin]
        correlation = rank_correlation(nearness, [row["accuracy"]["0"] for row in kin])
        others = [accuracies(tested, f"kin, {which}", 0) for which in ("random", "farthest", "all")]
        leads = [str(difference(accuracies(kin, "kin", 0), values) or "") for values in others]
        lines.append([NAMES[name], str(len(kin)), f"{correlation:.2f}", *leads])
    head = ["backbone", "tasks", "rank correlation", "nearest less random", "less farthest", "less all"]
    return markdown(head, lines)


def _parts(rows: Rows) -> str:
    """Methods with one part changed beside those that they were changed from, before any step, on the tasks of both."""
    lines = []
    for name, one in rows.items():
        tested = at_home(of_stage(one, "test"))
        for changed, whole in PARTS.items():
            first, second = (accuracies(tested, method, 0) for method in (whole, changed))
            lost = difference(first, second)
            if lost is not None:
                both = [{task: values[task] for task in first.keys() & second.keys()} for values in (second, first)]
                lines.append([NAMES[name], changed, whole, str(lost.tasks), *map(_percent, both), str(lost)])
    return markdown(["backbone", "method", "beside", "tasks", "accuracy", "beside's", "lost"], lines)


def _unseen(rows: Rows) -> str:
    lines = []
    for name, one in rows.items():
        for data in dict.fromkeys(row["data"] for row in one):
            here = [row for row in one if row["data"] == data]
            for method in dict.fromkeys(row["method"] for row in here):
                found = [accuracies(here, method, steps) for steps in (0, 15, 60)]
                lines.append([UNSEEN[name], data, method, str(len(found[0])), *map(_percent, found)])
    return markdown(["backbone", "data", "method", "tasks", "0 steps", "15 steps", "60 steps"], lines)


def _shared(rows: Rows) -> str:
    """Methods on tasks whose classes the bank may have seen, with the default's lead."""
    lines = []
    for name, one in rows.items():
        tested = of_stage(one, "test")
        for method in dict.fromkeys(row["method"] for row in tested):
            found = {steps: accuracies(tested, method, steps) for steps in (0, 15, 60)}
            cells = [SHARED[name], method, str(len(found[0]))]
            for steps, values in found.items():
                lead = difference(accuracies(tested, DEFAULT, steps), values) if method != DEFAULT else None
                cells += [_percent(values), str(lead or "")]
            lines.append(cells)
    return markdown(["backbone", "method", "tasks", *(w for n in (0, 15, 60) for w in (f"{n} steps", "lead"))], lines)


def _costs(costs: Mapping[str, Costs]) -> str:
    lines = []
    for name, one in costs.items():
        for method, seconds in one.others.items():
            pays = [one.pays_after(method, bank) for bank in (one.bank, one.broad)]
            shown = ["never" if math.isinf(number) else f"{number:.0f} tasks" for number in pays]
            hours = [f"{value / 3600:.2f}" for value in (one.bank, one.broad)]
            lines.append([NAMES[name], method, *hours, f"{one.adapt:.0f}", f"{seconds:.0f}", *shown])
    head = ["backbone", "beside", "bank, h", "broad task, h", "adapt, s", "beside, s"]
    return markdown([*head, "bank pays after", "broad task pays after"], lines)


def _percent(values: Mapping[Any, float]) -> str:
    return f"{np.mean(list(values.values())):.1%}" if values else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the figures; 2 where the page or the rows cannot be used."""
    parser = argparse.ArgumentParser("python -m benchmarks.study.evidence", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "study")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "evidence.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args(arguments)
    results = read_results(options.results)
    if not results.rows:
        print(f"evidence: {options.results} has no rows, expected those of python -m benchmarks.study", file=sys.stderr)
        return 2
    try:
        options.page.write_text(fill(options.page.read_text(), tables(results)))
    except (OSError, ValueError) as error:
        print(f"evidence: {error}", file=sys.stderr)
        return 2
    draw(results, options.figures)
    protocols = {name: len(one) for name, one in results.rows.items()}
    print(json.dumps({"page": str(options.page), "protocols": protocols}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
