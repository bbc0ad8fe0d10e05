"""Whether a bank's pruned models keep the same units, more than chance has it, and more so for tasks that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.bank import Bank, Entry
from kinprune.bank.listing import draw
from kinprune.errors import BankError
from kinprune.overlap import expected_overlap, overlap
from kinprune.pair_statistics import (
    Estimate,
    Floats,
    Places,
    all_pairs,
    draw_again,
    draw_pairs,
    estimate,
    levels,
    rank_correlation,
    tail_weights,
)
from kinprune.selection import Budget
from kinprune.transferability import Sources, Target, transferability
from kinprune.units import UnitSpace
from kinprune.units.space import Bools
from kinprune.voting import counts_for

PAIRS = 20_000
"""Pairs that are compared unless more are asked for: all of 200 tasks."""

TASKS = 2000
"""Tasks of a bank that are compared unless some are named: they make two million pairs."""

QUARTER = 0.25
"""The share of pairs that counts as the most or the least similar."""

READ = 64
"""Records whose units or probes are read at a time."""

UNITS = 1 << 22
"""How many units of masks are copied out at once for comparison."""


@dataclass(frozen=True)
class Means:
    """Mean IoU over pairs of tasks, and the exact expectation of it for random sets of the same sizes, ``chance``.

    ``most`` and ``least`` are the quarters of pairs whose class means are most and least similar, ``difference`` is
    their difference; ``none``, ``one`` and ``more`` are the pairs that share so many class names.
    """

    chance: float
    all: Estimate
    most: Estimate
    least: Estimate
    difference: Estimate
    none: Estimate
    one: Estimate
    more: Estimate


@dataclass(frozen=True)
class GroupOverlap:
    """One layer: its units, how many of them a task keeps on average, and how alike these are."""

    name: str
    size: int
    kept: float
    means: Means


@dataclass(frozen=True)
class Correlations:
    """Spearman's correlation of a pair's mean IoU with how alike its tasks are.

    By ``class_means``, by ``class_means_disjoint`` over the pairs without a shared class alone, and by the Jaccard
    index of their ``class_names``.
    """

    class_means: Estimate
    class_means_disjoint: Estimate
    class_names: Estimate


@dataclass(frozen=True, eq=False)
class KindOverlap:
    """All groups of one kind of unit, in forward order. A pair's IoU, ``pairs [p]``, is the mean over these groups."""

    kind: str
    means: Means
    correlations: Correlations
    groups: tuple[GroupOverlap, ...]
    pairs: Floats


@dataclass(frozen=True, eq=False)
class _Pairs:
    """The pairs compared, as ``OverlapStudy`` has them."""

    first: Places
    second: Places
    shared: Places
    names: Floats
    similarity: Floats


@dataclass(frozen=True, eq=False)
class OverlapStudy:
    """What the pairs of a bank's tasks say; ``keep`` is None for the units that the pruned models themselves kept.

    Of each pair compared, ``first`` and ``second`` are its places in ``tasks`` (sorted by key), ``shared`` the number
    of class names both have, ``names`` the Jaccard index of these, ``similarity`` that of the class means: all ``[p]``.
    ``possible`` is the number of pairs there are.
    """

    keep: float | None
    tasks: tuple[Entry, ...]
    possible: int
    first: Places
    second: Places
    shared: Places
    names: Floats
    similarity: Floats
    kinds: tuple[KindOverlap, ...]


@dataclass(frozen=True)
class PairGroup:
    """One layer of two tasks: how many of its units each keeps, their IoU, and that of random sets of these sizes."""

    name: str
    kind: str
    size: int
    first: int
    second: int
    overlap: float
    chance: float


@dataclass(frozen=True, eq=False)
class PairOverlap:
    """Two tasks beside each other."""

    keep: float | None
    tasks: tuple[Entry, Entry]
    shared: tuple[str, ...]
    names: float
    similarity: float
    groups: tuple[PairGroup, ...]


def source_tasks(bank: Bank, ids: Sequence[int] | None = None) -> list[Entry]:
    """The records of these ids, or all, in the order of their keys, which is the same in every copy of a bank.

    Of a bank of more than ``TASKS`` records so many are drawn, by their keys.

    Raises:
        BankError: one is not there or given twice, or they are fewer than two.
    """
    if ids is not None and len(set(ids)) < len(ids):
        raise BankError(f"the tasks {', '.join(map(str, ids))} name one twice, expected different records")
    entries = bank.entries(draw(bank, TASKS, 0) if ids is None and len(bank) > TASKS else ids)
    if len(entries) < 2:
        raise BankError(
            f"overlap needs two tasks or more, {len(entries)} {'is' if len(entries) == 1 else 'are'} "
            f"{'in the bank ' + bank.shown if ids is None else 'given'}: "
            + ("add more with 'kinprune bank build'" if ids is None else "'kinprune bank ls' lists them")
        )
    return sorted(entries, key=lambda entry: entry.key)


def compare_tasks(bank: Bank, space: UnitSpace, tasks: Sequence[Entry], *, keep: float | None = None) -> PairOverlap:
    """Two tasks, group by group. Raises BankError unless they are two; else as ``study_overlap``."""
    if len(tasks) != 2:
        raise BankError(f"{len(tasks)} tasks were given, expected two to compare")
    one, other = tasks
    masks = _masks(bank, space, tasks, keep)
    counts, pair = [space.counts(kept) for kept in masks], (np.array([0]), np.array([1]))
    chances = expected_overlap(space.sizes, counts[0], counts[1])
    names = {*one.classes, *other.classes}
    shared = tuple(name for name in one.classes if name in other.classes)
    rows = zip(space.groups, counts[0], counts[1], overlap(space, masks[0], masks[1]), chances, strict=True)
    return PairOverlap(
        keep=keep,
        tasks=(one, other),
        shared=shared,
        names=len(shared) / len(names),
        similarity=float(_class_mean_similarity(_means(bank, tasks), *pair)[0]),
        groups=tuple(
            PairGroup(group.name, group.kind, group.size, int(a), int(b), float(found), float(chance))
            for group, a, b, found, chance in rows
        ),
    )


def study_overlap(
    bank: Bank,
    space: UnitSpace,
    tasks: Sequence[Entry] | None = None,
    *,
    keep: float | None = None,
    pairs: int = PAIRS,
    seed: int = 0,
) -> OverlapStudy:
    """Compare the kept units of a bank's tasks (or of some), in pairs, with how alike the tasks are.

    ``keep`` takes so large a share of each group from the records' rankings; without it the units count that each
    pruned model kept. Above ``pairs`` pairs so many are drawn; ``seed`` decides them and the intervals. Similarity is
    what records alone can say, without an image: the class names, and the class means on the backbone's features, by
    the measure "class-mean" in both directions. Kinds of units are kept apart: a layer has 3 heads and 768 nodes, and
    the IoU of the first is nearly all chance. The order of records in the bank does not matter.

    Raises:
        BankError: there are fewer than two tasks, or a record is damaged.
        BudgetError: ``keep`` is no share.
    """
    chosen = sorted(source_tasks(bank) if tasks is None else tasks, key=lambda entry: entry.key)
    if len(chosen) < 2 or pairs < 1:
        raise BankError(f"{len(chosen)} tasks and {pairs} pairs were asked for, expected at least 2 and 1")
    first, second = draw_pairs(len(chosen), pairs, seed)
    masks = _masks(bank, space, chosen, keep)
    overlaps = _overlaps(space, masks, first, second)
    counts = np.stack([space.counts(kept) for kept in masks])
    chances = _chances(space, counts, first, second)
    shared, names = _class_names(chosen, first, second)
    compared = _Pairs(first, second, shared, names, _class_mean_similarity(_means(bank, chosen), first, second))
    return OverlapStudy(
        keep=keep,
        tasks=tuple(chosen),
        possible=all_pairs(len(chosen)),
        kinds=_kinds(space, overlaps, chances, counts, compared, seed),
        **vars(compared),
    )


def summarise_study(study: OverlapStudy) -> dict[str, Any]:
    """All but the single pairs, in JSON's own types."""
    shares = {"none": study.shared == 0, "one": study.shared == 1, "more": study.shared > 1}
    return {
        "keep": study.keep,
        "tasks": [{"id": entry.id, "key": entry.key, "classes": list(entry.classes)} for entry in study.tasks],
        "pairs": len(study.first),
        "possible_pairs": study.possible,
        "pairs_by_shared_classes": {name: int(those.sum()) for name, those in shares.items()},
        "kinds": [
            {
                "kind": kind.kind,
                **asdict(kind.means),
                "correlations": asdict(kind.correlations),
                "groups": [
                    {"name": group.name, "size": group.size, "kept": group.kept, **asdict(group.means)}
                    for group in kind.groups
                ],
            }
            for kind in study.kinds
        ],
    }


def summarise_pair(pair: PairOverlap) -> dict[str, Any]:
    """Two tasks beside each other, in JSON's own types."""
    return {
        "keep": pair.keep,
        "tasks": [{"id": entry.id, "key": entry.key, "classes": list(entry.classes)} for entry in pair.tasks],
        "shared": list(pair.shared),
        "class_names": pair.names,
        "class_means": pair.similarity,
        "groups": [asdict(group) for group in pair.groups],
    }


def _masks(bank: Bank, space: UnitSpace, tasks: Sequence[Entry], keep: float | None) -> Bools:
    """Kept units ``[n, u]``."""
    limits = None if keep is None else counts_for(space, Budget(keep=keep))[space.group_of]
    masks = np.empty((len(tasks), len(space)), dtype=np.bool_)
    for start in range(0, len(tasks), READ):
        lessons = bank.lessons([entry.id for entry in tasks[start : start + READ]])
        masks[start : start + READ] = lessons.kept if limits is None else lessons.rankings < limits
    return masks


def _overlaps(space: UnitSpace, masks: Bools, first: Places, second: Places) -> Floats:
    """IoU of pairs ``[p, g]``, a bounded number of them at a time."""
    found = np.empty((len(first), len(space.sizes)))
    step = max(UNITS // len(space), 1)
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        found[part] = overlap(space, masks[first[part]], masks[second[part]])
    return found


def _chances(space: UnitSpace, counts: NDArray[np.int64], first: Places, second: Places) -> Floats:
    """The expectation of the IoU of each pair ``[p, g]``; most pairs have the same counts, and are worked out once."""
    result = np.empty((len(first), len(space.sizes)))
    for number, size in enumerate(space.sizes.tolist()):
        sets = np.stack([counts[first, number], counts[second, number]])
        small, large = sets.min(axis=0), sets.max(axis=0)
        codes, inverse = np.unique(small * (size + 1) + large, return_inverse=True)
        result[:, number] = expected_overlap(size, codes // (size + 1), codes % (size + 1))[inverse.reshape(-1)]
    return result


def _class_names(tasks: Sequence[Entry], first: Places, second: Places) -> tuple[Places, Floats]:
    """How many class names both tasks of a pair have ``[p]``, and the Jaccard index of their sets ``[p]``."""
    sets = [frozenset(entry.classes) for entry in tasks]
    sizes = np.array([len(names) for names in sets])
    both = [len(sets[a] & sets[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    shared = np.array(both, dtype=np.int64)
    return shared, shared / (sizes[first] + sizes[second] - shared)


def _means(bank: Bank, tasks: Sequence[Entry]) -> Sources:
    """The class means of tasks, in their order. A bank has them in half precision, so nothing is lost here."""
    places = {entry.id: place for place, entry in enumerate(tasks)}
    counts = np.array([len(entry.classes) for entry in tasks], dtype=np.int64)
    means = np.zeros((len(tasks), int(counts.max()), bank.header.features), dtype=np.float16)
    missing = set(places)
    for chunk in bank.probes(ids=list(places)):
        for number, probe in zip(chunk.ids.tolist(), chunk.probes, strict=True):
            if number in missing:
                means[places[number], : len(probe.means)] = probe.means
                missing.remove(number)
    if missing:
        raise BankError(f"record {min(missing)} has no probe: run 'kinprune bank verify {bank.shown}'")
    # Their classifiers are not asked: the means stand in for the weights.
    return Sources(means, np.zeros(means.shape[:2], dtype=np.float16), means, counts)


def _class_mean_similarity(sources: Sources, first: Places, second: Places) -> Floats:
    """The measure "class-mean" of each pair ``[p]``, the mean of both directions: either task is the target once."""
    targets, others = np.concatenate([first, second]), np.concatenate([second, first])
    order = np.argsort(targets, kind="stable")
    found = np.empty(len(targets))
    for part in np.split(order, np.flatnonzero(np.diff(targets[order])) + 1):
        place = int(targets[part[0]])
        classes = int(sources.counts[place])
        own = sources.means[place, :classes].astype(np.float32)
        target = Target(own, np.arange(classes, dtype=np.int64), classes)
        found[part] = transferability("class-mean", target, sources.take(others[part]))
    return np.asarray(found.reshape(2, -1).mean(axis=0))


def _kinds(
    space: UnitSpace, overlaps: Floats, chances: Floats, counts: NDArray[np.int64], pairs: _Pairs, seed: int
) -> tuple[KindOverlap, ...]:
    """All that is said of each kind of unit, in the order in which kinds first come."""
    kinds = list(dict.fromkeys(group.kind for group in space.groups))
    members = [[place for place, group in enumerate(space.groups) if group.kind == kind] for kind in kinds]
    by_kind = np.stack([overlaps[:, those].mean(axis=1) for those in members], axis=1)
    columns = np.concatenate([by_kind, overlaps], axis=1)
    statistic = _statistic(columns, len(kinds), pairs)
    drawn = draw_again(statistic, len(counts), pairs.first, pairs.second, seed=seed)
    estimates = [
        estimate(float(value), None if drawn is None else drawn[:, number])
        for number, value in enumerate(statistic(np.ones(len(columns))))
    ]
    width = columns.shape[1]
    expected = [*(chances[:, those].mean() for those in members), *chances.mean(axis=0)]
    ends = len(estimates) - 3 * len(kinds)
    means = [Means(float(chance), *estimates[column:ends:width]) for column, chance in enumerate(expected)]
    return tuple(
        KindOverlap(
            kind=kind,
            means=means[number],
            correlations=Correlations(*estimates[ends + 3 * number : ends + 3 * (number + 1)]),
            groups=tuple(
                GroupOverlap(group.name, group.size, float(counts[:, place].mean()), means[len(kinds) + place])
                for place, group in enumerate(space.groups)
                if group.kind == kind
            ),
            pairs=by_kind[:, number],
        )
        for number, kind in enumerate(kinds)
    )


def _statistic(columns: Floats, kinds: int, pairs: _Pairs) -> Callable[[Floats], Floats]:
    """A function from the weights of pairs ``[p]`` to all numbers with an interval, flat.

    First the means of ``columns [p, k]`` in the order of ``Means``, ``[7, k]``; then, for each of the first ``kinds``
    columns, the correlations in the order of ``Correlations``.
    """
    alike, alike_names = levels(pairs.similarity), levels(pairs.names)
    ranked = [levels(columns[:, number]) for number in range(kinds)]
    subsets = np.stack([pairs.shared == 0, pairs.shared == 1, pairs.shared > 1]).astype(np.float64)

    def numbers(weights: Floats) -> Floats:
        tails = [tail_weights(alike, weights, QUARTER, top=top) for top in (True, False)]
        rows = np.stack([weights, *tails, *(subsets * weights)])
        with np.errstate(invalid="ignore"):  # no such pair: no number
            means = (rows @ columns) / rows.sum(axis=1, keepdims=True)
        means = np.insert(means, 3, means[1] - means[2], axis=0)
        correlations = [
            rank_correlation(by, ranks, those)
            for ranks in ranked
            for by, those in ((alike, weights), (alike, subsets[0] * weights), (alike_names, weights))
        ]
        return np.concatenate([means.reshape(-1), correlations])

    return numbers
