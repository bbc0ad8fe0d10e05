from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from kinprune import overlap as module
from kinprune.errors import BudgetError, UnitError
from kinprune.importance import rank
from kinprune.overlap import chance, expected_overlap, overlap, overlap_at
from kinprune.selection import Budget, select
from kinprune.units import UnitSpace, find_units


class Two(nn.Module):
    """Groups of 4 and 8 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.fixture(scope="module")
def space() -> UnitSpace:
    return find_units(Two(), (1, 1))


def bools(text: str) -> Any:
    return np.array([character == "1" for character in text if character != " "])


def slow(space: UnitSpace, a: Any, b: Any) -> list[float]:
    found = []
    for start, stop in itertools.pairwise(space.offsets.tolist()):
        first = {unit for unit in range(start, stop) if a[unit]}
        second = {unit for unit in range(start, stop) if b[unit]}
        found.append(len(first & second) / len(first | second) if first | second else 1.0)
    return found


def test_overlap_by_hand(space: UnitSpace) -> None:
    a, b = bools("1100 11110000"), bools("0110 00111100")
    assert overlap(space, a, b).tolist() == [1 / 3, 2 / 6]
    assert overlap(space, a, a).tolist() == [1, 1]
    assert overlap(space, a, ~a).tolist() == [0, 0]
    assert overlap(space, bools("0000 11110000"), bools("0000 00000001")).tolist() == [1, 0]


@pytest.mark.parametrize("chunk", [1, 30, 1 << 22])
def test_masks_are_broadcast_and_compared_in_chunks(
    space: UnitSpace, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    masks = np.random.default_rng(0).random((7, 12)) < 0.4
    against = overlap(space, masks[0], masks)
    assert against.tolist() == [slow(space, masks[0], other) for other in masks]
    assert np.array_equal(overlap(space, masks, masks[0]), against)
    assert overlap(space, masks[:6], masks[1:]).tolist() == [slow(space, a, b) for a, b in itertools.pairwise(masks)]
    square = overlap(space, masks[:, None], masks[None])
    assert square.shape == (7, 7, 2)
    assert square.tolist() == [[slow(space, a, b) for b in masks] for a in masks]
    assert overlap(space, masks[0], masks[:0]).shape == (0, 2)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 1])
def test_rankings_overlap_as_the_masks_that_are_selected_from_them(space: UnitSpace, keep: float) -> None:
    rankings = np.stack([rank(space, row) for row in np.random.default_rng(1).random((6, 12))])
    masks = [select(space, -row.astype(float), Budget(keep=keep)).mask.kept for row in rankings]
    expected = [[slow(space, a, b) for b in masks] for a in masks]
    assert overlap_at(space, rankings, keep).tolist() == expected
    assert overlap_at(space, rankings[:2], keep, rankings[1:]).tolist() == [row[1:] for row in expected[:2]]


def test_chance_is_the_ratio_of_expected_intersection_and_union() -> None:
    assert [round(chance(keep), 3) for keep in (0.1, 0.2, 0.5, 1)] == [0.053, 0.111, 0.333, 1]
    for keep in (0, 1.1, float("nan")):
        with pytest.raises(BudgetError):
            chance(keep)


def test_the_expected_overlap_is_that_of_all_pairs_of_sets() -> None:
    for n, a, b in [(4, 2, 2), (5, 1, 3), (6, 4, 5), (3, 3, 2), (5, 0, 2), (5, 0, 0), (1, 1, 1)]:
        pairs = itertools.product(itertools.combinations(range(n), a), itertools.combinations(range(n), b))
        total = Fraction(0)
        for first, second in pairs:
            union = len({*first, *second})
            total += Fraction(len({*first} & {*second}), union) if union else 1
        exact = float(total / (comb(n, a) * comb(n, b)))
        assert expected_overlap(n, a, b) == pytest.approx(exact, rel=1e-12)


def test_the_expected_overlap_of_large_groups_nears_chance_from_above_and_random_masks_have_it(
    space: UnitSpace,
) -> None:
    near = expected_overlap([10, 100, 10_000, 1_000_000], [1, 10, 1000, 100_000], [1, 10, 1000, 100_000])
    assert (np.diff(near) < 0).all() and (near > chance(0.1)).all()
    assert near[-1] == pytest.approx(chance(0.1), abs=1e-6)
    random = np.random.default_rng(2)
    rankings = np.stack([rank(space, row) for row in random.random((400, 12))])
    found = overlap_at(space, rankings[:200], 0.5, rankings[200:]).mean(axis=(0, 1))
    assert np.allclose(found, expected_overlap(space.sizes, [2, 4], [2, 4]), atol=0.01)


def test_what_is_no_mask_of_the_space_is_refused(space: UnitSpace) -> None:
    whole = np.ones(12, dtype=bool)
    with pytest.raises(UnitError, match=r"shape \(11,\), expected \[..., 12\]"):
        overlap(space, whole, whole[:11])
    with pytest.raises(UnitError, match="bool and int64, expected bool"):
        overlap(space, whole, np.arange(12))
    with pytest.raises(UnitError, match="1 and 1 dimensions, expected 2"):
        overlap_at(space, np.arange(12), 0.5)
    with pytest.raises(BudgetError, match="keep"):
        overlap_at(space, np.zeros((2, 12), dtype=int), 1.5)
    for sizes in ((3, 4, 1), (3, 1, 4), (3, -1, 1)):
        with pytest.raises(BudgetError, match="larger than its group or negative"):
            expected_overlap(*sizes)
