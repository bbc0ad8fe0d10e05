from __future__ import annotations

import itertools

import numpy as np
import pytest

from kinprune.pair_statistics import (
    LEAST,
    RESAMPLES,
    Estimate,
    all_pairs,
    draw_again,
    draw_pairs,
    estimate,
    levels,
    rank_correlation,
    tail_weights,
)


@pytest.mark.parametrize("items", [2, 3, 4, 40])
def test_all_pairs_come_once(items: int) -> None:
    first, second = draw_pairs(items, 10_000, 0)
    found = list(zip(first.tolist(), second.tolist(), strict=True))
    assert sorted(found) == list(itertools.combinations(range(items), 2))
    assert len(found) == all_pairs(items)


def test_some_pairs_are_drawn_without_repetition_evenly_and_by_the_seed() -> None:
    first, second = draw_pairs(30, 100, 1)
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 100
    assert (first < second).all() and first.min() >= 0 and second.max() < 30
    again, other = draw_pairs(30, 100, 1), draw_pairs(30, 100, 2)
    assert np.array_equal(again[0], first) and np.array_equal(again[1], second)
    assert not (np.array_equal(other[0], first) and np.array_equal(other[1], second))
    times = np.zeros(10)
    for seed in range(300):
        np.add.at(times, np.concatenate(draw_pairs(10, 15, seed)), 1)
    assert np.allclose(times, 900, atol=100)  # 15 of 45 pairs, 300 times: each thing 900 times


def test_pairs_of_very_many_things_are_drawn_in_little_memory() -> None:
    first, second = draw_pairs(3_000_000_000, 50, 0)
    assert len(first) == 50 and (first >= 0).all() and (first < second).all() and second.max() < 3_000_000_000


def test_rank_correlation_by_hand() -> None:
    ones = np.ones(4)
    rising = levels(np.array([1.0, 5, 6, 9]))
    assert rank_correlation(rising, rising, ones) == pytest.approx(1)
    assert rank_correlation(rising, rising[::-1], ones) == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert rank_correlation(rising, np.array([1, 0, 3, 2]), ones) == pytest.approx(0.6)
    # Ranks 1 2 3 4 against 1.5 1.5 3.5 3.5: 4 / sqrt(5 * 4).
    assert rank_correlation(rising, np.array([0, 0, 1, 1]), ones) == pytest.approx(4 / 20**0.5)
    assert np.isnan(rank_correlation(rising, np.zeros(4, int), ones))
    assert np.isnan(rank_correlation(rising, rising, np.zeros(4)))
    assert np.isnan(rank_correlation(rising, rising, np.array([0.0, 7, 0, 0])))


def test_tails_by_hand_with_ties() -> None:
    order = levels(np.array([5.0, 1, 1, 1, 9, 9, 5, 7]))  # 1 three times, 5 twice, 7, 9 twice
    ones = np.ones(8)
    assert tail_weights(order, ones, 0.25, top=True).tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert tail_weights(order, ones, 0.25, top=False) == pytest.approx(np.array([0, 2, 2, 2, 0, 0, 0, 0]) / 3)
    assert tail_weights(order, ones, 0.5, top=True) == pytest.approx([0.5, 0, 0, 0, 1, 1, 0.5, 1])
    weights = np.array([1.0, 0, 0, 0, 1, 0, 2, 0])
    assert tail_weights(order, weights, 0.5, top=False) == pytest.approx([2 / 3, 0, 0, 0, 0, 0, 4 / 3, 0])
    assert tail_weights(order, np.zeros(8), 0.5, top=True).tolist() == [0] * 8


def test_intervals_know_that_pairs_share_things() -> None:
    # A pair's value is the sum of its things': the mean's standard error is 2 s / sqrt(n), however many pairs.
    random = np.random.default_rng(0)
    own = random.normal(size=80)
    first, second = draw_pairs(80, 10_000, 0)
    values = own[first] + own[second]

    def mean(weights: np.ndarray) -> np.ndarray:
        return np.array([weights @ values / weights.sum()])

    drawn = draw_again(mean, 80, first, second, seed=0)
    assert drawn is not None and drawn.shape == (RESAMPLES, 1)
    assert np.array_equal(drawn, draw_again(mean, 80, first, second, seed=0))
    found = estimate(float(values.mean()), drawn[:, 0])
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 2 * own.std() / 80**0.5, rel=0.12)
    assert found.high - found.low > 5 * 2 * 1.96 * values.std() / len(values) ** 0.5


def test_few_things_and_what_is_not_defined_have_no_interval() -> None:
    first, second = draw_pairs(LEAST - 1, 100, 0)
    assert draw_again(lambda weights: weights, LEAST - 1, first, second, seed=0) is None
    assert estimate(0.5, None) == Estimate(0.5)
    assert estimate(float("nan"), np.ones(50)) == Estimate(None)
    drawn = np.where(np.arange(100) < 20, np.nan, 1.0)
    assert estimate(1.0, drawn) == Estimate(1.0)
    assert estimate(1.0, drawn[15:]) == Estimate(1.0, 1.0, 1.0)
