"""What a mask costs, without building the model: exactly, but for the memory of a runtime, which is bounded.

Every size of a pruned model is an affine function of how many units each group keeps, so parameters, bytes,
multiply-accumulates and live memory are sums of products of such functions. They are evaluated for many candidate
masks at once; all arithmetic is in integers. What a runtime needs for itself is in ``runtime``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.precision import PRECISIONS, Precision
from kinprune.units.layout import Layout, affine
from kinprune.units.runtime import ONNX_RUNTIME, Runtime
from kinprune.units.trace import Operation

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Costs:
    """The costs of one mask: numbers, multiply-accumulates of one image, and bytes in one precision.

    ``peak_memory_bytes`` is what loading the exported model and running it on one image takes at most of a device's
    memory, over what its runtime takes without any model: see ``CostModel.peak_memory_bytes``.
    """

    units: int
    parameters: int
    macs: int
    weight_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Terms:
    """Sums of ``scale * product of affine sizes``. ``factors [t, f]`` are rows of ``slopes [r, g]``, ``bases [r]``."""

    scales: Counts
    factors: Counts
    slopes: Counts
    bases: Counts

    def values(self, counts: Counts) -> Counts:
        """Each term's value for ``counts [n, g]``: ``[n, t]``."""
        rows = counts @ self.slopes.T + self.bases
        return np.asarray(self.scales * rows[:, self.factors].prod(axis=2), dtype=np.int64)

    def total(self, counts: Counts) -> Counts:
        """All terms added up: ``[n]``."""
        return np.asarray(self.values(counts).sum(axis=1), dtype=np.int64)


@dataclass(frozen=True)
class CostModel:
    """Costs as functions of kept counts; build one with ``cost_model``.

    ``matrix_terms`` are the elements of each weight of a convolution or matrix product; ``operations`` is how many
    operations touch the images, copies aside, and ``products`` how many of them multiply and accumulate.
    """

    parameter_terms: Terms
    byte_terms: Mapping[Precision, Terms]
    mac_terms: Terms
    activation_terms: Terms
    alive: Counts
    matrix_terms: Terms
    operations: int
    products: int
    runtime: Runtime

    def parameters(self, counts: Counts) -> Counts:
        """Numbers in the model's parameters, for ``counts [n, g]``: ``[n]``."""
        return self.parameter_terms.total(counts)

    def weight_bytes(self, counts: Counts, precision: Precision = "fp32") -> Counts:
        """Bytes of everything that is saved, parameters and buffers: ``[n]``.

        In *fp32* exactly what a safetensors file of the model holds. In *fp16* its floating-point numbers take two
        bytes. In *int8* a weight of a convolution or matrix product takes one, and each of its output channels 13
        more: its scale and zero point, and those of its bias, which has four bytes as before; the classifier stays as
        it is. Batch norm, which an export folds into the weights, counts in every precision; scales of activations
        (5 bytes each) count in none.
        """
        return self.byte_terms[precision].total(counts)

    def macs(self, counts: Counts) -> Counts:
        """Multiply-accumulates of convolutions and matrix products, for one image."""
        return self.mac_terms.total(counts)

    def live_bytes(self, counts: Counts) -> Counts:
        """The largest sum of activations alive at one time while one image passes: ``[n]``.

        Operation by operation, element-wise operations writing over an input that nobody reads afterwards; in the
        model's own numbers, as a runtime computes much in them whatever the precision of the weights.
        """
        live = self.activation_terms.values(counts) @ self.alive.T
        return np.asarray(live.max(axis=1, initial=0), dtype=np.int64)

    def peak_memory_bytes(self, counts: Counts, precision: Precision = "fp32") -> Counts:
        """What the exported model takes at most of a device's memory, one image: ``[n]``.

        Weights, live activations and the runtime's own for this model: an upper bound of what
        ``devices.memory.measure_memory`` finds, with the constants of ``units.runtime``.
        """
        weights, matrices = self.weight_bytes(counts, precision), self.matrix_terms.values(counts)
        live = self.live_bytes(counts)
        return self.runtime.peak_bytes(precision, weights, live, matrices, self.operations, self.products)

    def of(self, counts: Sequence[int] | Counts, precision: Precision = "fp32") -> Costs:
        """All costs of one mask, from how many units each group keeps."""
        row = np.asarray(counts, dtype=np.int64)[None]
        return Costs(
            units=int(row.sum()),
            parameters=int(self.parameters(row)[0]),
            macs=int(self.macs(row)[0]),
            weight_bytes=int(self.weight_bytes(row, precision)[0]),
            peak_memory_bytes=int(self.peak_memory_bytes(row, precision)[0]),
        )


@dataclass
class _TermWriter:
    """Collects terms; equal products are added up where ``merge``, kept apart otherwise."""

    groups: int
    merge: bool

    def __post_init__(self) -> None:
        self._rows: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {(1, ()): 0}
        self._scales: list[int] = []
        self._products: list[tuple[int, ...]] = []
        self._places: dict[tuple[int, ...], int] = {}

    def add(self, scale: int, layouts: Sequence[Layout]) -> None:
        """Add ``scale`` times the product of the layouts' sizes."""
        rows = []
        for layout in layouts:
            base, slopes = affine(layout)
            if not slopes:
                scale *= base
                continue
            key = (base, tuple(sorted(slopes.items())))
            rows.append(self._rows.setdefault(key, len(self._rows)))
        product = tuple(sorted(rows))
        place = self._places.get(product) if self.merge else None
        if place is None:
            self._places[product] = len(self._scales)
            self._scales.append(scale)
            self._products.append(product)
        else:
            self._scales[place] += scale

    def terms(self) -> Terms:
        width = max((len(product) for product in self._products), default=0)
        padded = [product + (0,) * (width - len(product)) for product in self._products]
        slopes = np.zeros((len(self._rows), self.groups), dtype=np.int64)
        for (_, pairs), row in self._rows.items():
            for group, slope in pairs:
                slopes[row, group] = slope
        return Terms(
            np.array(self._scales, dtype=np.int64),
            np.array(padded, dtype=np.int64).reshape(len(padded), width),
            slopes,
            np.array([base for base, _ in self._rows], dtype=np.int64),
        )


@dataclass(frozen=True)
class Matrix:
    """A weight of a convolution or matrix product: the layout of its output channels, whether they are the classes."""

    channels: Layout
    classifier: bool


@dataclass(frozen=True)
class StateTensor:
    """A parameter or buffer: its layout, whether it is trained, whether it is saved, bytes an element.

    ``floating``: its numbers are floating-point ones. ``matrix``: what it makes, where it is the weight of a
    convolution or matrix product.
    """

    layout: tuple[Layout, ...]
    parameter: bool
    saved: bool
    itemsize: int
    floating: bool = True
    matrix: Matrix | None = None


FOLDED = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
"""Operations that an export folds into the layer before them: what they give takes the place of what they read."""

COPIES = ("clone",)
"""Operations that PyTorch needs or not as the sizes would have it, and that are none for a runtime."""

CHANNEL_BYTES = 13
"""What an output channel of an int8 weight takes: its scale (4) and zero point (1), and those of its bias (4 + 4)."""


def cost_model(
    state: Mapping[str, StateTensor],
    operations: Sequence[Operation],
    layout_of: Callable[[int], Layout],
    groups: int,
    runtime: Runtime = ONNX_RUNTIME,
) -> CostModel:
    """Costs from the model's tensors (tied ones given once) and the operations seen; ``layout_of`` is by axis."""
    parameters, macs = _TermWriter(groups, True), _TermWriter(groups, True)
    sizes = {precision: _TermWriter(groups, True) for precision in PRECISIONS}
    matrices = _TermWriter(groups, False)
    for tensor in state.values():
        if tensor.parameter:
            parameters.add(1, tensor.layout)
        if tensor.matrix is not None:
            matrices.add(1, tensor.layout)
        if tensor.saved:
            _add_bytes(sizes, tensor)
    for operation in operations:
        if operation.macs is not None:
            macs.add(1, [layout_of(axis) for axis in operation.macs])
    activations, alive = _liveness(operations, layout_of, groups)
    return CostModel(
        parameters.terms(),
        {precision: size.terms() for precision, size in sizes.items()},
        macs.terms(),
        activations,
        alive,
        matrices.terms(),
        sum(operation.name not in COPIES for operation in operations),
        sum(operation.macs is not None for operation in operations),
        runtime,
    )


def _add_bytes(sizes: Mapping[Precision, _TermWriter], tensor: StateTensor) -> None:
    """What a saved tensor takes in each precision."""
    sizes["fp32"].add(tensor.itemsize, tensor.layout)
    sizes["fp16"].add(min(tensor.itemsize, 2) if tensor.floating else tensor.itemsize, tensor.layout)
    if tensor.matrix is None or tensor.matrix.classifier:
        sizes["int8"].add(tensor.itemsize, tensor.layout)
    else:
        sizes["int8"].add(1, tensor.layout)
        sizes["int8"].add(CHANNEL_BYTES, [tensor.matrix.channels])


def _liveness(operations: Sequence[Operation], layout_of: Callable[[int], Layout], groups: int) -> tuple[Terms, Counts]:
    """The bytes of every activation, and ``[moments, activations]``: which are alive when one is made."""
    last: dict[int, int] = {}
    for moment, operation in enumerate(operations):
        last.update(dict.fromkeys(operation.reads, moment))
        last.setdefault(operation.outputs[0].storage, moment)
    last[operations[-1].outputs[0].storage] = len(operations)
    owner: dict[int, int] = {}  # storage -> the buffer it lives in, after element-wise operations reuse theirs
    spans: dict[int, list[int]] = {}  # buffer -> first and last moment
    writer = _TermWriter(groups, False)
    shapes: dict[int, tuple[int, ...]] = {}
    order: list[int] = []
    for moment, operation in enumerate(operations):
        output = operation.outputs[0]
        if output.storage in owner:  # a view, or in place
            continue
        shape = tuple(sorted(output.axes))
        dying = (
            [
                owner[storage]
                for storage in operation.reads
                if storage in owner and last[storage] == moment and shapes[owner[storage]] == shape
            ]
            if operation.in_place or operation.name in FOLDED
            else []
        )
        if dying:
            owner[output.storage] = dying[0]
            spans[dying[0]][1] = last[output.storage]
            continue
        owner[output.storage] = output.storage
        spans[output.storage] = [moment, last[output.storage]]
        shapes[output.storage] = shape
        order.append(output.storage)
        writer.add(output.itemsize, [layout_of(axis) for axis in output.axes])
    first = np.array([spans[buffer][0] for buffer in order])
    end = np.array([spans[buffer][1] for buffer in order])
    moments = np.unique(first)
    alive = (first[None] <= moments[:, None]) & (moments[:, None] <= end[None])
    return writer.terms(), alive.astype(np.int64)
