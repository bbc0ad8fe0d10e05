from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinprune.errors import BudgetError, UnitError
from kinprune.selection import Budget, select, select_family
from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units.runtime import NO_RUNTIME


class Two(nn.Module):
    """Hidden layers of 4 and 8 nodes: groups "first" and "second" of a residual-free network."""

    def __init__(self, first: int = 4, second: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(3, first, bias=False)
        self.second = nn.Linear(first, second, bias=False)
        self.last = nn.Linear(second, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.fixture(scope="module")
def space() -> UnitSpace:
    """Its memory is that of its numbers alone, which can be counted by hand."""
    found = find_units(Two(), (1, 1))
    return replace(found, costs=replace(found.costs, runtime=NO_RUNTIME))


SCORES = np.array([4.0, 1, 3, 2, 8.0, 7, 6, 5, 4, 3, 2, 1])


def kept(found: Any) -> list[list[int]]:
    return [np.flatnonzero(part).tolist() for part in (found.mask.kept[:4], found.mask.kept[4:])]


# --- budgets


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "no budget was given.*--keep.*--max-params"),
        ({"keep": 0}, "keep is 0, expected a number above 0"),
        ({"keep": -0.1}, "keep is -0.1, expected a number above 0"),
        ({"keep": 1.01}, "keep ratio is 1.01, expected a share above 0 and at most 1"),
        ({"keep": float("nan")}, "keep is nan, expected a number above 0"),
        ({"parameters": 0}, "parameters is 0"),
        ({"macs": -1}, "macs is -1"),
        ({"keep": 0.5, "weight_bytes": float("inf")}, "weight_bytes is inf"),
        ({"peak_memory_bytes": float("nan")}, "peak_memory_bytes is nan"),
    ],
)
def test_malformed_budgets_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(BudgetError, match=told):
        Budget(**arguments)


def test_a_budget_knows_its_absolute_limits() -> None:
    assert Budget(keep=1).limits() == {}
    assert Budget(keep=0.5, parameters=10, macs=20).limits() == {"parameters": 10, "macs": 20}


# --- keep ratios by hand


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]),
        (0.5, [[0, 2], [0, 1, 2, 3]]),
        (0.49, [[0], [0, 1, 2]]),
        (0.25, [[0], [0, 1]]),
        (1e-6, [[0], [0]]),
    ],
)
def test_by_layer_every_group_keeps_its_share(space: UnitSpace, keep: float, expected: list[list[int]]) -> None:
    found = select(space, SCORES, Budget(keep=keep))
    assert kept(found) == expected
    assert (found.slack, found.note) == (0, None)
    assert found.costs == space.cost(found.mask)
    assert found.mask.fingerprint == space.fingerprint


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        # Divided by their means: 1.6 .4 1.2 .8 | 1.78 1.56 1.33 1.11 .89 .67 .44 .22
        ("mean", [[0, 2], [0, 1, 2, 3]]),
        ("none", [[0], [0, 1, 2, 3, 4]]),  # 4 1 3 2 | 8 7 6 5 4 ...: of two fours the later group's goes
        ("max", [[0, 2], [0, 1, 2, 3]]),
    ],
)
def test_globally_normalised_scores_compete(space: UnitSpace, normalisation: Any, expected: list[list[int]]) -> None:
    found = select(space, SCORES, Budget(keep=0.5), allocation="global", normalisation=normalisation)
    assert kept(found) == expected


def test_globally_a_group_keeps_its_best_unit_however_bad(space: UnitSpace) -> None:
    scores = np.where(np.arange(12) < 4, SCORES - 1000, SCORES)
    found = select(space, scores, Budget(keep=0.5), allocation="global", normalisation="none")
    assert kept(found) == [[0], [0, 1, 2, 3, 4]]


def test_ties_go_by_the_tiebreakers_then_by_index(space: UnitSpace) -> None:
    equal = np.ones(12)
    assert kept(select(space, equal, Budget(keep=0.5))) == [[0, 1], [0, 1, 2, 3]]
    assert kept(select(space, equal, Budget(keep=0.5), ties=[np.arange(12.0)])) == [[2, 3], [4, 5, 6, 7]]
    second = select(space, equal, Budget(keep=0.5), ties=[equal, np.arange(12.0)])
    assert kept(second) == [[2, 3], [4, 5, 6, 7]]


# --- absolute limits by hand: parameters are 3 a + a b + 2 b for a and b kept nodes


def test_a_limit_is_met_on_the_path_and_filled_up(space: UnitSpace) -> None:
    assert select(space, SCORES, Budget(parameters=60)).costs.parameters == 60  # 4 and 8
    # By layer the removals are, from whole: 8th, 4th + 7th, 6th ... of each group: (4, 8) (4, 7) (3, 7) ...
    found = select(space, SCORES, Budget(parameters=54))
    assert (kept(found), found.costs.parameters) == ([[0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], 54)
    assert (found.slack, found.note) == (0, None)


def test_what_a_coarse_step_leaves_is_filled_with_units_that_still_fit() -> None:
    # A first node costs 3 + b, a second node a + 2: of (100, 2) nodes a second one is coarse, a first one fine.
    space = find_units(Two(100, 2), (1, 1))
    scores = np.concatenate([np.ones(90), np.full(10, -1.0), [5.0, 0.0]])
    # Ten first nodes go, (90, 2) costs 454, then a second one, (90, 1) costs 362: 58 are left, the ten fit again.
    found = select(space, scores, Budget(parameters=420), allocation="global", normalisation="none")
    assert space.counts(found.mask.kept).tolist() == [100, 1]
    assert found.costs.parameters == 402
    assert found.note == "4.3% of the parameters asked for are unused: every further unit would go over it"
    exact = select(space, scores, Budget(parameters=364), allocation="global", normalisation="none")
    assert space.counts(exact.mask.kept).tolist() == [90, 1]  # within the tolerance nothing is filled up


def test_a_note_says_why_a_budget_is_not_used_up(space: UnitSpace) -> None:
    roomy = select(space, SCORES, Budget(parameters=1000))
    assert roomy.mask.kept.all()
    assert roomy.slack == pytest.approx(0.94)
    assert (
        roomy.note
        == "94.0% of the parameters asked for are unused: the whole model, or the keep ratio asked for, already fits"
    )
    both = select(space, SCORES, Budget(keep=0.5, macs=1000))
    assert both.note is not None and "multiply-accumulates" in both.note and "keep ratio" in both.note
    coarse = select(space, SCORES, Budget(parameters=59), multiple=4)
    assert coarse.note is not None and "rounded to multiples of 4" in coarse.note
    single = select(space, SCORES, Budget(parameters=7))  # (1, 1) has 6, (1, 2) has 9, (2, 1) has 10
    assert single.note is not None and "every further unit would go over it" in single.note


def test_several_limits_hold_at_once(space: UnitSpace) -> None:
    budget = Budget(keep=0.9, parameters=50, macs=40, weight_bytes=100, peak_memory_bytes=150)
    found = select(space, SCORES, budget)
    for name, limit in budget.limits().items():
        assert getattr(found.costs, name) <= limit
    assert found.costs.weight_bytes > 0.8 * 100
    tightest = select(space, SCORES, Budget(keep=0.9, weight_bytes=100))
    assert found.mask == tightest.mask


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ({"parameters": 5}, r"budget of 5 parameters cannot be reached: .* still needs 6: ask for at least that"),
        ({"macs": 5}, r"5 multiply-accumulates cannot be reached: .* still needs 6"),
        ({"weight_bytes": 23}, r"23 bytes of weights cannot be reached: .* still needs 24"),
        ({"peak_memory_bytes": 30}, r"30 bytes of peak memory cannot be reached: .* still needs 40"),
        ({"parameters": 100, "macs": 5}, r"5 multiply-accumulates cannot be reached"),
    ],
)
def test_impossible_limits_are_refused_with_what_is_possible(
    space: UnitSpace, limits: dict[str, int], told: str
) -> None:
    with pytest.raises(BudgetError, match=told):
        select(space, SCORES, Budget(**limits))


def test_the_smallest_reachable_is_that_of_the_rounding(space: UnitSpace) -> None:
    with pytest.raises(BudgetError, match="still needs 36"):  # (4, 4)
        select(space, SCORES, Budget(parameters=35), multiple=4)
    assert select(space, SCORES, Budget(parameters=36), multiple=4).costs.parameters == 36


# --- rounding


@pytest.mark.parametrize(
    ("multiple", "keep", "counts"),
    [
        (2, 0.7, [2, 4]),
        (4, 0.6, [4, 4]),
        (4, 1, [4, 8]),
        (3, 1, [4, 8]),
        (3, 0.99, [3, 6]),
        (8, 0.5, [4, 8]),
        (100, 0.01, [4, 8]),
    ],
)
@pytest.mark.parametrize("allocation", ["layer", "global"])
def test_widths_are_multiples_or_left_whole(
    space: UnitSpace, multiple: int, keep: float, counts: list[int], allocation: Any
) -> None:
    found = select(space, SCORES, Budget(keep=keep), multiple=multiple, allocation=allocation)
    if allocation == "layer":
        assert space.counts(found.mask.kept).tolist() == counts
    for count, whole in zip(space.counts(found.mask.kept), (4, 8), strict=True):
        assert count == whole or count % multiple == 0


def test_filling_up_takes_no_part_of_a_block() -> None:
    """Ten nodes of five parameters may be 10, 8 or 4: four cost 20, eight 40, and six would fit but are no multiple."""
    space = find_units(nn.Sequential(nn.Flatten(), nn.Linear(3, 10, bias=False), nn.Linear(10, 2, bias=False)), (1, 1))
    found = select(space, np.arange(10.0), Budget(parameters=35), multiple=4)
    assert found.costs.units == 4
    assert found.note is not None and "multiples of 4" in found.note


class Heads(nn.Module):
    """Six heads of width 4: multiples of 8 take two heads at once."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 6
        self.qkv, self.proj = nn.Linear(3, 72), nn.Linear(24, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1)
        return self.head(self.proj(y).mean(1))


def test_rounding_counts_the_width_of_a_unit() -> None:
    space = find_units(Heads(), (2, 2))
    assert [(group.kind, group.size, group.width) for group in space.groups] == [("head", 6, 4), ("node", 5, 1)]
    scores = np.arange(len(space), dtype=float)
    for keep, heads in ((0.9, 4), (0.5, 2), (0.01, 2)):
        assert space.counts(select(space, scores, Budget(keep=keep), multiple=8).mask.kept)[0] == heads
    assert space.counts(select(space, scores, Budget(keep=0.9), multiple=4).mask.kept)[0] == 5


# --- scores, spaces, families


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (np.zeros(11), r"shape \(11,\), expected \(12,\)"),
        (np.zeros((12, 1)), r"shape \(12, 1\)"),
        (np.where(np.arange(12) < 2, np.nan, 1), "2 of 12 scores are not finite"),
        (np.where(np.arange(12) < 1, -np.inf, 1), "1 of 12 scores are not finite"),
    ],
)
def test_bad_scores_are_refused(space: UnitSpace, scores: Any, told: str) -> None:
    with pytest.raises(BudgetError, match=told):
        select(space, scores, Budget(keep=0.5))


def test_bad_options_are_refused(space: UnitSpace) -> None:
    with pytest.raises(BudgetError, match="multiples of 0, expected 1 or more"):
        select(space, SCORES, Budget(keep=0.5), multiple=0)
    with pytest.raises(BudgetError, match="no allocation 'local', expected layer or global"):
        select(space, SCORES, Budget(keep=0.5), allocation="local")  # type: ignore[arg-type]
    with pytest.raises(UnitError, match="another unit space"):
        select(space, SCORES, Budget(keep=0.5), within=Mask(np.ones(12, dtype=bool), "elsewhere"))


def test_the_given_scores_stay_as_they_are(space: UnitSpace) -> None:
    scores = SCORES.copy()
    select(space, scores, Budget(keep=0.3, parameters=30), allocation="global")
    assert np.array_equal(scores, SCORES)


def test_a_family_comes_in_the_order_of_its_budgets_and_nests(space: UnitSpace) -> None:
    budgets = [Budget(keep=0.25), Budget(parameters=50), Budget(macs=20), Budget(keep=1)]
    family = select_family(space, SCORES, budgets, allocation="global")
    assert family[0].costs.units == 3
    assert 0.9 * 50 < family[1].costs.parameters <= 50
    assert family[2].costs.macs <= 20
    assert family[3].mask.kept.all()
    by_size = sorted(family, key=lambda selection: selection.costs.units)
    for smaller, larger in itertools.pairwise(by_size):
        assert not (smaller.mask.kept & ~larger.mask.kept).any()


def test_the_costs_of_a_selection_are_those_of_the_extracted_model(space: UnitSpace) -> None:
    found = select(space, SCORES, Budget(parameters=40))
    small = extract(Two(), space, found.mask)
    assert sum(parameter.numel() for parameter in small.parameters()) == found.costs.parameters <= 40
    assert small(torch.zeros(1, 3, 1, 1)).shape == (1, 2)
