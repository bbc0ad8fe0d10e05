"""Noise that stands for weights: made where it is measured, so that it need not be carried there.

This module needs NumPy alone: it is part of the kit that runs on devices without PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NOISE_FILE = "noise.bin"
ALIGNMENT = 4096
"""Segments begin at pages, so that a runtime can map the file into memory."""


@dataclass(frozen=True)
class Segment:
    """``count`` numbers of a NumPy type from byte ``offset`` on, evenly spread from ``low`` to ``high``."""

    offset: int
    count: int
    dtype: str
    low: float
    high: float

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(np.dtype(self.dtype).itemsize)


def write_noise(path: Path, segments: Iterable[Segment], seed: int = 0) -> None:
    """Write the file of noise that all models of a kit share; the same for the same seed."""
    generator = np.random.default_rng(seed)
    with path.open("wb") as file:
        for segment in segments:
            file.seek(segment.offset)
            kind = np.dtype(segment.dtype)
            if kind.kind == "f":
                values = generator.uniform(segment.low, segment.high, segment.count).astype(kind)
            else:
                values = generator.integers(int(segment.low), int(segment.high) + 1, segment.count).astype(kind)
            file.write(values.tobytes())
