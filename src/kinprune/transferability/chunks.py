"""All source tasks, a bounded chunk at a time: probes in float32, their logits on the target's images, scores.

Tasks with the same number of classes go together, so that no measure sees padding and none has a loop over tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kinprune.errors import TransferabilityError
from kinprune.transferability.inputs import Features, Labels, Scores, Sources, Target

CHUNK = 8_000_000
"""How many float32 numbers of probes, or of logits, there are at one time at most (one task's own are the least)."""

BLOCK = 250_000
"""How many logits a measure is given at one time at most: its temporary arrays should stay in the cache."""

Kernel = Callable[[Features, Labels], Scores]
"""From logits ``[k, c, n]`` of k tasks of c classes to k scores; see ``score_logits`` for the order of images."""


def score_logits(kernel: Kernel, target: Target, sources: Sources) -> Scores:
    """A kernel's scores ``[N]`` from the probes' logits.

    The kernel gets the images sorted by class, and as second argument where each class that has images starts, with n
    at the end ``[classes + 1]``. It may write over the logits.
    """
    order = np.argsort(target.labels, kind="stable")
    features = np.ascontiguousarray(target.features[order].T)
    starts = np.append(np.unique(target.labels[order], return_index=True)[1], len(order)).astype(np.int64)
    scores = np.empty(len(sources))
    room = np.empty(0, dtype=np.float32)
    images = len(order)
    for places, weights in converted(sources.weights, sources.counts, images):
        tasks, classes, width = weights.shape
        if room.size < tasks * classes * images:
            room = np.empty(tasks * classes * images, dtype=np.float32)
        flat = room[: tasks * classes * images].reshape(tasks * classes, images)
        with np.errstate(over="ignore", invalid="ignore"):
            np.matmul(weights.reshape(tasks * classes, width), features, out=flat)
        logits = flat.reshape(tasks, classes, images)
        step = max(1, BLOCK // (classes * images))
        for start in range(0, tasks, step):
            those = places[start : start + step]
            block = logits[start : start + step]
            block += sources.biases[those, :classes, None].astype(np.float32)
            _refuse_infinite(block, those)
            scores[those] = kernel(block, starts)
    return scores


def converted(array: NDArray[Any], counts: Labels, images: int = 1) -> Iterator[tuple[Labels, Features]]:
    """``array [N, c, d]`` in float32, in chunks ``[k, c', d]`` of tasks with the same count c', and their places.

    Chunks are so short that neither they nor their logits on so many ``images`` are more than ``CHUNK`` numbers. The
    memory is used again for the next chunk.
    """
    width = array.shape[2]
    room = np.empty(0, dtype=np.float32)
    for classes in np.unique(counts):
        those = np.flatnonzero(counts == classes)
        step = max(1, CHUNK // (int(classes) * max(width, images)))
        for start in range(0, len(those), step):
            places = those[start : start + step]
            size = len(places) * int(classes) * width
            if room.size < size:
                room = np.empty(size, dtype=np.float32)
            chunk = room[:size].reshape(len(places), int(classes), width)
            _convert(_rows(array, places)[:, :classes], chunk)
            yield places, chunk


def _rows(array: NDArray[Any], places: Labels) -> NDArray[Any]:
    """Rows at rising places: a view where no other lies between."""
    first, last = int(places[0]), int(places[-1])
    return array[first : last + 1] if last - first + 1 == len(places) else array[places]


def _convert(array: NDArray[Any], into: Features) -> None:
    """Copy to float32; torch does it on all cores and with the processor's own instruction, ten times faster."""
    if min(array.strides) < 0:
        array = array.copy()
    with warnings.catch_warnings():
        # An array that is read-only, as memory-mapped ones are: it is only read.
        warnings.simplefilter("ignore", UserWarning)
        torch.from_numpy(into).copy_(torch.from_numpy(array))


def _refuse_infinite(logits: Features, places: Labels) -> None:
    """One sum is quick, and not finite where a logit is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(logits.sum()):
            return
        wrong = ~np.isfinite(logits).all(axis=(1, 2))
    if wrong.any():
        raise TransferabilityError(
            f"the probe of source task {places[wrong][0]} gives logits that are not finite on the target's images: its "
            "weights or biases are damaged or left float16's range; build its record again"
        )
