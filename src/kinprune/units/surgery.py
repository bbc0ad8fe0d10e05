"""Extraction: a model and a mask to a physically smaller, ordinary module.

Every tensor is cut by index selection along the dimensions that hold units, and the modules' own attributes (channels,
groups, heads) are set to match. Nothing is traced and no hook is left: the result can be copied, compiled, exported
and trained like the original.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinprune.units.copies import copy_around
from kinprune.units.layout import Layout, groups, kept, size
from kinprune.units.modes import forget
from kinprune.units.space import Mask, UnitSpace

Attribute = int | tuple[int, ...]


def extract(model: nn.Module, space: UnitSpace, mask: Mask) -> nn.Module:
    """The sub-network of ``model`` that keeps the units of ``mask``; ``model`` itself is not touched.

    The result equals the model with the removed units' outgoing weights set to zero, wherever no statistics run over
    the units (``Group.normalised``). Tensors stay on their device and in their type.

    Raises:
        UnitError: the mask belongs to another unit space or empties a group.
    """
    space.check(mask)
    units = [np.flatnonzero(part).astype(np.int64) for part in space.split(mask.kept)]
    counts = space.sizes.tolist()
    partly = {group for group, chosen in enumerate(units) if len(chosen) < counts[group]}
    memo: dict[int, Any] = {}
    indices: dict[Layout, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if id(tensor) in memo:
            continue
        cut = tensor.detach()
        for dimension, layout in enumerate(space.tensors.get(name, ())):
            if partly.isdisjoint(groups(layout)):
                continue
            if layout not in indices:
                indices[layout] = torch.from_numpy(kept(layout, units, counts))
            cut = _take(cut, dimension, indices[layout].to(tensor.device))
        cut = cut.clone() if cut.untyped_storage() is tensor.untyped_storage() or cut.shape == tensor.shape else cut
        memo[id(tensor)] = nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
    small = copy_around(model, memo)
    set_attributes(small, attributes_of(space, [len(chosen) for chosen in units]))
    forget(small)
    return small


def _take(tensor: Tensor, dimension: int, indices: Tensor) -> Tensor:
    """``index_select``; along the last dimension PyTorch's ``gather`` does the same many times faster."""
    if dimension == 0 or dimension < tensor.dim() - 1:
        return tensor.index_select(dimension, indices)
    return tensor.gather(dimension, indices.expand(*tensor.shape[:-1], -1))


def attributes_of(space: UnitSpace, counts: list[int]) -> dict[str, dict[str, Attribute]]:
    """The attributes of each module that differ from the whole model's when group g keeps ``counts[g]`` units."""
    result: dict[str, dict[str, Attribute]] = {}
    full = space.sizes.tolist()
    for (module, attribute), layout in space.attributes.items():
        value, before = _value(layout, counts), _value(layout, full)
        if value != before:
            result.setdefault(module, {})[attribute] = value
    return result


def _value(layout: Layout | tuple[Layout, ...], counts: list[int]) -> Attribute:
    if isinstance(layout, tuple):
        return tuple(size(part, counts) for part in layout)
    return size(layout, counts)


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Attribute]]) -> None:
    """Set integer attributes of modules by their dotted names."""
    for name, values in attributes.items():
        module = model.get_submodule(name)
        for attribute, value in values.items():
            setattr(module, attribute, value)
