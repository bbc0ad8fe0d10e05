"""Smoothing: outliers of a layer norm's channels moved into the weights that read them.

A few channels behind a layer norm are far greater than the rest, and eight bits have one scale for all of them. Each
channel is divided by a factor in the norm, and multiplied by it in the matrix products behind: no answer changes, and
both sides share the range, in the geometric mean (Xiao et al., "SmoothQuant", 2023, with alpha 1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.graph import Graph
from kinprune.devices.ranges import channel_peaks

STRONGEST = 64.0
LEAST = 1e-5
"""Peaks below are taken for this: such a channel is dead."""


def smooth(graph: Graph, batches: Sequence[NDArray[np.float32]]) -> None:
    """Smooth a graph in place, by what its layer norms give on ``batches`` of normalised images."""
    norms = {node.output[0]: node for node in graph.nodes if node.op_type == "LayerNormalization"}
    readers = {tensor: products for tensor in norms if (products := _products(graph, norms[tensor]))}
    peaks = channel_peaks(graph.model, dict.fromkeys(readers, -1), batches)
    for tensor, products in readers.items():
        weights = np.max([np.abs(graph.value(product, 1)).max(axis=1) for product in products], axis=0)
        wanted = np.sqrt(np.maximum(peaks[tensor], LEAST) / np.maximum(weights, LEAST))
        factors = np.clip(wanted / np.exp(np.log(wanted).mean()), 1 / STRONGEST, STRONGEST).astype(np.float32)
        for place in range(1, len(norms[tensor].input)):
            graph.replace(norms[tensor], place, graph.value(norms[tensor], place) / factors)
        for product in products:
            graph.replace(product, 1, graph.value(product, 1) * factors[:, None])


def _products(graph: Graph, norm: Any) -> list[Any]:
    """The matrix products with weights that read a norm of its own scale; none where something else does too."""
    readers = [reader for reader in graph.readers(norm.output[0]) if reader.op_type != "Shape"]
    fits = all(
        reader.op_type == "MatMul"
        and reader.input[0] == norm.output[0]
        and graph.is_weight(reader.input[1])
        and graph.value(reader, 1).ndim == 2
        for reader in readers
    )
    stored = all(graph.is_weight(name) and graph.value(norm, 1).ndim == 1 for name in norm.input[1:])
    return readers if fits and stored and norm.output[0] not in graph.answers else []
