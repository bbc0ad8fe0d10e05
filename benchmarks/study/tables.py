"""The rows as Markdown: a table for each stage and keep ratio, each method beside the default."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.study.statistics import Row, accuracies, difference

DEFAULT = "smsp"


def page(rows: Sequence[Row]) -> str:
    """All tables of a protocol's rows, one a run (see ``running.read_rows``)."""
    if not rows:
        return "Nothing was run yet.\n"
    text = [f"# {rows[0]['protocol']}: {rows[0]['model']}\n", _LEGEND]
    for stage in ("test", "validation"):
        kept = [row for row in rows if row["stage"] == stage]
        for keep, shots, sources in sorted(
            {(row["keep"], row["shots"], row["sources"]) for row in kept}, key=lambda one: [(n is None, n) for n in one]
        ):
            chosen = [row for row in kept if (row["keep"], row["shots"], row["sources"]) == (keep, shots, sources)]
            title = f"## {stage.capitalize()} tasks, keep {keep:g}"
            title += f", {shots} images a class" if shots else ""
            title += f", {sources} source tasks" if sources else ""
            text += [title + "\n", table(chosen)]
    return "\n".join(text)


_LEGEND = """\
Mean accuracy on test images over the target tasks, before any step and after so many mini-batches. *lead* is by how
much the default (smsp) is better, in points: the mean of the paired differences with a 95 % bootstrap interval over
tasks, from five tasks on. `+` marks leads, and `-` the default's deficits, whose interval excludes 0. A number
in brackets is that of tasks, where not all were run.
"""


def table(rows: Sequence[Row]) -> str:
    """A line a method, in the order they were run, the default first."""
    steps = sorted({int(number) for row in rows for number in row["accuracy"]})
    lines = []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in sorted(methods, key=lambda name: name != DEFAULT):
        mine = [row for row in rows if row["method"] == method]
        cells = []
        for number in steps:
            values = accuracies(mine, method, number)
            lead = difference(accuracies(rows, DEFAULT, number), values) if method != DEFAULT else None
            mark = "" if lead is None or not lead.sure else " `+`" if lead.mean > 0 else " `-`"
            of = f" ({len(values)})" if len(values) < len(mine) else ""
            cells += [f"{np.mean(list(values.values())):.1%}{of}" if values else "", f"{lead}{mark}" if lead else ""]
        whole = np.mean([row["whole"] for row in mine])
        lines.append([method, str(len(mine)), f"{whole:.1%}", *cells])
    head = [cell for number in steps for cell in (f"{number} steps", "lead")]
    return markdown(["method", "tasks", "whole model", *head], lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, words to the left and numbers to the right."""
    numeric = [any(line[place][:1] in "+-0123456789" for line in lines if line[place]) for place in range(len(head))]
    every = [head, ["---:" if right else "---" for right in numeric], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)
