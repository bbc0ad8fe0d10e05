"""Prediction: the latency of any mask, from those of a few hundred that a device was timed with.

A model's latency is taken as a sum over its layers, each a function of its kept width: of the work, of the work with
the width rounded up to what the device's vectors hold, of what a wide layer costs beyond that and of what it costs
that a width is odd; and of the bytes of all weights, beyond the sizes of caches. Layers that are alike share a
function. What each costs is found by non-negative least squares of relative errors, so that a smaller model is never
foretold to take longer but for an odd width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.units import UnitSpace

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
BLOCKS = (1, 4, 8, 16, 32)
ODD = (4, 8, 16)
BENDS = (0.25, 0.5, 0.75)
"""Shares of a layer's whole width from which on each further channel may cost more."""
RIDGE = 1e-6
CACHES = tuple(2**power for power in range(18, 26))
"""Bytes of weights, from a quarter to 32 MB, beyond which a device may take longer for each: sizes of caches."""
FOLDS = 5
CERTAIN = 0.95


@dataclass(frozen=True)
class Layers:
    """What the features of a model are made of: for each group its ``widths`` a unit, ``work`` a unit, and ``alike``,
    a number that groups that are alike share; ``pairs`` are groups whose layers' work is a product of both.
    """

    widths: Counts
    work: Floats
    alike: Counts
    pairs: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Milliseconds of a mask of ``space`` on a device: ``features(counts) @ weights``.

    ``error`` is the median relative error on masks that had no part in it, ``margin`` what nearly all of them (95 %)
    took longer than foretold, at most.
    """

    space: UnitSpace
    layers: Layers
    weights: Floats
    error: float
    margin: float

    def predict(self, counts: Counts) -> Floats:
        """Milliseconds for counts ``[n, g]``: ``[n]``."""
        return np.asarray(features(self.space, self.layers, counts) @ self.weights)

    def bound(self, counts: Counts) -> Floats:
        """Milliseconds that are hardly ever exceeded, for counts ``[n, g]``: ``[n]``."""
        return self.predict(counts) * (1 + self.margin)


def describe_layers(space: UnitSpace) -> Layers:
    """What the layers of a unit space have to do for each unit."""
    terms = space.costs.mac_terms
    work = np.zeros(len(space.groups))
    pairs: dict[tuple[int, int], float] = {}
    for scale, product in zip(terms.scales.tolist(), terms.factors, strict=True):
        held = sorted({int(group) for row in product for group in np.flatnonzero(terms.slopes[row])})
        whole = float(scale) * float(np.prod([terms.bases[row] + terms.slopes[row] @ space.sizes for row in product]))
        for group in held:
            work[group] += whole / space.sizes[group]
        if len(held) == 2:
            pair = (held[0], held[1])
            pairs[pair] = pairs.get(pair, 0.0) + whole / float(space.sizes[held[0]] * space.sizes[held[1]])
    paired = _paired(pairs)
    keys = [
        (group.kind, group.size, group.width, round(float(work[number])), number if number in paired else -1)
        for number, group in enumerate(space.groups)
    ]
    known = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return Layers(
        np.array([group.width for group in space.groups], dtype=np.int64),
        work,
        np.array([known[key] for key in keys], dtype=np.int64),
        tuple((one, two, scale) for (one, two), scale in pairs.items()),
    )


def _paired(pairs: dict[tuple[int, int], float]) -> set[int]:
    return {group for pair in pairs for group in pair}


def features(space: UnitSpace, layers: Layers, counts: Counts) -> Floats:
    """What latency is a sum of, for counts ``[n, g]``: ``[n, f]``, never negative."""
    width, full = counts * layers.widths, space.sizes * layers.widths
    gather = np.zeros((len(layers.alike), int(layers.alike.max()) + 1))
    gather[np.arange(len(layers.alike)), layers.alike] = 1
    scale = layers.work / layers.widths
    columns = [np.ones((len(counts), 1))]
    columns += [(_up(width, block) * scale) @ gather for block in BLOCKS]
    columns += [(np.maximum(width - share * full, 0) * scale) @ gather for share in BENDS]
    for block in ODD:
        odd = width % block != 0
        columns += [(odd * width * scale) @ gather, odd.astype(np.float64) @ gather]
    for one, two, work in layers.pairs:
        for block in (1, 16):
            product = _up(width[:, one], block) * _up(width[:, two], block)
            columns.append((product * work / (layers.widths[one] * layers.widths[two]))[:, None])
    weights = space.costs.weight_bytes(counts).astype(np.float64)
    columns += [np.maximum(weights - cache, 0)[:, None] for cache in (0, *CACHES)]
    return np.concatenate(columns, axis=1)


def _up(width: Counts, block: int) -> Counts:
    return -(-width // block) * block


def fit_latency(space: UnitSpace, counts: Counts, milliseconds: Floats) -> LatencyModel:
    """The latency model of a device that took ``milliseconds [n]`` for masks of ``counts [n, g]``."""
    layers = describe_layers(space)
    seen = features(space, layers, counts)
    weights = _solve(seen, milliseconds)
    folds = np.arange(len(counts)) % FOLDS
    errors = np.empty(len(counts))
    for fold in range(FOLDS):
        apart = folds == fold
        guess = seen[apart] @ _solve(seen[~apart], milliseconds[~apart])
        errors[apart] = milliseconds[apart] / guess - 1
    margin = max(float(np.quantile(errors, CERTAIN)), 0.0)
    return LatencyModel(space, layers, weights, float(np.median(np.abs(errors))), margin)


def _solve(seen: Floats, milliseconds: Floats) -> Floats:
    """Non-negative weights of least squared relative error, slightly held towards none."""
    from scipy.optimize import nnls

    scale = np.maximum(seen.max(axis=0), 1e-12)
    rows = seen / scale / milliseconds[:, None]
    held = np.sqrt(RIDGE * len(rows)) * np.eye(rows.shape[1]) * np.abs(rows).mean()
    held[0, 0] = 0
    found, _ = nnls(np.concatenate([rows, held]), np.concatenate([np.ones(len(rows)), np.zeros(len(held))]))
    return np.asarray(found / scale)
