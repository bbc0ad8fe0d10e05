"""A made-up bank of any size in the shape of a real one, written in bulk: thousands of records a transaction."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from kin import CLASSES, PROBED, World
from numpy.typing import NDArray
from sqlalchemy import func, insert, select

import kinprune as kp
from kinprune.bank import Accuracy, Bank, Record, create_bank, open_bank, schema
from kinprune.bank.coding import seal
from kinprune.bank.rows import rows_of
from kinprune.bank.weights import pack
from kinprune.calibration import Probe
from kinprune.transferability import Sources
from kinprune.units import UnitSpace, extract

BATCH = 5000
"""Records a transaction; the world draws as many at once, so that a bank's first records are those of a smaller one."""

LEARNT = 500
"""Different rankings, scores and masks; records take them in turn, each sealed as its own."""

KEEP = 0.1


def make_bank(path: Path) -> Bank:
    """An empty bank of ResNet-18's filters inside blocks at 64 pixels, or the one that is there."""
    return open_bank(path) if path.exists() else create_bank(path, *_model())


def fill(bank: Bank, world: World, records: int, tell: Callable[[int], None] | None = None) -> float:
    """Write records until there are so many, and return the seconds that took; a multiple of ``BATCH`` or below it."""
    started, have = time.perf_counter(), len(bank)
    if have >= records:
        return 0.0
    learnt = Learnt.of(bank)
    with schema.reading(bank.engine) as connection:
        last = int(connection.execute(select(func.coalesce(func.max(schema.record.c.id), 0))).scalar_one())
    while have < records:
        batch, start = divmod(have, BATCH)
        tasks, stop = Tasks.of(world, batch), min(BATCH, start + records - have)
        tables: dict[str, list[Mapping[str, Any]]] = {"record": [], "probe": [], "units": []}
        for place in range(start, stop):
            last += 1
            for table, row in learnt.rows(last, batch * BATCH + place, tasks, place):
                tables[table].append(row)
        with schema.writing(bank.engine) as connection:
            for table, rows in tables.items():
                connection.execute(insert(schema.metadata.tables[table]), rows)
        have += stop - start
        if tell is not None:
            tell(have)
    return time.perf_counter() - started


SEALED = ("name", "classes", "dense", "start", "final", "created", "weights", "weight_bytes", "details")


@dataclass(frozen=True, eq=False)
class Tasks:
    """The probes of some tasks, and the numbers of their classes ``[n, 5]``."""

    sources: Sources
    classes: NDArray[np.int64]

    @classmethod
    def of(cls, world: World, batch: int) -> Tasks:
        """A batch; the world draws the classes first, so that the same seed gives the same."""
        classes = world.classes(BATCH, np.random.default_rng([2, batch + 1]))
        return cls(world.sources(BATCH, seed=batch + 1), classes)


@dataclass(frozen=True, eq=False)
class Learnt:
    """What records say of the units, encoded, and the columns that all of them share."""

    units: Sequence[bytes]
    shared: Mapping[str, Any]

    @classmethod
    def of(cls, bank: Bank) -> Learnt:
        """The same for every bank: rankings that have much in common, as those of real tasks have."""
        backbone, space = _model()
        random = np.random.default_rng(4)
        common = random.gamma(1.0, size=len(space))
        scores = [common * random.gamma(2.0, size=len(space)) for _ in range(LEARNT)]
        first = _record(backbone, space, scores[0])
        content = pack(first.tensors)
        bank.store.put(content)
        rows = [rows_of(replace(first, **_lessons(space, those)), bank.header, content) for those in scores]
        return cls([row.units["content"] for row in rows], rows[0].record)

    def rows(self, number: int, place: int, tasks: Tasks, row: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The three rows of a record, as ``bank.rows`` would make them."""
        key = hashlib.sha256(f"made up {place}".encode()).hexdigest()
        classes = json.dumps([f"class {kind}" for kind in tasks.classes[row].tolist()])
        values = {**self.shared, "key": key, "name": f"made-up-{place}", "classes": classes}
        yield "record", {"id": number, **values, "seal": seal(key, "record", *(str(values[name]) for name in SEALED))}
        own, count = tasks.sources, np.full(CLASSES, PROBED, dtype="<i4")
        parts = (own.weights[row], own.means[row], own.biases[row].astype("<f4"), count)
        probe, units = b"".join(part.tobytes() for part in parts), self.units[place % LEARNT]
        sealed = {"content": probe, "seal": seal(key, "probe", probe)}
        yield "probe", {"record": number, "key": key, "classes": CLASSES, **sealed}
        yield "units", {"record": number, "content": units, "seal": seal(key, "units", units)}


def _model() -> tuple[kp.Backbone, UnitSpace]:
    backbone = kp.load_backbone("resnet18", num_classes=CLASSES, random=True, image_size=64)
    return backbone, kp.find_units(backbone.model, (64, 64), head=backbone.head)


def _lessons(space: UnitSpace, scores: NDArray[np.float64]) -> dict[str, Any]:
    kept = kp.select(space, scores, kp.Budget(keep=KEEP)).mask
    ranking = np.concatenate([np.argsort(np.argsort(-part)) for part in space.split(scores)])
    return {"ranking": ranking.astype(np.int64), "scores": scores.astype(np.float16), "mask": kept}


def _record(backbone: kp.Backbone, space: UnitSpace, scores: NDArray[np.float64]) -> Record:
    """A whole record; its tensors are those of a model cut to its mask."""
    lessons = _lessons(space, scores)
    features = backbone.model.get_parameter(f"{backbone.head}.weight").shape[1]
    nothing = np.zeros((CLASSES, features), dtype=np.float32)
    return Record(
        key="0" * 64,
        name="made-up",
        classes=tuple(f"class {number}" for number in range(CLASSES)),
        probe=Probe(nothing, nothing[:, 0], nothing, np.full(CLASSES, PROBED, dtype=np.int64)),
        accuracy=Accuracy(0.85, 0.8, 0.84),
        tensors=dict(extract(backbone.model, space, lessons["mask"]).state_dict()),
        details={
            "data": "made up",
            "images": {"train": 500, "test": 500},
            "plan": vars(kp.Recipe()),
            "more": "-" * 400,
        },
        **lessons,
    )
