"""Voting: the neighbours' rankings or soft scores to one score a unit.

Hard votes (MVP, arXiv 2301.11560) count the neighbours that keep a unit at the ratio the budget comes to; a score mask
(SMSP, arXiv 2307.04365) serves every budget: the neighbours whose own pruned model has the unit, or their mean soft
score. Nothing here depends on the order in which neighbours come, bit for bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kinprune.errors import ImportanceError, UnitError
from kinprune.importance import Scores
from kinprune.selection import Budget, CostFunctions, Counts, select
from kinprune.units import UnitSpace

Weighting = Literal["uniform", "softmax"]
Weights = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]

TEMPERATURE = 2.0
"""In standard deviations of the neighbours' similarities. Ten neighbours spread like a normal distribution then count
as about eight equal ones; at 1 they count as four, and most of what averaging gives is lost."""
FAINTEST = -80.0
"""The least logarithm of a weight beside the largest: no neighbour that was chosen counts for nothing at all."""
DIGITS = 9
"""Votes are rounded to this: sums of weights that are equal on paper tie."""


@dataclass(frozen=True, eq=False)
class Ballot:
    """What ``select(space, ballot.scores, budget, ties=ballot.ties)`` takes; ties of ties go by index."""

    scores: Scores
    ties: tuple[Scores, ...]


def neighbour_weights(
    similarities: ArrayLike, weighting: Weighting = "softmax", temperature: float = TEMPERATURE
) -> Weights:
    """How much each neighbour counts, ``[k]`` summing to 1, from similarities ``[k]``, higher for nearer.

    ``softmax`` takes them in units of their own standard deviation times ``temperature``: similarities such as LEEP
    (mean log-likelihoods that differ by hundredths) have no scale of their own. It knows no shift and no scale. One
    neighbour, or neighbours that are equally near, get equal weights; every weight is above 0.

    Raises:
        ImportanceError: similarities are not a list of finite numbers, the weighting is unknown, the temperature is
            not a finite number above 0.
    """
    values = np.asarray(similarities, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ImportanceError(
            f"the similarities have the shape {values.shape} with {int((~np.isfinite(values)).sum())} that are not "
            "finite, expected one finite number for each of at least one neighbour"
        )
    if weighting not in get_args(Weighting):
        raise ImportanceError(f"there is no weighting '{weighting}', expected {' or '.join(get_args(Weighting))}")
    if not np.isfinite(temperature) or temperature <= 0:
        raise ImportanceError(f"the temperature is {temperature}, expected a finite number above 0, such as 1")
    # Sums run over sorted values: each neighbour's weight is the same wherever it stands.
    ordered = np.sort(values)
    spread = float(ordered.std())
    if weighting == "uniform" or spread <= 1e-9 * float(np.abs(ordered).max()):
        return np.full(len(values), 1 / len(values))
    with np.errstate(over="ignore"):
        logs = np.maximum((values - ordered[-1]) / spread / temperature, FAINTEST)
    weights = np.exp(logs)
    return np.asarray(weights / np.sort(weights).sum(), dtype=np.float64)


def counts_for(space: UnitSpace, budget: Budget, *, multiple: int = 1, costs: CostFunctions | None = None) -> Counts:
    """How many units each group keeps under a budget, ``[g]``, when every group keeps the same share.

    ``select`` with allocation by layer never looks at scores for this: these are the counts of its mask, whatever the
    scores. Raises BudgetError as it does.
    """
    return space.counts(select(space, np.zeros(len(space)), budget, multiple=multiple, costs=costs).mask.kept)


def vote(space: UnitSpace, rankings: NDArray[np.integer[Any]], counts: Counts, weights: Weights) -> Scores:
    """Hard votes: the weighted share, in [0, 1], of the neighbours whose best ``counts[g]`` units of the group g
    contain the unit. ``rankings`` is ``[k, u]``, each unit's place in its group (0 the best), ``weights`` ``[k]``.

    Raises:
        UnitError: the rankings are not of this unit space, or ``counts`` are not within its groups' sizes.
        ImportanceError: there is no neighbour, or weights are not k finite numbers above 0.
    """
    weights = _checked_weights(weights, len(rankings))
    _check_rankings(space, rankings)
    numbers = np.asarray(counts)
    if numbers.shape != space.sizes.shape or (numbers < 0).any() or (numbers > space.sizes).any():
        raise UnitError(
            f"the counts are {numbers.tolist()}, expected one for each of {len(space.sizes)} groups, within their sizes"
        )
    return _shares(rankings < numbers[space.group_of], weights)


def share_kept(space: UnitSpace, kept: NDArray[np.bool_], weights: Weights) -> Scores:
    """The weighted share, in [0, 1], of the neighbours whose own pruned model has the unit: ``kept`` is ``[k, u]``.

    Raises:
        UnitError: the masks are not of this unit space.
        ImportanceError: there is no neighbour, or weights are not k finite numbers above 0.
    """
    weights = _checked_weights(weights, len(kept))
    if kept.shape != (len(weights), len(space)) or kept.dtype != np.bool_:
        raise UnitError(
            f"the masks are {kept.dtype} of the shape {kept.shape}, expected bool ({len(weights)}, {len(space)}): a "
            "row a neighbour, whether it has each unit of this space"
        )
    return _shares(kept, weights)


def _shares(voted: NDArray[np.bool_], weights: Weights) -> Scores:
    # Neighbours of equal weight add the same number or nothing: sorted by weight the sums are always the same.
    total, whole = np.zeros(voted.shape[1]), 0.0
    for place in np.argsort(weights, kind="stable"):
        total += np.where(voted[place], weights[place], 0.0)
        whole += weights[place]
    return np.round(total / whole, DIGITS)


def score_mask(space: UnitSpace, soft: Floats, weights: Weights) -> Scores:
    """The weighted mean of the neighbours' soft scores ``[k, u]``, in double precision, whatever their type.

    The scores should be normalised a group (``importance.normalise``), as those of ``pruning.Pruned`` are. One
    neighbour's scores come back as they are.

    Raises:
        UnitError: the scores are not of this unit space.
        ImportanceError: there is no neighbour, weights are not k finite numbers above 0, scores are not finite.
    """
    weights = _checked_weights(weights, len(soft))
    if soft.shape != (len(weights), len(space)):
        raise UnitError(
            f"the soft scores have the shape {soft.shape}, expected ({len(weights)}, {len(space)}): a row a neighbour, "
            "a number a unit of this space"
        )
    if len(weights) == 1:
        return _checked_scores(space, soft[0], "the soft scores")
    total, whole = np.zeros(len(space)), 0.0
    for place in _order(weights, soft):
        total += weights[place] * soft[place].astype(np.float64)
        whole += weights[place]
    return _checked_scores(space, total / whole, "the soft scores")


def blend(space: UnitSpace, kin: Scores, own: Scores, share: float) -> Scores:
    """``(1 - share) * kin + share * own`` after each is made comparable in every group.

    Votes lie in [0, 1], most of them on 0; importances have heavy tails. So each is replaced by exponential rank scores
    (Savage 1956): the unit at place r of n, 0 the best, gets ``1/n + 1/(n-1) + ... + 1/(r+1)``, tied units their mean.
    Any scale and tail is gone, the mean is 1 in every group, and places at the top, where the selection happens,
    stand further apart than those below. ``share`` 0 gives kin's order, ties included, and 1 own's.

    Raises:
        ImportanceError: ``share`` is not in [0, 1], or scores are not finite.
        UnitError: scores are not of this unit space.
    """
    if not 0 <= share <= 1:
        raise ImportanceError(f"the share of the target's own scores is {share}, expected a number from 0 to 1")
    ranked = [
        _rank_scores(space, _checked_scores(space, values, name))
        for values, name in ((kin, "the neighbours' scores"), (own, "the target's own scores"))
    ]
    return np.asarray((1 - share) * ranked[0] + share * ranked[1], dtype=np.float64)


def ballot_mvp(
    space: UnitSpace,
    rankings: NDArray[np.integer[Any]],
    soft: Floats,
    weights: Weights,
    budget: Budget,
    *,
    own: Scores | None = None,
    share: float = 0.0,
    multiple: int = 1,
    costs: CostFunctions | None = None,
) -> Ballot:
    """The neighbours' hard votes at the counts a budget comes to; ties go by their mean soft score, then by ``own``.

    The counts are those of ``select`` by layer for the budget, ``multiple`` and ``costs`` (``counts_for``), so that
    neighbours vote on exactly as many units as are kept, be the budget a keep ratio, parameters or memory. ``share``
    above 0 blends the target's own importance in. Raises as vote, score_mask, blend and select do.
    """
    own = _checked_own(space, own, share)
    votes = vote(space, rankings, counts_for(space, budget, multiple=multiple, costs=costs), weights)
    means = score_mask(space, soft, weights)
    scores = votes if own is None or share == 0 else blend(space, votes, own, share)
    return Ballot(scores, (means,) if own is None else (means, own))


def ballot_smsp(
    space: UnitSpace,
    kept: NDArray[np.bool_] | None,
    soft: Floats,
    weights: Weights,
    *,
    own: Scores | None = None,
    share: float = 0.0,
) -> Ballot:
    """The neighbours' score mask, for every budget; ties go by their mean soft score, then by ``own``.

    A unit's score is the share of the neighbours whose pruned model has it (see ``share_kept``): where many have it,
    many have weights for it that were trained together. With ``kept`` None it is the mean soft score itself. ``share``
    above 0 blends the target's own importance in, by ranks: sizes of scores then no longer count. Raises as share_kept,
    score_mask and blend do.
    """
    own = _checked_own(space, own, share)
    means = score_mask(space, soft, weights)
    found = means if kept is None else share_kept(space, kept, weights)
    scores = found if own is None or share == 0 else blend(space, found, own, share)
    ties = () if kept is None else (means,)
    return Ballot(scores, ties if own is None else (*ties, own))


def ballot_ranking(space: UnitSpace, ranking: NDArray[np.integer[Any]]) -> Ballot:
    """One neighbour's ranking ``[u]`` alone, for every budget: at its own keep ratio it gives back its own units.

    Its soft scores would not: a unit's last importance is of the round that it left in. Raises ImportanceError for a
    ranking of another space.
    """
    if ranking.shape != (len(space),):
        raise ImportanceError(f"the ranking has the shape {ranking.shape}, expected ({len(space)},)")
    return Ballot(1 - (ranking + 0.5) / space.sizes[space.group_of], ())


def _rank_scores(space: UnitSpace, values: Scores) -> Scores:
    """Exponential rank scores of each group, tied units their mean."""
    order = np.lexsort((-values, space.group_of))
    sizes = space.sizes[space.group_of]
    places = np.arange(len(space)) - np.repeat(space.offsets[:-1], space.sizes)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(space.sizes.max()) + 1))])
    by_place = harmonic[sizes] - harmonic[places]
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], (ordered[1:] != ordered[:-1]) | (places[1:] == 0)]))
    lengths = np.diff(np.append(starts, len(space)))
    result = np.empty(len(space))
    result[order] = np.repeat(np.add.reduceat(by_place, starts) / lengths, lengths)
    return result


def _order(weights: Weights, rows: Floats) -> list[int]:
    """The neighbours in an order of their own: by weight, and by a hash of their rows where weights are equal."""
    same = dict(zip(*(part.tolist() for part in np.unique(weights, return_counts=True)), strict=True))

    def key(place: int) -> tuple[float, bytes]:
        weight = float(weights[place])
        return weight, hashlib.sha256(rows[place].tobytes()).digest() if same[weight] > 1 else b""

    return sorted(range(len(weights)), key=key)


def _checked_weights(weights: Weights, number: int) -> Weights:
    values = np.asarray(weights, dtype=np.float64)
    if not number:
        raise ImportanceError("there is no neighbour to vote, expected at least one")
    if values.shape != (number,) or not np.isfinite(values).all() or (values <= 0).any():
        raise ImportanceError(
            f"the weights are {values.tolist()}, expected {number} finite numbers above 0, one for each neighbour: "
            "make them with neighbour_weights"
        )
    return values


def _check_rankings(space: UnitSpace, rankings: NDArray[np.integer[Any]]) -> None:
    """Refuse what is not a complete order of the units of every group."""
    if rankings.shape[1:] != (len(space),) or not np.issubdtype(rankings.dtype, np.integer):
        raise UnitError(
            f"the rankings are {rankings.dtype} of the shape {rankings.shape}, expected whole numbers, a row a "
            f"neighbour, a place for each of the {len(space)} units of this space"
        )
    starts, sizes = np.repeat(space.offsets[:-1], space.sizes), space.sizes[space.group_of]
    for number, row in enumerate(rankings):
        seen = np.zeros(len(space), dtype=bool)
        within = (row >= 0) & (row < sizes)
        seen[starts[within] + row[within]] = True
        if not seen.all():
            group = space.groups[int(space.group_of[np.flatnonzero(~seen)[0]])]
            raise UnitError(
                f"the ranking of neighbour {number} is no order of {group.name}: expected each place from 0 to "
                f"{group.size - 1} once"
            )


def _checked_scores(space: UnitSpace, scores: ArrayLike, name: str) -> Scores:
    values = np.array(scores, dtype=np.float64)
    if values.shape != (len(space),):
        raise UnitError(f"{name} have the shape {values.shape}, expected ({len(space)},): one for each unit")
    if not np.isfinite(values).all():
        raise ImportanceError(f"{int((~np.isfinite(values)).sum())} of {len(values)} of {name} are not finite numbers")
    return values


def _checked_own(space: UnitSpace, own: Scores | None, share: float) -> Scores | None:
    if not 0 <= share <= 1:
        raise ImportanceError(f"the share of the target's own scores is {share}, expected a number from 0 to 1")
    if own is None:
        if share > 0:
            raise ImportanceError(f"the target's own scores are to count by {share}, but none were given: give own")
        return None
    return _checked_scores(space, own, "the target's own scores")
