"""Selection against a slow reference that walks the path unit by unit, on small chains of layers."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinprune.errors import BudgetError
from kinprune.selection import TOLERANCE, Allocation, Budget, Selection, select, select_family
from kinprune.units import Group, Mask, UnitSpace
from kinprune.units.costs import StateTensor, cost_model
from kinprune.units.layout import Fixed, Layout, Product, Units
from kinprune.units.runtime import NO_RUNTIME
from kinprune.units.trace import Operation, Output

MEASURES = ("parameters", "macs", "weight_bytes", "peak_memory_bytes")
Measure = Literal["parameters", "macs", "weight_bytes", "peak_memory_bytes"]


def chain(sizes: list[int], widths: list[int], grids: list[int]) -> UnitSpace:
    """Layers 3 -> sizes[0] * widths[0] -> ... -> 2; layer k makes a grid of grids[k] places."""
    features: list[Layout] = [Fixed(3)]
    for number, width in enumerate(widths):
        features.append(Units(number) if width == 1 else Product((Units(number), Fixed(width))))
    features.append(Fixed(2))
    places: list[Layout] = [Fixed(size) for size in [9, *grids, 1]]
    axes = [*features, *places]
    last = len(features)
    state = {
        f"layer{number}": StateTensor((features[number + 1], features[number]), True, True, 4)
        for number in range(len(features) - 1)
    }
    operations = [Operation("input", (Output((0, last), 0, 4),), (), None, False)]
    for number in range(1, len(features)):
        made = Output((number, last + number), number, 4)
        macs = (number, number - 1, last + number)
        operations.append(Operation("layer", (made,), (number - 1,), macs, False))
    groups = tuple(
        Group(f"layer{number}", "filter", size, width, (), False)
        for number, (size, width) in enumerate(zip(sizes, widths, strict=True))
    )
    costs = cost_model(state, operations, axes.__getitem__, len(groups), NO_RUNTIME)
    return UnitSpace(groups, {}, {}, (), (), costs, None)


@dataclass(frozen=True)
class Case:
    space: UnitSpace
    scores: NDArray[np.float64]
    allocation: Allocation
    multiple: int

    def select(self, budget: Budget, within: Mask | None = None) -> Selection:
        return select(
            self.space, self.scores, budget, allocation=self.allocation, multiple=self.multiple, within=within
        )


@st.composite
def cases(draw: st.DrawFn, multiples: st.SearchStrategy[int] = st.sampled_from([1, 1, 2, 3, 4, 8])) -> Case:  # noqa: B008
    number = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(2, 9), min_size=number, max_size=number))
    widths = draw(st.lists(st.integers(1, 3), min_size=number, max_size=number))
    grids = draw(st.lists(st.integers(1, 30), min_size=number, max_size=number))
    values = st.integers(-5, 20).map(float) | st.floats(0, 1).map(lambda value: round(value, 3))
    scores = draw(st.lists(values, min_size=sum(sizes), max_size=sum(sizes)))
    allocation: Allocation = draw(st.sampled_from(["layer", "global"]))
    return Case(chain(sizes, widths, grids), np.array(scores), allocation, draw(multiples))


@st.composite
def limits_for(draw: st.DrawFn, space: UnitSpace, floor: list[int]) -> Budget:
    """One to three limits somewhere between the smallest and the whole model, sometimes over it."""
    whole, least = space.costs.of(space.sizes), space.costs.of(floor)
    names: list[Measure] = draw(st.lists(st.sampled_from(MEASURES), min_size=1, max_size=3, unique=True))
    limits = {}
    for name in names:
        low, high = getattr(least, name), getattr(whole, name)
        limits[name] = draw(st.integers(low, max(low, int(high * 1.1))))
    return Budget(**limits)


def allowed(size: int, width: int, multiple: int) -> list[int]:
    """The counts that a group may keep, largest first: whole, or a width that is a multiple."""
    step = next(step for step in range(1, multiple + 1) if step * width % multiple == 0)
    return [size] + [count for count in range(size - 1, 0, -1) if count % step == 0]


def floors(case: Case) -> list[int]:
    return [allowed(group.size, group.width, case.multiple)[-1] for group in case.space.groups]


def order_of(case: Case) -> list[list[int]]:
    """The units of each group, best first; equal ones by index."""
    return [
        sorted(range(len(part)), key=lambda unit, part=part: (-part[unit], unit))
        for part in case.space.split(case.scores)
    ]


def path_of(case: Case) -> list[list[int]]:
    """The counts of every point of the path from the whole model to the smallest.

    The block of lowest priority goes first; among equals the one further from its group's floor, then the later group.
    """
    steps = []
    for number, (group, part, order) in enumerate(
        zip(case.space.groups, case.space.split(case.scores), order_of(case), strict=True)
    ):
        scale = np.abs(part).mean() or 1
        counts = allowed(group.size, group.width, case.multiple)
        for larger, smaller in itertools.pairwise(counts):
            if case.allocation == "layer":
                priority = -(smaller + 0.5) / group.size
            else:
                priority = max(part[order[place]] / scale for place in range(smaller, larger))
            steps.append((priority, -(smaller // counts[-1]), -number, number, smaller))
    steps.sort(key=lambda step: step[:3])
    point = [group.size for group in case.space.groups]
    path = [point]
    for *_, number, smaller in steps:
        point = [*point[:number], smaller, *point[number + 1 :]]
        path.append(point)
    return path


def fits(case: Case, counts: list[int], budget: Budget) -> bool:
    costs = case.space.costs.of(counts)
    return all(getattr(costs, name) <= limit for name, limit in budget.limits().items())


def unused(case: Case, counts: list[int], budget: Budget) -> float:
    costs = case.space.costs.of(counts)
    return min(1 - getattr(costs, name) / limit for name, limit in budget.limits().items())


def reference(case: Case, budget: Budget) -> list[int]:
    """The first point of the path that fits; what a coarse step left over goes to the best blocks that still fit."""
    path = path_of(case)
    place = next(place for place, counts in enumerate(path) if fits(case, counts, budget))
    counts = list(path[place])
    if place == 0 or unused(case, counts, budget) <= TOLERANCE:
        return counts
    stopped: set[int] = set()
    for larger, smaller in zip(path[place - 1 :: -1], path[place:0:-1], strict=True):
        (group,) = [number for number in range(len(counts)) if larger[number] != smaller[number]]
        if group in stopped:
            continue
        tried = [*counts[:group], larger[group], *counts[group + 1 :]]
        if fits(case, tried, budget):
            counts = tried
        else:
            stopped.add(group)
    return counts


def best_units(case: Case, counts: list[int]) -> NDArray[np.bool_]:
    kept = np.zeros(len(case.space), dtype=bool)
    for part, order, count in zip(case.space.split(kept), order_of(case), counts, strict=True):
        part[order[:count]] = True
    return kept


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_selection_is_the_first_point_of_the_path_that_fits_filled_up(data: st.DataObject) -> None:
    case = data.draw(cases())
    budget = data.draw(limits_for(case.space, floors(case)))
    found = case.select(budget)
    assert case.space.counts(found.mask.kept).tolist() == reference(case, budget)
    assert np.array_equal(found.mask.kept, best_units(case, reference(case, budget)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_limit_is_ever_passed_and_little_is_left_unless_a_note_says_why(data: st.DataObject) -> None:
    case = data.draw(cases())
    budget = data.draw(limits_for(case.space, floors(case)))
    found = case.select(budget)
    counts = case.space.counts(found.mask.kept).tolist()
    assert found.costs == case.space.costs.of(counts)
    assert fits(case, counts, budget)
    assert found.slack == pytest.approx(unused(case, counts, budget))
    assert (found.note is None) == (found.slack <= TOLERANCE)
    if found.note is not None and "already fits" in found.note:
        assert counts == case.space.sizes.tolist()
    elif found.note is not None:
        for number, group in enumerate(case.space.groups):
            larger = [count for count in allowed(group.size, group.width, case.multiple) if count > counts[number]]
            if larger:
                assert not fits(case, [*counts[:number], larger[-1], *counts[number + 1 :]], budget)


@given(cases(), st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_widths_are_multiples_or_whole(case: Case, keep: float) -> None:
    found = case.select(Budget(keep=keep))
    for group, count in zip(case.space.groups, case.space.counts(found.mask.kept), strict=True):
        assert count == group.size or count * group.width % case.multiple == 0
        assert count >= 1


@given(cases(st.just(1)), st.floats(0.001, 1))
@settings(max_examples=150, deadline=None)
def test_a_keep_ratio_gives_exact_counts(case: Case, keep: float) -> None:
    counts = case.space.counts(case.select(Budget(keep=keep)).mask.kept)
    if case.allocation == "layer":
        assert counts.tolist() == [max(math.floor(group.size * keep + 1e-9), 1) for group in case.space.groups]
    else:
        assert counts.sum() == max(math.floor(len(case.space) * keep + 1e-9), len(case.space.groups))


@given(cases(), st.lists(st.floats(0.001, 1), min_size=2, max_size=5))
@settings(max_examples=100, deadline=None)
def test_larger_keep_ratios_keep_all_that_smaller_ones_keep(case: Case, ratios: list[float]) -> None:
    found = [case.select(Budget(keep=ratio)) for ratio in sorted(ratios)]
    for smaller, larger in itertools.pairwise(found):
        assert not (smaller.mask.kept & ~larger.mask.kept).any()
        for field in fields(smaller.costs):
            assert getattr(smaller.costs, field.name) <= getattr(larger.costs, field.name)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_family_nests_whatever_its_budgets_are(data: st.DataObject) -> None:
    case = data.draw(cases())
    ratios = st.floats(0.01, 1).map(lambda keep: Budget(keep=keep))
    budgets = data.draw(st.lists(limits_for(case.space, floors(case)) | ratios, min_size=2, max_size=4))
    family = select_family(case.space, case.scores, budgets, allocation=case.allocation, multiple=case.multiple)
    by_size = sorted(family, key=lambda selection: int(selection.mask.kept.sum()))
    for smaller, larger in itertools.pairwise(by_size):
        assert not (smaller.mask.kept & ~larger.mask.kept).any()
    for budget, selection in zip(budgets, family, strict=True):
        assert fits(case, case.space.counts(selection.mask.kept).tolist(), budget)
    alone = [case.select(budget) for budget in budgets]
    largest = int(np.argmax([selection.costs.parameters for selection in alone]))
    assert family[largest].mask == alone[largest].mask


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_within_a_mask_nothing_else_is_kept(data: st.DataObject) -> None:
    case = data.draw(cases())
    outer = case.select(Budget(keep=data.draw(st.floats(0.2, 1))))
    kept = outer.mask.kept.copy()
    other = Case(case.space, case.scores[::-1].copy(), case.allocation, case.multiple)  # the mask of other scores
    budget = data.draw(limits_for(case.space, floors(case)))
    found = other.select(budget, within=outer.mask)
    assert not (found.mask.kept & ~kept).any()
    assert fits(case, case.space.counts(found.mask.kept).tolist(), budget)
    for part, inside, values in zip(
        case.space.split(found.mask.kept), case.space.split(kept), case.space.split(other.scores), strict=True
    ):
        if part.any() and (inside & ~part).any():
            assert values[part].min() >= values[inside & ~part].max()


@given(cases(), st.sampled_from(MEASURES), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_an_impossible_budget_is_refused_with_the_smallest_that_is_possible(
    case: Case, name: Measure, share: float
) -> None:
    least = getattr(case.space.costs.of(floors(case)), name)
    limit = int(least * share)
    assume(limit > 0)
    with pytest.raises(BudgetError, match="cannot be reached") as caught:
        case.select(Budget(**{name: limit}))
    told = int(re.findall(r"still needs ([\d,]+)", str(caught.value))[0].replace(",", ""))
    assert told == least
    reached = case.select(Budget(**{name: told}))
    assert getattr(reached.costs, name) == told
    with pytest.raises(BudgetError, match="cannot be reached"):
        case.select(Budget(**{name: told - 1}))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_limit_and_a_keep_ratio_hold_together(data: st.DataObject) -> None:
    case = data.draw(cases(st.just(1)))
    limits = data.draw(limits_for(case.space, floors(case)))
    keep = data.draw(st.floats(0.05, 1))
    both = case.select(Budget(keep=keep, **limits.limits()))
    counts = case.space.counts(both.mask.kept)
    assert fits(case, counts.tolist(), limits)
    alone = case.select(Budget(keep=keep))
    assert not (both.mask.kept & ~alone.mask.kept).any()
    if fits(case, case.space.counts(alone.mask.kept).tolist(), limits):
        assert both.mask == alone.mask


@given(cases(), st.floats(0.05, 1), st.integers(-5, 5))
@settings(max_examples=60, deadline=None)
def test_selection_is_the_same_every_time_and_knows_no_scale(case: Case, keep: float, power: int) -> None:
    first = case.select(Budget(keep=keep))
    assert case.select(Budget(keep=keep)).mask == first.mask
    # Powers of two are exact in floating point: no tie is broken by rounding.
    scaled = Case(case.space, case.scores * 2.0**power, case.allocation, case.multiple)
    assert scaled.select(Budget(keep=keep)).mask == first.mask


@given(cases(st.just(1)), st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_equal_scores_keep_the_first_units(case: Case, keep: float) -> None:
    flat = Case(case.space, np.ones(len(case.space)), case.allocation, 1)
    for part in case.space.split(flat.select(Budget(keep=keep)).mask.kept):
        assert (np.diff(part.astype(int)) <= 0).all()
