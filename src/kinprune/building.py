"""Filling a bank: source tasks are drawn, each is pruned from scratch, and its record is written as soon as it is done.

What was asked of a task is its record's key, so that a build that was stopped goes on where it was: run again, it
draws the same tasks and leaves out those that the bank has.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import comb
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from threading import Thread

import numpy as np

from kinprune.backbones import Backbone
from kinprune.bank import Accuracy, Bank, Record, open_bank, record_key
from kinprune.bank.backbone import load_bank_backbone
from kinprune.delivery import versions
from kinprune.errors import BankError, TaskError
from kinprune.pruning import OnStep, Plan, Pruned, prune
from kinprune.selection import Budget
from kinprune.tasks import DecodedTask, Task, decode, load_task
from kinprune.training import Recipe

SOURCE_PLAN = Plan(Budget(keep=0.1), rounds=2, round_steps=20, recipe=Recipe(steps=60))
"""How source tasks are pruned unless something else is asked for."""


BROAD_TIMES = 20
"""A broad source task is fine-tuned for so many times the steps of the others."""

BROAD_IMAGES = 10_000
"""About the most training images of a broad source task: they are in memory at once."""


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

    def load(self) -> Task:
        """The task, not yet decoded."""
        return load_task(
            self.data,
            classes=self.classes,
            shots=self.shots,
            test_fraction=self.test_fraction,
            image_column=self.image_column,
            label_column=self.label_column,
        )

    def plan(self, plan: Plan) -> Plan:
        """The plan by which this task is pruned where the others are pruned by ``plan``."""
        return plan if self.steps is None else replace(plan, recipe=replace(plan.recipe, steps=self.steps))


@dataclass(frozen=True)
class Build:
    """The outcome of a build: how many records it wrote, and how many the bank had already."""

    added: int
    present: int


@dataclass(frozen=True)
class Done:
    """One source task that is done; ``added`` is False where another builder was faster.

    ``work`` is about how long it takes beside the others, in steps, and ``remaining`` the work of those still to do.
    """

    name: str
    accuracy: Accuracy
    seconds: float
    added: bool
    work: int = 1
    remaining: int = 0


@dataclass(frozen=True)
class _Work:
    address: str
    source: Source
    plan: Plan
    device: str
    threads: int


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


def key_of(task: Task, plan: Plan) -> str:
    """The key of the record that pruning ``task`` under ``plan`` makes."""
    return record_key(task.digest, asdict(plan))


def record_of(pruned: Pruned, task: Task | DecodedTask, key: str, *, data: str) -> Record:
    """The record of a pruned source task."""
    return Record(
        key=key,
        name=task.name,
        classes=task.classes,
        ranking=pruned.ranking,
        scores=np.clip(pruned.scores, -65_504, 65_504).astype(np.float16),
        mask=pruned.selection.mask,
        probe=pruned.probe,
        accuracy=Accuracy(pruned.dense.accuracy, pruned.start.accuracy, pruned.final.accuracy),
        tensors=pruned.model.state_dict(),
        details={
            "data": data,
            "task_digest": task.digest,
            "images": {"train": len(task.train), "test": len(task.test)},
            "plan": asdict(pruned.plan),
            "seconds": pruned.seconds,
            "versions": versions(),
        },
    )


def build(
    bank: Bank,
    sources: Sequence[Source],
    plan: Plan = SOURCE_PLAN,
    *,
    workers: int = 1,
    device: str = "cpu",
    on_task: Callable[[Done, int, int], None] | None = None,
    on_step: OnStep | None = None,
) -> Build:
    """Prune every source task that the bank does not have yet, and write its record.

    ``workers`` processes share the cores. ``on_task(done, number, of)`` is called after each task, ``number`` counting
    those the bank had; ``on_step`` (see ``prune``) only where there is one worker. Ctrl-C, or the end of a process,
    loses the tasks under way and nothing else; run again, the build goes on.

    Raises:
        BankError: a worker was lost. TaskError: a source cannot be read; all are looked at before any is pruned.
    """
    if workers < 1:
        raise BankError(f"{workers} workers were asked for, expected at least 1")
    if plan.stream != bank.header.stream:
        raise BankError(
            f"the bank's unit space is {'with' if bank.header.stream else 'without'} the residual stream, the plan's "
            f"is not: {'give' if bank.header.stream else 'leave out'} --stream"
        )
    have = bank.keys()
    todo = [source for source in sources if key_of(source.load(), source.plan(plan)) not in have]
    present = len(sources) - len(todo)
    threads = max(1, _cores() // workers)
    works = [_Work(bank.address, source, source.plan(plan), device, threads) for source in todo]
    added, remaining = 0, sum(_work_of(work.plan) for work in works)
    with closing(_results(bank, works, workers, on_step)) as results:  # the workers end, whatever on_task raises
        for number, done in enumerate(results, start=present + 1):
            added += done.added
            remaining -= done.work
            if on_task is not None:
                on_task(replace(done, remaining=remaining), number, len(sources))
    return Build(added, len(sources) - added)


def _work_of(plan: Plan) -> int:
    """Steps of training, a round's closed form and what is done once counted as some more."""
    return plan.recipe.steps + (plan.rounds - 1) * plan.round_steps + 20 * (plan.rounds + 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _results(bank: Bank, works: list[_Work], workers: int, on_step: OnStep | None) -> Generator[Done, None, None]:
    if workers == 1 or len(works) < 2:
        for work in works:
            yield _prune_source(bank, work, on_step)
        return
    pool = ProcessPoolExecutor(min(workers, len(works)), _context(), _begin_worker)
    try:
        futures = [pool.submit(_in_worker, work) for work in works]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise BankError(
            "a worker of the build was lost (killed, or out of memory); what was done is in the bank: run the same "
            "build again to go on, with fewer --workers if memory was short"
        ) from error
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(10)


def _context() -> BaseContext:
    """How workers start: never as forks of this process, for torch's thread pool does not survive that.

    Where the system can, they are forks of a process that has loaded the libraries and computed nothing yet: that
    saves each worker the seconds and the memory of loading them.
    """
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin_worker() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the builder, and end when the builder does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    builder = parent_process()
    assert builder is not None

    def follow() -> None:
        builder.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _in_worker(work: _Work) -> Done:
    import torch

    torch.set_num_threads(work.threads)
    return _prune_source(_bank(work.address), work, None)


@lru_cache(maxsize=1)
def _bank(address: str) -> Bank:
    return open_bank(address)


@lru_cache(maxsize=4)
def _backbone(bank: Bank, num_classes: int) -> Backbone:
    return load_bank_backbone(bank, num_classes)


def _prune_source(bank: Bank, work: _Work, on_step: OnStep | None) -> Done:
    task = work.source.load()
    backbone = _backbone(bank, len(task.classes))
    decoded = decode(task, backbone.preprocessing, threads=work.threads)
    pruned = prune(backbone, decoded, work.plan, device=work.device, on_step=on_step)
    if pruned.training.stopped:
        raise KeyboardInterrupt
    record = record_of(pruned, task, key_of(task, work.plan), data=work.source.data)
    seconds = sum(pruned.seconds.values())
    return Done(task.name, record.accuracy, seconds, bank.add(record), _work_of(work.plan))
