"""What holds for every measure, target and bank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinprune.transferability import MEASURES, Sources, Target, nearest, transferability


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Target, Sources, np.random.Generator]:
    """A target of 2 to 4 classes, and 1 to 12 source tasks of 2 to 5; features and probes that are no ties."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes, width = draw(st.integers(2, 4)), draw(st.integers(2, 7))
    sizes = draw(st.lists(st.integers(1, 9), min_size=classes, max_size=classes))
    labels = random.permutation(np.repeat(np.arange(classes), sizes))
    features = random.normal(0, 1, (len(labels), width)) + random.normal(0, 2, (classes, width))[labels]
    counts = np.array(draw(st.lists(st.integers(2, 5), min_size=1, max_size=12)))
    shape = (len(counts), 5, width)
    kind = draw(st.sampled_from([np.float16, np.float32]))
    weights, means = (random.normal(0, 1, shape).astype(kind) for _ in range(2))
    biases = random.normal(0, 1, shape[:2]).astype(kind)
    return Target(features.astype(np.float32), labels, classes), Sources(weights, biases, means, counts), random


@pytest.mark.parametrize("measure", MEASURES)
@given(pair=pairs())
@settings(max_examples=40, deadline=None)
def test_each_source_task_is_scored_for_itself(measure: str, pair: tuple[Target, Sources, np.random.Generator]) -> None:
    target, sources, random = pair
    scores = transferability(measure, target, sources)
    order = random.permutation(len(sources))
    np.testing.assert_allclose(
        transferability(measure, target, sources.take(order)), scores[order], rtol=1e-5, atol=2e-6
    )
    part = order[: max(1, len(order) // 2)]
    np.testing.assert_allclose(transferability(measure, target, sources.take(part)), scores[part], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("measure", MEASURES)
@given(pair=pairs())
@settings(max_examples=40, deadline=None)
def test_the_order_of_images_and_names_of_classes_do_not_matter(
    measure: str, pair: tuple[Target, Sources, np.random.Generator]
) -> None:
    target, sources, random = pair
    order, names = random.permutation(len(target.labels)), random.permutation(target.classes)
    turned = Target(target.features[order], names[target.labels[order]], target.classes)
    np.testing.assert_allclose(
        transferability(measure, turned, sources), transferability(measure, target, sources), rtol=1e-4, atol=2e-5
    )


@given(pair=pairs())
@settings(max_examples=60, deadline=None)
def test_scores_are_in_their_range(pair: tuple[Target, Sources, np.random.Generator]) -> None:
    target, sources, _ = pair
    present = len(np.unique(target.labels))
    for measure in ("leep", "nce", "n-leep"):
        # A source task tells no more than all, and where it tells nothing the labels' own entropy is what is left.
        shares = np.bincount(target.labels) / len(target.labels)
        entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        scores = transferability(measure, target, sources)
        assert (scores <= 1e-6).all() and (scores >= -entropy - 1e-5).all(), measure
    h_score = transferability("h-score", target, sources)
    assert (h_score >= -1e-9).all() and (h_score <= np.minimum(sources.counts, present) - 1 + 1e-6).all()
    assert (np.abs(transferability("class-mean", target, sources)) <= 1).all()


@pytest.mark.parametrize("measure", MEASURES)
@given(pair=pairs(), share=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_the_nearest_are_the_best_best_first(
    measure: str, pair: tuple[Target, Sources, np.random.Generator], share: float
) -> None:
    target, sources, _ = pair
    count = 1 + int(share * (len(sources) - 1))
    places, scores = nearest(measure, target, sources, count)
    full = transferability(measure, target, sources)
    np.testing.assert_array_equal(places, np.lexsort((np.arange(len(full)), -full))[:count])
    np.testing.assert_array_equal(scores, full[places])
