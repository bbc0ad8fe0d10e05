"""Delivery: from a pruned model to the artifact that leaves the house, and to what a script wants to know of it."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import numpy as np
import timm
import torch

import kinprune
from kinprune.artifact import Artifact
from kinprune.backbones import Backbone
from kinprune.pruning import Pruned
from kinprune.tasks import DecodedTask
from kinprune.units import attributes_of


def artifact_of(pruned: Pruned, backbone: Backbone, task: DecodedTask) -> Artifact:
    """The artifact of a pruned model, ready for ``save``: what it is, where it comes from and how good it is."""
    space, mask = pruned.space, pruned.selection.mask
    kept = [np.flatnonzero(part).tolist() for part in space.split(mask.kept)]
    names = [group.name for group in space.groups]
    summary = summarise(pruned)
    return Artifact(
        model=pruned.model,
        spec=backbone.spec,
        preprocessing=task.preprocessing,
        classes=task.classes,
        kept=dict(zip(names, kept, strict=True)),
        group_sizes={group.name: group.size for group in space.groups},
        kinds={group.name: group.kind for group in space.groups},
        backbone_fingerprint=backbone.fingerprint,
        space_fingerprint=space.fingerprint,
        attributes=attributes_of(space, [len(units) for units in kept]),
        seed=pruned.plan.recipe.seed,
        metrics={key: summary[key] for key in ("accuracy", "accuracy_closed_form", "accuracy_dense", "costs", "whole")},
        provenance={"task": task.name, "task_digest": task.digest, "plan": _plain(asdict(pruned.plan))},
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
        "seconds": pruned.seconds,
        "seed": pruned.plan.recipe.seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "kinprune": kinprune.__version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _plain(value: Any) -> Any:
    """Tuples to lists, all the way down: what JSON gives back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
