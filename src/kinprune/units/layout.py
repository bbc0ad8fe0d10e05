"""Layouts: how the indices of one dimension of a tensor follow from which units are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Fixed:
    """Indices that always stay."""

    size: int


@dataclass(frozen=True)
class Units:
    """One index a unit of group number ``group``."""

    group: int


@dataclass(frozen=True)
class Product:
    """Row-major over the parts; at most one of them holds units."""

    parts: tuple[Layout, ...]


@dataclass(frozen=True)
class Sum:
    """The parts one after the other."""

    parts: tuple[Layout, ...]


Layout = Fixed | Units | Product | Sum


def size(layout: Layout, counts: Sequence[int] | Indices) -> int:
    """How many indices a dimension has when group g keeps ``counts[g]`` units."""
    if isinstance(layout, Fixed):
        return layout.size
    if isinstance(layout, Units):
        return int(counts[layout.group])
    sizes = [size(part, counts) for part in layout.parts]
    return prod(sizes) if isinstance(layout, Product) else sum(sizes)


def groups(layout: Layout) -> list[int]:
    """The groups a layout holds, in order, repeated where they repeat."""
    if isinstance(layout, Fixed):
        return []
    if isinstance(layout, Units):
        return [layout.group]
    return [group for part in layout.parts for group in groups(part)]


def affine(layout: Layout) -> tuple[int, dict[int, int]]:
    """The size as ``constant + sum of slope[g] * counts[g]``."""
    if isinstance(layout, Fixed):
        return layout.size, {}
    if isinstance(layout, Units):
        return 0, {layout.group: 1}
    parts = [affine(part) for part in layout.parts]
    if isinstance(layout, Product):
        constant = prod(part[0] for part in parts if not part[1])
        variable = [part for part in parts if part[1]]
        if not variable:
            return constant, {}
        (base, slopes), *others = variable
        assert not others, "a product holds the units of at most one group"
        return constant * base, {group: constant * slope for group, slope in slopes.items()}
    total: dict[int, int] = {}
    for _, slopes in parts:
        for group, slope in slopes.items():
            total[group] = total.get(group, 0) + slope
    return sum(part[0] for part in parts), total


def unit_of(layout: Layout, group: int, counts: Sequence[int]) -> Indices:
    """For each index of the dimension the unit of ``group`` it belongs to, or -1."""
    if isinstance(layout, Units) and layout.group == group:
        return np.arange(counts[group], dtype=np.int64)
    if isinstance(layout, (Fixed, Units)):
        return np.full(size(layout, counts), -1, dtype=np.int64)
    parts = [unit_of(part, group, counts) for part in layout.parts]
    if isinstance(layout, Sum):
        return np.concatenate(parts)
    result = np.full(1, -1, dtype=np.int64)
    for part in parts:
        result = np.maximum(result[:, None], part[None, :]).reshape(-1)
    return result


def kept(layout: Layout, units: Sequence[Indices], counts: Sequence[int]) -> Indices:
    """The indices that stay, ascending, when group g keeps ``units[g]`` of its ``counts[g]`` units."""
    if isinstance(layout, Fixed):
        return np.arange(layout.size, dtype=np.int64)
    if isinstance(layout, Units):
        return units[layout.group]
    parts = [(kept(part, units, counts), size(part, counts)) for part in layout.parts]
    if isinstance(layout, Sum):
        starts = np.cumsum([0, *[width for _, width in parts[:-1]]])
        return np.concatenate([indices + start for (indices, _), start in zip(parts, starts, strict=True)])
    result = np.zeros(1, dtype=np.int64)
    for indices, width in parts:
        result = (result[:, None] * width + indices[None, :]).reshape(-1)
    return result
