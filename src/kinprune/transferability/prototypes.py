"""Class means: whether a source task has classes that look like the target's."""

from __future__ import annotations

import numpy as np

from kinprune.errors import TransferabilityError
from kinprune.transferability.chunks import converted
from kinprune.transferability.inputs import Scores, Sources, Target


def class_mean(target: Target, sources: Sources) -> Scores:
    """The mean over the target's classes of the best cosine with a class mean of the source, in [-1, 1].

    Features of one backbone share a large common component, so that cosines of plain means are all near 1. Both sides
    are taken from one centre, the mean of the target's class means: it depends on no other source task, and what is
    left are the directions in which the target's own classes differ. A source of another kind of images lies far off
    in a direction that no class of the target has, and scores near 0. A mean at the centre has cosine 0.
    """
    present, inverse, counts = np.unique(target.labels, return_inverse=True, return_counts=True)
    own = np.zeros((len(present), target.features.shape[1]))
    np.add.at(own, inverse, target.features)
    own /= counts[:, None]
    centre = own.mean(axis=0)
    own -= centre
    lengths = np.linalg.norm(own, axis=1, keepdims=True)
    directions = np.ascontiguousarray((own / np.where(lengths > 0, lengths, 1)).T, dtype=np.float32)
    scores = np.empty(len(sources))
    common = centre.astype(np.float32)
    for places, means in converted(sources.means, sources.counts, len(present)):
        # What is not finite is told below, by the task's name.
        with np.errstate(over="ignore", invalid="ignore"):
            means -= common
            squares = np.einsum("kcd,kcd->kc", means, means)
            cosines = (means.reshape(-1, len(common)) @ directions).reshape(*squares.shape, -1)
            cosines /= np.sqrt(np.where(squares > 0, squares, 1))[:, :, None]
            found = cosines.max(axis=1).mean(axis=1, dtype=np.float64)
        if not np.isfinite(found).all():
            raise TransferabilityError(
                f"the class means of source task {places[~np.isfinite(found)][0]} are not finite: its record is "
                "damaged or left float16's range; build it again"
            )
        scores[places] = np.clip(found, -1, 1)
    return scores
