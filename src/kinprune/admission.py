"""Admission: what adapting refuses before any work, for it could not come to a good end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kinprune.adapt_plan import AdaptPlan
from kinprune.backbones import Backbone
from kinprune.bank import Bank
from kinprune.devices.goal import Goal, plain_goal, reachable_goals
from kinprune.errors import BankError, TrainingError
from kinprune.quantities import byte_count
from kinprune.selection import Budget, select
from kinprune.tasks import DecodedTask
from kinprune.training import least_limit
from kinprune.units import UnitSpace, extract

NEARLY = 0.9
"""The share of what the least fine-tuning is foretold to take, by units of no merit, below which a limit is refused."""


def check_task(task: DecodedTask, bank: Bank, backbone: Backbone) -> None:
    """Refuse a backbone of other classes, and images decoded for another preprocessing. Raises BankError."""
    if backbone.spec.num_classes != len(task.classes):
        raise BankError(
            f"the backbone answers {backbone.spec.num_classes} classes, the task {task.name} has {len(task.classes)}: "
            f"load it with num_classes={len(task.classes)}"
        )
    if task.preprocessing != bank.header.preprocessing:
        raise BankError(
            f"the task was decoded for {task.preprocessing}, the bank's backbone takes {bank.header.preprocessing}: "
            "decode it with the bank's preprocessing"
        )


def check_goals(space: UnitSpace, budgets: Sequence[Budget | Goal], plan: AdaptPlan) -> list[Goal]:
    """The goals of budgets, without alternatives that cannot be reached.

    Raises BudgetError where none can, before any work: whether one can does not depend on scores.
    """
    goals = [
        one if isinstance(one, Goal) else plain_goal(one, space, multiple=plan.multiple, wish=place)
        for place, one in enumerate(budgets)
    ]
    return reachable_goals(space, goals)


def check_training_memory(backbone: Backbone, space: UnitSpace, goals: Sequence[Goal], plan: AdaptPlan) -> None:
    """Refuse a limit of memory far below what fine-tuning can do with, before any work: units of no merit tell nearly.

    What is near the limit, ``fine_tune`` decides on the model itself. Raises TrainingError.
    """
    if plan.train_memory is None or plan.recipe.steps == 0:
        return
    for goal in goals:
        mask = select(space, np.zeros(len(space)), goal.budget, multiple=goal.multiple, costs=goal.costs).mask
        small = extract(backbone.model, space, mask)
        least = least_limit(small, None, backbone.preprocessing, plan.recipe)
        if plan.train_memory < NEARLY * least:
            raise TrainingError(
                f"fine-tuning cannot stay below {byte_count(plan.train_memory)} of memory: even one image at a time, "
                f"with the last layer alone trained, takes about {byte_count(least)}; expected a limit of at least "
                "that: raise the limit, ask for a smaller model, or for no steps"
            )
