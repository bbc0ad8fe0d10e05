"""Target tasks: drawn once from their seeds, apart for validation and test, and decoded when they are run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import comb
from pathlib import Path

import numpy as np
from torch import nn

import kinprune as kp
from benchmarks.study.protocol import Targets
from kinprune.bank import Bank
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.calibration import head_inputs, solve_probe
from kinprune.evaluation import evaluate, lay_out
from kinprune.tasks import Split
from kinprune.training import Recipe, hold_back


@dataclass(frozen=True, eq=False)
class TargetTask:
    """A task ready to run: ``dense`` is the whole model with a closed-form head, every method's teacher, and
    ``whole`` its test accuracy.

    ``fit`` is what methods learn from and ``guard`` what guards their fine-tuning; ``task.test`` is only evaluated on.
    """

    task: kp.DecodedTask
    bank: Bank
    backbone: kp.Backbone
    space: kp.UnitSpace
    fit: Split
    guard: Split | None
    dense: nn.Module
    whole: float


@dataclass(frozen=True)
class Drawn:
    """A target task's data set and classes."""

    data: str
    classes: tuple[str, ...]


def draw_targets(targets: Targets, bank: Bank, data: Path, stage: str) -> list[Drawn]:
    """The target tasks of a stage, in turn of each data set."""
    by_data = [_draw(targets, bank, data, name, stage) for name in targets.data]
    return [task for turn in zip(*by_data, strict=True) for task in turn]


def _draw(targets: Targets, bank: Bank, data: Path, name: str, stage: str) -> list[Drawn]:
    every = kp.load_task(str(data / name), label_column=targets.label_column).classes
    if targets.unseen:
        seen = {name for entry in bank.entries() for name in entry.classes}
        every = tuple(sorted(set(every) - seen))
    mixed = [every[place] for place in np.random.default_rng(targets.seed).permutation(len(every))]
    validating = stage == "validation"
    if targets.validation_classes:
        part = targets.validation_classes
        mixed = mixed[:part] if validating else mixed[part:]
    generator = np.random.default_rng([targets.seed, 1 + validating])
    count = targets.validation if validating else targets.test
    if comb(len(mixed), targets.classes) < count:
        raise ValueError(
            f"{len(mixed)} classes of {name} are left for the {stage} tasks: no {count} different tasks of "
            f"{targets.classes} can be drawn; ask for fewer, or leave more classes out of the bank"
        )
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(sorted(generator.choice(mixed, targets.classes, replace=False).tolist()))] = None
    return [Drawn(name, classes) for classes in drawn]


def prepare(targets: Targets, bank: Bank, data: Path, drawn: Drawn, shots: int | None) -> TargetTask:
    """Load and decode a target task, and solve its teacher's head."""
    classes = drawn.classes
    backbone = load_bank_backbone(bank, len(classes))
    source = kp.load_task(
        str(data / drawn.data), classes=classes, shots=shots or targets.shots, label_column=targets.label_column
    )
    task = kp.decode(source, backbone.preprocessing)
    fit, guard = hold_back(task.train, Recipe().hold_back, Recipe().seed)
    dense = copy.deepcopy(backbone.model)
    lay_out(dense)
    features = head_inputs(dense, backbone.head, fit.images, task.preprocessing)
    solve_probe(dense, backbone.head, features, fit.labels, len(classes))
    whole = evaluate(dense, task.test, task.preprocessing).accuracy
    return TargetTask(task, bank, backbone, bank_space(bank, backbone), fit, guard, dense, whole)
