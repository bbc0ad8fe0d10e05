"""What a runtime needs of a device's memory for one model, beyond its weights: an upper bound, found by measuring.

ONNX Runtime reads a file's weights one by one, so that the largest is there twice for a moment; it keeps structures
for every operation of the graph; it takes memory for activations in blocks that double in size; and, having no kernels
for half precision on a CPU, it keeps a copy of fp16 weights in single precision. ``python benchmarks/memory.py``
measures how the bound holds, with the options of ``devices.memory.session_options``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.precision import PRECISIONS, Precision

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Overhead:
    """A runtime's own for a model of one precision, in bytes.

    ``fixed`` for any model (pages of the kernels' code, the session); ``operation`` for each operation that touches
    the images, ``product`` for each that multiplies and accumulates besides; ``copied`` for each element of the weights
    of convolutions and matrix products, which are there in a second form; ``largest`` for each element of the largest
    of them, while it is read. Loading leaves the heap in pieces: half of the weights' bytes again, but no more than
    ``most_loose``. Blocks for activations have up to ``spare`` times what is alive in them unused, but no
    more than ``most_spare``.
    """

    fixed: int
    operation: int
    product: int
    copied: int
    largest: int
    spare: int
    most_spare: int
    most_loose: int


@dataclass(frozen=True)
class Runtime:
    """What a runtime needs in each precision."""

    overheads: Mapping[Precision, Overhead]

    def peak_bytes(
        self, precision: Precision, weights: Counts, live: Counts, matrices: Counts, operations: int, products: int
    ) -> Counts:
        """The most that a model takes at one time, ``[n]``.

        ``weights [n]`` are their bytes in the precision, ``live [n]`` those of live activations, ``matrices [n, t]``
        the elements of each weight of a convolution or matrix product; of the ``operations``, ``products`` multiply
        and accumulate.
        """
        own = self.overheads[precision]
        loading = own.largest * matrices.max(axis=1, initial=0)
        running = live + np.minimum(own.spare * live, own.most_spare)
        graph = own.fixed + own.operation * operations + own.product * products
        kept = weights + np.minimum(weights // 2, own.most_loose) + own.copied * matrices.sum(axis=1) + graph
        # What loading needs for a moment is gone when activations are made.
        return np.asarray(kept + np.maximum(loading, running), dtype=np.int64)


ONNX_RUNTIME = Runtime(
    {
        "fp32": Overhead(
            fixed=1_100_000,
            operation=6_400,
            product=0,
            copied=0,
            largest=4,
            spare=3,
            most_spare=4_000_000,
            most_loose=2_000_000,
        ),
        "fp16": Overhead(
            fixed=1_000_000,
            operation=9_100,
            product=6_000,
            copied=4,
            largest=10,
            spare=1,
            most_spare=2_000_000,
            most_loose=0,
        ),
        "int8": Overhead(
            fixed=1_750_000,
            operation=10_600,
            product=43_500,
            copied=0,
            largest=2,
            spare=3,
            most_spare=4_000_000,
            most_loose=0,
        ),
    }
)
"""ONNX Runtime on a CPU, with the options of ``devices.memory.session_options(low_memory=True)``.

The least that no measurement of twelve architectures, whole and at a fifth of their units, with images of 64 to 224
pixels, exceeds: with versions 1.20 and 1.32, on x86 and with one thread, to which others add little. The bound is
nearest for large models, and up to 1.9 times what is measured for small ones.
"""

NO_RUNTIME = Runtime({precision: Overhead(0, 0, 0, 0, 0, 0, 0, 0) for precision in PRECISIONS})
"""Weights and live activations alone: what no runtime can go below."""
