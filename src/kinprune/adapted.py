"""From adapted models to the artifacts that leave the house, to records that a bank takes, and to summaries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from kinprune.adaptation import Adapted, Sized
from kinprune.artifact import Artifact
from kinprune.bank import Accuracy, Record, record_key
from kinprune.delivery import METRICS, make_artifact, plain, training_memory, versions
from kinprune.importance import Scores, normalise, rank
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


def adapted_record(adapted: Adapted, sized: Sized, task: DecodedTask) -> Record:
    """What one size taught of its task, as a record for a bank of the same backbone (``kinprune bank add``).

    The ranking has the kept units first, each part in the ballot's order. ``details["adapted"]`` tells such a record
    from one that was pruned from scratch. Its key is that of the task, plan and budget: adapting again with the same,
    from a larger bank even, gives the same key.
    """
    space, ballot, kept = adapted.space, sized.ballot, sized.selection.mask.kept
    plan = plain({**asdict(adapted.plan), "budget": asdict(sized.budget)})
    if plan["train_memory"] is None:
        del plan["train_memory"]  # keys of before there were limits stay as they are
    return Record(
        key=record_key(task.digest, {"adapted": plan}),
        name=task.name,
        classes=task.classes,
        ranking=rank(space, kept.astype(np.float64), (ballot.scores, *ballot.ties)),
        scores=np.clip(_soft_scores(adapted, sized), -65_504, 65_504).astype(np.float16),
        mask=sized.selection.mask,
        probe=adapted.probe,
        accuracy=Accuracy(adapted.dense.accuracy, sized.start.accuracy, sized.final.accuracy),
        tensors=sized.model.state_dict(),
        details={
            "data": task.name,
            "task_digest": task.digest,
            "images": {"train": len(task.train), "test": len(task.test)},
            "plan": plan,
            "adapted": True,
            "neighbours": [neighbour.entry.key for neighbour in adapted.neighbours],
            "seconds": dict(adapted.seconds),
            "versions": versions(),
        },
    )


def _soft_scores(adapted: Adapted, sized: Sized) -> Scores:
    """The ballot's scores normalised by group, as a score mask averages them (``voting.score_mask``).

    Bare votes are shares of neighbours, most of them 0 or 1, that say nothing of how important a unit is: the
    neighbours' mean soft scores, which break the votes' ties, stand for them.
    """
    ballot, plan = sized.ballot, adapted.plan
    voted = plan.method == "mvp" or (plan.score_mask == "kept" and len(adapted.voters) > 1)
    bare = voted and adapted.blend == 0
    return normalise(adapted.space, ballot.ties[0] if bare else ballot.scores, plan.normalisation)


def summarise_adapted(adapted: Adapted) -> dict[str, Any]:
    """All that is known of an adaptation, in JSON's own types."""
    return {
        "sizes": [summarise_size(adapted, sized) for sized in adapted.sizes],
        "neighbours": summarise_kin(adapted),
        "accuracy_dense": adapted.dense.accuracy,
        "whole": asdict(adapted.whole),
        "method": adapted.plan.method,
        "blend": adapted.blend,
        "voters": [place + 1 for place in adapted.voters],
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
        "inherited": sized.inherited,
        "reconstructed": sized.closed_form.reconstructed,
        **training_memory(sized.training),
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
