"""The nearest of any number of source tasks that come some at a time: only those that lead so far are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import TransferabilityError
from kinprune.transferability.inputs import Scores, Sources, Target, sample
from kinprune.transferability.measures import Measure, sample_size, transferability

LEADERS, LEADERS_EACH = 1000, 50
"""How many source tasks lead, and are scored once more at the end: the least, and for each one asked."""

Keys = NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class _Row:
    """A source task's own arrays, unpadded: of the chunk that it came in nothing stays."""

    weights: NDArray[np.generic]
    biases: NDArray[np.generic]
    means: NDArray[np.generic]


class Leaders:
    """A search for the ``count`` source tasks nearest to a target, or farthest from it, whatever order they come in.

    Give every source task to ``add`` once, with a key of its own, and ask ``best`` at the end. Where the target has
    many images, a sample of them, drawn by ``seed``, finds the leaders (1,000, or 50 for each one asked if that is
    more), and only these are scored on all images: what comes out has its exact score, a task that does badly on the
    sample may be missed. "class-mean", measures of one's own and the farthest are scored in full. Memory is that of
    the leaders and of what is given at a time.

    At the end each of the best is scored once more by itself: the last bit of a product depends on where in which
    matrix a row stands, and what else was there is to mean nothing.
    """

    def __init__(
        self, measure: str | Measure, target: Target, count: int, *, farthest: bool = False, seed: int = 0
    ) -> None:
        if count < 1:
            raise TransferabilityError(f"{count} nearest source tasks were asked for, expected at least 1")
        self._measure, self._target, self._count = measure, target, count
        self._sign = -1.0 if farthest else 1.0
        images = None if farthest else sample_size(measure, target)
        self.seen = target if images is None else sample(target, images, seed)
        self._most = max(LEADERS, LEADERS_EACH * count)
        self._scores: Scores = np.empty(0)
        self._keys: Keys = np.empty(0, dtype=np.str_)
        self._rows: list[_Row] = []

    def add(self, sources: Sources, keys: Keys) -> None:
        """Look at some source tasks, ``keys [N]`` beside them. Raises as ``transferability``."""
        scores = self._sign * transferability(self._measure, self.seen, sources)
        full = len(self._scores) == self._most
        able = np.flatnonzero(scores >= self._scores[-1]) if full else np.arange(len(scores))
        if not len(able):
            return
        scores, keys = np.concatenate([self._scores, scores[able]]), np.concatenate([self._keys, keys[able]])
        order = np.lexsort((keys, -scores))[: self._most]
        had = len(self._rows)
        self._rows = [
            self._rows[place] if place < had else _row(sources, int(able[place - had])) for place in order.tolist()
        ]
        self._scores, self._keys = scores[order], keys[order]

    def best(self) -> tuple[Keys, Scores]:
        """The keys and exact scores of the best, nearest (or farthest) first; of equal scores the lower key's."""
        best = self._order(self._keys, self._exact(self._rows))[: self._count]
        keys = self._keys[best]
        alone = np.array([self._exact([self._rows[place]])[0] for place in best.tolist()])
        order = self._order(keys, alone)
        return keys[order], alone[order]

    def _order(self, keys: Keys, scores: Scores) -> NDArray[np.int64]:
        return np.lexsort((keys, -self._sign * scores))

    def _exact(self, rows: Sequence[_Row]) -> Scores:
        """Scores on all images; source tasks of as many classes are compared together."""
        counts = np.array([len(row.biases) for row in rows], dtype=np.int64)
        scores = np.empty(len(rows))
        for classes in np.unique(counts):
            places = np.flatnonzero(counts == classes)
            sources = _stacked([rows[place] for place in places.tolist()])
            scores[places] = transferability(self._measure, self._target, sources)
        return scores


def _row(sources: Sources, place: int) -> _Row:
    classes = int(sources.counts[place])
    return _Row(*(array[place, :classes].copy() for array in (sources.weights, sources.biases, sources.means)))


def _stacked(rows: list[_Row]) -> Sources:
    weights, biases, means = (np.stack([getattr(row, name) for row in rows]) for name in ("weights", "biases", "means"))
    return Sources(weights, biases, means, np.full(len(rows), biases.shape[1], dtype=np.int64))
