"""What a bank costs and what it saves: seconds on one core, beside pruning every task from scratch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.statistics import Row, at_home, of_stage
from kinprune.bank import Bank

STEPS = "60"
"""The fine-tuning that tasks are counted with."""

OTHERS = ("taylor", "scratch", "scratch, ten times the steps")
"""The methods without a bank that it is held against."""


@dataclass(frozen=True)
class BankCosts:
    """What a protocol's bank took to build: seconds of its narrow and its broad records, and how many there are."""

    records: int
    broad_records: int
    narrow_seconds: float
    broad_seconds: float


@dataclass(frozen=True)
class Costs:
    """Seconds: of the ``bank``, of its ``broad`` task alone, to ``adapt`` one task, and of other methods a task."""

    bank: float
    broad: float
    adapt: float
    others: dict[str, float] = field(default_factory=dict)

    def pays_after(self, method: str, bank: float) -> float:
        """The number of tasks from which a bank of so many seconds is cheaper than ``method``; infinite for never."""
        saved = self.others[method] - self.adapt
        return math.ceil(bank / saved) if saved > 0 else math.inf


def bank_costs(bank: Bank) -> BankCosts:
    """Read what the records of a bank took, as they tell it."""
    entries = bank.entries()
    least = min(len(entry.classes) for entry in entries)
    seconds = [sum(entry.details["seconds"].values()) for entry in entries]
    broad = [len(entry.classes) > least for entry in entries]
    parts = [sum(value for value, is_broad in zip(seconds, broad, strict=True) if is_broad == want) for want in (0, 1)]
    return BankCosts(len(entries), sum(broad), round(parts[0], 1), round(parts[1], 1))


def write_bank_costs(bank: Bank, path: Path) -> None:
    """Keep what the bank took beside the rows, for the bank itself is not kept with them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(bank_costs(bank))) + "\n")


def costs_of(path: Path, rows: Sequence[Row]) -> Costs | None:
    """The costs of a protocol, from its bank's file and its test rows; None where one of them says nothing yet."""
    adapt = _seconds(rows, "smsp")
    if not path.exists() or adapt is None:
        return None
    bank = BankCosts(**json.loads(path.read_text()))
    others = {method: _seconds(rows, method) for method in OTHERS}
    return Costs(
        bank.narrow_seconds + bank.broad_seconds,
        bank.broad_seconds,
        adapt,
        {name: value for name, value in others.items() if value is not None},
    )


def _seconds(rows: Sequence[Row], method: str) -> float | None:
    """The mean seconds a task of a method's start and steps, at the protocol's own sizes."""
    found: list[dict[str, Any]] = [
        row["seconds"]
        for row in at_home(of_stage(rows, "test"))
        if row["method"] == method and STEPS in row.get("seconds", {})
    ]
    return float(np.mean([one.get("start", 0.0) + one[STEPS] for one in found])) if found else None
