"""One source task: what is to be done for it, and what comes of it. The same on this machine and on another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kinprune.backbones import Backbone
from kinprune.bank import Accuracy, Header, Record, record_key
from kinprune.bank.record import check_record
from kinprune.bank.rows import Rows, rows_of
from kinprune.bank.weights import pack
from kinprune.building.sources import Source
from kinprune.delivery import versions
from kinprune.errors import TaskError
from kinprune.pruning import OnStep, Plan, Pruned, prune
from kinprune.tasks import DecodedTask, Task, decode
from kinprune.tasks.task import Labelled


@dataclass(frozen=True)
class Work:
    """A source task to prune: ``key`` is its record's, ``threads`` the processors' threads it may use."""

    key: str
    source: Source
    plan: Plan
    device: str
    threads: int

    @property
    def amount(self) -> int:
        """Steps of training, a round's closed form and what is done once counted as some more."""
        plan = self.plan
        return plan.recipe.steps + (plan.rounds - 1) * plan.round_steps + 20 * (plan.rounds + 1)


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned source task as it goes into the bank: its rows and its file of weights. Plain values and bytes."""

    key: str
    rows: Rows
    content: bytes
    name: str
    accuracy: Accuracy
    seconds: float


Outcome = Result | TaskError
"""What comes of a task: its record, or why its images could not be read."""


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


def do(
    work: Work,
    images: Labelled,
    header: Header,
    backbone_of: Callable[[int], Backbone],
    on_step: OnStep | None = None,
) -> Outcome:
    """Prune a source task for the bank of a header; ``images`` is its place, opened.

    ``backbone_of`` gives the bank's backbone with a head of so many classes. KeyboardInterrupt is Ctrl-C in the middle.
    """
    try:
        task = work.source.take(images)
        backbone = backbone_of(len(task.classes))
        decoded = decode(task, backbone.preprocessing, threads=work.threads)
    except TaskError as error:
        return error
    pruned = prune(backbone, decoded, work.plan, device=work.device, on_step=on_step)
    if pruned.training.stopped:
        raise KeyboardInterrupt
    record = record_of(pruned, task, work.key, data=work.source.data)
    check_record(header, record)
    content = pack(record.tensors)
    rows = rows_of(record, header, content)
    return Result(work.key, rows, content, task.name, record.accuracy, sum(pruned.seconds.values()))
