"""Votes and score masks against slow loops, and their independence of the neighbours' order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kinprune.importance import rank
from kinprune.selection import Budget, select
from kinprune.units import Group, UnitSpace
from kinprune.units.costs import StateTensor, cost_model
from kinprune.units.layout import Fixed, Layout, Units
from kinprune.units.trace import Operation, Output
from kinprune.voting import (
    Ballot,
    ballot_mvp,
    ballot_smsp,
    blend,
    counts_for,
    neighbour_weights,
    score_mask,
    share_kept,
    vote,
)


def chain(sizes: list[int]) -> UnitSpace:
    """Linear layers 3 -> sizes[0] -> ... -> 2."""
    axes: list[Layout] = [Fixed(3), *map(Units, range(len(sizes))), Fixed(2)]
    state = {f"l{place}": StateTensor((axes[place + 1], axes[place]), True, True, 4) for place in range(len(axes) - 1)}
    operations = [Operation("input", (Output((0,), 0, 4),), (), None, False)]
    for place in range(1, len(axes)):
        operations.append(Operation("l", (Output((place,), place, 4),), (place - 1,), (place, place - 1), False))
    groups = tuple(Group(f"l{place}", "node", size, 1, (), False) for place, size in enumerate(sizes))
    return UnitSpace(groups, {}, {}, (), (), cost_model(state, operations, axes.__getitem__, len(groups)), None)


@dataclass(frozen=True)
class Case:
    space: UnitSpace
    rankings: NDArray[np.int64]
    soft: NDArray[np.floating[Any]]
    weights: NDArray[np.float64]
    own: NDArray[np.float64]
    order: list[int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    space = chain(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    number = draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    soft = random.exponential(size=(number, len(space)))
    if draw(st.booleans()):
        soft = np.round(soft)  # many ties
    rankings = np.stack([rank(space, row) for row in soft])
    soft = soft.astype(draw(st.sampled_from([np.float16, np.float32, np.float64])))
    similarities = draw(st.lists(st.sampled_from([-0.1, -0.2, -0.25, -3.0]), min_size=number, max_size=number))
    weights = neighbour_weights(similarities, draw(st.sampled_from(["uniform", "softmax"])))
    order = draw(st.permutations(range(number)))
    return Case(space, rankings, soft, weights, random.exponential(size=len(space)), list(order))


def kept_by(case: Case) -> NDArray[np.bool_]:
    """Masks of the neighbours' own: of sizes that differ, as rankings have it."""
    shares = np.linspace(0.2, 0.7, len(case.rankings))[:, None]
    return np.asarray(case.rankings < np.maximum(shares * case.space.sizes[case.space.group_of], 1))


def ballots(case: Case, budget: Budget, share: float, order: list[int]) -> list[Ballot]:
    rankings, soft, weights = case.rankings[order], case.soft[order], case.weights[order]
    return [
        ballot_mvp(case.space, rankings, soft, weights, budget, own=case.own, share=share),
        ballot_smsp(case.space, None, soft, weights, own=case.own, share=share),
        ballot_smsp(case.space, kept_by(case)[order], soft, weights, own=case.own, share=share),
    ]


@given(cases(), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_votes_and_means_are_those_of_loops(case: Case, keep: float) -> None:
    counts = counts_for(case.space, Budget(keep=keep))
    assert counts.tolist() == [max(math.floor(size * keep + 1e-9), 1) for size in case.space.sizes]
    votes = vote(case.space, case.rankings, counts, case.weights)
    means = score_mask(case.space, case.soft, case.weights)
    kept, shares = kept_by(case), share_kept(case.space, kept_by(case), case.weights)
    for unit in range(len(case.space)):
        voted = mean = 0.0
        assert abs(shares[unit] - sum(case.weights[kept[:, unit]])) < 1e-9 and 0 <= shares[unit] <= 1
        for neighbour, weight in enumerate(case.weights):
            if case.rankings[neighbour, unit] < counts[case.space.group_of[unit]]:
                voted += weight
            mean += weight * float(case.soft[neighbour, unit])
        assert abs(votes[unit] - voted) < 1e-9 and 0 <= votes[unit] <= 1
        assert math.isclose(means[unit], mean, rel_tol=1e-12, abs_tol=1e-300)


def slow_rank_score(values: NDArray[np.float64], place: int) -> float:
    """The mean over the places that the unit's tie takes of 1/n + ... + 1/(r + 1)."""
    above, tied = int((values > values[place]).sum()), int((values == values[place]).sum())
    scores = [sum(1 / j for j in range(r + 1, len(values) + 1)) for r in range(above, above + tied)]
    return sum(scores) / tied


@given(cases(), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_a_blend_is_that_of_loops(case: Case, share: float) -> None:
    kin = case.soft[0].astype(np.float64)
    found = case.space.split(blend(case.space, kin, case.own, share))
    for part, first, second in zip(found, case.space.split(kin), case.space.split(case.own), strict=True):
        slow = [
            (1 - share) * slow_rank_score(first, unit) + share * slow_rank_score(second, unit)
            for unit in range(len(part))
        ]
        assert np.allclose(part, slow, rtol=1e-12)


@given(cases(), st.floats(0.01, 1), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_order_of_neighbours_changes_no_bit(case: Case, keep: float, share: float) -> None:
    straight = ballots(case, Budget(keep=keep), share, list(range(len(case.order))))
    for first, second in zip(straight, ballots(case, Budget(keep=keep), share, case.order), strict=True):
        assert first.scores.tobytes() == second.scores.tobytes()
        assert [tie.tobytes() for tie in first.ties] == [tie.tobytes() for tie in second.ties]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.floats(0.1, 10), st.randoms())
@settings(max_examples=150, deadline=None)
def test_weights_go_with_their_neighbours(similarities: list[float], temperature: float, random: Any) -> None:
    order = list(range(len(similarities)))
    random.shuffle(order)
    found = neighbour_weights(similarities, temperature=temperature)
    again = neighbour_weights([similarities[place] for place in order], temperature=temperature)
    assert found[order].tobytes() == again.tobytes()
    assert (found > 0).all() and math.isclose(found.sum(), 1, rel_tol=1e-12)
    assert all(found[a] <= found[b] for a in order for b in order if similarities[a] <= similarities[b])


@given(cases(), st.floats(0.01, 1))
@settings(max_examples=100, deadline=None)
def test_one_neighbours_vote_keeps_what_it_kept(case: Case, keep: float) -> None:
    budget = Budget(keep=keep)
    ballot = ballot_mvp(case.space, case.rankings[:1], case.soft[:1], case.weights[:1], budget)
    found = select(case.space, ballot.scores, budget, ties=ballot.ties)
    assert found.mask == select(case.space, -case.rankings[0].astype(float), budget).mask


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_budgets_hold_and_votes_are_on_what_is_kept(case: Case, data: st.DataObject) -> None:
    least = case.space.costs.of([1] * len(case.space.sizes)).parameters
    whole = case.space.costs.of(case.space.sizes).parameters
    budget = Budget(keep=data.draw(st.floats(0.01, 1)), parameters=data.draw(st.integers(least, whole)))
    assert budget.parameters is not None
    ballot = ballots(case, budget, 0.0, list(range(len(case.order))))[0]
    found = select(case.space, ballot.scores, budget, ties=ballot.ties)
    assert found.costs.parameters <= budget.parameters
    counts = case.space.counts(found.mask.kept)
    assert np.array_equal(ballot.scores, vote(case.space, case.rankings, counts, case.weights))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_where_all_ties_the_first_units_stay(sizes: list[int], keep: float) -> None:
    space = chain(sizes)
    rows: Callable[..., NDArray[np.float64]] = np.ones
    # As many neighbours as units, each preferring another one, all alike otherwise: every unit has as many votes.
    number = math.lcm(*sizes)
    rankings = np.stack([np.concatenate([(np.arange(n) + shift) % n for n in sizes]) for shift in range(number)])
    budget, weights = Budget(keep=keep), np.full(number, 1 / number)
    ballot = ballot_mvp(space, rankings, rows((number, len(space))), weights, budget)
    assert all(np.ptp(part) == 0 for part in space.split(ballot.scores))
    for part in space.split(select(space, ballot.scores, budget, ties=ballot.ties).mask.kept):
        assert (np.diff(part.astype(int)) <= 0).all()
