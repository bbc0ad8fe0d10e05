"""Weighted statistics of pairs against those of so many copies, slowly."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kinprune.pair_statistics import levels, rank_correlation, tail_weights

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=25)


def middle_ranks(values: list[int]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@given(PAIRS)
def test_a_weight_is_so_many_copies(pairs: list[tuple[int, int, int]]) -> None:
    first, second, weights = (np.array(part) for part in zip(*pairs, strict=True))
    copies = [(a, b) for a, b, times in pairs for _ in range(times)]
    a, b = (middle_ranks([copy[side] for copy in copies]) for side in (0, 1))
    found = rank_correlation(levels(first), levels(second), weights.astype(float))
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert np.isnan(found)
    else:
        assert np.isclose(found, np.corrcoef(a, b)[0, 1], atol=1e-9)


@given(PAIRS, st.sampled_from([0.1, 0.25, 0.5, 1.0]), st.booleans())
def test_a_tail_is_what_sorting_gives_whatever_the_order_of_ties(
    pairs: list[tuple[int, int, int]], share: float, top: bool
) -> None:
    values, others, weights = (np.array(part, dtype=float) for part in zip(*pairs, strict=True))
    found = tail_weights(levels(values), weights, share, top=top)
    assert np.isclose(found.sum(), share * weights.sum())
    assert (found >= 0).all() and (found <= weights + 1e-12).all()
    # Of each value as much as sorting all of them and cutting gives.
    wanted, left = dict.fromkeys(values.tolist(), 0.0), share * weights.sum()
    for value in sorted(wanted, reverse=top):
        wanted[value] = min(left, weights[values == value].sum())
        left -= wanted[value]
        assert np.isclose(found[values == value].sum(), wanted[value])
    assert len(others) == len(found)
