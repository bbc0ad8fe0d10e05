from __future__ import annotations

import numpy as np
import pytest

from kinprune.precision import PRECISIONS, Precision
from kinprune.units.runtime import NO_RUNTIME, ONNX_RUNTIME, Overhead, Runtime


def test_a_peak_by_hand() -> None:
    own = Overhead(fixed=1000, operation=10, product=30, copied=2, largest=4, spare=3, most_spare=500, most_loose=900)
    runtime = Runtime(dict.fromkeys(PRECISIONS, own))
    weights, live = np.array([5000, 600, 600]), np.array([100, 100, 400])
    matrices = np.array([[200, 800], [10, 50], [10, 50]])
    assert runtime.peak_bytes("fp32", weights, live, matrices, 7, 2).tolist() == [
        5000 + 900 + 2 * 1000 + 1000 + 70 + 60 + 4 * 800,  # while the largest weight is read
        600 + 300 + 2 * 60 + 1000 + 70 + 60 + 100 + 3 * 100,  # while it runs
        600 + 300 + 2 * 60 + 1000 + 70 + 60 + 400 + 500,  # and no more than so much is spare
    ]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_runtime_takes_more_than_none(precision: Precision) -> None:
    given = (np.array([9000]), np.array([700]), np.array([[40, 60]]), 5, 2)
    assert NO_RUNTIME.peak_bytes(precision, *given).tolist() == [9700]
    assert ONNX_RUNTIME.peak_bytes(precision, *given)[0] > 1_000_000


def test_a_model_without_weights_needs_a_runtime_all_the_same() -> None:
    nothing = np.zeros(1, dtype=np.int64)
    found = ONNX_RUNTIME.peak_bytes("fp32", nothing, nothing, np.zeros((1, 0), dtype=np.int64), 1, 0)
    assert found.tolist() == [ONNX_RUNTIME.overheads["fp32"].fixed + ONNX_RUNTIME.overheads["fp32"].operation]
