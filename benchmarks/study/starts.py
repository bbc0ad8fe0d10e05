"""Starts: what each method gives before the common fine-tuning. All get the same repair in closed form."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

import kinprune as kp
from benchmarks.study.targets import TargetTask
from kinprune.adaptation import adapt
from kinprune.bank import Bank
from kinprune.evaluation import lay_out
from kinprune.kin import Search
from kinprune.pruning import prune
from kinprune.repair import repair
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


def begin(method: Mapping[str, Any], target: TargetTask, keep: float, sources: int | None = None) -> Start:
    """The start of a method of ``methods.json``. One with a bank sees ``sources`` of its narrow tasks, or all."""
    started = time.perf_counter()
    way = method["way"]
    if way == "adapt":
        return _adapted(method, target, keep, hidden(target.bank, method.get("hide"), sources), started)
    if way == "prune":
        stream = target.bank.header.stream
        plan = kp.Plan(kp.Budget(keep=keep), stream=stream, recipe=Recipe(steps=0), **method["plan"])
        pruned = prune(target.backbone, target.task, plan)
        closed = pruned.closed_form
        return Start(pruned.model, closed.trainable, time.perf_counter() - started, _closed(closed))
    if way == "whole":
        return Start(copy.deepcopy(target.dense), None, time.perf_counter() - started)
    if way == "baseline":
        from benchmarks.study import baselines

        return getattr(baselines, method["name"])(target, keep, **method.get("options", {}))  # type: ignore[no-any-return]
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
        "voters": len(adapted.voters),
        "blend": adapted.blend,
        "similarity": [round(neighbour.similarity, 5) for neighbour in adapted.neighbours[:10]],
        "neighbours_sharing_a_class": shared,
        "classes_of_the_nearest": len(adapted.neighbours[0].entry.classes),
    }
    return Start(sized.model, sized.closed_form.trainable, time.perf_counter() - started, details)


def hidden(bank: Bank, hide: str | None, sources: int | None) -> list[str]:
    """The keys of the records that are not seen: ``hide`` *broad* or *narrow* ones, and all but ``sources`` narrow.

    Those that are seen are a seeded draw, and a larger one holds a smaller one. Broad are those of more classes than
    the fewest.
    """
    entries = bank.entries()
    least = min(len(entry.classes) for entry in entries)
    broad = [entry.key for entry in entries if len(entry.classes) > least]
    narrow = sorted(entry.key for entry in entries if len(entry.classes) == least)
    mixed = [narrow[place] for place in np.random.default_rng(0).permutation(len(narrow))]
    unseen = mixed[0 if hide == "narrow" else len(mixed) if sources is None else sources :]
    return [*unseen, *(broad if hide == "broad" else [])]


def _closed(closed: Any) -> dict[str, Any]:
    return {"reconstructed": closed.reconstructed, "judged": closed.judged}
