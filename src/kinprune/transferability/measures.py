"""Transferability of many source tasks to one target, by a measure's name or a function of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TransferabilityError
from kinprune.transferability.chunks import Kernel, score_logits
from kinprune.transferability.inputs import Scores, Sources, Target, sample
from kinprune.transferability.probabilities import leep, n_leep, nce
from kinprune.transferability.prototypes import class_mean
from kinprune.transferability.representations import h_score, logme

Measure = Callable[[Target, Sources], Scores]

_KERNELS: dict[str, Kernel] = {"leep": leep, "nce": nce, "n-leep": n_leep, "logme": logme, "h-score": h_score}
MEASURES: tuple[str, ...] = (*_KERNELS, "class-mean")
"""The measures that come with the library."""

_registered: dict[str, Measure] = {
    **{name: partial(score_logits, kernel) for name, kernel in _KERNELS.items()},
    "class-mean": class_mean,
}

SAMPLE = 96
SAMPLE_OF_CLASS = 8
"""How many images, and how many a class, ``nearest`` looks at first."""

LEAD = 0.02
LEAST_LEAD = 500
"""The share, and the least number, of source tasks whose scores on those few images earn them all images."""


def register(name: str, measure: Measure) -> None:
    """Make a measure known by a name: a function of a target and N sources to N finite scores, higher for nearer.

    Raises:
        TransferabilityError: the name is taken.
    """
    if name in _registered:
        raise TransferabilityError(f"there is already a measure '{name}', expected another name")
    _registered[name] = measure


def transferability(
    measure: str | Measure, target: Target, sources: Sources, *, images: int | None = None, seed: int = 0
) -> Scores:
    """How well each source task fits the target ``float64 [N]``, higher for nearer.

    Scores compare source tasks for one target by one measure, nothing else. ``images`` scores on a sample of so many of
    the target's images (more where there are more classes), drawn by ``seed``; nothing else is random.

    Raises:
        TransferabilityError: the measure is unknown or gives no number for a source task, the features are of another
            width than the probes, or a probe is damaged.
    """
    function = _measure(measure)
    width = sources.weights.shape[2]
    if target.features.shape[1] != width:
        raise TransferabilityError(
            f"the target has {target.features.shape[1]} features an image and the probes take {width}: they are of "
            "different backbones; compute the target's features with the bank's backbone"
        )
    if images is not None:
        target = sample(target, images, seed)
    scores = np.asarray(function(target, sources), dtype=np.float64)
    if scores.shape != (len(sources),):
        raise TransferabilityError(
            f"the measure gave scores of shape {scores.shape}, expected ({len(sources)},): one a source task"
        )
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        raise TransferabilityError(
            f"the measure gave {len(wrong)} of {len(scores)} source tasks no finite score, task {wrong[0]} the first"
        )
    return scores


def nearest(
    measure: str | Measure, target: Target, sources: Sources, count: int, *, seed: int = 0
) -> tuple[NDArray[np.int64], Scores]:
    """The places ``int64 [count]`` and scores of the source tasks nearest to the target, best first.

    Of equal scores the lower place wins. Where there are many source tasks and images, a sample of the images drawn by
    ``seed`` first sorts out all but the leading two per cent, and only these are scored on all images: what is returned
    has its exact score, but a task that does badly on the sample may be missed. "class-mean" and measures of one's own
    are always scored in full.

    Raises:
        TransferabilityError: as ``transferability``, or ``count`` is not between 1 and N.
    """
    if not 1 <= count <= len(sources):
        raise TransferabilityError(f"{count} nearest of {len(sources)} source tasks were asked for, expected 1 to all")
    few = _few(measure, target, sources, count)
    if few is None:
        scores = transferability(measure, target, sources)
        order = _best(scores, count)
        return order, scores[order]
    images, lead = few
    rough = transferability(measure, target, sources, images=images, seed=seed)
    # In rising places, so that the lower wins among equals below.
    leading = np.sort(_best(rough, lead))
    scores = transferability(measure, target, sources.take(leading))
    order = _best(scores, count)
    return leading[order], scores[order]


def _few(measure: str | Measure, target: Target, sources: Sources, count: int) -> tuple[int, int] | None:
    """How many images to look at first and how many source tasks to keep then, or None where that saves little."""
    images = sample_size(measure, target)
    lead = max(LEAST_LEAD, 20 * count, math.ceil(LEAD * len(sources)))
    return (images, lead) if images is not None and 2 * lead <= len(sources) else None


def sample_size(measure: str | Measure, target: Target) -> int | None:
    """How many of the target's images are enough to sort out most source tasks; None where that saves little."""
    if not isinstance(measure, str) or measure not in _KERNELS:
        return None
    images = max(SAMPLE, SAMPLE_OF_CLASS * len(np.unique(target.labels)))
    return images if 2 * images <= len(target.labels) else None


def _best(scores: Scores, count: int) -> NDArray[np.int64]:
    return np.argsort(-scores, kind="stable")[:count]


def _measure(measure: str | Measure) -> Measure:
    if callable(measure):
        return measure
    if measure not in _registered:
        raise TransferabilityError(f"there is no measure '{measure}', expected one of: {', '.join(_registered)}")
    return _registered[measure]
