"""Planning a fine-tuning under a limit of memory: of the ways that fit, the one that costs least."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from kinprune.errors import TrainingError
from kinprune.evaluation import device_of
from kinprune.preprocessing import Preprocessing
from kinprune.quantities import byte_count
from kinprune.training.memory import JUDGED, MemoryPlan
from kinprune.training.needs import Needs, Phase, as_it_was
from kinprune.training.recipe import LEAST_BATCH, MOMENTS, Recipe, optimiser_name, resolve_precision
from kinprune.training.step import Lesson

SLOW, SLOWEST = 8, 4
"""Images below which passes are slow for their size, and very slow: a mini-batch in parts of 4 takes twice the time of
one in parts of 16, in parts of 1 five to nine times, while recomputation adds two fifths (ResNet-18, MobileNetV2 and
ViT-tiny, on one core)."""


def plan_memory(needs: Needs, limit: int) -> MemoryPlan:
    """How to stay under ``limit`` bytes.

    In this order: the whole mini-batch at once, where it fits with room to spare, or with every block of memory given
    back at once; the largest part of it that fits, halved as often as needed; recomputation of blocks; the earliest
    layers not trained, before parts become so small that they are very slow. Batch norm that trains on statistics
    keeps them, in parts of at least ``LEAST_BATCH`` images, with recomputation where it must, before it is frozen.

    Raises:
        TrainingError: nothing fits; the message names the smallest limit that something fits in.
    """
    smallest = least_memory(needs)
    found = (_fitted(needs, plan, least) for plan, least in _ways(needs, limit) if smallest <= limit)
    plan = next((plan for plan in found if plan is not None), None)
    if plan is not None:
        return plan
    raise TrainingError(
        f"fine-tuning cannot stay below {byte_count(limit)} of memory: with one image at a time, every block "
        f"recomputed and only the last layer trained it is predicted to take {smallest:,} bytes; expected a limit of "
        "at least that: raise the limit, or ask for a smaller model"
    )


def least_memory(needs: Needs) -> int:
    """The smallest limit in bytes that a plan can be made for."""
    plan = replace(_last(needs, None), parts=needs.batch_size, taught_at_once=1, judged_at_once=1)
    return needs.predict(plan)


def least_limit(model: nn.Module, teacher: nn.Module | None, preprocessing: Preprocessing, recipe: Recipe) -> int:
    """The smallest limit of memory in bytes under which ``fine_tune`` trains a model, for any images; no step is made.

    The model and its teacher are where they are to be trained.
    """
    lesson = Lesson(model, teacher, preprocessing, recipe, resolve_precision(recipe, device_of(model)))
    images = torch.zeros(1, 3, *preprocessing.image_size, dtype=torch.uint8)
    moments = MOMENTS[optimiser_name(model, recipe)]
    with as_it_was(model):
        return least_memory(Needs(lesson, images, recipe.batch_size, moments))


def _last(needs: Needs, limit: int | None) -> MemoryPlan:
    """The way that takes least: everything that can be done is done."""
    names = tuple(layer.name for layer in needs.layers[:-1])
    return MemoryPlan(
        needs.batch_size,
        recomputed=needs.blocks,
        frozen=names,
        norms_frozen=needs.statistics,
        compact=True,
        limit=limit,
    )


def _ways(needs: Needs, limit: int) -> Iterator[tuple[MemoryPlan, int]]:
    """Plans whose sizes are still open, least cost first, each with the fewest images that a part may have."""
    small, smallest = min(SLOW, needs.batch_size), min(SLOWEST, needs.batch_size)
    roomy = MemoryPlan(needs.batch_size, limit=limit)
    yield roomy, needs.batch_size
    plain = replace(roomy, compact=True)
    if needs.statistics:
        yield plain, LEAST_BATCH
        if needs.blocks:
            yield replace(plain, recomputed=needs.blocks), LEAST_BATCH
        plain = replace(plain, norms_frozen=True)
    yield plain, small
    if needs.blocks:
        yield replace(plain, recomputed=needs.blocks), smallest
    yield plain, smallest
    if needs.statistics:
        yield from _freezing(needs, replace(_last(needs, limit), norms_frozen=False), LEAST_BATCH)
    yield from _freezing(needs, _last(needs, limit), small)
    yield from _freezing(needs, _last(needs, limit), 1)


def _freezing(needs: Needs, last: MemoryPlan, least: int) -> Iterator[tuple[MemoryPlan, int]]:
    """The plan that freezes the fewest of the earliest layers such that parts of ``least`` images fit."""

    def fits(number: int) -> bool:
        return _fitted(needs, replace(last, frozen=last.frozen[:number]), least, largest=False) is not None

    numbers = range(1, len(last.frozen) + 1)
    place = bisect_left(numbers, True, key=fits)
    if place < len(numbers):
        yield replace(last, frozen=last.frozen[: numbers[place]]), least


def _fitted(needs: Needs, plan: MemoryPlan, least: int, *, largest: bool = True) -> MemoryPlan | None:
    """The plan with the largest sizes that fit (of parts the smallest that may be, where not), or None."""
    parts = [replace(plan, parts=parts) for parts in reversed(_halvings(plan.batch_size))]
    parts = [each for each in parts if each.least_part >= least]
    found = _largest(needs, parts if largest else parts[:1], "learn")
    if found is None:
        return None
    judged = [replace(found, judged_at_once=size) for size in _halvings(JUDGED)]
    found = _largest(needs, judged, "judge")
    if found is None:
        return None
    taught = [replace(found, taught_at_once=size) for size in _halvings(plan.batch_size)]
    found = _largest(needs, taught, "teach")
    return None if found is None else replace(found, predicted=needs.predict(found))


def _halvings(size: int) -> list[int]:
    """1, 2, 4, 8 ... and the size itself."""
    return [*(2**power for power in range(size.bit_length()) if 2**power < size), size]


def _largest(needs: Needs, plans: Sequence[MemoryPlan], phase: Phase) -> MemoryPlan | None:
    """Of plans that grow, the last whose phase fits."""

    def too_large(plan: MemoryPlan) -> bool:
        return needs.bytes_of(plan, phase) > (plan.limit or 0)

    # The ends decide most often, and then nothing between them need be counted.
    if not plans or too_large(plans[0]):
        return None
    if not too_large(plans[-1]):
        return plans[-1]
    return plans[bisect_left(plans, True, lo=1, hi=len(plans) - 1, key=too_large) - 1]
