from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kinprune.errors import KinpruneError
from kinprune.transferability import MEASURES, Sources, Target, TransferabilityError, sample, transferability

Pair = Callable[..., tuple[Target, Sources]]
FEATURES = np.eye(4, 3, dtype=np.float32)
LABELS = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"features": FEATURES.astype(np.float64)}, r"features are float64 \(4, 3\), expected .* float32 with 2 axes"),
        ({"features": FEATURES[0]}, r"features are float32 \(3,\)"),
        ({"features": [[1.0]]}, "features are list"),
        ({"labels": LABELS.astype(np.int32)}, "labels are int32"),
        ({"labels": LABELS[:, None]}, r"labels are int64 \(4, 1\), expected .* with 1 axes"),
        ({"labels": LABELS[:3]}, "4 rows of features and 3 labels"),
        ({"features": np.where(FEATURES > 0, np.nan, FEATURES)}, "features of 3 of 4 images are not finite, image 0"),
        ({"features": np.full((4, 3), np.inf, dtype=np.float32)}, "4 of 4 images are not finite"),
        ({"labels": np.array([0, 1, 2, 1])}, "label 2 is out of range, expected 0 to 1"),
        ({"labels": np.array([0, -1, 0, 1])}, "label -1 is out of range"),
        ({"classes": 1}, "label 1 is out of range, expected 0 to 0"),
        ({"labels": np.zeros(4, dtype=np.int64)}, "all images are of one class"),
        ({"features": FEATURES[:0], "labels": LABELS[:0]}, "there are none, expected images of at least two"),
    ],
)
def test_a_malformed_target_is_refused(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(TransferabilityError, match=told) as caught:
        Target(**({"features": FEATURES, "labels": LABELS, "classes": 2} | changed))
    assert isinstance(caught.value, KinpruneError)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"weights": np.zeros((5, 3, 4))}, r"weights are float64 .* expected .* float16 or float32 with 3 axes"),
        ({"weights": np.zeros((5, 3), dtype=np.float32)}, "weights are float32"),
        ({"biases": np.zeros((5, 3), dtype=np.int64)}, "biases are int64"),
        ({"biases": np.zeros((5, 2), dtype=np.float32)}, r"do not belong together, expected \[N, c, d\]"),
        ({"means": np.zeros((5, 3, 5), dtype=np.float32)}, "do not belong together"),
        ({"counts": np.full(4, 3)}, "do not belong together"),
        ({"counts": np.full(5, 3.0)}, "counts are float64"),
        ({"counts": np.array([3, 2, 1, 3, 3])}, "source task 2 has 1 classes, expected 2 to 3"),
        ({"counts": np.array([3, 2, 3, 3, 4])}, "source task 4 has 4 classes"),
    ],
)
def test_malformed_sources_are_refused(changed: dict[str, Any], told: str) -> None:
    shape = (5, 3, 4)
    given: dict[str, Any] = {
        "weights": np.zeros(shape, dtype=np.float16),
        "biases": np.zeros(shape[:2], dtype=np.float16),
        "means": np.zeros(shape, dtype=np.float16),
        "counts": np.full(5, 3),
    }
    assert len(Sources(**given)) == 5
    with pytest.raises(TransferabilityError, match=told):
        Sources(**(given | changed))


def test_no_source_task_at_all_is_refused() -> None:
    none = np.zeros((0, 3, 4), dtype=np.float32)
    with pytest.raises(TransferabilityError, match="no source task"):
        Sources(none, none[:, :, 0], none, np.zeros(0, dtype=np.int64))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_damaged_record_is_named(measure: str, value: float, make_pair: Pair) -> None:
    target, sources = make_pair(counts=(3, 2, 3, 2, 3))
    damaged = sources.means if measure == "class-mean" else sources.weights
    damaged[3, 1, 2] = value
    with pytest.raises(TransferabilityError, match="source task 3 "):
        transferability(measure, target, sources)


def test_features_of_another_backbone_are_refused(make_pair: Pair) -> None:
    target, _ = make_pair(width=6)
    _, sources = make_pair(width=7)
    with pytest.raises(TransferabilityError, match="6 features an image and the probes take 7"):
        transferability("leep", target, sources)


def test_a_sample_keeps_shares_and_every_class() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 1]).astype(np.int64)
    features = np.arange(91, dtype=np.float32)[:, None]
    target = Target(features, labels, 3)
    few = sample(target, 31, seed=0)
    np.testing.assert_array_equal(np.bincount(few.labels), [20, 10, 1])
    np.testing.assert_array_equal(few.labels, labels[few.features[:, 0].astype(int)])
    assert len(np.unique(few.features)) == 31
    np.testing.assert_array_equal(few.features, sample(target, 31, seed=0).features)
    assert not np.array_equal(few.features, sample(target, 31, seed=1).features)
    np.testing.assert_array_equal(np.bincount(sample(target, 1, seed=0).labels), [1, 1, 1])
    np.testing.assert_array_equal(sample(target, 500, seed=0).features, features)
    with pytest.raises(TransferabilityError, match="0 images"):
        sample(target, 0, seed=0)
