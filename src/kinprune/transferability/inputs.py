"""What is compared: the features of a target task's images, and the probes of many source tasks on such features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TransferabilityError

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Target:
    """The backbone's features of a target task's images ``float32 [n, d]``, and their labels ``int64 [n]``.

    ``classes`` is how many classes the task has; labels are below it, and some classes may have no image here.

    Raises:
        TransferabilityError: shapes or types are wrong, a feature is not finite, a label is out of range, or fewer than
            two classes have an image.
    """

    features: Features
    labels: Labels
    classes: int

    def __post_init__(self) -> None:
        _expect("features", self.features, 2, (np.float32,))
        _expect("labels", self.labels, 1, (np.int64,))
        if len(self.labels) != len(self.features):
            raise TransferabilityError(
                f"there are {len(self.features)} rows of features and {len(self.labels)} labels, expected one an image"
            )
        wrong = np.flatnonzero(~np.isfinite(self.features).all(axis=1))
        if len(wrong):
            raise TransferabilityError(
                f"the features of {len(wrong)} of {len(self.features)} images are not finite, image {wrong[0]} the "
                "first: check the backbone's weights and the images' preprocessing"
            )
        outside = (self.labels < 0) | (self.labels >= self.classes)
        if outside.any():
            raise TransferabilityError(
                f"label {self.labels[outside][0]} is out of range, expected 0 to {self.classes - 1} for "
                f"{self.classes} classes"
            )
        if len(np.unique(self.labels)) < 2:
            raise TransferabilityError(
                "all images are of one class or there are none, expected images of at least two classes"
            )


@dataclass(frozen=True, eq=False)
class Sources:
    """Linear probes of N source tasks over the backbone's features: ``softmax(features @ weights.T + biases)``.

    ``weights`` and ``means [N, c, d]``, the classes' mean features, and ``biases [N, c]`` are float16 or float32 and
    padded to the most classes of any task; ``counts int64 [N]`` says how many of them are real. Padded places are never
    read. The arrays may be memory-mapped: a chunk is read at a time.

    Raises:
        TransferabilityError: shapes or types are wrong, or a count is below two or above ``c``.
    """

    weights: NDArray[Any]
    biases: NDArray[Any]
    means: NDArray[Any]
    counts: Labels

    def __post_init__(self) -> None:
        for name, array, axes in (("weights", self.weights, 3), ("means", self.means, 3), ("biases", self.biases, 2)):
            _expect(name, array, axes, (np.float16, np.float32))
        _expect("counts", self.counts, 1, (np.int64,))
        shape = self.weights.shape
        if self.means.shape != shape or self.biases.shape != shape[:2] or self.counts.shape != shape[:1]:
            raise TransferabilityError(
                f"weights {shape}, means {self.means.shape}, biases {self.biases.shape} and counts "
                f"{self.counts.shape} do not belong together, expected [N, c, d], [N, c, d], [N, c] and [N]"
            )
        if not len(self.counts):
            raise TransferabilityError("there is no source task to compare with, expected at least one")
        wrong = np.flatnonzero((self.counts < 2) | (self.counts > shape[1]))
        if len(wrong):
            raise TransferabilityError(
                f"source task {wrong[0]} has {self.counts[wrong[0]]} classes, expected 2 to {shape[1]}"
            )

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, places: Labels) -> Sources:
        """The source tasks at these places, in this order (a copy)."""
        return Sources(self.weights[places], self.biases[places], self.means[places], self.counts[places])


def sample(target: Target, count: int, seed: int) -> Target:
    """About ``count`` of the target's images, drawn so that every class keeps its share and at least one image."""
    if count < 1:
        raise TransferabilityError(f"a sample of {count} images was asked for, expected at least 1")
    shuffled = np.random.default_rng(seed).permutation(len(target.labels))
    labels = target.labels[shuffled]
    by_class = np.argsort(labels, kind="stable")
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    # How far down its class an image is, in [0, 1): the first of every class are at 0.
    depth = np.empty(len(labels))
    depth[by_class] = (np.arange(len(labels)) - np.repeat(starts, sizes)) / np.repeat(sizes, sizes)
    kept = np.sort(shuffled[np.argsort(depth, kind="stable")[: max(count, len(sizes))]])
    return Target(target.features[kept], target.labels[kept], target.classes)


def _expect(name: str, array: NDArray[Any], axes: int, types: tuple[type, ...]) -> None:
    if not isinstance(array, np.ndarray) or array.ndim != axes or array.dtype.type not in types:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        expected = " or ".join(kind.__name__ for kind in types)
        raise TransferabilityError(f"{name} are {found}, expected a numpy array of {expected} with {axes} axes")
