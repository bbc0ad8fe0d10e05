"""Finding a model's units: one run on the meta device, then a trial cut that must behave as foreseen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, cast

import torch
from torch import Tensor, nn

from kinprune.errors import UnitError
from kinprune.units import layout as layouts
from kinprune.units.axes import Axes, Form
from kinprune.units.costs import StateTensor, cost_model
from kinprune.units.layout import Fixed, Layout, Product, Sum, Units
from kinprune.units.modes import evaluating
from kinprune.units.rules import RULES
from kinprune.units.space import Group, Kind, Mask, Part, PartRole, Shortcut, UnitSpace, Whole
from kinprune.units.surgery import extract
from kinprune.units.trace import ShapeRecorder, Step, Trace, on_meta, watch

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "nh")
HEAD_WIDTHS = ("attn_dim", "all_head_dim", "all_head_size", "inner_dim", "key_attn_dim", "val_attn_dim", "out_dim")
INNER_SHAPES = ("bias_shape", "shape")
"""Attributes by which attention modules of timm, transformers and torchvision know their heads, and shapes that some
modules view with."""

SILENT = frozenset({"detach", "alias", "_to_copy", "lift_fresh", "empty", "clone"})
"""Operations that come and go with how a tensor lies in memory; two runs are compared without them."""

RESHAPES = frozenset({"view", "_unsafe_view", "_reshape_alias"})
"""Names of one and the same operation; which of them runs depends on how the tensor lies in memory."""

STREAM = "a channel of the residual stream (cut with stream=True, --stream)"


@dataclass
class Draft:
    """A unit space in the making: the trace, its chosen leaves, and who uses each leaf."""

    model: nn.Module
    trace: Trace
    stream: bool
    producers: dict[int, list[str]] = field(default_factory=dict)
    consumers: dict[int, list[str]] = field(default_factory=dict)
    chosen: list[int] = field(default_factory=list)
    _leaves: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def axes(self) -> Axes:
        return self.trace.axes

    def leaves(self, axis: int) -> frozenset[int]:
        """The leaves below an axis, kept: once some are chosen no axis changes."""
        if axis not in self._leaves:
            self._leaves[axis] = frozenset(self.axes.leaves(axis))
        return self._leaves[axis]

    @cached_property
    def head_counts(self) -> dict[int, list[tuple[str, str]]]:
        """The (module, attribute) pairs that may count heads, by the number they hold."""
        found: dict[int, list[tuple[str, str]]] = {}
        for name, module in self.model.named_modules():
            for attribute in HEAD_COUNTS:
                value = getattr(module, attribute, None)
                if isinstance(value, int):
                    found.setdefault(value, []).append((name, attribute))
        return found

    @cached_property
    def cut_layers(self) -> dict[int, set[str]]:
        """The layers of whose tensors a leaf is a part."""
        found: dict[int, set[str]] = {}
        for name, axes in self.trace.parameters.items():
            for leaf in frozenset[int]().union(*(self.leaves(axis) for axis in axes)):
                found.setdefault(leaf, set()).add(_layer(name))
        return found


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
        draft = _draft(meta, trace, stream)
        space = _space(draft, head)
        if not space.groups:
            raise UnitError(_nothing(space, stream))
        blamed = _trial(draft, space, (1, channels, *image_size))
        if blamed is None:
            return space
        _blame(draft, blamed)


def _run(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, Trace]:
    """Trace on the meta device, or for real where the model cannot run there (it reads values)."""
    meta, trace = on_meta(model), Trace()
    reference = _reference(model)
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


def _reference(model: nn.Module) -> Tensor:
    """A tensor whose device and type the model's images share."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.empty(0))


def _draft(model: nn.Module, trace: Trace, stream: bool) -> Draft:
    draft, axes = Draft(model, trace, stream), trace.axes
    for name, role in trace.roles.items():
        grouping = axes.leaves(trace.groupings[name]) if name in trace.groupings else []
        for axis, users in ((role.produces, draft.producers), (role.consumes, draft.consumers)):
            for leaf in dict.fromkeys(axes.leaves(axis)):
                if leaf not in grouping:
                    users.setdefault(leaf, []).append(name)
    if not stream:
        _hold_streams(draft)
    _hold_squeezes(draft)
    candidates = [leaf for leaf in draft.producers if leaf in draft.consumers and _free(axes, leaf)]
    _choose_outermost(axes, candidates)
    draft.chosen = [leaf for leaf in candidates if axes.facts[leaf].fixed is None]
    return draft


def _free(axes: Axes, leaf: int) -> bool:
    facts = axes.facts[leaf]
    return facts.fixed is None and facts.active and axes.size(leaf) > 1


def _hold_streams(draft: Draft) -> None:
    """Keep residual streams whole, and whatever else runs from block to block of a sequence that has streams inside."""
    axes = draft.axes
    for leaf in draft.producers:
        if axes.facts[leaf].coupled:
            axes.freeze(leaf, STREAM)
    for leaf in [leaf for leaf in draft.producers if leaf in draft.consumers]:
        name = _owner(draft, leaf)
        owner = draft.model.get_submodule(name)
        joined = any(not name or f"{join}.".startswith(f"{name}.") for join in draft.trace.joins)
        if joined and (owner is draft.model or isinstance(owner, (nn.Sequential, nn.ModuleList))):
            axes.freeze(leaf, STREAM)


def _hold_squeezes(draft: Draft) -> None:
    """The few channels inside a squeeze-and-excite gate cost nothing and decide much: they stay."""
    for leaf, users in draft.consumers.items():
        if all(user in draft.trace.gates for user in users):
            draft.axes.freeze(leaf, "the squeeze of a gate")


def _owner(draft: Draft, leaf: int) -> str:
    """The innermost module that holds every layer that makes or uses a leaf."""
    layers = [_layer(name).split(".") for name in draft.producers[leaf] + draft.consumers.get(leaf, [])]
    common = []
    for names in zip(*layers, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    if any(len(common) == len(names) for names in layers):
        common = common[:-1]
    return ".".join(common)


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _choose_outermost(axes: Axes, candidates: Sequence[int]) -> None:
    """Where a dimension is a product of several candidates (heads x width), only the outermost may be cut."""
    free = set(candidates)
    for axis, form in enumerate(axes.forms):
        if form is not Form.PRODUCT or axes.find(axis) != axis:
            continue
        inside = [leaf for leaf in dict.fromkeys(axes.leaves(axis)) if leaf in free and axes.facts[leaf].fixed is None]
        first = axes.factors(axis)
        outer = next((axes.leaves(factor) for factor in first if set(axes.leaves(factor)) & set(inside)), [])
        for leaf in inside:
            if leaf not in outer:
                axes.freeze(leaf, "it lies inside units that are cut whole")


class _Layouts(dict[int, Layout]):
    """Layouts by axis, made when asked for."""

    def __init__(self, axes: Axes, number: dict[int, int]) -> None:
        super().__init__()
        self._axes, self._number = axes, number

    def __missing__(self, axis: int) -> Layout:
        root = self._axes.find(axis)
        if root not in self:
            self[root] = self._make(root)
        return self[root]

    def _make(self, root: int) -> Layout:
        axes = self._axes
        if axes.forms[root] is Form.LEAF:
            return Units(self._number[root]) if root in self._number else Fixed(axes.sizes[root])
        parts = tuple(self[part] for part in axes.parts[root])
        if all(isinstance(part, Fixed) for part in parts):
            return Fixed(axes.sizes[root])
        return Product(parts) if axes.forms[root] is Form.PRODUCT else Sum(parts)


def _space(draft: Draft, head: str | None) -> UnitSpace:
    made = _Layouts(draft.axes, {leaf: number for number, leaf in enumerate(draft.chosen)})
    persistent = set(draft.model.state_dict().keys())
    state: dict[str, StateTensor] = {}
    tensors: dict[str, tuple[Layout, ...]] = {}
    for kind, named in (("parameter", draft.model.named_parameters), ("buffer", draft.model.named_buffers)):
        for name, tensor in named():
            layout = tuple(made[axis] for axis in draft.trace.parameters[name])
            tensors[name] = layout
            state[name] = StateTensor(layout, kind == "parameter", name in persistent, tensor.element_size())
    by_group: dict[int, list[tuple[str, int]]] = {}
    for name, layout in tensors.items():
        for dimension, part in enumerate(layout):
            for group in dict.fromkeys(layouts.groups(part)):
                by_group.setdefault(group, []).append((name, dimension))
    attributes = _attributes(draft, made)
    groups = _groups(draft, by_group, made)
    shortcuts = tuple(
        Shortcut(_layer(name), module, cast(Literal["input", "output"], side))
        for name, (module, side) in draft.trace.shortcuts.items()
    )
    costs = cost_model(state, draft.trace.operations, made.__getitem__, len(groups))
    return UnitSpace(groups, tensors, attributes, _whole(draft, head), shortcuts, costs, head)


def _attributes(draft: Draft, made: _Layouts) -> dict[tuple[str, str], Layout | tuple[Layout, ...]]:
    """Which integer attributes of which modules follow from the cut tensors."""
    result: dict[tuple[str, str], Layout | tuple[Layout, ...]] = {}
    first: dict[int, str] = {}  # a tied tensor is known by its first name
    for name, value in (
        *draft.model.named_parameters(remove_duplicate=False), *draft.model.named_buffers(remove_duplicate=False)
    ):  # fmt: skip
        module_name, _, tensor = name.rpartition(".")
        module = draft.model.get_submodule(module_name)
        layout = tuple(made[axis] for axis in draft.trace.parameters[name])
        grouping = draft.trace.groupings.get(first.setdefault(id(value), name))
        if isinstance(module, nn.modules.conv._ConvNd) and tensor == "weight":
            groups = made[grouping] if grouping is not None else Fixed(1)
            inner, outer = (1, 0) if not module.transposed else (0, 1)
            result[module_name, "in_channels"] = Product((groups, layout[inner]))
            result[module_name, "out_channels"] = layout[outer]
            result[module_name, "groups"] = groups
        elif isinstance(module, nn.Linear) and tensor == "weight":
            result[module_name, "out_features"], result[module_name, "in_features"] = layout
        elif isinstance(module, nn.modules.batchnorm._NormBase) and tensor in ("weight", "running_mean"):
            result[module_name, "num_features"] = layout[0]
        elif isinstance(module, nn.GroupNorm) and tensor == "weight":
            result[module_name, "num_channels"] = layout[0]
            result[module_name, "num_groups"] = made[grouping] if grouping is not None else Fixed(1)
        elif tensor == "weight" and isinstance(getattr(module, "normalized_shape", None), tuple):
            result[module_name, "normalized_shape"] = layout
    for number, leaf in enumerate(draft.chosen):
        owner = _owner(draft, leaf)
        for name, attribute, count in _head_attributes(draft, leaf, number, owner):
            result[name, attribute] = count
        for name, attribute, sides in _inner_shapes(draft, leaf, number, owner):
            result[name, attribute] = sides
    result.update(_split_sizes(draft, made))
    return {key: value for key, value in result.items() if _moves(value)}


def _moves(layout: Layout | tuple[Layout, ...]) -> bool:
    return any(layouts.groups(part) for part in (layout if isinstance(layout, tuple) else (layout,)))


def _head_attributes(draft: Draft, leaf: int, number: int, owner: str) -> list[tuple[str, str, Layout]]:
    """The (module, attribute) pairs by which the owner of attention heads, and modules inside it, count them."""
    size = draft.axes.size(leaf)
    found: list[tuple[str, str, Layout]] = []
    for name, attribute in draft.head_counts.get(size, ()):
        if owner and not f"{name}.".startswith(f"{owner}."):
            continue
        module = draft.model.get_submodule(name)
        found.append((name, attribute, Units(number)))
        for width in HEAD_WIDTHS:
            value = getattr(module, width, None)
            if isinstance(value, int) and value % size == 0:
                found.append((name, width, Product((Units(number), Fixed(value // size)))))
    return found


def _inner_shapes(draft: Draft, leaf: int, number: int, owner: str) -> list[tuple[str, str, tuple[Layout, ...]]]:
    """Shapes that modules inside ``owner`` keep to view their weights with, where one side is the group's size."""
    size = draft.axes.size(leaf)
    found: list[tuple[str, str, tuple[Layout, ...]]] = []
    for name in draft.cut_layers.get(leaf, ()):
        module = draft.model.get_submodule(name)
        for attribute in INNER_SHAPES:
            value = getattr(module, attribute, None)
            if isinstance(value, tuple) and value.count(size) == 1:
                sides = tuple(Units(number) if side == size else Fixed(side) for side in value)
                found.append((name, attribute, sides))
    return found


def _split_sizes(draft: Draft, made: _Layouts) -> dict[tuple[str, str], tuple[Layout, ...]]:
    """Sizes that modules keep to split their tensors by."""
    found: dict[tuple[str, str], tuple[Layout, ...]] = {}
    for step in draft.trace.steps:
        if step.name != "split_with_sizes":
            continue
        for pieces in zip(*step.outputs, strict=True):  # a dimension at a time
            sizes = [draft.axes.size(piece) for piece in pieces]
            for attribute, value in vars(draft.model.get_submodule(step.module)).items():
                if isinstance(value, (list, tuple)) and list(value) == sizes:
                    found[step.module, attribute] = tuple(made[piece] for piece in pieces)
    return found


def _groups(draft: Draft, by_group: dict[int, list[tuple[str, int]]], made: _Layouts) -> tuple[Group, ...]:
    groups: list[Group] = []
    names: dict[str, int] = {}
    for number, leaf in enumerate(draft.chosen):
        producer = draft.producers[leaf][0]
        kind = _kind(draft, leaf, producer)
        name = _owner(draft, leaf) if kind in ("head", "node") else _layer(producer)
        owner = draft.model.get_submodule(name)
        if name in names or owner is draft.model or isinstance(owner, (nn.Sequential, nn.ModuleList)):
            name = _layer(producer)
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
    if _head_attributes(draft, leaf, 0, _owner(draft, leaf)) and draft.axes.leaves(
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
        layer = _layer(name)
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


def _trial(draft: Draft, space: UnitSpace, shape: tuple[int, ...]) -> Step | None:
    """Cut a part of every group and run: None if every operation gives the foreseen shapes, else the first that does
    not.
    """
    kept = space.whole_mask().kept
    for number, (group, part) in enumerate(zip(space.groups, space.split(kept), strict=True)):
        part[_trial_count(group, number) :] = False
    counts = space.counts(kept)
    small = extract(draft.model, space, Mask(kept, space.fingerprint)).eval()
    recorder = ShapeRecorder()
    reference = _reference(small)
    # An error of the cut model, of any kind, shows as the step that was not recorded; it is blamed like a wrong shape.
    with torch.no_grad(), recorder, contextlib.suppress(Exception):
        small(torch.zeros(shape, device=reference.device, dtype=reference.dtype))
    seen = iter([(_plain(name), shapes) for name, shapes in recorder.steps if name not in SILENT])
    made = _Layouts(draft.axes, {leaf: number for number, leaf in enumerate(draft.chosen)})
    next(seen, None)  # the image itself
    for step in draft.trace.steps:
        if step.name in SILENT:
            continue
        foreseen = tuple(tuple(layouts.size(made[axis], counts) for axis in output) for output in step.outputs)
        if next(seen, None) != (_plain(step.name), foreseen):
            return step
    return None


def _plain(name: str) -> str:
    return "view" if name in RESHAPES else name


def _trial_count(group: Group, number: int) -> int:
    """How many units a trial keeps: another share for neighbouring groups and for streams, so that no size in the
    model's own code is right by chance; always fewer than all.
    """
    if group.kind == "channel":
        count = group.size * 2 // 3 | 1
    else:
        count = -(-group.size // 2) if number % 2 else -(-group.size * 3 // 5)
    return min(count, group.size - 1)


def _blame(draft: Draft, step: Step) -> None:
    """Freeze the groups at fault for a step that did not give what was foreseen, and those like them elsewhere.

    At fault are the groups among its axes; else those of the module it ran in, whose attributes they set; else the
    streams, which reach everywhere; else all.
    """
    axes = (*(axis for output in step.outputs for axis in output), *step.inputs)
    guilty = {leaf for axis in axes for leaf in draft.axes.leaves(axis) if leaf in draft.chosen}
    inside = {leaf for leaf in draft.chosen if _owner(draft, leaf) == step.module}
    streams = {leaf for leaf in draft.chosen if draft.axes.facts[leaf].coupled}
    guilty = guilty - streams or guilty or inside or streams or set(draft.chosen)
    alike = {_likeness(draft, leaf) for leaf in guilty}
    for leaf in draft.chosen:
        if leaf in guilty or _likeness(draft, leaf) in alike:
            owner = _owner(draft, leaf)
            kind = type(draft.model.get_submodule(owner)).__name__
            draft.axes.freeze(leaf, f"{kind} ({owner or 'the model'}) fixes this size in its own code")


def _likeness(draft: Draft, leaf: int) -> tuple[str, ...]:
    """Equal for groups at the same place of modules of one class; a container or the model makes none alike."""
    owner = _owner(draft, leaf)
    module = draft.model.get_submodule(owner)
    if module is draft.model or isinstance(module, (nn.Sequential, nn.ModuleList)):
        return (str(leaf),)
    return (type(module).__qualname__, *(name.removeprefix(owner) for name in draft.producers[leaf]))
