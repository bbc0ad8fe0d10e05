"""The unit space of a model: which units it has, how its tensors are cut when they go, and what they cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import UnitError
from kinprune.units.costs import CostModel, Costs
from kinprune.units.layout import Layout

Kind = Literal["filter", "head", "node", "channel"]
Bools = NDArray[np.bool_]
PartRole = Literal["produces", "consumes", "carries"]


@dataclass(frozen=True)
class Part:
    """One dimension of one tensor that a group cuts, and what that tensor does with the units."""

    tensor: str
    dimension: int
    role: PartRole


@dataclass(frozen=True)
class Group:
    """The units of one layer that compete with each other.

    ``kind``: a conv filter (or a whole group of them, in a grouped convolution), an attention head, an MLP's hidden
    node, or a channel of the residual stream. ``width`` is how many indices a unit takes in its layer (a head's
    width). ``normalised``: statistics are taken over the units, so that removing some changes what the others see.
    """

    name: str
    kind: Kind
    size: int
    width: int
    parts: tuple[Part, ...]
    normalised: bool

    def tensors(self, role: PartRole) -> list[tuple[str, int]]:
        """The (tensor, dimension) pairs with a role."""
        return [(part.tensor, part.dimension) for part in self.parts if part.role == role]


@dataclass(frozen=True)
class Whole:
    """A layer whose outputs are never cut, and why."""

    layer: str
    size: int
    reason: str


@dataclass(frozen=True)
class Shortcut:
    """The output of ``layer`` is added to the tensor that is the ``side`` of ``module``."""

    layer: str
    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class UnitSpace:
    """All groups of a model in forward order. Masks, scores and rankings are flat arrays over all their units."""

    groups: tuple[Group, ...]
    tensors: Mapping[str, tuple[Layout, ...]]
    attributes: Mapping[tuple[str, str], Layout | tuple[Layout, ...]]
    whole: tuple[Whole, ...]
    shortcuts: tuple[Shortcut, ...]
    costs: CostModel
    head: str | None

    def __len__(self) -> int:
        """The number of units."""
        return int(self.offsets[-1])

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Units of each group, ``[g]``."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each group's units begin in a flat array, ``[g + 1]``."""
        return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.sizes)])

    @cached_property
    def group_of(self) -> NDArray[np.int64]:
        """The group of each unit, ``[u]``."""
        return np.repeat(np.arange(len(self.groups)), self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the groups and of every tensor they cut (the classifier aside): equal for equal unit spaces."""
        head = f"{self.head}." if self.head is not None else None
        groups = [
            [group.name, group.kind, group.size, group.width]
            + [[part.tensor, part.dimension, part.role] for part in group.parts]
            for group in self.groups
        ]
        layouts = {
            name: repr(layout)
            for name, layout in sorted(self.tensors.items())
            if head is None or not name.startswith(head)
        }
        return hashlib.sha256(json.dumps([groups, layouts]).encode()).hexdigest()

    def counts(self, kept: Bools) -> NDArray[np.int64]:
        """How many units each group keeps, ``[g]``, for a flat ``bool [u]``."""
        return np.add.reduceat(np.asarray(kept, dtype=np.int64), self.offsets[:-1])

    def split(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """A flat array ``[u]`` as one view a group."""
        return [values[start:stop] for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def whole_mask(self) -> Mask:
        """The mask that keeps everything."""
        return Mask(np.ones(len(self), dtype=bool), self.fingerprint)

    def shrink(self, mask: Mask) -> UnitSpace:
        """The unit space of the model that ``extract`` gives for ``mask``."""
        self.check(mask)
        counts = self.counts(mask.kept)
        groups = tuple(replace(group, size=int(count)) for group, count in zip(self.groups, counts, strict=True))
        return replace(self, groups=groups)

    def cost(self, mask: Mask) -> Costs:
        """The exact costs of a mask."""
        self.check(mask)
        return self.costs.of(self.counts(mask.kept))

    def check(self, mask: Mask) -> None:
        """Refuse a mask of another unit space, or one that leaves a group empty."""
        if mask.fingerprint != self.fingerprint or mask.kept.shape != (len(self),):
            raise UnitError(
                f"the mask belongs to another unit space ({mask.fingerprint[:12]}, {mask.kept.size} units), expected "
                f"{self.fingerprint[:12]} with {len(self)} units: make it for this model, image size and options"
            )
        for group, count in zip(self.groups, self.counts(mask.kept), strict=True):
            if count == 0:
                raise UnitError(f"the mask keeps no unit of {group.name}: every group must keep at least one")


@dataclass(frozen=True, eq=False)
class Mask:
    """Which units are kept: ``kept`` is ``bool [u]`` over the units of the space with that fingerprint."""

    kept: Bools
    fingerprint: str

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask) and self.fingerprint == other.fingerprint and np.array_equal(self.kept, other.kept)
        )

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.kept.tobytes()))
