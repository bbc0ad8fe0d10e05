"""Ranges: the values that tensors of an ONNX graph take on real images, and the part that eight bits should hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.runtime import package, session_of

BINS = 2048
STEPS = 255
RANGES = ("all", "most", "least error")
"""How a range is chosen: of all values, of all but one in 10,000 at each end, or of the least mean squared error."""
LEFT_OUT = 1e-4
SHARES = np.linspace(0.2, 1, 41)

Range = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often values fall in each of equal parts of ``low`` to ``high``, which contain 0."""

    low: float
    high: float
    counts: NDArray[np.int64]


def channel_means(
    model: Any, axes: Mapping[str, int], batches: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel of the tensors named, whose channels lie on the axis given."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for name, values in _observe(model, tuple(axes), batches):
        rows = np.moveaxis(values, axes[name], 0).reshape(values.shape[axes[name]], -1)
        sums[name] = sums.get(name, np.zeros(len(rows))) + rows.sum(axis=1, dtype=np.float64)
        counts[name] = counts.get(name, 0) + rows.shape[1]
    return {name: total / counts[name] for name, total in sums.items()}


def channel_peaks(
    model: Any, axes: Mapping[str, int], batches: Sequence[NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """The greatest magnitude of each channel of the tensors named, whose channels lie on the axis given."""
    found: dict[str, NDArray[np.float32]] = {}
    for name, values in _observe(model, tuple(axes), batches):
        peaks = np.abs(np.moveaxis(values, axes[name], 0)).reshape(values.shape[axes[name]], -1).max(axis=1)
        found[name] = np.maximum(found[name], peaks) if name in found else peaks
    return found


def histograms(model: Any, tensors: Sequence[str], batches: Sequence[NDArray[np.float32]]) -> dict[str, Histogram]:
    """The values of the tensors named, over all batches; two passes, for the limits and for the counts."""
    limits: dict[str, Range] = {}
    for name, values in _observe(model, tensors, batches):
        low, high = limits.get(name, (0.0, 0.0))
        limits[name] = min(low, float(values.min())), max(high, float(values.max()))
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in limits}
    for name, values in _observe(model, tensors, batches):
        if limits[name][0] < limits[name][1]:
            counts[name] += np.histogram(values, BINS, limits[name])[0]
    return {name: Histogram(low, high, counts[name]) for name, (low, high) in limits.items()}


def choose_range(seen: Histogram, how: str) -> Range:
    """The part of the values seen that eight bits should hold, by one of ``RANGES``; 0 is always in it."""
    if how == "all" or not seen.low < seen.high:
        return seen.low, seen.high
    return _most(seen) if how == "most" else _least_error(seen)


def _most(seen: Histogram) -> Range:
    below = np.cumsum(seen.counts) / seen.counts.sum()
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    low = edges[np.searchsorted(below, LEFT_OUT)]
    high = edges[min(BINS, 1 + int(np.searchsorted(below, 1 - LEFT_OUT)))]
    return min(0.0, float(low)), max(0.0, float(high))


def _least_error(seen: Histogram) -> Range:
    """Both ends are drawn in together, then one of them alone."""
    both = [(share * seen.low, share * seen.high) for share in SHARES]
    low, high = min(both, key=lambda tried: _error(seen, tried))
    each = [
        (low, high),
        *((share * seen.low, high) for share in SHARES),
        *((low, share * seen.high) for share in SHARES),
    ]
    return min(each, key=lambda tried: _error(seen, tried))


def _error(seen: Histogram, tried: Range) -> float:
    low, high = tried
    step = (high - low) / STEPS
    if step <= 0:
        return float("inf")
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    zero = round(-low / step)
    stored = (np.clip(np.round(centres / step) + zero, 0, STEPS) - zero) * step
    return float((seen.counts * (stored - centres) ** 2).sum())


def _observe(
    model: Any, tensors: Sequence[str], batches: Sequence[NDArray[np.float32]]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor's values for each batch; those that are not floating point are left out."""
    onnx = package("onnx")
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    known = {value.name for value in (*shown.graph.input, *shown.graph.output)}
    made = {name for node in shown.graph.node for name in node.output}
    asked = [name for name in tensors if name in made or name in known]
    shown.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in asked if name in made and name not in known
    )
    session = session_of(shown)
    fetched = [name for name in asked if name != "images"]
    for batch in batches:
        if "images" in asked:
            yield "images", batch
        for name, values in zip(fetched, session.run(fetched, {"images": batch}) if fetched else (), strict=True):
            if values.dtype == np.float32 and values.size:
                yield name, values
