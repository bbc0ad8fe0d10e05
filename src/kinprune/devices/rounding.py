"""Rounding: what eight bits do to a layer's weights, and the shift of its answers that this brings, taken back.

Rounded weights answer otherwise by their error times the input. Behind a ReLU inputs have a mean far from 0, so most
of that is the same for every image, and a bias takes it away in closed form (Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", 2019). On MobileNetV2 this is most of all error in the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.graph import Graph

GREATEST = 127
"""Weights are symmetric: -127 to 127."""


def channel_axes(layers: Iterable[Any]) -> dict[str, int]:
    """The inputs of layers, each with the axis of its channels."""
    return {layer.input[0]: 1 if layer.op_type == "Conv" else -1 for layer in layers}


def correct_biases(graph: Graph, layers: Iterable[Any], means: Mapping[str, NDArray[np.float64]]) -> None:
    """Correct the bias of each layer that has one, in place; ``means`` are those of the channels of their inputs."""
    for layer in layers:
        found = _bias(graph, layer)
        if found is None or layer.input[0] not in means:
            continue
        node, place = found
        weight = graph.value(layer, 1)
        error = (weight - rounded(weight, _axes(layer, weight))).astype(np.float64)
        shift = _shift(layer, error, means[layer.input[0]])
        bias = graph.value(node, place)
        if bias.shape == shift.shape:
            graph.replace(node, place, (bias + shift).astype(np.float32))


def rounded(weight: NDArray[np.float32], axes: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights as eight bits hold them, with a scale for everything that lies along ``axes``."""
    step = np.abs(weight).max(axis=axes, keepdims=True) / GREATEST
    step = np.where(step > 0, step, 1).astype(np.float32)
    return np.asarray(np.round(weight / step) * step, dtype=np.float32)


def _axes(layer: Any, weight: NDArray[np.float32]) -> tuple[int, ...]:
    """All axes but that of the output channels."""
    kept = 0 if layer.op_type == "Conv" or _transposed(layer) else weight.ndim - 1
    return tuple(axis for axis in range(weight.ndim) if axis != kept)


def _shift(layer: Any, error: NDArray[np.float64], means: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of what the rounding takes from each output channel."""
    if layer.op_type != "Conv":
        return np.asarray(error @ means if _transposed(layer) else means @ error)
    groups = next((int(attribute.i) for attribute in layer.attribute if attribute.name == "group"), 1)
    taps = error.sum(axis=tuple(range(2, error.ndim)))  # [out, in of the group]
    inputs = means.reshape(groups, -1)
    return np.asarray(np.einsum("goi,gi->go", taps.reshape(groups, -1, taps.shape[1]), inputs)).reshape(-1)


def _bias(graph: Graph, layer: Any) -> tuple[Any, int] | None:
    """The node that adds a layer's bias, and the place of the bias among its inputs."""
    if layer.op_type != "MatMul":
        return (layer, 2) if len(layer.input) > 2 and graph.is_weight(layer.input[2]) else None
    readers = graph.readers(layer.output[0])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    place = next((place for place, name in enumerate(readers[0].input) if graph.is_weight(name)), None)
    return None if place is None else (readers[0], place)


def _transposed(layer: Any) -> bool:
    return any(attribute.name == "transB" and attribute.i for attribute in layer.attribute)
