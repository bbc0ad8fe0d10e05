"""Starts: what each method gives before the common fine-tuning. All get the same repair in closed form."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import kinprune as kp
from benchmarks.study.targets import TargetTask
from kinprune.adaptation import adapt
from kinprune.evaluation import lay_out
from kinprune.kin import Search
from kinprune.pruning import prune, repair
from kinprune.training import Recipe
from kinprune.units import Mask, extract


@dataclass(frozen=True, eq=False)
class Start:
    """A small model before the common fine-tuning. ``trainable`` is the state to train from, where it is another.

    ``seconds`` is what the method took, the bank's building and what ``shared`` names left out; ``details`` is said in
    the row.
    """

    model: nn.Module
    trainable: Mapping[str, Tensor] | None
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)


def begin(method: Mapping[str, Any], target: TargetTask, keep: float, without: Sequence[str] = ()) -> Start:
    """The start of a method of ``methods.json``. Records with a key in ``without`` are hidden from one with a bank."""
    started = time.perf_counter()
    way = method["way"]
    if way == "adapt":
        return _adapted(method, target, keep, [*without, *_hidden(method, target)], started)
    if way == "prune":
        plan = kp.Plan(kp.Budget(keep=keep), recipe=Recipe(steps=0), **method["plan"])
        pruned = prune(target.backbone, target.task, plan)
        closed = pruned.closed_form
        return Start(pruned.model, closed.trainable, time.perf_counter() - started, _closed(closed))
    if way == "whole":
        return Start(copy.deepcopy(target.dense), None, time.perf_counter() - started)
    if way == "baseline":
        from benchmarks.study import baselines

        return getattr(baselines, method["name"])(target, keep)  # type: ignore[no-any-return]
    raise ValueError(f"there is no way {way!r} to begin")


def cut(
    target: TargetTask, mask: Mask, seconds: float, *, whole: nn.Module | None = None, details: Mapping[str, Any] = {}
) -> Start:
    """A start from a mask: extracted from ``whole`` (the dense model where none is given) and repaired towards it."""
    started = time.perf_counter()
    small = extract(target.dense if whole is None else whole, target.space, mask)
    taken = seconds + time.perf_counter() - started
    return mend(target, small, mask, taken, trained=whole is not None, details=details)


def mend(
    target: TargetTask, small: nn.Module, mask: Mask, seconds: float, *, trained: bool, details: Mapping[str, Any] = {}
) -> Start:
    """A start from a model that a mask cut: repaired towards the dense model. ``trained`` is as ``repair`` takes it."""
    started = time.perf_counter()
    lay_out(small)
    closed = repair(
        small,
        target.dense,
        target.space,
        mask,
        target.fit,
        target.task.preprocessing,
        head=target.backbone.head,
        trained=trained,
    )
    taken = seconds + time.perf_counter() - started
    return Start(small, closed.trainable, taken, {**_closed(closed), **details})


def _adapted(
    method: Mapping[str, Any], target: TargetTask, keep: float, without: Sequence[str], started: float
) -> Start:
    plan = kp.AdaptPlan(**method.get("plan", {}), search=Search(**method.get("search", {})), recipe=Recipe(steps=0))
    adapted = adapt(
        target.task,
        target.bank,
        kp.Budget(keep=keep),
        plan,
        backbone=target.backbone,
        space=target.space,
        without=without,
    )
    sized = adapted.sizes[0]
    shared = sum(len(neighbour.shared) > 0 for neighbour in adapted.neighbours)
    details = {
        **_closed(sized.closed_form),
        "inherited": sized.inherited,
        "voters": adapted.voters,
        "blend": adapted.blend,
        "similarity": [round(neighbour.similarity, 5) for neighbour in adapted.neighbours[:10]],
        "neighbours_sharing_a_class": shared,
    }
    return Start(sized.model, sized.closed_form.trainable, time.perf_counter() - started, details)


def _hidden(method: Mapping[str, Any], target: TargetTask) -> list[str]:
    """The keys of the records that a method is to do without: the broad ones, or those that are not."""
    if "hide" not in method:
        return []
    entries = target.bank.entries()
    least = min(len(entry.classes) for entry in entries)
    broad = method["hide"] == "broad"
    return [entry.key for entry in entries if (len(entry.classes) > least) == broad]


def _closed(closed: Any) -> dict[str, Any]:
    return {"reconstructed": closed.reconstructed, "judged": closed.judged}
