"""Numbers to inline SVG. Colours are the page's own: elements carry classes, and draw in ``currentColor``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 426, 12, 208
"""The plot's edges in pixels of the drawing; the rest is for labels."""

CHARACTER = 9
"""About the pixels of a character in a label."""

COLOURS = 6
"""Series colours that the page's style sheet has."""
SHAPES = 4

Point = tuple[float, float]
Form = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` to pixels from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(here)
        return self.start + (self.stop - self.start) * (here - low) / (high - low)


@dataclass(frozen=True)
class Axis:
    """A scale, what it shows (written below a horizontal axis), and where its labels stand."""

    label: str
    scale: Scale
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Series:
    """What one size looks like in a chart.

    ``line`` is joined, with a mark a point; ``faint`` a thin line without marks. ``start`` is marked hollow,
    ``chosen`` large. ``colour`` picks the colour and the marks' shape, whatever the number of series.
    """

    colour: int
    line: tuple[Point, ...]
    faint: tuple[Point, ...] = ()
    start: Point | None = None
    chosen: Point | None = None


@dataclass(frozen=True)
class Reference:
    """A dashed level with its name, and a cross on it ``at`` a place."""

    value: float
    name: str
    at: float


def ticks(low: float, high: float, most: int = 6, least_step: float = 0.0) -> list[float]:
    """At most ``most`` round numbers at equal steps (1, 2 or 5 times a power of ten) that span ``low`` to ``high``."""
    if high <= low:
        spread = abs(low) * 0.05 or 0.05
        low, high = low - spread, high + spread
    raw = max((high - low) / (most - 1), least_step)
    power = 10.0 ** math.floor(math.log10(raw) + 1e-9)
    for multiple in (1, 2, 5, 10, 20, 50):
        step = multiple * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if step >= least_step and last - first < most:
            break
    return [round(place * step, 12) for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between ``low`` and ``high``, both above 0, for a logarithmic axis: two to seven of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 7)]
    return [value for value in ticks(low, high, 5) if low <= value <= high] or [low, high]


def linear_axis(
    label: str,
    values: Iterable[float],
    form: Form,
    start: float,
    stop: float,
    *,
    within: tuple[float, float] = (-math.inf, math.inf),
    least_step: float = 0.0,
) -> Axis:
    """An axis over all ``values``, from one round number to another, not beyond ``within``."""
    known = list(values)
    lowest, highest = within
    shown = [value for value in ticks(min(known), max(known), least_step=least_step) if lowest <= value <= highest]
    return Axis(label, Scale(shown[0], shown[-1], start, stop), tuple((value, form(value)) for value in shown))


def log_axis(label: str, values: Iterable[float], form: Form, start: float, stop: float) -> Axis:
    """A logarithmic axis over all ``values``, with an eighth of their range to spare on either side."""
    known = list(values)
    spare = max((max(known) / min(known)) ** 0.125, 1.05)
    low, high = min(known) / spare, max(known) * spare
    scale = Scale(low, high, start, stop, True)
    return Axis(label, scale, _fitting([(value, form(value)) for value in log_ticks(low, high)], scale))


def _fitting(labels: Sequence[tuple[float, str]], scale: Scale) -> tuple[tuple[float, str], ...]:
    """The labels beside each other that have the room; where two do not, the rounder number stays."""
    chosen: list[tuple[float, str]] = []
    for value, text in sorted(labels, key=lambda one: (_roundness(one[0]), one[0])):
        room = [CHARACTER * (len(text) + len(other)) / 2 + CHARACTER for _, other in chosen]
        gaps = [abs(scale.at(value) - scale.at(other)) for other, _ in chosen]
        if all(gap >= wanted for gap, wanted in zip(gaps, room, strict=True)):
            chosen.append((value, text))
    return tuple(sorted(chosen))


def _roundness(value: float) -> int:
    """0 for a power of ten, 1 for five times one, 2 for twice one, 3 for all others."""
    leading = f"{value:.0e}"[0]
    return {"1": 0, "5": 1, "2": 2}.get(leading, 3)


def chart(
    name: str,
    title: str,
    description: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    reference: Reference | None = None,
) -> Markup:
    """A chart as an SVG element. ``name`` makes its ids unique in the page; texts are escaped here."""
    drawn = Markup("").join(_series(one, x.scale, y.scale) for one in series)
    level = Markup("") if reference is None else _reference(reference, x.scale, y.scale)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}-title {}-desc">'
        '<title id="{}-title">{}</title><desc id="{}-desc">{}</desc>{}{}{}{}</svg>'
    ).format(WIDTH, HEIGHT, name, name, name, title, name, description, _horizontal(x), _vertical(y), level, drawn)


def mark_of(colour: int) -> Markup:
    """The mark of a series alone, for a legend."""
    return Markup('<svg class="mark s{}" viewBox="0 0 12 12" aria-hidden="true">{}</svg>').format(
        colour % COLOURS, _mark(colour, (6, 6), 4, "full")
    )


def _horizontal(axis: Axis) -> Markup:
    labels = Markup("").join(
        Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _px(axis.scale.at(value)), BOTTOM + 16, text
        )
        for value, text in axis.ticks
    )
    stubs = Markup("").join(
        Markup('<line x1="{0}" y1="{1}" x2="{0}" y2="{2}"/>').format(_px(axis.scale.at(value)), BOTTOM, BOTTOM + 4)
        for value, _ in axis.ticks
    )
    name = Markup('<text class="axis" x="{}" y="{}" text-anchor="end">{}</text>').format(RIGHT, BOTTOM + 34, axis.label)
    return Markup('<g class="grid">{}</g><g class="labels">{}{}</g>').format(stubs, labels, name)


def _vertical(axis: Axis) -> Markup:
    lines = Markup("").join(
        Markup('<line x1="{0}" y1="{2}" x2="{1}" y2="{2}"/>').format(LEFT, RIGHT, _px(axis.scale.at(value)))
        for value, _ in axis.ticks
    )
    labels = Markup("").join(
        Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 11, _px(axis.scale.at(value) + 4), text)
        for value, text in axis.ticks
    )
    return Markup('<g class="grid">{}</g><g class="labels">{}</g>').format(lines, labels)


def _reference(reference: Reference, x: Scale, y: Scale) -> Markup:
    height, across = y.at(reference.value), x.at(reference.at)
    text = height - 6 if height - 6 > TOP + 8 else height + 15
    cross = " ".join(
        f"M{_px(across - 5)},{_px(height - down)}L{_px(across + 5)},{_px(height + down)}" for down in (5, -5)
    )
    return Markup(
        '<g class="reference"><line x1="{}" y1="{}" x2="{}" y2="{}"/><path d="{}"/><text x="{}" y="{}">{}</text></g>'
    ).format(LEFT, _px(height), RIGHT, _px(height), cross, LEFT + 4, _px(text), reference.name)


def _series(series: Series, x: Scale, y: Scale) -> Markup:
    def place(points: Iterable[Point]) -> list[Point]:
        return [(x.at(across), y.at(up)) for across, up in points if math.isfinite(across) and math.isfinite(up)]

    line = place(series.line)
    parts = [_path(place(series.faint), "faint"), _path(line, "line")]
    start, chosen = place(_known(series.start)), place(_known(series.chosen))
    parts += [_mark(series.colour, point, 2.5, "full") for point in line if point not in (*start, *chosen)]
    # Where both are one point, this shows as a dot in a ring.
    parts += [_mark(series.colour, point, 6, "hollow") for point in start]
    parts += [_mark(series.colour, point, 4, "full") for point in chosen]
    return Markup('<g class="s{}">{}</g>').format(series.colour % COLOURS, Markup("").join(parts))


def _known(point: Point | None) -> list[Point]:
    return [] if point is None else [point]


def _path(points: Sequence[Point], style: str) -> Markup:
    if len(points) < 2:
        return Markup("")
    drawn = " ".join(f"{_px(across)},{_px(up)}" for across, up in points)
    return Markup('<polyline class="{}" points="{}"/>').format(style, drawn)


def _mark(series: int, point: Point, radius: float, style: str) -> Markup:
    """A series' own shape: circle, square, triangle or diamond, so that colour is not all that tells them apart."""
    across, up = point
    shape = series % SHAPES
    if shape == 0:
        return Markup('<circle class="{}" cx="{}" cy="{}" r="{}"/>').format(style, _px(across), _px(up), radius)
    corners = {
        1: [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    }[shape]
    drawn = " ".join(f"{_px(across + radius * right)},{_px(up + radius * down)}" for right, down in corners)
    return Markup('<polygon class="{}" points="{}"/>').format(style, drawn)


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
