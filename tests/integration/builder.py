"""A build in a process of its own, which tests stop: ``builder.py ADDRESS FOLDER WORKERS``, a line for each task."""

from __future__ import annotations

import sys

from kinprune.bank import open_bank
from kinprune.building import Done, Source, Watch, build, sample_sources
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


if __name__ == "__main__":
    print(build(open_bank(sys.argv[1]), sources(sys.argv[2]), PLAN, workers=int(sys.argv[3]), watch=Watch(tell)))
