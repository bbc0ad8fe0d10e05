"""Delivery: from a pruned model to the artifact that leaves the house, and to what a script wants to know of it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import kinprune
from kinprune.artifact import Artifact
from kinprune.backbones import Backbone
from kinprune.pruning import Pruned
from kinprune.tasks import DecodedTask
from kinprune.training import TrainingResult
from kinprune.units import Mask, UnitSpace, attributes_of


def artifact_of(pruned: Pruned, backbone: Backbone, task: DecodedTask) -> Artifact:
    """The artifact of a pruned model, ready for ``save``: what it is, where it comes from and how good it is."""
    summary = summarise(pruned)
    return make_artifact(
        pruned.model,
        backbone,
        task,
        pruned.space,
        pruned.selection.mask,
        seed=pruned.plan.recipe.seed,
        metrics={key: summary[key] for key in METRICS},
        provenance={"plan": plain(asdict(pruned.plan))},
    )


METRICS = ("accuracy", "accuracy_closed_form", "accuracy_dense", "costs", "whole")
"""What an artifact keeps of a summary."""


def make_artifact(
    model: nn.Module,
    backbone: Backbone,
    task: DecodedTask,
    space: UnitSpace,
    mask: Mask,
    *,
    seed: int,
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Artifact:
    """The artifact of a model that ``mask`` cut from a backbone for a task; ``provenance`` gains the task."""
    kept = [np.flatnonzero(part).tolist() for part in space.split(mask.kept)]
    names = [group.name for group in space.groups]
    return Artifact(
        model=model,
        spec=backbone.spec,
        preprocessing=task.preprocessing,
        classes=task.classes,
        kept=dict(zip(names, kept, strict=True)),
        group_sizes={group.name: group.size for group in space.groups},
        kinds={group.name: group.kind for group in space.groups},
        backbone_fingerprint=backbone.fingerprint,
        space_fingerprint=space.fingerprint,
        attributes=attributes_of(space, [len(units) for units in kept]),
        seed=seed,
        metrics=metrics,
        provenance={"task": task.name, "task_digest": task.digest, **provenance},
    )


def summarise(pruned: Pruned) -> dict[str, Any]:
    """What a script wants to know of a pruned model, in JSON's own types."""
    counts = pruned.space.counts(pruned.selection.mask.kept).tolist()
    budget = {name: value for name, value in asdict(pruned.plan.budget).items() if value is not None}
    return {
        "budget": budget,
        "accuracy": pruned.final.accuracy,
        "accuracy_closed_form": pruned.start.accuracy,
        "accuracy_dense": pruned.dense.accuracy,
        "costs": asdict(pruned.selection.costs),
        "whole": asdict(pruned.whole),
        "slack": pruned.selection.slack,
        "note": pruned.selection.note,
        "kept": {group.name: count for group, count in zip(pruned.space.groups, counts, strict=True)},
        "losses": list(pruned.training.losses),
        "curve": [asdict(point) for point in pruned.training.curve],
        "best_step": pruned.training.best_step,
        "stopped": pruned.training.stopped,
        "reconstructed": pruned.closed_form.reconstructed,
        **training_memory(pruned.training),
        "seconds": pruned.seconds,
        "seed": pruned.plan.recipe.seed,
        "versions": versions(),
    }


def training_memory(training: TrainingResult) -> dict[str, Any]:
    """What a fine-tuning under a limit of memory was planned to take and took; nothing where there was no limit."""
    return {} if training.memory is None else {"training_memory": plain(asdict(training.memory))}


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "kinprune": kinprune.__version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: what JSON gives back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
