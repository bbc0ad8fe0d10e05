"""A build in a process of its own, which tests stop: ``ADDRESS FOLDER WORKERS [STEPS RAY]``, a line for each task."""

from __future__ import annotations

import sys
from dataclasses import replace

from kinprune.bank import open_bank
from kinprune.building import Cluster, Done, Source, Watch, build, sample_sources
from kinprune.pruning import Plan
from kinprune.selection import Budget
from kinprune.training import Recipe

TASKS = 5
PLAN = Plan(Budget(keep=0.3), rounds=2, round_steps=1, score_images=16, recipe=Recipe(steps=2, batch_size=8))


def sources(folder: str) -> list[Source]:
    """Five tasks of two classes each."""
    return sample_sources([Source(folder)], TASKS, 2, seed=3)


def tell(done: Done, number: int, of: int) -> None:
    """Say that a task is done."""
    print(f"done {number} of {of}: {done.name}", flush=True)


def longer(steps: int) -> Plan:
    """The plan with so many steps at the end."""
    return replace(PLAN, recipe=replace(PLAN.recipe, steps=steps))


if __name__ == "__main__":
    address, folder, workers, *more = sys.argv[1:]
    plan = longer(int(more[0])) if more else PLAN
    cluster = Cluster(more[1]) if more else None
    print(
        build(open_bank(address), sources(folder), plan, workers=int(workers), cluster=cluster, watch=Watch(tell)),
    )
