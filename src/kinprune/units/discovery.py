"""Finding a model's units: one run on the meta device, then a trial cut that must behave as foreseen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import nn

from kinprune.errors import UnitError
from kinprune.units import layout as layouts
from kinprune.units.attributes import attributes_of_draft, head_attributes
from kinprune.units.costs import Matrix, StateTensor, cost_model
from kinprune.units.draft import Draft, Layouts, layer_of, make_draft, owner_of
from kinprune.units.layout import Layout
from kinprune.units.modes import evaluating
from kinprune.units.rules import RULES
from kinprune.units.space import Group, Kind, Part, PartRole, Shortcut, UnitSpace, Whole
from kinprune.units.trace import Trace, on_meta, reference_tensor, watch
from kinprune.units.trial import blame, trial


def find_units(
    model: nn.Module, image_size: tuple[int, int], *, channels: int = 3, stream: bool = False, head: str | None = None
) -> UnitSpace:
    """The unit space of a model that takes ``[n, channels, *image_size]`` and gives logits.

    ``stream`` adds the channels of residual streams. ``head`` is the dotted name of the classifier. Weights are not
    read and the model is not changed.

    Raises:
        UnitError: nothing can be pruned; the message lists why.
    """
    meta, trace = _run(model, (1, channels, *image_size))
    for name in (head,) if head else ():
        for axis in trace.parameters.get(f"{name}.weight", ())[:1]:
            trace.axes.freeze(axis, "the classifier's classes")
    while True:
        draft = make_draft(meta, trace, stream)
        space = _space(draft, head)
        if not space.groups:
            raise UnitError(_nothing(space, stream))
        blamed = trial(draft, space, (1, channels, *image_size))
        if blamed is None:
            return space
        blame(draft, blamed)


def _run(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Trace]:
    """Trace on the meta device, or for real where the model cannot run there (it reads values)."""
    meta, trace = on_meta(model), Trace()
    reference = reference_tensor(model)
    buffers = list(meta.buffers())
    try:
        watch(meta, torch.empty(shape, device="meta", dtype=reference.dtype), RULES, trace)
        # A model that replaced a buffer on the way (a grid kept for next time) would not run the same again.
        same = all(now is before for now, before in zip(meta.buffers(), buffers, strict=True))
        return meta if same else on_meta(model), trace
    except UnitError:
        raise
    except Exception:  # whatever it is: the model's own error comes again below, where nobody watches it
        image = torch.zeros(shape, device=reference.device, dtype=reference.dtype)
    try:
        with torch.no_grad(), evaluating(model):
            model(image)
    except Exception as error:
        size = " x ".join(str(value) for value in shape[2:])
        raise UnitError(
            f"the model cannot run on one image of {size} pixels with {shape[1]} channels: "
            f"{type(error).__name__}: {error}; "
            "expected a model that takes a batch of images of that size: choose another image size"
        ) from error
    trace = Trace()
    watch(model, image, RULES, trace)
    return model, trace


def _space(draft: Draft, head: str | None) -> UnitSpace:
    made = Layouts(draft.axes, {leaf: number for number, leaf in enumerate(draft.chosen)})
    persistent = set(draft.model.state_dict().keys())
    state: dict[str, StateTensor] = {}
    tensors: dict[str, tuple[Layout, ...]] = {}
    for kind, named in (("parameter", draft.model.named_parameters), ("buffer", draft.model.named_buffers)):
        for name, tensor in named():
            layout = tuple(made[axis] for axis in draft.trace.parameters[name])
            tensors[name] = layout
            state[name] = StateTensor(
                layout,
                kind == "parameter",
                name in persistent,
                tensor.element_size(),
                tensor.is_floating_point(),
                _matrix(draft, made, name),
            )
    by_group: dict[int, list[tuple[str, int]]] = {}
    for name, layout in tensors.items():
        for dimension, part in enumerate(layout):
            for group in dict.fromkeys(layouts.groups(part)):
                by_group.setdefault(group, []).append((name, dimension))
    attributes = attributes_of_draft(draft, made)
    groups = _groups(draft, by_group, made)
    shortcuts = tuple(
        Shortcut(layer_of(name), module, cast(Literal["input", "output"], side))
        for name, (module, side) in draft.trace.shortcuts.items()
    )
    costs = cost_model(state, draft.trace.operations, made.__getitem__, len(groups))
    return UnitSpace(groups, tensors, attributes, _whole(draft, head), shortcuts, costs, head)


def _matrix(draft: Draft, made: Layouts, name: str) -> Matrix | None:
    """What a weight makes, where it is one of a convolution or matrix product; the classifier makes the output."""
    role = draft.trace.roles.get(name)
    if role is None:
        return None
    return Matrix(made[role.produces], draft.axes.find(role.produces) == draft.axes.find(draft.trace.output[-1]))


def _groups(draft: Draft, by_group: dict[int, list[tuple[str, int]]], made: Layouts) -> tuple[Group, ...]:
    groups: list[Group] = []
    names: dict[str, int] = {}
    for number, leaf in enumerate(draft.chosen):
        producer = draft.producers[leaf][0]
        kind = _kind(draft, leaf, producer)
        name = owner_of(draft, leaf) if kind in ("head", "node") else layer_of(producer)
        owner = draft.model.get_submodule(name)
        if name in names or owner is draft.model or isinstance(owner, (nn.Sequential, nn.ModuleList)):
            name = layer_of(producer)
        if name in names:  # a layer that makes several groups
            name = f"{name}:{number}"
        names[name] = number
        produced = draft.trace.roles[producer].produces
        width = layouts.affine(made[produced])[1][number] // _repeats(draft, draft.axes.leaves(produced), leaf)
        parts = tuple(_part(draft, leaf, tensor, dimension) for tensor, dimension in by_group.get(number, []))
        normalised = draft.axes.facts[leaf].normalised
        groups.append(Group(name, kind, draft.axes.size(leaf), width, parts, normalised))
    return tuple(groups)


def _repeats(draft: Draft, leaves: Sequence[int], leaf: int) -> int:
    """How often a leaf stands in a dimension: three times in concatenated queries, keys and values."""
    axes = draft.axes
    repeated = {other for other in leaves if axes.facts[other].fixed in ("it is unbound", "repeated segments")}
    fixed = math.prod(axes.size(other) for other in leaves if other in repeated)
    return max(leaves.count(leaf), 1) * fixed


def _kind(draft: Draft, leaf: int, producer: str) -> Kind:
    if draft.axes.facts[leaf].coupled:
        return "channel"
    if head_attributes(draft, leaf, 0, owner_of(draft, leaf)) and draft.axes.leaves(
        draft.trace.roles[producer].produces
    ) != [leaf]:
        return "head"
    return "filter" if len(draft.trace.parameters[producer]) > 2 else "node"


def _part(draft: Draft, leaf: int, tensor: str, dimension: int) -> Part:
    role: PartRole = "carries"
    known = draft.trace.roles.get(tensor)
    leaves = draft.leaves(draft.trace.parameters[tensor][dimension])
    if known is not None and leaf in leaves:
        if tensor in draft.producers[leaf] and leaves <= draft.leaves(known.produces):
            role = "produces"
        if tensor in draft.consumers[leaf] and draft.axes.find(draft.trace.parameters[tensor][dimension]) == (
            draft.axes.find(known.consumes)
        ):
            role = "consumes"
    return Part(tensor, dimension, role)


def _whole(draft: Draft, head: str | None) -> tuple[Whole, ...]:
    """Every layer whose outputs are not cut, with the first reason found."""
    result = []
    for name, role in draft.trace.roles.items():
        leaves = sorted(draft.axes.leaves(role.produces), key=lambda leaf: leaf not in draft.consumers)
        if any(leaf in draft.chosen for leaf in leaves):
            continue
        layer = layer_of(name)
        reasons = [draft.axes.facts[leaf].fixed for leaf in leaves if draft.axes.facts[leaf].fixed]
        if layer == head:
            reason = "the classifier's classes"
        elif reasons:
            reason = str(reasons[0])
        elif not any(leaf in draft.consumers for leaf in leaves):
            reason = "no layer's weights take it in"
        else:
            reason = "it is not on the images' path"
        result.append(Whole(layer, draft.axes.size(role.produces), reason))
    return tuple(result)


def _nothing(space: UnitSpace, stream: bool) -> str:
    reasons = "; ".join(dict.fromkeys(f"{whole.reason} ({whole.layer})" for whole in space.whole[:8]))
    hint = "" if stream else ": try stream=True (--stream)"
    return f"the model has no prunable unit, expected at least one: {reasons or 'it has no layer with weights'}{hint}"
