"""Memory of a fine-tuning: how it goes about its mini-batches to stay under a limit, and what it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from kinprune.training.freezing import Piece, frozen
from kinprune.training.recomputation import recomputed

JUDGED, COUNTED = 128, 64
"""Images at a time, where there is no limit, when states are judged and batch norms are counted again."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a fine-tuning goes about its mini-batches.

    Every mini-batch of ``batch_size`` images goes through the model in ``parts``; the blocks ``recomputed`` are run
    again in the backward pass instead of kept; the layers ``frozen``, the earliest, are not trained. ``norms_frozen``
    says that batch norms are frozen because a part has too few images for statistics. The teacher answers
    ``taught_at_once`` images at a time, and states are judged on ``judged_at_once``. ``compact`` is to give every block
    of memory back to the system as soon as it is free, which costs time. ``predicted`` is the peak in bytes under
    ``limit``; both are None where there is no limit.
    """

    batch_size: int
    parts: int = 1
    recomputed: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    norms_frozen: bool = False
    taught_at_once: int = 0
    judged_at_once: int = JUDGED
    compact: bool = False
    limit: int | None = None
    predicted: int | None = None

    @property
    def micro_batch(self) -> int:
        """Images in the largest part."""
        return -(-self.batch_size // self.parts)

    @property
    def least_part(self) -> int:
        """Images in the smallest part."""
        return self.batch_size // self.parts


@dataclass(frozen=True)
class TrainingMemory:
    """What a fine-tuning under a limit was planned to take and took, in bytes, and what was done for it.

    ``peak`` is the most memory taken while it ran, above what was taken just before, None where the system cannot
    tell. ``micro_batch`` is the most images that went through the model at once, of ``batch_size`` a step;
    ``recomputed`` the number of blocks run twice; ``frozen`` the early layers that were not trained;
    ``norms_frozen`` whether batch norms were frozen because a micro-batch was too small for statistics.
    """

    limit: int
    predicted: int
    peak: int | None
    batch_size: int
    micro_batch: int
    recomputed: int
    frozen: tuple[str, ...]
    norms_frozen: bool


def remember(plan: MemoryPlan, peak: int | None) -> TrainingMemory | None:
    """What a plan came to; None where there was no limit."""
    if plan.limit is None or plan.predicted is None:
        return None
    return TrainingMemory(
        plan.limit,
        plan.predicted,
        peak,
        plan.batch_size,
        plan.micro_batch,
        len(plan.recomputed),
        plan.frozen,
        plan.norms_frozen,
    )


@contextmanager
def arranged(plan: MemoryPlan, model: nn.Module, layers: Sequence[Piece]) -> Iterator[None]:
    """The model recomputes and freezes inside as the plan says; ``layers`` are its pieces."""
    with frozen(model, [layer for layer in layers if layer.name in plan.frozen]), recomputed(model, plan.recomputed):
        yield
