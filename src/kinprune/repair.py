"""Repair: a model that was just cut, brought in closed form to its start, towards what the whole model answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from kinprune.calibration import ClosedForm, ReconstructionLayer, closed_form, describe_layers
from kinprune.calibration.head import HeadMethod
from kinprune.preprocessing import Preprocessing
from kinprune.tasks import Split
from kinprune.units import Mask, UnitSpace
from kinprune.units.layout import kept as kept_indices


def repair(
    small: nn.Module,
    whole: nn.Module,
    space: UnitSpace,
    mask: Mask,
    split: Split,
    preprocessing: Preprocessing,
    *,
    head: str,
    reconstruct: bool = True,
    trained: bool = False,
    intact: bool = False,
    method: HeadMethod = "ridge",
    seed: int = 0,
) -> ClosedForm:
    """Bring ``small``, cut from ``whole`` by ``mask``, to its closed-form start on a split; see ``closed_form``.

    The classes are those that ``whole`` answers. ``trained`` says that the weights were trained after they were cut:
    their batch norms are counted again, for the whole model's statistics are no longer their aim. ``intact`` says that
    they were trained together, as they are.
    """
    return closed_form(
        small,
        head,
        split.images,
        split.labels,
        whole.get_parameter(f"{head}.weight").shape[0],
        preprocessing,
        dense=whole,
        layers=_layers(space, mask, whole) if reconstruct else (),
        channels=None if trained else _channels(space, mask),
        method=method,
        seed=seed,
        intact=intact,
    )


def _layers(space: UnitSpace, mask: Mask, dense: nn.Module) -> tuple[ReconstructionLayer, ...]:
    """The layers that took in removed units, with where their output joins the residual stream."""
    units = [np.flatnonzero(part).astype(np.int64) for part in space.split(mask.kept)]
    counts = space.sizes.tolist()
    names = dict.fromkeys(
        name.rpartition(".")[0]
        for group, chosen in zip(space.groups, units, strict=True)
        if len(chosen) < group.size
        for name, _ in group.tensors("consumes")
    )
    solvable = [name for name in names if name != space.head and f"{name}.weight" in space.tensors]
    seen = {shortcut.layer: shortcut for shortcut in space.shortcuts}
    layers = []
    for layer in describe_layers(dense, solvable):
        if layer.shortcut is None and layer.name in seen:
            shortcut = seen[layer.name]
            layer = replace(layer, shortcut=(shortcut.module, shortcut.side))
        outputs = kept_indices(space.tensors[f"{layer.name}.weight"][0], units, counts)
        whole = dense.get_parameter(f"{layer.name}.weight").shape[0]
        layers.append(replace(layer, outputs=tuple(outputs.tolist())) if len(outputs) < whole else layer)
    return tuple(layers)


def _channels(space: UnitSpace, mask: Mask) -> dict[str, list[int]]:
    """The channels that each cut layer still makes, or each cut norm still sees, by module."""
    units = [np.flatnonzero(part).astype(np.int64) for part in space.split(mask.kept)]
    counts = space.sizes.tolist()
    return {
        name.rpartition(".")[0]: kept_indices(layout[0], units, counts).tolist()
        for name, layout in space.tensors.items()
        if name.endswith(".weight") and layout
    }
