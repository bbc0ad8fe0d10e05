"""The trial of a unit space: cut a part of every group and run; every operation must give the foreseen shapes."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from kinprune.units import layout as layouts
from kinprune.units.draft import Draft, Layouts, owner_of
from kinprune.units.space import Group, Mask, UnitSpace
from kinprune.units.surgery import extract
from kinprune.units.trace import ShapeRecorder, Step, reference_tensor

SILENT = frozenset({"detach", "alias", "_to_copy", "lift_fresh", "empty", "clone"})
"""Operations that come and go with how a tensor lies in memory; two runs are compared without them."""


RESHAPES = frozenset({"view", "_unsafe_view", "_reshape_alias"})
"""Names of one and the same operation; which of them runs depends on how the tensor lies in memory."""


def trial(draft: Draft, space: UnitSpace, shape: tuple[int, ...]) -> Step | None:
    """Cut a part of every group and run: None if every operation gives the foreseen shapes, else the first that does
    not.
    """
    kept = space.whole_mask().kept
    for number, (group, part) in enumerate(zip(space.groups, space.split(kept), strict=True)):
        part[_trial_count(group, number) :] = False
    counts = space.counts(kept)
    small = extract(draft.model, space, Mask(kept, space.fingerprint)).eval()
    recorder = ShapeRecorder()
    reference = reference_tensor(small)
    # An error of the cut model, of any kind, shows as the step that was not recorded; it is blamed like a wrong shape.
    with torch.no_grad(), recorder, contextlib.suppress(Exception):
        small(torch.zeros(shape, device=reference.device, dtype=reference.dtype))
    seen = iter([(_plain(name), shapes) for name, shapes in recorder.steps if name not in SILENT])
    made = Layouts(draft.axes, {leaf: number for number, leaf in enumerate(draft.chosen)})
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


def blame(draft: Draft, step: Step) -> None:
    """Freeze the groups at fault for a step that did not give what was foreseen, and those like them elsewhere.

    At fault are the groups among its axes; else those of the module it ran in, whose attributes they set; else the
    streams, which reach everywhere; else all.
    """
    axes = (*(axis for output in step.outputs for axis in output), *step.inputs)
    guilty = {leaf for axis in axes for leaf in draft.axes.leaves(axis) if leaf in draft.chosen}
    inside = {leaf for leaf in draft.chosen if owner_of(draft, leaf) == step.module}
    streams = {leaf for leaf in draft.chosen if draft.axes.facts[leaf].coupled}
    guilty = guilty - streams or guilty or inside or streams or set(draft.chosen)
    alike = {_likeness(draft, leaf) for leaf in guilty}
    for leaf in draft.chosen:
        if leaf in guilty or _likeness(draft, leaf) in alike:
            owner = owner_of(draft, leaf)
            kind = type(draft.model.get_submodule(owner)).__name__
            draft.axes.freeze(leaf, f"{kind} ({owner or 'the model'}) fixes this size in its own code")


def _likeness(draft: Draft, leaf: int) -> tuple[str, ...]:
    """Equal for groups at the same place of modules of one class; a container or the model makes none alike."""
    owner = owner_of(draft, leaf)
    module = draft.model.get_submodule(owner)
    if module is draft.model or isinstance(module, (nn.Sequential, nn.ModuleList)):
        return (str(leaf),)
    return (type(module).__qualname__, *(name.removeprefix(owner) for name in draft.producers[leaf]))
