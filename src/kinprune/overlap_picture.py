"""A study of overlap as a picture: an SVG that needs nothing else, alone or in an HTML page with its tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from uuid import uuid4

import numpy as np

from kinprune.errors import KinpruneError
from kinprune.overlap_study import KindOverlap, Means, OverlapStudy
from kinprune.pair_statistics import Estimate, Floats

SUFFIXES = (".svg", ".html")

WIDTH, HEAD, ROW = 1040, 92, 366
"""Pixels: the picture's width, its title, and the row of panels that each kind of unit has."""

TOP, BASE = 62, 290
"""Where a panel's plot begins and ends in its row."""

LAYERS, PAIRS = (64, 506), (604, 1020)
"""Where the plots of the two panels begin and end from the left."""

DOTS, BINS = 3000, 10
"""The most pairs that are drawn, and the bins of equally many pairs whose means are."""

NAMES = {"filter": "filters", "head": "attention heads", "node": "MLP nodes", "channel": "channels of the stream"}

STYLE = """
.ov { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; }
.ov text { fill: #24292f; } .ov .soft { fill: #57606a; font-size: 12px; }
.ov .title { font-size: 19px; font-weight: 600; } .ov .panel { font-size: 14px; font-weight: 600; }
.ov .paper { fill: #ffffff; } .ov .grid { stroke: #e4e8ec; } .ov .axis { stroke: #8c959f; }
.ov .chance { stroke: #6e7781; stroke-width: 1.6; stroke-dasharray: 6 4; fill: none; }
.ov .most { stroke: #b3470b; fill: #b3470b; } .ov .least { stroke: #0b66b3; fill: #0b66b3; }
.ov .binned { stroke: #24292f; fill: #24292f; } .ov path.line, .ov polyline.line { fill: none; stroke-width: 2.2; }
.ov polygon.band { stroke: none; opacity: .16; } .ov .dots { fill: none; stroke-linecap: round; stroke-width: 3.4; }
.ov .apart { stroke: #8c959f; opacity: .45; } .ov .sharing { stroke: #8250df; opacity: .6; }
@media (prefers-color-scheme: dark) {
.ov text { fill: #e6edf3; } .ov .soft { fill: #9aa4af; }
.ov .paper { fill: #0d1117; } .ov .grid { stroke: #222a33; } .ov .axis { stroke: #6e7781; }
.ov .chance { stroke: #9aa4af; } .ov .most { stroke: #ff9b57; fill: #ff9b57; }
.ov .least { stroke: #5cb3ff; fill: #5cb3ff; } .ov .binned { stroke: #f0f6fc; fill: #f0f6fc; }
.ov polygon.band { opacity: .24; } .ov .apart { stroke: #7d8894; opacity: .5; }
.ov .sharing { stroke: #b893ff; opacity: .65; }
}
"""

PAGE = """
body { margin: 0 auto; max-width: 1080px; padding: 16px; background: #ffffff; color: #24292f;
  font: 14px/1.5 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; }
svg { width: 100%; height: auto; } h2 { font-size: 17px; margin: 28px 0 4px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
table { font-size: 12.5px; }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } small { color: #57606a; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3; } small { color: #9aa4af; }
  th, td { border-color: #222a33; } }
"""


class PictureError(KinpruneError):
    """A picture cannot be written where it was asked for."""


def check_picture(path: Path, *, overwrite: bool = False) -> None:
    """Refuse, with PictureError, a file that ``write_picture`` could not write: to be asked before long work."""
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"{path} has the suffix '{path.suffix}', expected a picture's: {' or '.join(SUFFIXES)}")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PictureError(f"{path} cannot be made: {above} is no folder one may write to; choose another path")
    if path.is_dir():
        raise PictureError(f"{path} is a folder, expected a file: choose another path")
    if path.exists() and not overwrite:
        raise PictureError(f"{path} is there already: choose another path, or --overwrite it")


def write_picture(study: OverlapStudy, path: Path, *, name: str) -> None:
    """Write the picture, and for ``.html`` the page around it; whole or not at all. Missing folders are made."""
    text = overlap_page(study, name=name) if path.suffix.lower() == ".html" else overlap_svg(study, name=name)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def overlap_page(study: OverlapStudy, *, name: str) -> str:
    """An HTML page: the picture and the numbers in it. ``name`` is what the tasks are from, such as the bank's."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
        f"<title>{escape(_title(name))}</title><style>{PAGE}</style></head><body>",
        overlap_svg(study, name=name),
    ]
    for kind in study.kinds:
        rows = [_cells(group.name, f"{group.size:,}", f"{group.kept:.4g}", group.means) for group in kind.groups]
        rows.append(_cells("mean", "", "", kind.means))
        head = (
            "layer",
            "units",
            "kept",
            "chance",
            "IoU",
            "times chance",
            "least similar",
            "most similar",
            "difference",
        )
        parts += [f"<h2>By layer: {escape(_of(kind))}</h2>", _table(head, rows)]
    shares = [int((study.shared == 0).sum()), int((study.shared == 1).sum()), int((study.shared > 1).sum())]
    rows = [
        [words, f"{pairs:,}", *(shown(getattr(kind.means, key)) for kind in study.kinds)]
        for (words, key), pairs in zip((("none", "none"), ("one", "one"), ("two or more", "more")), shares, strict=True)
    ]
    kinds = [f"IoU of {_of(kind)}" for kind in study.kinds]
    parts += ["<h2>By the classes that two tasks share</h2>", _table(("shared classes", "pairs", *kinds), rows)]
    rows = [
        [words, *(shown(getattr(kind.correlations, key)) for kind in study.kinds)]
        for words, key in (
            ("similarity of class means", "class_means"),
            ("the same, pairs without a shared class", "class_means_disjoint"),
            ("share of class names in common", "class_names"),
        )
    ]
    parts += ["<h2>Rank correlation with a pair's IoU</h2>", _table(("", *map(_of, study.kinds)), rows)]
    parts.append(
        "<p><small>Chance is the exact expectation for random sets of the same sizes. In brackets: 95 % intervals from "
        "drawing the tasks, not the pairs, again. Correlations are Spearman's.</small></p></body></html>\n"
    )
    return "\n".join(parts)


def overlap_svg(study: OverlapStudy, *, name: str) -> str:
    """The picture: a row for each kind of unit, the layers on the left and the pairs on the right."""
    height = HEAD + ROW * len(study.kinds)
    some = len(study.first) < study.possible
    pairs = f"{len(study.first):,} of {study.possible:,} pairs" if some else f"all {study.possible:,} pairs"
    kept = "the units that each pruned model kept" if study.keep is None else f"the best {study.keep:.3g} of each layer"
    every = _every(study)
    drawn = f", a dot for one in {every}" if every > 1 else ""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'class="ov" role="img">',
        f"<title>{escape(_title(name))}</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        _text(24, 34, _title(name), "title"),
        _text(
            24, 57, f"{len(study.tasks):,} tasks, {pairs}{drawn}; {kept}. Bands are 95 % intervals over tasks.", "soft"
        ),
        _legend(24, 80),
    ]
    for number, kind in enumerate(study.kinds):
        high = _highest(kind)
        row = [*_layers_panel(kind, high), *_pairs_panel(study, kind, high)]
        parts.append(f'<g transform="translate(0 {HEAD + ROW * number})">{"".join(row)}</g>')
    return "\n".join([*parts, "</svg>"])


def shown(found: Estimate) -> str:
    """``0.181 (0.177 to 0.185)``."""
    if found.value is None:
        return "not defined"
    known = found.low is not None and found.high is not None
    # A rounded -0.0004 is 0.000: adding 0 takes the sign off.
    numbers = (number for number in (found.value, found.low, found.high) if number is not None)
    value, *ends = (f"{round(number, 3) + 0.0:.3f}" for number in numbers)
    return f"{value} ({ends[0]} to {ends[1]})" if known else value


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within a range, about so many: steps of 1, 2 or 5 times a power of ten."""
    raw = max(high - low, 1e-9) / about
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= raw * 0.999)
    return [round(number * step, 12) for number in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1)]


def place(value: float, low: float, high: float, start: float, stop: float) -> float:
    """Where a value of ``low`` to ``high`` lies between the pixels ``start`` and ``stop``."""
    return start + (value - low) / (high - low) * (stop - start)


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Names without the dotted parts that all have at the front or back, and what was taken off: ``blocks.*.mlp``."""
    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1 if len(names) > 1 else 0
    front = next((n for n in range(most) if len({part[n] for part in parts}) > 1), most)
    back = next((n for n in range(most - front) if len({part[-1 - n] for part in parts}) > 1), most - front)
    short = [".".join(part[front : len(part) - back]) for part in parts]
    return short, ".".join([*parts[0][:front], "*", *parts[0][len(parts[0]) - back :]]) if front + back else ""


def binned(x: Floats, y: Floats, bins: int = BINS) -> list[tuple[float, float]]:
    """Means of x and y in bins of equally many pairs, by x; equal x are never torn apart."""
    edges = np.unique(np.quantile(x, np.linspace(0, 1, bins + 1)[1:-1]))
    numbers = np.searchsorted(edges, x, side="left")
    return [(float(x[numbers == one].mean()), float(y[numbers == one].mean())) for one in np.unique(numbers)]


def _every(study: OverlapStudy) -> int:
    """One pair in so many has a dot."""
    return max(-(-len(study.first) // DOTS), 1)


def _title(name: str) -> str:
    return f"Do tasks keep the same units? {name}"


def _of(kind: KindOverlap) -> str:
    return NAMES.get(kind.kind, kind.kind)


def _layers_panel(kind: KindOverlap, high: float) -> list[str]:
    """Mean IoU of each layer in forward order: the most and least similar pairs, and chance."""
    left, right = LAYERS
    names, pattern = short_names([group.name for group in kind.groups])
    all_means = [group.means for group in kind.groups]
    gap = (right - left) / len(names)
    across = [left + gap * (number + 0.5) for number in range(len(names))]
    parts = [
        _text(left - 40, 30, f"By layer: {_of(kind)}", "panel"),
        _text(left - 40, 48, f"layers in forward order{f', {pattern}' if pattern else ''}", "soft"),
        *_upright(left, right, 0, high),
        *_layer_labels(names, across, gap),
    ]
    for which in ("least", "most"):
        estimates: list[Estimate] = [getattr(means, which) for means in all_means]
        known = [
            (x, found.value, found.low, found.high)
            for x, found in zip(across, estimates, strict=True)
            if found.value is not None
        ]
        bands = [(x, low, top) for x, _, low, top in known if low is not None and top is not None]
        if len(bands) > 1:
            outline = [(x, top) for x, _, top in bands] + [(x, low) for x, low, _ in bands[::-1]]
            parts.append(f'<polygon class="{which} band" points="{_points(outline, 0, high)}"/>')
        line = [(x, value) for x, value, _, _ in known]
        parts.append(f'<polyline class="{which} line" points="{_points(line, 0, high)}"/>')
        parts += _marks(line, 0, high, which, 3)
    chance = [(x, means.chance) for x, means in zip(across, all_means, strict=True)]
    ends = [(left, chance[0][1]), *chance, (right, chance[-1][1])]
    parts.append(f'<polyline class="chance" points="{_points(ends, 0, high)}"/>')
    return parts


def _pairs_panel(study: OverlapStudy, kind: KindOverlap, top: float) -> list[str]:
    """Similarity against IoU, pair by pair, the mean of both in bins, and chance."""
    left, right = PAIRS
    x, y = study.similarity, kind.pairs
    low, high = (float(x.min()), float(x.max())) if np.ptp(x) > 0 else (float(x[0]) - 0.5, float(x[0]) + 0.5)
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    parts = [
        _text(left - 40, 30, f"By pair of tasks: {_of(kind)}", "panel"),
        _text(left - 40, 48, f"rank correlation {shown(kind.correlations.class_means)}", "soft"),
        *_upright(left, right, 0, top),
        _text((left + right) / 2, BASE + 40, "similarity of the tasks' class means (cosine, -1 to 1)", "soft", "m"),
    ]
    for value in ticks(low, high):
        parts.append(_text(place(value, low, high, left, right), BASE + 18, f"{value:g}", "soft", "m"))
    every = _every(study)
    for which, those in (("apart", study.shared == 0), ("sharing", study.shared > 0)):
        dots = np.flatnonzero(those)
        dots = dots[dots % every == 0]
        path = "".join(
            f"M{place(a, low, high, left, right):.1f} {place(b, 0, top, BASE, TOP):.1f}h0"
            for a, b in zip(x[dots].tolist(), y[dots].tolist(), strict=True)
        )
        parts.append(f'<path class="dots {which}" d="{path}"/>' if path else "")
    means = [(place(a, low, high, left, right), b) for a, b in binned(x, y)]
    chance = [(left, kind.means.chance), (right, kind.means.chance)]
    parts.append(f'<polyline class="chance" points="{_points(chance, 0, top)}"/>')
    parts.append(f'<polyline class="binned line" points="{_points(means, 0, top)}"/>')
    return [*parts, *_marks(means, 0, top, "binned", 3.5)]


def _legend(x: float, y: float) -> str:
    """What the lines and dots are, on one line below the title."""
    parts = []
    for mark, words, width in (
        ("most", "most similar quarter of pairs", 214),
        ("least", "least similar quarter", 164),
        ("chance", "chance", 84),
        ("apart", "a pair without a shared class", 206),
        ("sharing", "with a shared class", 150),
        ("binned", f"mean in {BINS} bins of pairs", 0),
    ):
        if mark in ("apart", "sharing"):
            parts.append(f'<path class="dots {mark}" style="stroke-width:7" d="M{x + 11} {y - 4}h0"/>')
        else:
            parts.append(f'<path class="{mark} line" d="M{x} {y - 4}h22"/>')
        parts.append(_text(x + 28, y, words, "soft"))
        x += width
    return "".join(parts)


def _layer_labels(names: Sequence[str], across: Sequence[float], gap: float) -> Iterable[str]:
    """Names below the axis: upright where they fit, else slanted, and only some where even so they are too many."""
    every = _step(gap)
    for name, x in list(zip(names, across, strict=True))[::every]:
        words = name if len(name) <= 14 else f"...{name[-11:]}"
        if _slanted(names, gap):
            yield _text(x + 4, BASE + 14, words, "soft", "e", f"rotate(-40 {x + 4:.1f} {BASE + 14})")
        else:
            yield _text(x, BASE + 18, words, "soft", "m")


def _step(gap: float) -> int:
    return max(int(np.ceil(13 / gap)), 1)


def _slanted(names: Sequence[str], gap: float) -> bool:
    return max(map(len, names)) * 7 > gap * _step(gap)


def _upright(left: float, right: float, low: float, high: float) -> Iterable[str]:
    """The axis of IoU with its grid."""
    for value in ticks(low, high):
        y = place(value, low, high, BASE, TOP)
        kind = "axis" if value == low else "grid"
        yield f'<path class="{kind}" d="M{left} {y:.1f}H{right}"/>'
        yield _text(left - 8, y + 4, f"{value:g}", "soft", "e")
    middle = (TOP + BASE) / 2
    yield _text(left - 46, middle, "mean IoU of kept units", "soft", "m", f"rotate(-90 {left - 46} {middle})")


def _marks(points: Iterable[tuple[float, float]], low: float, high: float, kind: str, radius: float) -> list[str]:
    return [
        f'<circle class="{kind}" cx="{x:.1f}" cy="{place(value, low, high, BASE, TOP):.1f}" r="{radius}"/>'
        for x, value in points
    ]


def _points(points: Iterable[tuple[float, float]], low: float, high: float) -> str:
    return " ".join(f"{x:.1f},{place(value, low, high, BASE, TOP):.1f}" for x, value in points)


def _bound(means: Means, which: str) -> float:
    found: Estimate = getattr(means, which)
    return next((value for value in (found.high, found.value) if value is not None), 0.0)


def _highest(kind: KindOverlap) -> float:
    """The end of the axis of IoU in both panels: the first round number above all that is drawn."""
    means = [group.means for group in kind.groups]
    bounds = [_bound(found, which) for found in means for which in ("most", "least")]
    value = max(*bounds, *(found.chance for found in means), kind.means.chance, float(kind.pairs.max()))
    step = ticks(0, value)[1]
    return min(float(np.ceil(value / step - 1e-9)) * step, 1.0)


def _text(x: float, y: float, words: str, kind: str, anchor: str = "", transform: str = "") -> str:
    where = {"m": ' text-anchor="middle"', "e": ' text-anchor="end"'}.get(anchor, "")
    turned = f' transform="{transform}"' if transform else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{where}{turned}>{escape(words)}</text>'


def _cells(name: str, size: str, kept: str, means: Means) -> list[str]:
    times = "" if means.all.value is None else f"{means.all.value / means.chance:.2f}"
    tails = [shown(found) for found in (means.least, means.most, means.difference)]
    return [name, size, kept, f"{means.chance:.3f}", shown(means.all), times, *tails]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
