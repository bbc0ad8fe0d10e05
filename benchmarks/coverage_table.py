"""How the rows of the coverage benchmark are read: a line, a page, a summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]

MUCH = 0.75
"""At most this share of the weights left counts as pruned: half of a model's layers at half their width."""

EXACT = 1e-9
REASONS = {
    r"a channel of the residual stream.*": "stream",
    r"the squeeze of a gate": "gates",
    r"(\S+) \(.*\) fixes this size in its own code": r"\1",
    r"a dimension of the images.*": "grid",
    r"the operation (\S+) .*": r"\1",
    r"it lies inside units that are cut whole": "inside heads",
    r"the classifier's classes|the model's output": "",
}


def reason(text: str) -> str:
    """A reason why a layer is kept whole, short: a class's name says that its code fixes the size."""
    for pattern, name in REASONS.items():
        if match := re.fullmatch(pattern, text):
            return match.expand(name)
    return text


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes, most often first, without the empty one."""
    return {name: number for name, number in Counter(names).most_common() if name}


def first_line(error: BaseException) -> str:
    """An error in a short line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:160]


def left(row: Row, cost: str = "parameters") -> float | None:
    """The share of the parameters or multiply-accumulates that is left; None if it never came so far."""
    return row[cost][1] / row[cost][0] if cost in row else None


def short(row: Row) -> str:
    """One row as progress."""
    share = left(row)
    parts = [row["model"], row["tool"], "runs" if row["runs"] else row["error"]]
    parts += [f"{share:.0%} of the weights"] if share is not None else []
    parts += [f"differs by {row['difference']:.0e}"] if row.get("difference") is not None else []
    parts += [row.get("onnx_error", "ONNX")] if "onnx" in row else []
    return ", ".join([*parts, f"{row['seconds']} s"])


def summary(rows: Sequence[Row]) -> dict[str, str | int]:
    """N of M for what is claimed."""
    own = [row for row in rows if row["tool"] == "kinprune"]
    other = [row for row in rows if row["tool"] == "torch-pruning"]
    streams = [row.get("with_stream", row) for row in own]
    compared = [row["difference"] for row in own if row.get("difference") is not None]
    exported = [row["onnx"] for row in own if "onnx" in row]
    return {
        "models": len({row["model"] for row in rows}),
        "families": len({row["family"] for row in own if "family" in row}),
        "Kinprune: pruned inside blocks, runs": _of(row["runs"] and not row["stream"] for row in own),
        "Kinprune: pruned inside blocks, or in streams if that finds nothing, runs": _of(row["runs"] for row in own),
        "Kinprune: pruned with streams, runs": _of(row["runs"] for row in streams),
        "Kinprune: pruned with streams, runs, at most 75 % of the weights left": _of(_much(row) for row in streams),
        "Kinprune: parameters as foretold": _of(row["costs_exact"] for row in own if "costs_exact" in row),
        "Kinprune: equals the masked model within 1e-9": _of(value < EXACT for value in compared),
        "Kinprune: exported to ONNX, equal in ONNX Runtime": _of(exported),
        "torch-pruning: runs": _of(row["runs"] for row in other),
        "torch-pruning: runs, at most 75 % of the weights left": _of(_much(row) for row in other),
    }


def _much(row: Row) -> bool:
    share = left(row)
    return bool(row["runs"]) and share is not None and share <= MUCH


def _of(values: Iterable[bool]) -> str:
    listed = list(values)
    return f"{sum(listed)} of {len(listed)}"


def page(rows: Sequence[Row], names: Sequence[str]) -> str:
    """All rows as a page of Markdown."""
    own = {row["model"]: row for row in rows if row["tool"] == "kinprune"}
    other = {row["model"]: row for row in rows if row["tool"] == "torch-pruning"}
    lines = [f"| {value} | {text} |" for text, value in summary(rows).items()]
    columns = (
        "model",
        "timm module",
        "units",
        "groups",
        "kept whole",
        "weights left",
        "MACs left",
        "with streams",
        "runs",
        "masked",
        "ONNX",
        "s",
        "torch-pruning 1.6.1",
        "s",
    )
    table = [_line(own[name], other.get(name)) for name in names if name in own]
    table.sort(key=lambda cells: (cells[1], cells[0]))
    made_with = ", ".join(f"{name} {version}" for name, version in rows[-1].get("versions", {}).items())
    return "\n".join(
        [
            "# Which models can be pruned",
            "",
            "Made by `python benchmarks/coverage.py`: random weights, half of every group's units. How each column",
            f"is measured: [benchmarks/README.md](../README.md#coverage). Versions: {made_with}.",
            "",
            "| | |",
            "|---:|---|",
            *lines,
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
        ]
    )


def _line(row: Row, other: Row | None) -> list[str]:
    if "groups" not in row:
        return [row["model"], row.get("family", ""), _cell(row["error"]), *[""] * 9, *_peer(other)]
    groups = ", ".join(f"{number} {kind}" for kind, number in row["groups"].items())
    whole = ", ".join(f"{number} {name}" for name, number in row["whole"].items())
    return [
        row["model"],
        row["family"],
        str(row["units"]),
        groups,
        whole or "-",
        _share(left(row)) + (" (streams)" if row["stream"] else ""),
        _share(left(row, "macs")),
        _streams(row),
        "yes" if row["runs"] else row["error"],
        _masked(row),
        _onnx(row),
        str(row["cut_seconds"]),
        *_peer(other),
    ]


def _cell(error: str) -> str:
    """The beginning of an error, fit for a table."""
    text = error.removeprefix("ExportError: ").replace("|", "/")
    return text if len(text) <= 80 else text[:79] + "…"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _streams(row: Row) -> str:
    if row["stream"]:
        return _share(left(row))
    found = row.get("with_stream")
    if found is None:
        return ""
    return _share(left(found)) if found["runs"] else _cell(found["error"])


def _masked(row: Row) -> str:
    """The difference from the masked model; over how many of the groups, where statistics run over some."""
    if "compared" not in row:
        return ""
    compared, groups = row["compared"]
    if row["difference"] is None:
        return "n/a"
    return f"{row['difference']:.0e}" + (f" ({compared} of {groups})" if compared < groups else "")


def _onnx(row: Row) -> str:
    if "onnx" not in row:
        return ""
    return f"{row['onnx_difference']:.0e}" if row["onnx"] else _cell(row["onnx_error"])


def _peer(row: Row | None) -> list[str]:
    if row is None:
        return ["", ""]
    said = "runs" if row["runs"] else _cell(row["error"])
    share = left(row)
    return [said + (f", {share:.0%} left" if share is not None else ""), str(row.get("cut_seconds", ""))]
