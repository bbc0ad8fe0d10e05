"""A build in a process of its own, which tests stop: a line for each task."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import replace

from kinprune.bank import open_bank
from kinprune.building import Cluster, Done, Source, Watch, build, sample_sources
from kinprune.pruning import Plan
from kinprune.selection import Budget
from kinprune.training import Recipe

TASKS = 5
PLAN = Plan(Budget(keep=0.3), rounds=2, round_steps=1, score_images=16, recipe=Recipe(steps=2, batch_size=8))


def sources(folder: str, tasks: int = TASKS) -> list[Source]:
    """Tasks of two classes each."""
    return sample_sources([Source(folder)], tasks, 2, seed=3)


def tell(done: Done, number: int, of: int) -> None:
    """Say that a task is done."""
    print(f"done {number} of {of}: {done.name}", flush=True)


def longer(steps: int) -> Plan:
    """The plan with so many steps at the end."""
    return replace(PLAN, recipe=replace(PLAN.recipe, steps=steps))


if __name__ == "__main__":
    parser = ArgumentParser()
    for name, kind in (("address", str), ("folder", str), ("workers", int)):
        parser.add_argument(name, type=kind)
    for name, kind, usual in (("--steps", int, PLAN.recipe.steps), ("--tasks", int, TASKS), ("--ray", str, None)):
        parser.add_argument(name, type=kind, default=usual)
    given = parser.parse_args()
    print(
        build(
            open_bank(given.address),
            sources(given.folder, given.tasks),
            longer(given.steps),
            workers=given.workers,
            cluster=Cluster(given.ray) if given.ray else None,
            watch=Watch(tell),
        )
    )
