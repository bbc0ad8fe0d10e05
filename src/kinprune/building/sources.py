"""Source tasks: where their images are, how many are drawn of which classes, and how they are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np

from kinprune.errors import TaskError
from kinprune.pruning import Plan
from kinprune.selection import Budget
from kinprune.tasks import Task
from kinprune.tasks.loading import open_source
from kinprune.tasks.splitting import Choice, take_task
from kinprune.tasks.task import Labelled
from kinprune.training import Recipe

SOURCE_PLAN = Plan(Budget(keep=0.1), rounds=2, round_steps=20, recipe=Recipe(steps=60))
"""How source tasks are pruned unless something else is asked for."""


BROAD_TIMES = 20
"""A broad source task is fine-tuned for so many times the steps of the others."""

BROAD_IMAGES = 10_000
"""About the most training images of a broad source task: they are in memory at once."""


@dataclass(frozen=True)
class Place:
    """Where labelled images are, as ``open_source`` takes it."""

    data: str
    image_column: str | None = None
    label_column: str | None = None

    def open(self) -> Labelled:
        """All that is there, nothing decoded."""
        return open_source(self.data, image_column=self.image_column, label_column=self.label_column)


@dataclass(frozen=True)
class Source:
    """Where a source task's images are, as ``load_task`` takes it; ``classes`` None for all of them.

    ``steps`` of the last fine-tuning, where they are not the plan's.
    """

    data: str
    classes: tuple[str, ...] | None = None
    shots: int | None = None
    test_fraction: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
    steps: int | None = None

    @property
    def place(self) -> Place:
        """What is opened once for all tasks that are taken of it."""
        return Place(self.data, self.image_column, self.label_column)

    def take(self, opened: Labelled) -> Task:
        """The task, taken of its place that was opened."""
        return take_task(opened, Choice(self.classes, self.shots, self.test_fraction))

    def load(self) -> Task:
        """The task, not yet decoded."""
        return self.take(self.place.open())

    def plan(self, plan: Plan) -> Plan:
        """The plan by which this task is pruned where the others are pruned by ``plan``."""
        return plan if self.steps is None else replace(plan, recipe=replace(plan.recipe, steps=self.steps))


def sample_sources(sources: Sequence[Source], tasks: int, classes: int, *, seed: int = 0) -> list[Source]:
    """Draw ``tasks`` source tasks of ``classes`` random classes each, in turn from each source; no two are the same.

    The first n of a longer draw are the draw of n: a bank can be made larger later.

    Raises:
        TaskError: a source has too few classes, or too few different choices of them.
    """
    if tasks < 1 or classes < 2:
        raise TaskError(f"{tasks} tasks of {classes} classes were asked for, expected at least 1 task of 2 classes")
    known = [source.classes or source.load().classes for source in sources]
    drawn: list[Source] = []
    for place, (source, names) in enumerate(zip(sources, known, strict=True)):
        wanted = len(range(place, tasks, len(sources)))
        if len(names) < classes or comb(len(names), classes) < wanted:
            raise TaskError(
                f"{source.data} has {len(names)} classes: no {wanted} different tasks of {classes} can be drawn from "
                "it; ask for fewer tasks, or for another number of classes"
            )
    generators = [np.random.default_rng([seed, place]) for place in range(len(sources))]
    seen: list[set[frozenset[int]]] = [set() for _ in sources]
    while len(drawn) < tasks:
        place = len(drawn) % len(sources)
        chosen = generators[place].choice(len(known[place]), classes, replace=False)
        if frozenset(chosen.tolist()) in seen[place]:
            continue
        seen[place].add(frozenset(chosen.tolist()))
        drawn.append(replace(sources[place], classes=tuple(known[place][index] for index in sorted(chosen.tolist()))))
    return drawn


def broaden(sources: Sequence[Source], classes: int, steps: int) -> list[Source]:
    """A broad source task of all classes of each source that has more than ``classes``, to be trained for long.

    Its pruned model has learnt more than any of few classes can teach, and is near to every task: a new one that has
    no closer kin starts from there.
    """
    known = [source.classes or source.load().classes for source in sources]
    return [
        replace(source, classes=tuple(names), shots=min(source.shots or BROAD_IMAGES, most), steps=steps)
        for source, names in zip(sources, known, strict=True)
        if len(names) > classes
        for most in [max(BROAD_IMAGES // len(names), 1)]
    ]
