"""Filling a bank: each source task is pruned from scratch, and its record is written as soon as it is done.

What was asked of a task is its record's key, so that a build that was stopped goes on where it was: run again, it
draws the same tasks and leaves out those that the bank has. Builds beside each other claim what they are at, and do
no task twice.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from kinprune.bank import Accuracy, Bank
from kinprune.bank.storage import write_rows
from kinprune.building.claiming import Claims
from kinprune.building.cluster import Cluster, OnCluster
from kinprune.building.crew import Alone, Crew, Processes
from kinprune.building.sources import SOURCE_PLAN, Place, Source
from kinprune.building.work import Outcome, Work, key_of
from kinprune.errors import BankError, TaskError
from kinprune.pruning import OnStep, Plan
from kinprune.tasks import Task
from kinprune.tasks.task import Labelled

LOOK = 2.0
"""Seconds between two looks at tasks that another builder has claimed."""


@dataclass(frozen=True)
class Build:
    """The outcome of a build: how many records it wrote, how many the bank had already, and what could not be read."""

    added: int
    present: int
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Done:
    """One source task that is done; ``added`` is False where another builder did it.

    ``work`` is about how long it takes beside the others, in steps, and ``remaining`` the work of those still to do;
    ``beside`` counts the tasks that were under way when it was done.
    """

    name: str
    accuracy: Accuracy
    seconds: float
    added: bool
    work: int = 1
    remaining: int = 0
    beside: int = 0


OnTask = Callable[[Done, int, int], None]


@dataclass(frozen=True)
class Watch:
    """What a build tells while it runs.

    ``on_task(done, number, of)`` after each task, ``number`` counting those the bank had; ``on_step`` (see ``prune``)
    only where this process is the one worker; ``on_wait(count)`` where nothing is left but tasks that others are at.
    """

    on_task: OnTask | None = None
    on_step: OnStep | None = None
    on_wait: Callable[[int], None] | None = None


def build(
    bank: Bank,
    sources: Sequence[Source],
    plan: Plan = SOURCE_PLAN,
    *,
    workers: int = 1,
    device: str = "cpu",
    cluster: Cluster | None = None,
    watch: Watch | None = None,
) -> Build:
    """Prune every source task that the bank does not have yet, and write its record.

    ``workers`` processes share the cores, or a Ray ``cluster`` does the work. Ctrl-C, or the end of a process, loses
    the tasks under way and nothing else; run again, the build goes on. Tasks that another build is at are waited for.
    A task whose images cannot be read is left out and said at the end.

    Raises:
        BankError: a worker was lost, or the cluster cannot be used. TaskError: a source cannot be opened; all are
            before any task is pruned.
    """
    _check(bank, plan, workers)
    watch = watch or Watch()
    threads = cluster.cpus if cluster else max(1, _cores() // workers)
    opened = {place: place.open() for place in dict.fromkeys(source.place for source in sources)}
    tasks: dict[str, tuple[Work, Task]] = {}
    for source in sources:
        task, own = source.take(opened[source.place]), source.plan(plan)
        key = key_of(task, own)
        tasks[key] = (Work(key, source, own, device, threads), task)
    have = bank.find(list(tasks))
    todo = {work: task for key, (work, task) in tasks.items() if key not in have}
    if not todo:
        return Build(0, len(sources))
    run = _Run(bank, list(todo), len(tasks), watch)
    with closing(_crew(bank, opened, todo, workers, cluster, watch)) as crew:  # workers end, whatever on_task raises
        run.all(crew)
    return Build(run.added, len(sources) - run.added - len(run.failed), tuple(run.failed))


def _check(bank: Bank, plan: Plan, workers: int) -> None:
    if workers < 1:
        raise BankError(f"{workers} workers were asked for, expected at least 1")
    if plan.stream != bank.header.stream:
        raise BankError(
            f"the bank's unit space is {'with' if bank.header.stream else 'without'} the residual stream, the plan's "
            f"is not: {'give' if bank.header.stream else 'leave out'} --stream"
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _crew(
    bank: Bank,
    opened: Mapping[Place, Labelled],
    todo: Mapping[Work, Task],
    workers: int,
    cluster: Cluster | None,
    watch: Watch,
) -> Crew:
    if cluster is not None:
        taken: dict[Place, list[Task]] = {}
        for work, task in todo.items():
            taken.setdefault(work.source.place, []).append(task)
        return OnCluster(cluster, bank, opened, taken)
    count = min(workers, len(todo))
    return Processes(bank, count) if count > 1 else Alone(bank, opened, watch.on_step)


class _Run:
    """A build under way: the tasks that no worker has, and the count of what is done."""

    def __init__(self, bank: Bank, works: Sequence[Work], of: int, watch: Watch) -> None:
        self.bank, self.of, self.watch = bank, of, watch
        self.pending, self.elsewhere = deque(works), deque[Work]()
        self.under_way = 0
        self.number, self.added = of - len(works), 0
        self.remaining = sum(work.amount for work in works)
        self.failed: list[str] = []

    def all(self, crew: Crew) -> None:
        """Do all tasks, or see them done by others."""
        with closing(Claims(self.bank)) as claims:
            while self.pending or self.elsewhere or self.under_way:
                self._begin(crew, claims)
                if self.under_way:
                    for work, outcome in crew.finished(LOOK):
                        self._finish(work, outcome)
                        claims.drop(work.key, done=not isinstance(outcome, TaskError))
                elif self.elsewhere:
                    if self.watch.on_wait is not None:
                        self.watch.on_wait(len(self.elsewhere))
                    time.sleep(LOOK)

    def _begin(self, crew: Crew, claims: Claims) -> None:
        """Begin what there is room for; tasks that others are at come last."""
        if not self.pending:
            self.pending, self.elsewhere = self.elsewhere, deque()
        while self.pending and crew.room() > 0:
            work = self.pending.popleft()
            answer = claims.take(work.key)
            if answer == "yes":
                crew.begin(work)
                self.under_way += 1
            elif answer == "taken":
                self.elsewhere.append(work)
            else:
                entry = self.bank.find([work.key])[work.key]
                self._tell(work, Done(entry.name, entry.accuracy, 0.0, False))

    def _finish(self, work: Work, outcome: Outcome) -> None:
        self.under_way -= 1
        if isinstance(outcome, TaskError):
            self.failed.append(str(outcome))
            self.remaining -= work.amount
            return
        added = write_rows(self.bank, outcome.rows, outcome.content)
        self.added += added
        self._tell(work, Done(outcome.name, outcome.accuracy, outcome.seconds, added))

    def _tell(self, work: Work, done: Done) -> None:
        self.number += 1
        self.remaining -= work.amount
        if self.watch.on_task is not None:
            told = replace(done, work=work.amount, remaining=self.remaining, beside=self.under_way)
            self.watch.on_task(told, self.number, self.of)
