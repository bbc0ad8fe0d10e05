"""A unit space in the making: which of a trace's axes may be cut, and who makes and uses each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from kinprune.units.axes import Axes, Form
from kinprune.units.layout import Fixed, Layout, Product, Sum, Units
from kinprune.units.trace import Trace

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "heads", "nh")
"""Attributes by which attention modules of timm, transformers and torchvision count their heads."""

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
                found.setdefault(leaf, set()).add(layer_of(name))
        return found


def make_draft(model: nn.Module, trace: Trace, stream: bool) -> Draft:
    """Decide which leaves of a trace may be cut, with the residual stream or without."""
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
        name = owner_of(draft, leaf)
        owner = draft.model.get_submodule(name)
        joined = any(not name or f"{join}.".startswith(f"{name}.") for join in draft.trace.joins)
        if joined and (owner is draft.model or isinstance(owner, (nn.Sequential, nn.ModuleList))):
            axes.freeze(leaf, STREAM)


def _hold_squeezes(draft: Draft) -> None:
    """The few channels inside a squeeze-and-excite gate cost nothing and decide much: they stay."""
    for leaf, users in draft.consumers.items():
        if all(user in draft.trace.gates for user in users):
            draft.axes.freeze(leaf, "the squeeze of a gate")


def owner_of(draft: Draft, leaf: int) -> str:
    """The innermost module that holds every layer that makes or uses a leaf."""
    layers = [layer_of(name).split(".") for name in draft.producers[leaf] + draft.consumers.get(leaf, [])]
    common = []
    for names in zip(*layers, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    if any(len(common) == len(names) for names in layers):
        common = common[:-1]
    return ".".join(common)


def layer_of(tensor: str) -> str:
    """The dotted name of the module that owns a tensor."""
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


class Layouts(dict[int, Layout]):
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
