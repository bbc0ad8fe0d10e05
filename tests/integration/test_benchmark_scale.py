"""The benchmark of a bank's size, on a few records: what it writes in bulk is a whole bank, and all is measured."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from kinprune.bank import verify

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, which is Linux's")
def test_banks_written_in_bulk_are_whole_and_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scale, scale_bank, kin = (importlib.import_module(name) for name in ("scale", "scale_bank", "kin"))
    monkeypatch.setattr(scale_bank, "BATCH", 40)
    monkeypatch.setattr(scale_bank, "LEARNT", 3)
    monkeypatch.setattr(kin.World, "POOL", 250)
    world = kin.World(512)
    monkeypatch.setattr(scale, "World", lambda features: world)
    bank = scale_bank.make_bank(tmp_path / "bank-60.db")
    for records in (30, 60):  # it goes on where it was, in the middle of a batch
        assert scale_bank.fill(bank, world, records) > 0 and len(bank) == records
    assert scale_bank.fill(bank, world, 60) == 0
    report = verify(bank)
    assert report.whole and report.records == 60 and len(bank.keys()) == 60
    options = argparse.Namespace(repeats=1, targets=2, threads=1)
    row: dict[str, Any] = {name: measure(bank, options) for name, measure in scale.MEASURES.items()}
    assert row["recall"] == {"mean": 1.0, "worst": 1.0} and all(row[name]["seconds"] > 0 for name in scale.COLUMNS)
    row |= {"tasks": 60, "bytes": 1_200_000, "made": 1.0, "load": 0.5, "repeats": 1, "targets": 2}
    page = scale.page({"rows": [row], "threads": 1})
    assert page.count("\n| 60 | ") == 3
    scale.draw([row, row | {"tasks": 120}], tmp_path / "scale.svg")
    assert "<svg" in (tmp_path / "scale.svg").read_text()
