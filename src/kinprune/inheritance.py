"""Inheritance: weights for the kept units from the pruned models of neighbours.

A weight of the target's sub-network is there in a neighbour's pruned model where that model kept the units at all its
cut ends: its filter and its input channel, say. Each entry is the weighted mean over the neighbours that have it, and
the backbone's own where none has. Layers that nothing cuts are averaged over all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kinprune.errors import UnitError
from kinprune.units import Mask, UnitSpace, extract
from kinprune.units.layout import Indices, Layout, groups, kept, size

LEAST = 1e-30
"""The smallest weight beside the largest: smaller ones are raised to it, so that products never underflow."""


@dataclass(frozen=True, eq=False)
class Donor:
    """A neighbour's pruned model: its mask, its small tensors by name, and its positive weight in the mean.

    ``tensors`` holds parameters and persistent buffers in any floating-point type; a tied tensor may be there under
    any of its names; the classifier's and whole numbers are not read and may be absent.
    """

    mask: Mask
    tensors: Mapping[str, Tensor]
    weight: float


@dataclass(frozen=True)
class _Entry:
    """A tensor that is inherited: all its names, its whole shape and its layouts (none where nothing cuts it)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    layouts: tuple[Layout, ...]

    def find(self, donor: Donor) -> Tensor | None:
        return next((donor.tensors[name] for name in self.names if name in donor.tensors), None)


def inherit(
    model: nn.Module,
    space: UnitSpace,
    mask: Mask,
    donors: Sequence[Donor],
    *,
    average: bool = True,
    quiet: bool = False,
) -> nn.Module:
    """The sub-network of ``mask``, like ``extract``, with weights from neighbours' pruned models.

    Parameters and persistent floating-point buffers are inherited, except the classifier's (``space.head``). Entries
    are averaged in double precision with weights renormalised over the donors that have them; the result depends on
    no order of the donors, bit for bit, and keeps the model's types and devices. ``average=False`` takes only the
    donor of the largest weight, and the backbone elsewhere. With ``quiet`` a unit that no donor has is not heard at
    first by outputs that a donor has: its weights there are 0, for they were trained without it. A larger model than
    the donor's then answers as the donor's does, until it is repaired or trained.

    Raises:
        UnitError: the mask is not of this space; there is no donor; a donor is of another space, lacks a tensor, has
            one of another shape or type or with values that are not finite, or has a weight that is not positive.
    """
    space.check(mask)
    entries = _entries(model, space)
    donors = _checked(space, entries, donors)
    if not average:
        donors = donors[:1]
    small = extract(model, space, mask)
    tensors = dict(_named(small))
    maps = [_Map(space, mask, donor.mask) for donor in donors]
    largest = donors[0].weight
    weights = [max(donor.weight / largest, LEAST) for donor in donors]
    with torch.no_grad():
        for entry in entries:
            target = tensors[entry.names[0]]
            given = [entry.find(donor) for donor in donors]
            target.copy_(_mean(target, entry, given, weights, maps, quiet))
    return small


class _Map:
    """Where a donor has the indices of the target, by layout; each layout is worked out once."""

    def __init__(self, space: UnitSpace, target: Mask, donor: Mask) -> None:
        self._counts = space.sizes.tolist()
        self._target, self._donor = _units(space, target), _units(space, donor)
        self._found: dict[Layout, tuple[Tensor, Tensor] | None] = {}

    def places(self, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """The donor's index for each of the target's (0 where it has none) and whether it has it; None: the same."""
        if layout not in self._found:
            wanted, present = (kept(layout, units, self._counts) for units in (self._target, self._donor))
            self._found[layout] = None if np.array_equal(wanted, present) else self._places(layout, wanted, present)
        return self._found[layout]

    def _places(self, layout: Layout, wanted: Indices, present: Indices) -> tuple[Tensor, Tensor]:
        lookup = np.full(size(layout, self._counts), -1, dtype=np.int64)
        lookup[present] = np.arange(len(present))
        places = torch.from_numpy(lookup[wanted])
        return places.clamp(min=0), places >= 0


def _mean(
    target: Tensor,
    entry: _Entry,
    given: Sequence[Tensor | None],
    weights: Sequence[float],
    maps: Sequence[_Map],
    quiet: bool,
) -> Tensor:
    """The weighted mean over the donors that have each entry of ``target``, and its own value where none has.

    Where none has it though one has its output (dimension 0), it is 0 with ``quiet``.
    """
    total = torch.zeros(target.shape, dtype=torch.float64)
    # The weight present is the same along dimensions that nothing cuts: it is kept at length one there.
    present = torch.zeros([1] * target.dim(), dtype=torch.float64)
    heard = torch.zeros([1] * target.dim(), dtype=torch.bool)
    for tensor, weight, places in zip(given, weights, maps, strict=True):
        assert tensor is not None, "checked before"
        values = tensor.detach().cpu()
        share = torch.full([1] * target.dim(), weight, dtype=torch.float64)
        output = torch.ones([1] * target.dim(), dtype=torch.bool)
        for dimension, layout in enumerate(entry.layouts):
            found = places.places(layout) if groups(layout) else None
            if found is None:
                continue
            indices, has = found
            values = values.index_select(dimension, indices)
            here = has.view([-1 if place == dimension else 1 for place in range(target.dim())])
            share = share * here
            output = here if dimension == 0 else output
        total.addcmul_(values.double(), share)
        present = present + share
        heard = heard | output
    own = target.detach().cpu().double()
    if quiet:
        own = torch.where(heard, 0.0, own)
    return torch.where(present > 0, total / present.clamp(min=LEAST), own)


def _units(space: UnitSpace, mask: Mask) -> list[Indices]:
    return [np.flatnonzero(part).astype(np.int64) for part in space.split(mask.kept)]


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by every name; other buffers are made by the model's own code."""
    yield from model.named_parameters(remove_duplicate=False)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False, remove_duplicate=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _entries(model: nn.Module, space: UnitSpace) -> list[_Entry]:
    """What is inherited; a tensor that the classifier shares is the classifier's."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in _named(model):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [
        _Entry(
            tuple(known), tuple(tensors[key].shape), next((space.tensors[n] for n in known if n in space.tensors), ())
        )
        for key, known in names.items()
        if tensors[key].is_floating_point()
        and not (space.head is not None and any(name.startswith(f"{space.head}.") for name in known))
    ]


def _checked(space: UnitSpace, entries: Sequence[_Entry], donors: Sequence[Donor]) -> list[Donor]:
    """The donors in an order of their own, largest weight first."""
    if not donors:
        raise UnitError("there is no donor, expected at least one pruned model: use extract for the backbone's weights")
    for number, donor in enumerate(donors):
        if not math.isfinite(donor.weight) or donor.weight <= 0:
            raise UnitError(f"donor {number} has the weight {donor.weight}, expected a finite number above 0")
        try:
            space.check(donor.mask)
        except UnitError as error:
            raise UnitError(f"donor {number} does not fit: {error}") from error
        _check_tensors(number, donor, space, entries)
    same: dict[tuple[float, bytes], int] = {}
    keys = [(-donor.weight, donor.mask.kept.tobytes()) for donor in donors]
    for key in keys:
        same[key] = same.get(key, 0) + 1
    # Contents only decide between donors of equal weights and masks: hashing them costs more than the mean.
    order = sorted(
        range(len(donors)),
        key=lambda place: (*keys[place], _digest(donors[place], entries) if same[keys[place]] > 1 else b""),
    )
    return [donors[place] for place in order]


def _check_tensors(number: int, donor: Donor, space: UnitSpace, entries: Sequence[_Entry]) -> None:
    counts = space.counts(donor.mask.kept)
    for entry in entries:
        name, tensor = entry.names[0], entry.find(donor)
        if tensor is None:
            raise UnitError(
                f"donor {number} has no tensor {name}: give all parameters and buffers of its pruned model, "
                "the classifier's aside"
            )
        cut = {place: layout for place, layout in enumerate(entry.layouts) if groups(layout)}
        expected = [size(cut[place], counts) if place in cut else whole for place, whole in enumerate(entry.shape)]
        if list(tensor.shape) != expected:
            raise UnitError(
                f"{name} of donor {number} has the shape {list(tensor.shape)}, expected {expected} by its mask: "
                "give the tensors of the model that this mask made"
            )
        if not tensor.is_floating_point():
            raise UnitError(f"{name} of donor {number} is of {tensor.dtype}, expected a floating-point type")
        others = [donor.tensors[other] for other in entry.names if other in donor.tensors]
        if any(other is not tensor and not torch.equal(other, tensor) for other in others):
            raise UnitError(
                f"{' and '.join(entry.names)} are one tensor in the backbone and differ in donor {number}: "
                "prune the backbone itself, whose tensors stay tied"
            )
        if not _finite(tensor):
            raise UnitError(
                f"{name} of donor {number} holds values that are not finite: its training went wrong, leave it out"
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; a finite sum proves it in one pass."""
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float64))) or bool(torch.isfinite(tensor).all())


def _digest(donor: Donor, entries: Sequence[_Entry]) -> bytes:
    """A hash of the tensors that are read."""
    result = hashlib.sha256()
    for entry in entries:
        tensor = entry.find(donor)
        assert tensor is not None, "checked before"
        result.update(f"{entry.names[0]} {tensor.dtype};".encode())
        result.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.digest()
