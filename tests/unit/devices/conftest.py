"""What the tests of devices share: a small convolutional network, its unit space, and a made-up device of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import kinprune as kp
from kinprune.devices.device import Device, Profile
from kinprune.devices.widths import sample_counts
from kinprune.units import UnitSpace


@pytest.fixture(scope="session")
def backbone() -> kp.Backbone:
    return kp.load_backbone("test_resnet", num_classes=3, random=True, image_size=32)


@pytest.fixture(scope="session")
def space(backbone: kp.Backbone) -> UnitSpace:
    return kp.find_units(backbone.model, (32, 32), head=backbone.head)


Latency = Callable[[NDArray[np.int64]], NDArray[np.float64]]


@pytest.fixture(scope="session")
def true_latency(space: UnitSpace) -> Latency:
    """A device whose vectors hold eight channels, and which dislikes what is no multiple of four: ms of ``[n, g]``."""
    widths = np.array([group.width for group in space.groups])

    def milliseconds(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        wide = counts * widths
        rounded = -(-wide // 8) * 8
        return np.asarray(0.2 + (rounded * 0.01).sum(1) + ((wide % 4 != 0) * wide * 0.02).sum(1))

    return milliseconds


@pytest.fixture(scope="session")
def profile(space: UnitSpace, true_latency: Latency) -> Profile:
    counts = sample_counts(space, 200)
    return Profile(
        "test_resnet",
        space.fingerprint,
        (32, 32),
        "fp32",
        "onnxruntime 1.20.0",
        {"system": "Linux", "processor": "one of a kind", "cores": "1"},
        1,
        1,
        tuple(tuple(row) for row in counts.tolist()),
        tuple(true_latency(counts).tolist()),
    )


@pytest.fixture
def device(profile: Profile) -> Device:
    return Device("pi", {"latency_ms": 0.9}, "fp32", (profile,))
