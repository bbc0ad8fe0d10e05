"""A small target and source tasks, some of whose classes look like the target's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kinprune.transferability import Sources, Target

Pair = Callable[..., tuple[Target, Sources]]


@pytest.fixture(scope="session")
def make_pair() -> Pair:
    """A function from a seed and sizes to a target and its source tasks, one for each of ``counts``."""

    def make(
        seed: int = 0, *, classes: int = 3, shots: int = 8, width: int = 6, counts: Sequence[int] = (3,) * 5
    ) -> tuple[Target, Sources]:
        random = np.random.default_rng(seed)
        own = random.normal(0, 1, (classes, width)) + 2
        labels = random.permutation(np.repeat(np.arange(classes), shots)).astype(np.int64)
        features = (own[labels] + random.normal(0, 0.7, (len(labels), width))).astype(np.float32)
        shape = (len(counts), max(counts), width)
        # Source tasks lie on a line from "its classes are the target's" to "its classes are any".
        far = np.linspace(0, 1, len(counts))[:, None, None]
        near = own[np.arange(max(counts)) % classes]
        means = (1 - far) * near + far * (random.normal(0, 1, shape) + 2) + random.normal(0, 0.1, shape)
        weights = means - means.mean(axis=1, keepdims=True)
        biases = -(weights * (means + means.mean(axis=1, keepdims=True))).sum(axis=2) / 2
        # What is padded must never be read.
        padded = np.arange(max(counts)) >= np.array(counts)[:, None]
        weights[padded], means[padded], biases[padded] = np.nan, np.nan, np.nan
        arrays = [array.astype(np.float16) for array in (weights, biases, means)]
        return Target(features, labels, classes), Sources(*arrays, np.array(counts, dtype=np.int64))

    return make
