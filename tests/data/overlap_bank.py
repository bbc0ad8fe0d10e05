"""Banks whose tasks belong to families: a family's tasks have like classes, and keep like units or do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kinprune.backbones import Backbone
from kinprune.bank import Accuracy, Bank, Record, create_bank, record_key
from kinprune.calibration import Probe
from kinprune.importance import rank
from kinprune.units import Mask, UnitSpace


def family_record(
    backbone: Backbone,
    space: UnitSpace,
    name: str,
    classes: Sequence[str],
    means: NDArray[Any],
    scores: NDArray[Any],
    counts: NDArray[np.int64],
) -> Record:
    """A record that keeps the best ``counts`` units of each group by ``scores``; its weights are of no account."""
    ranking = rank(space, scores)
    return Record(
        key=record_key(name, {}),
        name=name,
        classes=tuple(classes),
        ranking=ranking,
        scores=scores.astype(np.float16),
        mask=Mask(ranking < counts[space.group_of], space.fingerprint),
        probe=Probe(
            means.astype(np.float32),
            np.zeros(len(means), np.float32),
            means.astype(np.float32),
            np.full(len(means), 9),
        ),
        accuracy=Accuracy(0.5, 0.5, 0.5),
        tensors={"bias": torch.zeros(1)},
    )


def family_records(
    backbone: Backbone, space: UnitSpace, families: int, tasks: int, *, units: float, seed: int = 0
) -> list[Record]:
    """``tasks`` of each family; ``units`` from 0 to 1 is how much of the units' importance is the family's own.

    Two classes a task are the family's, the third is the task's. Tasks keep different numbers of units.
    """
    random = np.random.default_rng(seed)
    width = backbone.model.get_parameter(f"{backbone.head}.weight").shape[1]
    records = []
    for family in range(families):
        means, scores = random.normal(size=(3, width)), random.random(len(space))
        for task in range(tasks):
            name = f"{family}.{task}"
            own = units * scores + (1 - units) * random.random(len(space))
            counts = np.maximum(space.sizes // random.integers(2, 4), 1)
            classes = (f"a {family}", f"b {family}", f"c {name}")
            like = means + random.normal(0, 0.3, means.shape)
            records.append(family_record(backbone, space, name, classes, like, own, counts))
    return records


def make_bank(path: Path, backbone: Backbone, space: UnitSpace, records: Sequence[Record]) -> Bank:
    """A bank of these records, in this order."""
    bank = create_bank(path, backbone, space)
    for record in records:
        assert bank.add(record)
    return bank
