"""What a report is refused for, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinprune.adaptation import Adapted
from kinprune.errors import KinpruneError
from kinprune.tasks import DecodedTask


class ReportError(KinpruneError):
    """A report's inputs do not belong together, or it cannot be written."""


@dataclass(frozen=True)
class Tried:
    """What was found of an exported model: its accuracy on the test images, and its peak of memory where measured."""

    accuracy: float
    memory_bytes: int | None = None


def check_inputs(
    adapted: Adapted,
    task: DecodedTask,
    samples: Mapping[str, Tensor] | None,
    latencies: Sequence[float | None] | None,
    tried: Sequence[Tried] | None = None,
) -> None:
    """Refuse what does not belong together, with ReportError."""
    _check_task(adapted, task)
    for name, images in (samples or {}).items():
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            shape = ", ".join(map(str, images.shape))
            raise ReportError(
                f"the samples of class {name!r} are {images.dtype} [{shape}], expected uint8 [n, 3, h, w]: give the "
                "images of a decoded task"
            )
    if tried is not None and len(tried) != len(adapted.sizes):
        raise ReportError(f"{len(tried)} exports were tried, expected {len(adapted.sizes)}: one a size")
    if latencies is not None:
        _check_latencies(latencies, len(adapted.sizes))


def _check_task(adapted: Adapted, task: DecodedTask) -> None:
    classes, images = len(adapted.dense.confusion), adapted.dense.n
    if len(task.classes) != classes or len(task.test) != images:
        raise ReportError(
            f"the task {task.name} has {len(task.classes)} classes and {len(task.test)} test images, what was adapted "
            f"{classes} and {images}: give the task that was adapted to"
        )


def _check_latencies(latencies: Sequence[float | None], sizes: int) -> None:
    if len(latencies) != sizes + 1:
        raise ReportError(
            f"{len(latencies)} latencies were given, expected {sizes + 1}: one of the whole model, then one a size "
            "(None where there is none)"
        )
    for latency in latencies:
        if latency is not None and not (math.isfinite(latency) and latency > 0):
            raise ReportError(f"a latency is {latency}, expected milliseconds above 0, or None")
