"""An adaptation's charts: how each size learnt, and what its size costs in accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kinprune import quantities
from kinprune.adaptation import Adapted, Sized
from kinprune.report.charts import BOTTOM, LEFT, RIGHT, TOP, Axis, Reference, Series, chart, linear_axis, log_axis
from kinprune.report.sizes import SizeRow


@dataclass(frozen=True)
class Chart:
    """A drawing, and the caption above it."""

    caption: str
    drawing: Markup


def learning_charts(adapted: Adapted, rows: Sequence[SizeRow]) -> tuple[Chart, ...]:
    """Accuracy and loss against steps, a series a size; none where no step was made."""
    trained = [(row, sized) for row, sized in zip(rows, adapted.sizes, strict=True) if sized.training.curve]
    if not trained:
        return ()
    guard = "training images" if trained[0][1].training.guard == "training" else "held-back images"
    charts = (_accuracy_chart(trained, guard), _loss_chart(trained, guard))
    return tuple(one for one in charts if one is not None)


def family_charts(adapted: Adapted, rows: Sequence[SizeRow]) -> tuple[Chart, ...]:
    """Test accuracy against parameters and against MACs; none of a single size."""
    if len(rows) < 2:
        return ()
    return (_family_chart(adapted, rows, "parameters", "Parameters"), _family_chart(adapted, rows, "macs", "MACs"))


def _accuracy_chart(trained: Sequence[tuple[SizeRow, Sized]], guard: str) -> Chart:
    caption = f"Accuracy on {guard}"
    series = [
        _judged(row, [(point.step, point.accuracy) for point in sized.training.curve], sized) for row, sized in trained
    ]
    y = linear_axis(
        "Accuracy",
        [value for one in series for _, value in one.line],
        quantities.round_percent,
        BOTTOM,
        TOP,
        within=(0, 1),
    )
    told = "; ".join(
        f"{row.name}: {quantities.percent(sized.training.curve[0].accuracy)} in closed form, "
        f"{quantities.percent(_chosen(sized))} in the end"
        for row, sized in trained
    )
    return Chart(caption, chart("accuracy", caption, told, _steps(trained), y, series))


def _loss_chart(trained: Sequence[tuple[SizeRow, Sized]], guard: str) -> Chart | None:
    caption = f"Loss on {guard}, and of each step (thin)"
    series = []
    for row, sized in trained:
        judged = _judged(row, [(point.step, point.loss) for point in sized.training.curve], sized)
        faint = tuple(_finite(list(enumerate(sized.training.losses, 1))))
        series.append(Series(judged.colour, judged.line, faint, judged.start, judged.chosen))
    values = [value for one in series for _, value in (*one.line, *one.faint)]
    if not values:
        return None
    y = linear_axis("Loss", [0.0, *values], lambda value: f"{value:g}", BOTTOM, TOP)
    told = "; ".join(
        f"{row.name}: {one.line[0][1]:.3f} at first, {one.line[-1][1]:.3f} at the last step"
        for (row, _), one in zip(trained, series, strict=True)
        if one.line
    )
    return Chart(caption, chart("loss", caption, told, _steps(trained), y, series))


def _steps(trained: Sequence[tuple[SizeRow, Sized]]) -> Axis:
    most = max(1, *(len(sized.training.losses) for _, sized in trained))
    return linear_axis("Steps", [0, most], lambda value: f"{value:.0f}", LEFT, RIGHT, least_step=1)


def _judged(row: SizeRow, judged: Sequence[tuple[int, float]], sized: Sized) -> Series:
    line = _finite(judged)
    at = dict(line)
    best = sized.training.best_step
    start = (0.0, at[0]) if 0 in at else None
    chosen = (float(best), at[best]) if best in at else None
    return Series(row.colour, tuple(line), start=start, chosen=chosen)


def _chosen(sized: Sized) -> float:
    return next(point.accuracy for point in sized.training.curve if point.step == sized.training.best_step)


def _finite(found: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(float(step), value) for step, value in found if math.isfinite(value)]


def _family_chart(adapted: Adapted, rows: Sequence[SizeRow], cost: str, noun: str) -> Chart:
    caption = f"Accuracy on the test images against {noun if noun == 'MACs' else noun.lower()}"
    places = [float(getattr(sized.selection.costs, cost)) for sized in adapted.sizes]
    whole = float(getattr(adapted.whole, cost))
    series = [
        Series(
            row.colour,
            ((place, row.accuracy_start), (place, row.accuracy)),
            start=(place, row.accuracy_start),
            chosen=(place, row.accuracy),
        )
        for row, place in zip(rows, places, strict=True)
    ]
    accuracies = [value for row in rows for value in (row.accuracy_start, row.accuracy)]
    y = linear_axis(
        "Accuracy", [*accuracies, adapted.dense.accuracy], quantities.round_percent, BOTTOM, TOP, within=(0, 1)
    )
    x = log_axis(f"{noun} (logarithmic)", [*places, whole], quantities.count, LEFT, RIGHT)
    level = Reference(adapted.dense.accuracy, f"whole model {quantities.percent(adapted.dense.accuracy)}", whole)
    told = "; ".join(
        f"{row.name}: {quantities.percent(row.accuracy)} with {quantities.count(place)} {noun}"
        for row, place in zip(rows, places, strict=True)
    )
    return Chart(caption, chart(f"family-{cost}", caption, told, x, y, series, level))
