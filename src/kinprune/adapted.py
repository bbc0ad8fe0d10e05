"""From adapted models to the artifacts that leave the house, and to what a script wants to know of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kinprune.adaptation import Adapted, Sized
from kinprune.artifact import Artifact
from kinprune.delivery import METRICS, make_artifact, plain, versions
from kinprune.kin import Neighbour
from kinprune.tasks import DecodedTask


def adapted_artifact(adapted: Adapted, sized: Sized, task: DecodedTask) -> Artifact:
    """The artifact of one size, ready for ``save``."""
    summary = summarise_size(adapted, sized)
    return make_artifact(
        sized.model,
        adapted.backbone,
        task,
        adapted.space,
        sized.selection.mask,
        seed=adapted.plan.recipe.seed,
        metrics={key: summary[key] for key in METRICS},
        provenance={"plan": plain(asdict(adapted.plan)), "neighbours": summarise_kin(adapted)},
    )


def summarise_adapted(adapted: Adapted) -> dict[str, Any]:
    """All that is known of an adaptation, in JSON's own types."""
    return {
        "sizes": [summarise_size(adapted, sized) for sized in adapted.sizes],
        "neighbours": summarise_kin(adapted),
        "accuracy_dense": adapted.dense.accuracy,
        "whole": asdict(adapted.whole),
        "method": adapted.plan.method,
        "seconds": adapted.seconds,
        "seed": adapted.plan.recipe.seed,
        "versions": versions(),
    }


def summarise_size(adapted: Adapted, sized: Sized) -> dict[str, Any]:
    """The model of one budget: accuracy, costs, what it kept, and how it was trained."""
    space, costs = adapted.space, sized.selection.costs
    counts = space.counts(sized.selection.mask.kept).tolist()
    return {
        "budget": {name: value for name, value in asdict(sized.budget).items() if value is not None},
        "accuracy": sized.final.accuracy,
        "accuracy_closed_form": sized.start.accuracy,
        "accuracy_dense": adapted.dense.accuracy,
        "costs": asdict(costs),
        "whole": asdict(adapted.whole),
        "params": costs.parameters,
        "macs": costs.macs,
        "weight_bytes": costs.weight_bytes,
        "peak_memory_bytes": costs.peak_memory_bytes,
        "slack": sized.selection.slack,
        "note": sized.selection.note,
        "kept": {group.name: count for group, count in zip(space.groups, counts, strict=True)},
        "losses": list(sized.training.losses),
        "curve": [asdict(point) for point in sized.training.curve],
        "best_step": sized.training.best_step,
        "stopped": sized.training.stopped,
        "confusion": sized.final.confusion.tolist(),
        "reconstructed": sized.closed_form.reconstructed,
    }


def summarise_kin(adapted: Adapted) -> list[dict[str, Any]]:
    """The neighbours and how much each counted."""
    return [
        {**summarise_neighbour(neighbour), "weight": weight}
        for neighbour, weight in zip(adapted.neighbours, adapted.weights, strict=True)
    ]


def summarise_neighbour(neighbour: Neighbour) -> dict[str, Any]:
    """A source task beside the target."""
    entry = neighbour.entry
    return {
        "id": entry.id,
        "key": entry.key,
        "name": entry.name,
        "classes": list(entry.classes),
        "shared": list(neighbour.shared),
        "similarity": neighbour.similarity,
        "accuracy": entry.accuracy.final,
    }
