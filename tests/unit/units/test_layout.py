from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kinprune.units.layout import Fixed, Layout, Product, Sum, Units, affine, groups, kept, size, unit_of

COUNTS = [3, 4, 2]


def test_heads_inside_queries_keys_and_values_by_hand() -> None:
    features = Product((Fixed(3), Units(0), Fixed(2)))  # 3 x 3 heads x width 2
    assert size(features, COUNTS) == 18
    assert affine(features) == (0, {0: 6})
    assert unit_of(features, 0, COUNTS).tolist() == [0, 0, 1, 1, 2, 2] * 3
    left = kept(features, [np.array([0, 2]), np.arange(4), np.arange(2)], COUNTS)
    assert left.tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]


def test_a_concatenation_by_hand() -> None:
    channels = Sum((Fixed(2), Units(1), Product((Units(2), Fixed(2))), Units(1)))
    assert size(channels, COUNTS) == 2 + 4 + 4 + 4
    assert affine(channels) == (2, {1: 2, 2: 2})
    assert groups(channels) == [1, 2, 1]
    assert unit_of(channels, 1, COUNTS).tolist() == [-1, -1, 0, 1, 2, 3, -1, -1, -1, -1, 0, 1, 2, 3]
    left = kept(channels, [np.arange(3), np.array([3]), np.array([1])], COUNTS)
    assert left.tolist() == [0, 1, 5, 8, 9, 13]


def _products(parts: st.SearchStrategy[Layout]) -> st.SearchStrategy[Layout]:
    fixed = st.lists(st.builds(Fixed, st.integers(1, 3)), max_size=2)
    return st.builds(lambda before, part, after: Product((*before, part, *after)), fixed, parts, fixed)


LAYOUTS: st.SearchStrategy[Layout] = st.recursive(
    st.builds(Fixed, st.integers(1, 3)) | st.builds(Units, st.integers(0, 2)),
    lambda parts: _products(parts) | st.builds(Sum, st.lists(parts, min_size=1, max_size=3).map(tuple)),
    max_leaves=6,
)


@given(LAYOUTS, st.tuples(*[st.sets(st.integers(0, count - 1)) for count in COUNTS]))
def test_what_stays_is_what_belongs_to_kept_units(layout: Layout, chosen: tuple[set[int], ...]) -> None:
    units = [np.array(sorted(part), dtype=np.int64) for part in chosen]
    alive = np.ones(size(layout, COUNTS), dtype=bool)
    for group, part in enumerate(chosen):
        owner = unit_of(layout, group, COUNTS)
        alive &= np.isin(owner, [-1, *part])
    left = kept(layout, units, COUNTS)
    assert left.tolist() == np.flatnonzero(alive).tolist()
    counts = [len(part) for part in chosen]
    base, slopes = affine(layout)
    assert len(left) == size(layout, counts) == base + sum(slope * counts[group] for group, slope in slopes.items())
