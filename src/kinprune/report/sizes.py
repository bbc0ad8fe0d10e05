"""The sizes of an adaptation as rows: what was asked of each, what it came to, and what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kinprune import quantities
from kinprune.adaptation import Adapted, Sized
from kinprune.devices.profile import is_here
from kinprune.report.inputs import Tried
from kinprune.selection import Budget
from kinprune.units import Costs

FIGURES = {
    "parameters": ("parameters", quantities.count),
    "macs": ("MACs", quantities.count),
    "weight_bytes": ("of weights", quantities.byte_count),
    "peak_memory_bytes": ("of peak memory", quantities.byte_count),
}
"""The costs that are shown: what they are called after a number, and how they are written."""


@dataclass(frozen=True)
class Figure:
    """A number: exact, as people read it, and its share of the whole model's."""

    value: float
    text: str
    share: float
    share_text: str


@dataclass(frozen=True)
class Limit:
    """One limit of a size's budget: how much was asked for, how much it came to, and whether that is within it."""

    text: str
    reached: Figure
    met: bool


@dataclass(frozen=True)
class SizeRow:
    """One model. ``costs`` are in the order of ``FIGURES``; ``colour`` is the size's in every chart."""

    name: str
    colour: int
    accuracy_start: float
    accuracy: float
    difference: str
    costs: tuple[Figure, ...]
    latency: Figure | None
    limits: tuple[Limit, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class GroupRow:
    """One layer's units, and how many of them each size kept."""

    name: str
    kind: str
    size: int
    kept: tuple[Figure, ...]


def size_name(budget: Budget) -> str:
    """A size in a few words, from its budget: ``10% of units, 1.5 M parameters``."""
    asked = [] if budget.keep is None else [f"{quantities.ratio(budget.keep)} of units"]
    return ", ".join([*asked, *(_amount(name, limit) for name, limit in budget.limits().items())])


def size_rows(
    adapted: Adapted, latencies: Sequence[float | None] | None = None, tried: Sequence[Tried] | None = None
) -> tuple[SizeRow, ...]:
    """A row for every size, in the order they were asked for."""
    times = [None] * (len(adapted.sizes) + 1) if latencies is None else list(latencies)
    names = [_name(sized) for sized in adapted.sizes]
    names = [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]
    return tuple(
        SizeRow(
            name=name,
            colour=colour,
            accuracy_start=sized.start.accuracy,
            accuracy=sized.final.accuracy,
            difference=quantities.points(sized.final.accuracy - adapted.dense.accuracy),
            costs=figures(sized.selection.costs, adapted.whole),
            latency=_latency(times[1 + colour], times[0]),
            limits=_limits(adapted, sized, times[1 + colour]),
            notes=(
                *_notes(adapted, sized, times[1 + colour]),
                *(() if tried is None else _found(sized, tried[colour])),
            ),
        )
        for colour, (name, sized) in enumerate(zip(names, adapted.sizes, strict=True))
    )


def _name(sized: Sized) -> str:
    """A size by its device where it has one, else by its budget; with its precision where that is no usual one."""
    goal = sized.goal
    name = size_name(sized.budget) if goal.device is None else goal.device
    return name if goal.precision == "fp32" else f"{name}, {goal.precision}"


def group_rows(adapted: Adapted) -> tuple[GroupRow, ...]:
    """A row for every group of units, in forward order."""
    counts = [adapted.space.counts(sized.selection.mask.kept).tolist() for sized in adapted.sizes]
    return tuple(
        GroupRow(
            group.name,
            group.kind,
            group.size,
            tuple(_figure(kept, group.size, str(kept)) for kept in of_group),
        )
        for group, *of_group in zip(adapted.space.groups, *counts, strict=True)
    )


def figures(costs: Costs, whole: Costs) -> tuple[Figure, ...]:
    """Costs beside those of the whole model."""
    have, all_of = asdict(costs), asdict(whole)
    return tuple(_figure(have[name], all_of[name], form(have[name])) for name, (_, form) in FIGURES.items())


def smallest(adapted: Adapted) -> int:
    """The place of the size with the fewest parameters; the first of equals."""
    return min(range(len(adapted.sizes)), key=lambda place: adapted.sizes[place].selection.costs.parameters)


def latency_of(value: float | None) -> Figure | None:
    """The time of the whole model."""
    return _latency(value, value)


def _latency(value: float | None, whole: float | None) -> Figure | None:
    if value is None:
        return None
    text = quantities.milliseconds(value)
    return Figure(value, text, 0.0, "") if whole is None else _figure(value, whole, text)


def _figure(value: float, whole: float, text: str) -> Figure:
    share = value / whole
    return Figure(value, text, share, quantities.round_percent(share))


def _amount(name: str, value: float) -> str:
    if name == "latency_ms":
        return quantities.milliseconds(value)
    noun, form = FIGURES[name]
    return f"{form(value)} {noun}"


def _limits(adapted: Adapted, sized: Sized, latency: float | None) -> tuple[Limit, ...]:
    """A reached figure's share is that of its limit. ``latency`` was measured here, on the device or elsewhere."""
    limits = []
    keep = sized.budget.keep
    if keep is not None:
        kept, units = sized.selection.costs.units, adapted.whole.units
        reached = Figure(kept, f"{kept:,} of {units:,} units", kept / units / keep, quantities.percent(kept / units))
        limits.append(Limit(f"{quantities.ratio(keep)} of units", reached, kept <= units * keep + 1e-9 * units))
    costs = asdict(sized.selection.costs)
    for name, limit in sized.budget.limits().items():
        if name == "latency_ms":
            limits.append(_latency_limit(adapted, sized, limit, latency))
            continue
        # To the last digit: rounded, a reached 1,499,990 and an asked 1,500,000 would look the same.
        noun = "bytes " + FIGURES[name][0] if name.endswith("bytes") else FIGURES[name][0]
        share = costs[name] / limit
        reached = Figure(costs[name], f"{costs[name]:,} {noun}", share, f"{quantities.round_percent(share)} of it")
        limits.append(Limit(f"{limit:,} {noun}", reached, costs[name] <= limit))
    return tuple(limits)


def _latency_limit(adapted: Adapted, sized: Sized, limit: float, measured: float | None) -> Limit:
    """Milliseconds as measured where this machine is the device, else as its profile foretells them."""
    goal = sized.goal
    foretold = goal.costs.predicted_ms(adapted.space.counts(sized.selection.mask.kept))
    assert foretold is not None  # no limit in milliseconds without a profile
    on_device = measured is not None and goal.profile is not None and is_here(goal.profile)
    found = measured if on_device and measured is not None else foretold
    text = f"{quantities.milliseconds(found)} {'measured' if on_device else 'foretold'}"
    reached = Figure(found, text, found / limit, f"{quantities.round_percent(found / limit)} of it")
    return Limit(quantities.milliseconds(limit), reached, found <= limit)


def _found(sized: Sized, tried: Tried) -> list[str]:
    """What its export was found to be where that is not just the model: another precision, memory as measured."""
    notes = []
    lost = sized.final.accuracy - tried.accuracy
    if sized.goal.precision != "fp32" or lost > 0.01:
        notes.append(
            f"Exported in {sized.goal.precision} it answers {quantities.percent(tried.accuracy)} of the test images: "
            f"{quantities.points(-lost)} points beside the model before."
        )
    if tried.memory_bytes is not None:
        notes.append(f"{quantities.byte_count(tried.memory_bytes)} of memory, measured in ONNX Runtime.")
    return notes


def _notes(adapted: Adapted, sized: Sized, latency: float | None) -> tuple[str, ...]:
    notes = [] if sized.selection.note is None else [f"{sized.selection.note}."]
    limits = _limits(adapted, sized, latency)
    if sized.goal.multiple > 1:
        notes.append(f"Widths are multiples of {sized.goal.multiple}.")
    if sized.budget.keep is not None and not limits[0].met:
        notes.append("More units than asked for: every layer keeps at least one, or one block of a rounded width.")
    training = sized.training
    if training.stopped:
        notes.append(f"Fine-tuning was stopped after step {len(training.losses)}; the best state until then was kept.")
    if training.losses and training.best_step == 0:
        notes.append("No step of the fine-tuning was better than the closed form, which was kept.")
    return tuple(notes)
