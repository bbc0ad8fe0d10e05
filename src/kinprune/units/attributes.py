"""Which attributes of which modules follow from the cut: channels, groups, heads, shapes kept for viewing."""

from __future__ import annotations

from torch import nn

from kinprune.units import layout as layouts
from kinprune.units.draft import Draft, Layouts, owner_of
from kinprune.units.layout import Fixed, Layout, Product, Units

HEAD_WIDTHS = ("attn_dim", "all_head_dim", "all_head_size", "inner_dim", "key_attn_dim", "val_attn_dim", "out_dim")
INNER_SHAPES = ("bias_shape", "shape")
"""Attributes by which attention modules of timm, transformers and torchvision know their heads, and shapes that some
modules view with."""


def attributes_of_draft(draft: Draft, made: Layouts) -> dict[tuple[str, str], Layout | tuple[Layout, ...]]:
    """Which integer attributes of which modules follow from the cut tensors."""
    result: dict[tuple[str, str], Layout | tuple[Layout, ...]] = {}
    first: dict[int, str] = {}  # a tied tensor is known by its first name
    for name, value in (
        *draft.model.named_parameters(remove_duplicate=False),
        *draft.model.named_buffers(remove_duplicate=False),
    ):
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
        elif grouping is not None and getattr(module, "channels", None) == draft.axes.size(grouping):
            result[module_name, "channels"] = made[grouping]  # a fixed filter for each channel (anti-aliasing)
    for number, leaf in enumerate(draft.chosen):
        owner = owner_of(draft, leaf)
        for name, attribute, count in head_attributes(draft, leaf, number, owner):
            result[name, attribute] = count
        for name, attribute, sides in _inner_shapes(draft, leaf, number, owner):
            result[name, attribute] = sides
    result.update(_split_sizes(draft, made))
    return {key: value for key, value in result.items() if _moves(value)}


def _moves(layout: Layout | tuple[Layout, ...]) -> bool:
    return any(layouts.groups(part) for part in (layout if isinstance(layout, tuple) else (layout,)))


def head_attributes(draft: Draft, leaf: int, number: int, owner: str) -> list[tuple[str, str, Layout]]:
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


def _split_sizes(draft: Draft, made: Layouts) -> dict[tuple[str, str], tuple[Layout, ...]]:
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
