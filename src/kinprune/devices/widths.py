"""Widths: which of a backbone's small models a device is timed with, so that every width's cost can be told."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.units import UnitSpace

MULTIPLES = (1, 4, 8, 16, 32)
"""What widths are rounded to: runtimes work on so many channels at once, and dislike what is left over."""
LEVELS = (0.75, 0.5, 0.35, 0.2, 0.1, 0.05)
LEAST_SHARE = 0.03
TRIES = 20


def sample_counts(space: UnitSpace, samples: int, seed: int = 0) -> NDArray[np.int64]:
    """Kept counts ``[samples, g]`` of small models, the whole one first.

    Every layer kept alike at a few levels, then random models, all of them different: all layers around one level,
    each rounded to one of ``MULTIPLES``. A very small model has fewer than were asked for.
    """
    generator = np.random.default_rng(seed)
    rows = [space.sizes]
    rows += [round_counts(space, space.sizes * level, multiple) for level in LEVELS for multiple in (1, 16)]
    known = {tuple(row.tolist()) for row in rows}
    for _ in range(TRIES * samples):
        if len(rows) >= samples:
            break
        level = np.exp(generator.uniform(np.log(LEAST_SHARE), 0))
        shares = level * np.exp(generator.uniform(-1, 1, len(space.sizes)))
        row = round_counts(space, space.sizes * np.minimum(shares, 1), int(generator.choice(MULTIPLES)))
        if (key := tuple(row.tolist())) not in known:
            known.add(key)
            rows.append(row)
    return np.array(rows[:samples], dtype=np.int64)


def round_counts(space: UnitSpace, wanted: NDArray[Any], multiple: int) -> NDArray[np.int64]:
    """Counts near ``wanted [g]`` whose widths are multiples of ``multiple``, at least one block and at most all."""
    steps = np.array([multiple // np.gcd(multiple, group.width) for group in space.groups], dtype=np.int64)
    rounded = np.maximum(np.rint(wanted / steps).astype(np.int64), 1) * steps
    return np.minimum(rounded, space.sizes)
