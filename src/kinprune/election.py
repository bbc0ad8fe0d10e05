"""Election: the neighbours that vote, what they vote for, and the units that are kept for each goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kinprune.adapt_plan import AdaptPlan, Inheritance
from kinprune.bank import Lessons
from kinprune.devices.goal import Goal
from kinprune.importance import Scores
from kinprune.selection import Budget, Selection, select, select_family
from kinprune.units import UnitSpace
from kinprune.voting import Ballot, ballot_mvp, ballot_ranking, ballot_smsp


@dataclass(frozen=True)
class Trial:
    """A way to a model: the places of the neighbours that vote, nearest first, the target's own share in it, and whose
    weights are taken: *nearest* is the nearest voter's.
    """

    voters: tuple[int, ...]
    blend: float
    inherited: Inheritance


@dataclass(frozen=True, eq=False)
class Electorate:
    """All neighbours with what they learnt and how much each counts, and the target's own importance where asked."""

    lessons: Lessons
    weights: Sequence[float]
    own: Scores | None


def elect(
    space: UnitSpace, electorate: Electorate, trial: Trial, goals: Sequence[Goal], plan: AdaptPlan
) -> tuple[list[Ballot], list[Selection]]:
    """A ballot and a selection for each goal; with SMSP one ballot serves all, and those of one device nest."""
    ballots = _ballots(space, electorate, trial, goals, plan)
    alike = len({(goal.device, goal.precision, goal.multiple) for goal in goals}) == 1
    if plan.method == "smsp" and alike:
        return ballots, _nested(space, ballots[0], goals, plan)
    pairs = zip(ballots, goals, strict=True)
    return ballots, [pick(space, ballot, goal, plan, goal.budget) for ballot, goal in pairs]


def pick(space: UnitSpace, ballot: Ballot, goal: Goal, plan: AdaptPlan, budget: Budget) -> Selection:
    """The best mask of a ballot under a budget, in the goal's costs and widths."""
    return select(
        space,
        ballot.scores,
        budget,
        ties=ballot.ties,
        multiple=goal.multiple,
        costs=goal.costs,
        allocation=plan.allocation,
        normalisation=plan.normalisation,
    )


def _ballots(
    space: UnitSpace, electorate: Electorate, trial: Trial, goals: Sequence[Goal], plan: AdaptPlan
) -> list[Ballot]:
    lessons, own, voters = electorate.lessons, electorate.own, list(trial.voters)
    rankings, scores = lessons.rankings[voters], lessons.scores[voters]
    shares = np.array(electorate.weights)[voters]
    if plan.method == "mvp":
        return [
            ballot_mvp(
                space,
                rankings,
                scores,
                shares,
                goal.budget,
                own=own,
                share=trial.blend,
                multiple=goal.multiple,
                costs=goal.costs,
            )
            for goal in goals
        ]
    if len(voters) == 1 and trial.blend == 0:
        return [ballot_ranking(space, rankings[0])] * len(goals)
    kept = lessons.kept[voters] if plan.score_mask == "kept" else None
    return [ballot_smsp(space, kept, scores, shares, own=own, share=trial.blend)] * len(goals)


def _nested(space: UnitSpace, ballot: Ballot, goals: Sequence[Goal], plan: AdaptPlan) -> list[Selection]:
    """A family of one device: one lies within the other."""
    return select_family(
        space,
        ballot.scores,
        [goal.budget for goal in goals],
        ties=ballot.ties,
        multiple=goals[0].multiple,
        costs=goals[0].costs,
        allocation=plan.allocation,
        normalisation=plan.normalisation,
    )
