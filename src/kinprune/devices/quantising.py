"""Eight bits: an exported ONNX file with the weights of its layers in a byte each, and scales from real images.

Static quantisation in QDQ form, which ONNX Runtime fuses into integer kernels: signed weights with a scale an output
channel, unsigned activations with one scale a tensor, 32-bit sums. What stays in float: the classifier, whose share of
the time is small and of the error is great; attention's products of two activations; norms, softmax and GELU. Models
with layer norms have outliers that eight bits cannot hold: there the residual stream and what layers answer stay in
float, and so do the layers whose inputs, alone in eight bits, move the logits most.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.graph import Graph
from kinprune.devices.ranges import RANGES, Histogram, Range, channel_means, choose_range, histograms
from kinprune.devices.rounding import channel_axes, correct_biases
from kinprune.devices.runtime import answers, package, session_of
from kinprune.devices.smoothing import smooth

LAYERS = ("Conv", "Gemm", "MatMul")
BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu")
"""What runs in eight bits between the layers of a CNN, so that numbers need not be converted back and forth."""
ACTIVATIONS = ("Clip", "Relu")
WITHOUT_SEARCH = "most"
NEAR = 0.05
"""How far eight bits may move the logits, in parts of their standard deviation, before layers stay in float."""
MOST_IN_FLOAT = 0.2
"""The greatest share of inputs of layers that do."""
PROBED = 16
"""Images on which the effect of one input is measured."""


@dataclass(frozen=True)
class Quantised:
    """An ONNX model in eight bits, its logits on the calibration images, and layers that stay in float for accuracy."""

    model: Any
    logits: NDArray[np.float32]
    in_float: tuple[str, ...]


@dataclass(frozen=True)
class _Recipe:
    """What to quantise: the kinds of nodes, the nodes that are left out, and means and ranges of tensors."""

    kinds: tuple[str, ...]
    left_out: tuple[str, ...]
    means: Mapping[str, NDArray[np.float64]]
    ranges: Mapping[str, Range]


@dataclass(frozen=True)
class _Tried:
    """A recipe followed; ``distance`` is the mean move of a logit, in parts of the logits' standard deviation."""

    recipe: _Recipe
    model: Any
    logits: NDArray[np.float32]
    distance: float


def quantise(
    path: Path, batches: Sequence[NDArray[np.float32]], expected: NDArray[np.float32], *, search: bool = True
) -> Quantised:
    """Quantise an exported float32 file by what its layers see on ``batches`` of normalised images.

    With ``search``, of the ways to choose ranges the one is kept whose logits are nearest to ``expected``, the
    model's own, and layers that cost too much stay in float. Without, the same kind of model always has the same
    operations, and it takes a fraction of the time.
    """
    with tempfile.TemporaryDirectory() as aside:
        prepared = Path(aside) / "prepared.onnx"
        package("onnxruntime.quantization").quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        model = package("onnx").load(prepared)
    graph = Graph(model)
    smooth(graph, batches)
    layers = _layers(graph)
    norms = any(node.op_type == "LayerNormalization" for node in graph.nodes)
    kinds = LAYERS if norms else (*LAYERS, *BETWEEN)
    tensors = [name for node in graph.nodes if node.op_type in kinds for name in (*node.input, *node.output)]
    seen = histograms(model, tuple(dict.fromkeys(tensors)), batches)
    means = channel_means(model, channel_axes(layers), batches)
    quantised = {layer.name for layer in layers}
    left_out = tuple(node.name for node in graph.nodes if node.op_type in LAYERS and node.name not in quantised)
    recipes = [
        _Recipe(kinds, left_out, means, _saturating(graph, {name: choose_range(h, how) for name, h in seen.items()}))
        for how in (RANGES if search else (WITHOUT_SEARCH,))
    ]
    best = min((_try(model, recipe, batches, expected) for recipe in recipes), key=lambda each: each.distance)
    if search and kinds == LAYERS and best.distance > NEAR:
        best = _spare(model, layers, best, seen, batches, expected)
    in_float = tuple(layer.name for layer in layers if layer.name in best.recipe.left_out)
    return Quantised(best.model, best.logits, in_float)


def _layers(graph: Graph) -> list[Any]:
    """The layers with weights in the order of the graph, without the classifier."""
    last = set(_classifier(graph))
    return [
        node
        for node in graph.nodes
        if node.op_type in LAYERS and graph.is_weight(node.input[1]) and node.name not in last
    ]


def _classifier(graph: Graph) -> list[str]:
    """The nodes from the last layers on, by which the logits are made: what follows a layer is none of ``LAYERS``."""
    open_names = [value.name for value in graph.model.graph.output]
    found: list[str] = []
    while open_names:
        node = graph.maker.get(open_names.pop())
        if node is not None and node.name not in found:
            found.append(node.name)
            if node.op_type not in LAYERS:
                open_names.extend(node.input)
    return found


def _saturating(graph: Graph, ranges: dict[str, Range]) -> dict[str, Range]:
    """A layer's range is that of the ReLU behind it: eight bits end where it cuts, and none are spent beyond."""
    found = dict(ranges)
    for node in graph.nodes:
        readers = graph.readers(node.output[0])
        if node.op_type not in ACTIVATIONS and len(readers) == 1 and readers[0].op_type in ACTIVATIONS:
            behind = ranges.get(readers[0].output[0])
            if behind is not None:
                found[node.output[0]] = behind
    return found


def _spare(
    model: Any,
    layers: Sequence[Any],
    start: _Tried,
    seen: Mapping[str, Histogram],
    batches: Sequence[NDArray[np.float32]],
    expected: NDArray[np.float32],
) -> _Tried:
    """What is best of ``start`` with better ranges for the inputs that need them and some layers left in float.

    The inputs whose eight bits alone move the logits most are tried in other ranges; then one layer after another
    stays in float, worst first, until the logits are near enough or ``MOST_IN_FLOAT`` of them are.
    """
    recipe, probed = start.recipe, [batches[0][:PROBED]]
    wanted = expected[: len(probed[0])]

    def effect(tensor: str, tried: Range) -> float:
        others = (layer.name for layer in layers if layer.input[0] != tensor)
        ranges = {**recipe.ranges, tensor: tried}
        alone = replace(recipe, left_out=(*recipe.left_out, *others), ranges=ranges)
        return _try(model, alone, probed, wanted).distance

    inputs = [name for name in dict.fromkeys(layer.input[0] for layer in layers) if name in seen]
    effects = {name: effect(name, recipe.ranges[name]) for name in inputs}
    worst = sorted(inputs, key=lambda name: -effects[name])[: max(1, int(MOST_IN_FLOAT * len(inputs)))]
    ranges = dict(recipe.ranges)
    for name in worst:
        choices = sorted({choose_range(seen[name], how) for how in RANGES} - {ranges[name]})
        effects[name], ranges[name] = min([(effects[name], ranges[name]), *((effect(name, c), c) for c in choices)])
    worst.sort(key=lambda name: -effects[name])
    best = start
    for count in range(len(worst) + 1):
        spared = tuple(layer.name for layer in layers if layer.input[0] in worst[:count])
        tried = _try(model, replace(recipe, left_out=(*recipe.left_out, *spared), ranges=ranges), batches, expected)
        best = min(best, tried, key=lambda each: each.distance)
        if best.distance <= NEAR:
            break
    return best


def _try(model: Any, recipe: _Recipe, batches: Sequence[NDArray[np.float32]], expected: NDArray[np.float32]) -> _Tried:
    made = _insert(model, recipe)
    found = answers(session_of(made), list(batches))
    distance = float(np.abs(found - expected).mean()) / max(float(expected.std()), 1e-12)
    return _Tried(recipe, made, found, distance if np.isfinite(distance) else float("inf"))


def _insert(model: Any, recipe: _Recipe) -> Any:
    quantization = package("onnxruntime.quantization")
    copied = package("onnx").ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    # A layer that stays in float has the weights that its bias was made for.
    correct_biases(graph, [layer for layer in _layers(graph) if layer.name not in recipe.left_out], recipe.means)
    limits = {
        name: quantization.TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in recipe.ranges.items()
    }
    quantiser = quantization.QDQQuantizer(
        copied,
        True,  # a scale an output channel
        False,  # all eight bits of the weights: seven lose points, and help only CPUs without VNNI
        quantization.QuantType.QInt8,
        quantization.QuantType.QUInt8,
        quantization.TensorsData(quantization.CalibrationMethod.MinMax, limits),
        [],
        list(recipe.left_out),
        list(recipe.kinds),
        {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"] if recipe.kinds == LAYERS else []},
    )
    quantiser.quantize_model()
    quantiser.model.topological_sort()
    return quantiser.model.model
