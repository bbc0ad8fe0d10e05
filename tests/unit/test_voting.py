from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from kinprune.errors import BudgetError, ImportanceError, UnitError
from kinprune.importance import rank
from kinprune.selection import Budget, select, select_family
from kinprune.units import UnitSpace, find_units
from kinprune.voting import (
    FAINTEST,
    Ballot,
    ballot_mvp,
    ballot_ranking,
    ballot_smsp,
    blend,
    counts_for,
    neighbour_weights,
    score_mask,
    share_kept,
    vote,
)


class Two(nn.Module):
    """Groups of 4 and 8 nodes; parameters are 3 a + a b + 2 b."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False)
        self.second = nn.Linear(4, 8, bias=False)
        self.last = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.fixture(scope="module")
def space() -> UnitSpace:
    return find_units(Two(), (1, 1))


RANKINGS = np.array(
    [
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7],
        [1, 0, 3, 2, 7, 6, 5, 4, 3, 2, 1, 0],
        [3, 0, 1, 2, 0, 7, 1, 6, 2, 5, 3, 4],
    ]
)
SOFT = np.array(
    [
        [4, 3, 2, 1, 8, 7, 6, 5, 4, 3, 2, 1],
        [3, 4, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8],
        [1, 4, 3, 2, 8, 1, 7, 2, 6, 3, 5, 4],
    ]
)
WEIGHTS = np.array([0.5, 0.3, 0.2])


def kept(ballot: Ballot, space: UnitSpace, budget: Budget) -> list[list[int]]:
    mask = select(space, ballot.scores, budget, ties=ballot.ties).mask
    return [np.flatnonzero(part).tolist() for part in space.split(mask.kept)]


# --- weights


def test_softmax_is_in_standard_deviations_of_the_similarities() -> None:
    # Deviations from the mean: -1, 0, 1; their standard deviation: sqrt(2 / 3).
    found = neighbour_weights([-0.03, -0.02, -0.01], temperature=1)
    expected = np.exp(np.array([-2, -1, 0]) / np.sqrt(2 / 3))
    assert np.allclose(found, expected / expected.sum(), rtol=1e-9)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(found, neighbour_weights(np.array([4.0, 11, 18]), temperature=1))
    flat, steep = (neighbour_weights([1, 2, 3], temperature=temperature) for temperature in (100.0, 0.1))
    assert np.allclose(flat, 1 / 3, atol=0.01)
    assert steep[2] > 0.99999


@pytest.mark.parametrize("weighting", ["uniform", "softmax"])
def test_one_neighbour_and_equals_have_equal_weights(weighting: Any) -> None:
    assert neighbour_weights([-1.5], weighting).tolist() == [1]
    assert neighbour_weights([-1.5] * 4, weighting).tolist() == [0.25] * 4
    assert neighbour_weights([0.1 + 0.2, 0.3, 0.3, 0.3], weighting).tolist() == [0.25] * 4  # rounding is no difference
    assert neighbour_weights([0.0, 0.0], weighting).tolist() == [0.5] * 2


def test_uniform_weights_know_no_similarity() -> None:
    assert neighbour_weights([1, 2, 30, 4], "uniform").tolist() == [0.25] * 4


def test_no_weight_is_nothing() -> None:
    found = neighbour_weights([0, 1, 2], temperature=1e-300)
    assert found[0] == found[1] == pytest.approx(np.exp(FAINTEST)) and found[0] > 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([],), r"shape \(0,\).*at least one neighbour"),
        (([[1.0]],), r"shape \(1, 1\)"),
        (([1, np.nan, -np.inf],), "2 that are not finite"),
        (([1, 2], "linear"), "no weighting 'linear', expected uniform or softmax"),
        (([1, 2], "softmax", 0), "temperature is 0, expected a finite number above 0"),
        (([1, 2], "softmax", -1), "temperature is -1"),
        (([1, 2], "softmax", np.nan), "temperature is nan"),
        (([1, 2], "uniform", np.inf), "temperature is inf"),
    ],
)
def test_bad_weightings_are_refused(arguments: Any, told: str) -> None:
    with pytest.raises(ImportanceError, match=told):
        neighbour_weights(*arguments)


# --- votes and means by hand


def test_votes_by_hand(space: UnitSpace) -> None:
    found = vote(space, RANKINGS, np.array([2, 3]), WEIGHTS)
    # Places below 2: all three neighbours' sets are {0 1}, {0 1}, {1 2}; below 3: {0 1 2}, {5 6 7}, {0 2 4}.
    assert found.tolist() == [0.8, 1, 0.2, 0, 0.7, 0.5, 0.7, 0, 0.2, 0.3, 0.3, 0.3]
    assert vote(space, RANKINGS, np.array([4, 8]), WEIGHTS).tolist() == [1] * 12
    assert vote(space, RANKINGS, np.array([0, 0]), WEIGHTS).tolist() == [0] * 12


def test_votes_need_no_weights_that_sum_to_one_and_equal_sums_tie(space: UnitSpace) -> None:
    counts = np.array([2, 3])
    assert np.array_equal(vote(space, RANKINGS, counts, 7 * WEIGHTS), vote(space, RANKINGS, counts, WEIGHTS))
    # In floating point 0.1 + 0.2 is more than 0.3: unit 0 of the first group has the one, unit 2 the other.
    rankings = np.array([[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 0, 3], [3, 2, 1, 0]])
    rankings = np.concatenate([rankings, np.tile(np.arange(8), (4, 1))], axis=1)
    votes = vote(space, rankings, np.array([1, 8]), np.array([0.1, 0.2, 0.3, 0.4]))
    assert votes[:4].tolist() == [0.3, 0, 0.3, 0.4]
    assert votes[4:].tolist() == [1] * 8


def test_a_score_mask_by_hand(space: UnitSpace) -> None:
    found = score_mask(space, SOFT.astype(np.float16), WEIGHTS)
    expected = [3.1, 3.5, 1.9, 1.5, 5.9, 4.3, 5.3, 4.1, 4.7, 3.9, 4.1, 3.7]
    assert found.dtype == np.float64
    assert np.allclose(found, expected, atol=1e-12)
    assert np.allclose(score_mask(space, SOFT.astype(float), 9 * WEIGHTS), expected, atol=1e-12)


def test_the_mean_of_half_precision_scores_is_not_of_half_precision(space: UnitSpace) -> None:
    soft = np.stack([np.full(12, 2048, np.float16), np.full(12, 1, np.float16)])
    assert np.allclose(score_mask(space, soft, np.array([0.5, 0.5])), 1024.5, atol=1e-9)


def test_one_neighbours_scores_come_back_as_they_are(space: UnitSpace) -> None:
    soft = np.random.default_rng(0).random((1, 12)) ** 9
    assert np.array_equal(score_mask(space, soft, np.array([0.3])), soft[0])


# --- blending


def test_rank_scores_by_hand(space: UnitSpace) -> None:
    kin = np.array([9.0, 1, 5, 5, *range(8)])
    found = blend(space, kin, np.zeros(12), 0)
    # Of four: 1/4, 1/4 + 1/3, 1/4 + 1/3 + 1/2, that + 1; the two fives share the second and third best.
    worst, third, second, best = 3 / 12, 7 / 12, 13 / 12, 25 / 12
    assert np.allclose(found[:4], [best, worst, (second + third) / 2, (second + third) / 2])
    assert np.allclose(found[4:], np.cumsum(1 / np.arange(8, 0, -1)))
    assert np.allclose(blend(space, np.ones(12), kin, 0), 1)
    half = blend(space, kin, kin[::-1].copy(), 0.25)
    assert np.allclose(half, 0.75 * found + 0.25 * blend(space, kin, kin[::-1].copy(), 1))


def test_a_blend_knows_no_scale_and_no_tail(space: UnitSpace) -> None:
    random = np.random.default_rng(1)
    kin, own = random.random(12), random.random(12)
    expected = blend(space, kin, own, 0.4)
    assert np.array_equal(blend(space, 1e6 * kin - 3, own**40, 0.4), expected)
    assert np.allclose([part.mean() for part in space.split(expected)], 1)


def test_the_ends_of_a_blend_are_kins_order_and_the_targets_own(space: UnitSpace) -> None:
    random = np.random.default_rng(2)
    kin, own = np.round(random.random(12), 1), random.random(12)
    assert np.array_equal(rank(space, blend(space, kin, own, 0)), rank(space, kin))
    assert np.array_equal(rank(space, blend(space, kin, own, 1)), rank(space, own))


# --- ballots


def test_the_tie_of_votes_goes_by_soft_score_then_by_the_targets_own_then_by_index(space: UnitSpace) -> None:
    rankings = np.stack([np.r_[[0, 1, 2, 3], np.arange(8)], np.r_[[3, 2, 1, 0], np.arange(8)]])
    equal, weights, budget = np.ones((2, 12)), np.array([0.5, 0.5]), Budget(keep=0.25)
    soft = np.tile(np.r_[[1.0, 1, 1, 3], np.ones(8)], (2, 1))  # units 0 and 3 have a vote each
    assert kept(ballot_mvp(space, rankings, soft, weights, budget), space, budget) == [[3], [0, 1]]
    own = np.r_[[1.0, 9, 9, 2], np.zeros(8)]
    assert kept(ballot_mvp(space, rankings, equal, weights, budget, own=own), space, budget) == [[3], [0, 1]]
    assert kept(ballot_mvp(space, rankings, equal, weights, budget), space, budget) == [[0], [0, 1]]
    assert kept(ballot_smsp(space, None, soft, weights), space, budget) == [[3], [0, 1]]
    assert kept(ballot_smsp(space, None, equal, weights, own=own), space, budget) == [[1], [0, 1]]
    assert kept(ballot_smsp(space, None, equal, weights), space, budget) == [[0], [0, 1]]
    masks = np.array([[0, 1, 0, 1, *[1] * 8], [0, 1, 0, 1, *[1] * 8]], dtype=bool)
    assert kept(ballot_smsp(space, masks, equal, weights, own=own), space, budget) == [[1], [0, 1]]
    assert kept(ballot_smsp(space, masks, soft, weights, own=own), space, budget) == [[3], [0, 1]]


def test_a_score_mask_of_what_neighbours_kept_by_hand(space: UnitSpace) -> None:
    masks = np.array([[1, 1, 0, 0, *[1] * 8], [1, 0, 1, 0, *[0] * 8], [0, 1, 1, 0, *[1] * 8]], dtype=bool)
    weights = np.array([0.5, 0.3, 0.2])
    assert share_kept(space, masks, weights).tolist() == [0.8, 0.7, 0.5, 0, *[0.7] * 8]
    ballot = ballot_smsp(space, masks, SOFT, weights)
    assert ballot.scores.tolist() == [0.8, 0.7, 0.5, 0, *[0.7] * 8]
    assert np.array_equal(ballot.ties[0], score_mask(space, SOFT, weights))


@pytest.mark.parametrize("keep", [step / 40 for step in range(1, 41)])
def test_the_vote_of_one_is_its_own_mask(space: UnitSpace, keep: float) -> None:
    budget = Budget(keep=keep)
    for row, soft in zip(RANKINGS, SOFT, strict=True):
        ballot = ballot_mvp(space, row[None], soft[None].astype(np.float16), np.array([1.0]), budget)
        alone = select(space, -row.astype(float), budget)
        assert select(space, ballot.scores, budget, ties=ballot.ties).mask == alone.mask


@pytest.mark.parametrize(
    ("limits", "multiple"), [({"parameters": 33}, 1), ({"macs": 41}, 2), ({"weight_bytes": 99}, 1)]
)
def test_neighbours_vote_on_as_many_units_as_the_budget_keeps(
    space: UnitSpace, limits: dict[str, int], multiple: int
) -> None:
    budget = Budget(**limits)
    ballot = ballot_mvp(space, RANKINGS, SOFT, WEIGHTS, budget, multiple=multiple)
    found = select(space, ballot.scores, budget, ties=ballot.ties, multiple=multiple)
    counts = space.counts(found.mask.kept)
    assert counts.tolist() == counts_for(space, budget, multiple=multiple).tolist()
    assert np.array_equal(ballot.scores, vote(space, RANKINGS, counts, WEIGHTS))
    for name, limit in limits.items():
        assert 0.5 * limit < getattr(found.costs, name) <= limit


def test_a_share_of_the_targets_own_turns_the_vote(space: UnitSpace) -> None:
    own, budget = np.arange(12.0), Budget(keep=0.5)
    only_kin = ballot_mvp(space, RANKINGS, SOFT, WEIGHTS, budget, own=own)
    # Votes of the second group: .7 .5 .7 .5 .5 .3 .5 .3; of the four with .5 the second and fifth have the best means.
    assert kept(only_kin, space, budget) == [[0, 1], [0, 1, 2, 4]]
    only_own = ballot_mvp(space, RANKINGS, SOFT, WEIGHTS, budget, own=own, share=1)
    assert kept(only_own, space, budget) == [[2, 3], [4, 5, 6, 7]]
    mixed = ballot_smsp(space, None, SOFT, WEIGHTS, own=own, share=0.5)
    assert np.array_equal(mixed.scores, blend(space, score_mask(space, SOFT, WEIGHTS), own, 0.5))


def test_one_score_mask_serves_a_nested_family(space: UnitSpace) -> None:
    ballot = ballot_smsp(space, None, SOFT, WEIGHTS)
    budgets = [Budget(keep=0.25), Budget(parameters=40), Budget(macs=20), Budget(keep=0.75)]
    family = select_family(space, ballot.scores, budgets, ties=ballot.ties)
    assert family[1].costs.parameters <= 40 and family[2].costs.macs <= 20
    by_size = sorted(family, key=lambda selection: selection.costs.units)
    for smaller, larger in itertools.pairwise(by_size):
        assert not (smaller.mask.kept & ~larger.mask.kept).any()


# --- refusals


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"rankings": RANKINGS[:0]}, ImportanceError, "no neighbour to vote"),
        ({"rankings": RANKINGS[:, :11]}, UnitError, r"shape \(3, 11\), expected .* the 12 units"),
        ({"rankings": RANKINGS.astype(float)}, UnitError, "rankings are float64"),
        ({"rankings": np.where(RANKINGS == 7, 6, RANKINGS)}, UnitError, "neighbour 0 is no order of second: .* to 7"),
        ({"rankings": RANKINGS - 1}, UnitError, "neighbour 0 is no order of first"),
        ({"rankings": RANKINGS + 1}, UnitError, "neighbour 0 is no order of first"),
        ({"weights": WEIGHTS[:2]}, ImportanceError, "expected 3 finite numbers above 0"),
        ({"weights": np.array([0.5, 0.5, 0])}, ImportanceError, "expected 3 finite numbers above 0"),
        ({"weights": np.array([0.5, 0.5, np.nan])}, ImportanceError, "expected 3 finite numbers above 0"),
        ({"soft": SOFT[:2]}, ImportanceError, "expected 2 finite numbers above 0"),
        ({"soft": np.where(SOFT == 8, np.inf, SOFT)}, ImportanceError, "2 of 12 of the soft scores are not finite"),
        ({"own": np.zeros(11)}, UnitError, r"the target's own scores have the shape \(11,\)"),
        ({"own": np.full(12, np.nan)}, ImportanceError, "12 of 12 of the target's own scores"),
        ({"share": 0.1}, ImportanceError, "count by 0.1, but none were given"),
        ({"share": 1.1, "own": np.zeros(12)}, ImportanceError, "1.1, expected a number from 0 to 1"),
        ({"share": np.nan, "own": np.zeros(12)}, ImportanceError, "nan, expected a number from 0 to 1"),
        ({"budget": Budget(parameters=3)}, BudgetError, "cannot be reached"),
    ],
)
def test_bad_ballots_are_refused(space: UnitSpace, change: dict[str, Any], error: type[Exception], told: str) -> None:
    arguments = {"rankings": RANKINGS, "soft": SOFT, "weights": WEIGHTS, "budget": Budget(keep=0.5), **change}
    with pytest.raises(error, match=told):
        ballot_mvp(space, **arguments)


def test_bad_counts_blends_and_soft_scores_are_refused(space: UnitSpace) -> None:
    for counts in ([2], [5, 8], [-1, 2]):
        with pytest.raises(UnitError, match="expected one for each of 2 groups, within their sizes"):
            vote(space, RANKINGS, np.array(counts), WEIGHTS)
    with pytest.raises(ImportanceError, match=r"-0.1, expected a number from 0 to 1"):
        blend(space, np.zeros(12), np.zeros(12), -0.1)
    with pytest.raises(UnitError, match=r"the neighbours' scores have the shape \(3,\)"):
        blend(space, np.zeros(3), np.zeros(12), 0.1)
    with pytest.raises(UnitError, match=r"shape \(3, 4\), expected \(3, 12\)"):
        score_mask(space, SOFT[:, :4], WEIGHTS)


# --- one ranking alone


def test_a_ranking_alone_gives_back_its_own_units_at_every_ratio(space: UnitSpace) -> None:
    generator = np.random.default_rng(3)
    ranking = np.concatenate([generator.permutation(size) for size in space.sizes])
    ballot = ballot_ranking(space, ranking)
    for keep in (0.1, 0.34, 0.5, 1.0):
        budget = Budget(keep=keep)
        kept = select(space, ballot.scores, budget, ties=ballot.ties).mask.kept
        assert np.array_equal(kept, ranking < counts_for(space, budget)[space.group_of])
    with pytest.raises(ImportanceError, match="shape"):
        ballot_ranking(space, ranking[1:])
