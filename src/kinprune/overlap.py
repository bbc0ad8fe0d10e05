"""Overlap: how alike the kept units of tasks are, group by group, and how alike chance would make them.

The measure is intersection over union (IoU, Jaccard). Two sets that are both empty are equal: 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinprune.errors import BudgetError, UnitError
from kinprune.selection import Budget
from kinprune.units import UnitSpace
from kinprune.units.space import Bools
from kinprune.voting import counts_for

Overlaps = NDArray[np.float64]

CHUNK = 1 << 22
"""How many units of masks are compared at once: 32 MiB of counts."""


def overlap(space: UnitSpace, kept_a: Bools, kept_b: Bools) -> Overlaps:
    """IoU of kept units for pairs of masks: ``[..., u]`` and ``[..., u]``, broadcast, to ``[..., g]``.

    One mask against many, ``[u]`` and ``[n, u]``, works a chunk of rows at a time. Raises UnitError for what is no
    mask of this space.
    """
    first, second = _checked(space, kept_a), _checked(space, kept_b)
    if first.dtype != bool or second.dtype != bool:
        raise UnitError(f"masks are of {first.dtype} and {second.dtype}, expected bool: overlap_at takes rankings")
    shape = np.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    first, second = (
        np.broadcast_to(part, (*shape, len(space))).reshape(-1, len(space)) if part.ndim > 1 else part[None]
        for part in (first, second)
    )
    result = np.empty((int(np.prod(shape, dtype=np.int64)), len(space.sizes)))
    rows = max(CHUNK // len(space), 1)
    for start in range(0, len(result), rows):
        a, b = (part if len(part) == 1 else part[start : start + rows] for part in (first, second))
        result[start : start + rows] = _iou(_counts(space, a & b), _counts(space, a), _counts(space, b))
    return result.reshape(*shape, len(space.sizes))


def overlap_at(
    space: UnitSpace,
    rankings: NDArray[np.integer[Any]],
    keep: float,
    others: NDArray[np.integer[Any]] | None = None,
) -> Overlaps:
    """IoU at a keep ratio of each ranking ``[n, u]`` with each of ``others`` ``[m, u]`` (or of its own): ``[n, m, g]``.

    Each group keeps what ``select`` keeps for that ratio. A matrix product a group: the result, of ``8 n m g`` bytes,
    is the largest thing in memory; give a few rankings at a time where that is too much. Raises UnitError for
    rankings of another space and BudgetError for a bad ratio.
    """
    limits = counts_for(space, Budget(keep=keep))[space.group_of]
    rows = _checked(space, rankings) < limits
    columns = rows if others is None else _checked(space, others) < limits
    if rows.ndim != 2 or columns.ndim != 2:
        raise UnitError(f"the rankings have {rows.ndim} and {columns.ndim} dimensions, expected 2: a row a task")
    result = np.empty((len(rows), len(columns), len(space.sizes)))
    for number, (start, stop) in enumerate(zip(space.offsets[:-1], space.offsets[1:], strict=True)):
        # Exact: float32 holds whole numbers up to 2 ** 24, more than any group has.
        first, second = (part[:, start:stop].astype(np.float32) for part in (rows, columns))
        both = first @ second.T
        result[:, :, number] = _iou(both, first.sum(1)[:, None], second.sum(1)[None, :])
    return result


def chance(keep: float) -> float:
    """The IoU of two random sets of a share ``keep`` of many units: ``keep / (2 - keep)``.

    The ratio of the expected intersection ``keep^2`` to the expected union, and the limit of ``expected_overlap`` for
    large groups. Raises BudgetError unless ``0 < keep <= 1``.
    """
    Budget(keep=keep)
    return keep / (2 - keep)


def expected_overlap(sizes: ArrayLike, first: ArrayLike, second: ArrayLike) -> Overlaps:
    """The exact expectation of the IoU of two random sets, of ``first`` and ``second`` of ``sizes`` units each.

    Broadcast whole numbers to ``float64 [...]``: for every group by itself, say. The intersection is hypergeometric,
    and the IoU of each of its values is weighted by its probability; the ratio of expectations would be
    ``i / (a + b - i)`` at ``i = a b / n``, which is lower (the IoU is convex in the intersection).

    Raises:
        BudgetError: a set is larger than its group, or negative.
    """
    sizes, first, second = np.broadcast_arrays(
        *(np.asarray(values, dtype=np.int64) for values in (sizes, first, second))
    )
    if (first < 0).any() or (second < 0).any() or (first > sizes).any() or (second > sizes).any():
        raise BudgetError("a set of kept units is larger than its group or negative, expected 0 up to the group's size")
    known: dict[tuple[int, int, int], float] = {}
    result = np.empty(sizes.shape)
    for place in np.ndindex(sizes.shape):
        n, a, b = int(sizes[place]), int(first[place]), int(second[place])
        if (n, a, b) not in known:
            known[n, a, b] = _expected(n, a, b)
        result[place] = known[n, a, b]
    return result


def _expected(n: int, a: int, b: int) -> float:
    least, most = max(a + b - n, 0), min(a, b)
    both = np.arange(least, most + 1, dtype=np.float64)
    # Ratios of neighbouring hypergeometric probabilities, summed in logarithms.
    before = both[:-1]
    ratios = (a - before) * (b - before) / ((before + 1) * (n - a - b + before + 1))
    logs = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    shares = np.exp(logs - logs.max())
    return float((_iou(both, np.float64(a), np.float64(b)) * shares).sum() / shares.sum())


def _counts(space: UnitSpace, kept: Bools) -> NDArray[np.int64]:
    """Kept units of each group, ``[n, g]``."""
    return np.add.reduceat(kept, space.offsets[:-1], axis=-1, dtype=np.int64)


def _iou(both: ArrayLike, first: ArrayLike, second: ArrayLike) -> Overlaps:
    both = np.asarray(both, dtype=np.float64)
    union = np.asarray(first, dtype=np.float64) + np.asarray(second, dtype=np.float64) - both
    return np.where(union > 0, both / np.maximum(union, 1), 1.0)


def _checked(space: UnitSpace, values: NDArray[Any]) -> NDArray[Any]:
    if values.ndim < 1 or values.shape[-1] != len(space):
        raise UnitError(f"the masks or rankings have the shape {values.shape}, expected [..., {len(space)}]")
    return values
