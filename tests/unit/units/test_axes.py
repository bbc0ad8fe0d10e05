from __future__ import annotations

import pytest

from kinprune.units.axes import ONE, Axes, Form


def sizes(axes: Axes, found: list[int]) -> list[int]:
    return [axes.size(axis) for axis in found]


def test_an_axis_of_one_index_is_one_axis_for_all() -> None:
    axes = Axes()
    assert axes.new(1) == ONE
    assert axes.leaves(ONE) == [ONE]
    assert axes.factors(ONE) == []
    assert axes.is_fixed(ONE)


def test_products_drop_ones_and_do_not_wrap_a_single_axis() -> None:
    axes = Axes()
    a, b = axes.new(3), axes.new(4)
    assert axes.product([ONE, a, ONE]) == a
    assert axes.product([]) == axes.product([ONE]) == ONE
    whole = axes.product([a, ONE, b])
    assert axes.size(whole) == 12
    assert axes.form(whole) is Form.PRODUCT
    assert axes.factors(whole) == axes.leaves(whole) == [a, b]


def test_unifying_leaves_makes_them_one_that_knows_what_both_knew() -> None:
    axes = Axes()
    a, b = axes.new(5), axes.new(5, "why b")
    axes.facts[a].coupled, axes.facts[b].normalised = True, True
    axes.unify(a, b)
    assert axes.find(a) == axes.find(b)
    facts = axes.facts[axes.find(a)]
    assert (facts.fixed, facts.coupled, facts.normalised, facts.active) == ("why b", True, True, False)


def test_unification_reaches_all_that_were_unified_before() -> None:
    axes = Axes()
    a, b, c, d = (axes.new(5) for _ in range(4))
    axes.unify(a, b)
    axes.unify(c, d)
    assert axes.find(a) != axes.find(c)
    axes.unify(b, c)
    assert len({axes.find(axis) for axis in (a, b, c, d)}) == 1


def test_axes_of_different_sizes_are_never_unified() -> None:
    axes = Axes()
    with pytest.raises(AssertionError, match="5 and 6"):
        axes.unify(axes.new(5), axes.new(6))


def test_the_first_reason_to_fix_an_axis_stays() -> None:
    axes = Axes()
    a, b = axes.new(3), axes.new(4)
    axes.freeze(a, "first")
    whole = axes.product([a, b])
    assert not axes.is_fixed(whole)
    axes.freeze(whole, "second")
    assert axes.is_fixed(whole)
    assert [axes.facts[leaf].fixed for leaf in axes.leaves(whole)] == ["first", "second"]


def test_a_leaf_unified_with_a_product_becomes_that_product_and_hands_down_what_it_knew() -> None:
    axes = Axes()
    heads, width, features = axes.new(3), axes.new(4), axes.new(12)
    axes.facts[features].coupled = True
    axes.unify(features, axes.product([heads, width]))
    assert axes.leaves(features) == [heads, width]
    assert axes.facts[heads].coupled and axes.facts[width].coupled


def test_reshaping_a_leaf_refines_it_and_back_gives_the_same_leaves() -> None:
    axes = Axes()
    leaf = axes.new(12, None)
    axes.facts[leaf].coupled = True
    outer, inner = axes.reshape([leaf], [3, 4])
    assert sizes(axes, [outer, inner]) == [3, 4]
    assert axes.leaves(leaf) == [outer, inner]
    assert axes.facts[outer].coupled and axes.facts[inner].coupled
    (back,) = axes.reshape([outer, inner], [12])
    assert axes.leaves(back) == [outer, inner]
    assert axes.reshape([back], [3, 4]) == [outer, inner]
    assert not axes.is_fixed(outer) and not axes.is_fixed(inner)


def test_a_finer_reshape_refines_further_and_the_coarser_one_still_matches() -> None:
    axes = Axes()
    leaf = axes.new(24)
    three, eight = axes.reshape([leaf], [3, 8])
    found = axes.reshape([leaf], [6, 4])
    assert sizes(axes, found) == [6, 4]
    assert axes.factors(found[0])[0] == three
    assert axes.leaves(found[0])[1:] + axes.leaves(found[1]) == axes.leaves(eight)
    assert not any(axes.is_fixed(leaf) for leaf in axes.leaves(leaf))


def test_ones_come_and_go_in_reshapes() -> None:
    axes = Axes()
    a, b = axes.new(3), axes.new(4)
    assert axes.reshape([a, b], [3, 1, 4]) == [a, ONE, b]
    assert axes.reshape([ONE, a, ONE, b], [3, 4]) == [a, b]
    assert axes.reshape([a, b], [1, 3, 4, 1]) == [ONE, a, b, ONE]


def test_dimensions_that_keep_their_size_keep_their_axis_whatever_happens_beside_them() -> None:
    axes = Axes()
    batch, a, b = axes.new(2), axes.new(3), axes.new(8)
    found = axes.reshape([batch, a, b], [2, 3, 2, 4])
    assert found[:2] == [batch, a]
    assert axes.leaves(b) == found[2:]


@pytest.mark.parametrize(("before", "after"), [([3, 4], [4, 3]), ([2, 3], [3, 2]), ([6, 4], [4, 6])])
def test_a_reshape_across_boundaries_freezes_all_it_mixes(before: list[int], after: list[int]) -> None:
    axes = Axes()
    given = [axes.new(size) for size in before]
    aside = axes.new(7)
    found = axes.reshape([aside, *given], [7, *after])
    assert found[0] == aside
    assert not axes.is_fixed(aside)
    assert sizes(axes, found[1:]) == after
    assert all(axes.is_fixed(axis) for axis in [*given, *found[1:]])


def test_two_products_of_equal_factors_are_unified_factor_by_factor() -> None:
    axes = Axes()
    a, b, c, d = axes.new(3), axes.new(4), axes.new(3), axes.new(4)
    axes.unify(axes.product([a, b]), axes.product([c, d]))
    assert axes.find(a) == axes.find(c)
    assert axes.find(b) == axes.find(d)
    assert not axes.is_fixed(a) and not axes.is_fixed(b)


def test_products_cut_at_different_places_are_refined_until_they_match() -> None:
    axes = Axes()
    a, b, c, d = axes.new(6), axes.new(4), axes.new(3), axes.new(8)
    axes.unify(axes.product([a, b]), axes.product([c, d]))
    assert axes.leaves(a) == [axes.find(c), *axes.leaves(a)[1:]]
    assert [axes.size(leaf) for leaf in axes.leaves(a)] == [3, 2]
    assert axes.leaves(d) == [*axes.leaves(a)[1:], axes.find(b)]
    assert not any(axes.is_fixed(axis) for axis in (a, b, c, d))


def test_products_that_cannot_be_matched_are_frozen() -> None:
    axes = Axes()
    a, b, c, d = axes.new(3), axes.new(4), axes.new(4), axes.new(3)
    axes.unify(axes.product([a, b]), axes.product([c, d]))
    assert all(axes.is_fixed(axis) for axis in (a, b, c, d))


def test_sums_keep_their_order_and_give_one_an_index_of_its_own() -> None:
    axes = Axes()
    a, b = axes.new(3), axes.new(5)
    token = axes.sum([ONE, a, b])
    assert axes.size(token) == 9
    assert [axes.size(segment) for segment in axes.segments(token)] == [1, 3, 5]
    assert axes.segments(token)[1:] == [a, b]
    assert axes.segments(token)[0] != ONE
    assert axes.sum([a]) == a


def test_nested_sums_and_products_unfold_only_their_own_kind() -> None:
    axes = Axes()
    a, b, c = axes.new(3), axes.new(3), axes.new(2)
    inner = axes.sum([a, b])
    whole = axes.product([c, inner])
    assert axes.factors(whole) == [c, inner]
    assert axes.segments(whole) == [whole]
    assert axes.leaves(whole) == [c, a, b]
    assert axes.segments(axes.sum([inner, whole])) == [a, b, whole]


def test_sums_cut_at_different_places_are_refined_until_they_match() -> None:
    axes = Axes()
    a, b, c, d = axes.new(4), axes.new(6), axes.new(7), axes.new(3)
    axes.unify(axes.sum([a, b]), axes.sum([c, d]))
    assert axes.leaves(b) == [*axes.leaves(c)[1:], axes.find(d)]
    assert axes.leaves(c)[0] == axes.find(a)
    assert [axes.size(leaf) for leaf in axes.leaves(b)] == [3, 3]


def test_a_sum_that_would_have_to_cut_a_product_is_frozen() -> None:
    axes = Axes()
    product = axes.product([axes.new(2), axes.new(2)])
    a, b, c = axes.new(3), axes.new(7), axes.new(6)
    axes.unify(axes.sum([a, b]), axes.sum([product, c]))
    assert all(axes.is_fixed(axis) for axis in (a, b, c, product))


def test_queries_keys_and_values_side_by_side_equal_a_product_of_three() -> None:
    """A bias concatenated from q, k and v, added to features seen as 3 x heads x width."""
    axes = Axes()
    three, heads, width = axes.new(3), axes.new(4), axes.new(5)
    q, k, v = axes.new(20), axes.new(20), axes.new(20)
    axes.unify(axes.sum([q, k, v]), axes.product([three, heads, width]))
    for part in (q, k, v):
        assert axes.leaves(part) == [axes.find(heads), axes.find(width)]
    assert axes.facts[three].fixed == "repeated segments"
    assert not axes.is_fixed(heads) and not axes.is_fixed(width)


def test_a_concatenation_of_equals_can_be_viewed_as_a_product() -> None:
    axes = Axes()
    q, k, v = axes.new(20), axes.new(20), axes.new(20)
    three, features = axes.reshape([axes.sum([q, k, v])], [3, 20])
    assert axes.is_fixed(three)
    assert len({axes.find(axis) for axis in (q, k, v, features)}) == 1
    assert not axes.is_fixed(q)


def test_segments_of_other_sizes_than_the_product_are_frozen() -> None:
    axes = Axes()
    three, rest, a, b = axes.new(3), axes.new(4), axes.new(5), axes.new(7)
    axes.unify(axes.product([three, rest]), axes.sum([a, b]))
    assert all(axes.is_fixed(axis) for axis in (three, rest, a, b))


def test_slices_of_whole_segments_are_these_segments() -> None:
    axes = Axes()
    a, b, c = axes.new(3), axes.new(4), axes.new(5)
    whole = axes.sum([a, b, c])
    assert axes.slice(whole, 0, 12) == whole
    assert axes.slice(whole, 3, 7) == b
    assert axes.segments(axes.slice(whole, 3, 12) or -1) == [b, c]


def test_a_slice_inside_a_leaf_refines_it_and_complementary_slices_agree() -> None:
    axes = Axes()
    leaf = axes.new(10)
    middle = axes.slice(leaf, 2, 5)
    assert middle is not None
    first, last = axes.slice(leaf, 0, 2), axes.slice(leaf, 5, 10)
    assert [axes.size(segment) for segment in axes.segments(leaf)] == [2, 3, 5]
    assert axes.leaves(leaf) == [first, middle, last]
    assert not axes.is_fixed(leaf)


def test_slices_of_a_product_take_whole_rows() -> None:
    axes = Axes()
    whole = axes.product([axes.new(3), inner := axes.new(4)])
    rows = [axes.slice(whole, start, start + 4) for start in (0, 4, 8)]
    assert rows == [inner, inner, inner]
    two = axes.slice(axes.product([axes.new(3), inner]), 4, 12)
    assert two is not None
    assert axes.size(two) == 8
    assert axes.factors(two)[-1] == inner
    assert not axes.is_fixed(whole)


def test_a_slice_across_rows_of_a_product_is_refused() -> None:
    axes = Axes()
    assert axes.slice(axes.product([axes.new(3), axes.new(4)]), 2, 6) is None
