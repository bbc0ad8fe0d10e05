"""Merging banks: everything comes over bit for bit, once, from one database to the other; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import select

from kinprune.backbones import Backbone, load_backbone
from kinprune.bank import Bank, Record, create_bank, merge, schema, verify
from kinprune.bank.merging import check_same
from kinprune.errors import BankError
from kinprune.units import UnitSpace, find_units

Make = Callable[..., Record]


@pytest.fixture
def source(tmp_path: Path, backbone: Backbone, space: UnitSpace, make_record: Make) -> Bank:
    """Four records in a file."""
    made = create_bank(tmp_path / "source.db", backbone, space)
    for seed in range(4):
        made.add(make_record(seed))
    return made


def contents(bank: Bank, table: str) -> list[tuple[object, ...]]:
    """The rows of a table in order, without numbers."""
    columns = [column for column in schema.metadata.tables[table].c if column.name not in ("id", "record")]
    order = schema.metadata.tables[table].primary_key.columns.values()[0]
    with schema.reading(bank.engine) as connection:
        return [tuple(row) for row in connection.execute(select(*columns).order_by(order))]


def test_everything_comes_over_bit_for_bit(bank: Bank, source: Bank) -> None:
    """From SQLite to both databases, and back."""
    seen: list[tuple[int, int]] = []
    assert merge(bank, source, lambda done, of: seen.append((done, of))) == (4, 0)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for table in ("record", "probe", "units"):
        assert contents(bank, table) == contents(source, table)
    for entry in source.entries():
        assert bank.store.get(entry.weights) == source.store.get(entry.weights)
    assert verify(bank).whole and verify(bank).unreferenced == ()
    source.remove([entry.id for entry in source.entries()][:2])
    assert merge(source, bank) == (2, 2) and verify(source).whole
    assert sorted(contents(source, "record")) == sorted(contents(bank, "record"))


def test_merging_again_adds_nothing(sqlite_bank: Bank, source: Bank, make_record: Make) -> None:
    sqlite_bank.add(make_record(2))
    sqlite_bank.add(make_record(9))
    made = sqlite_bank.entries()[0].created
    assert merge(sqlite_bank, source) == (3, 1)
    assert merge(sqlite_bank, source) == (0, 4)
    assert merge(sqlite_bank, sqlite_bank) == (0, 5)
    names = [entry.name for entry in sqlite_bank.entries()]
    assert names == ["fruit 2", "fruit 9", "fruit 0", "fruit 1", "fruit 3"]
    assert sqlite_bank.entries()[0].created == made and verify(sqlite_bank).whole


def test_a_merge_that_broke_off_goes_on(sqlite_bank: Bank, source: Bank) -> None:
    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(sqlite_bank, source, stop)
    assert len(sqlite_bank) == 2 and verify(sqlite_bank).whole
    assert merge(sqlite_bank, source) == (2, 2)
    assert [entry.name for entry in sqlite_bank.entries()] == [f"fruit {seed}" for seed in range(4)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda bank, entry: bank.store.remove(entry.weights),
        lambda bank, entry: execute(bank, "UPDATE record SET name = 'x' WHERE id = 3"),
        lambda bank, entry: execute(bank, "UPDATE probe SET seal = 'x' WHERE record = 3"),
        lambda bank, entry: execute(bank, "UPDATE units SET seal = 'x' WHERE record = 3"),
        lambda bank, entry: execute(bank, "DELETE FROM units WHERE record = 3"),
    ],
    ids=["weights", "record", "probe", "units", "lost"],
)
def test_a_damaged_record_does_not_come_over(sqlite_bank: Bank, source: Bank, damage: Callable[..., None]) -> None:
    damage(source, source.entries([3])[0])
    with pytest.raises(BankError, match=r"record 3|weights"):
        merge(sqlite_bank, source)
    assert len(sqlite_bank) == 2 and verify(sqlite_bank).whole
    source.remove([3])
    assert merge(sqlite_bank, source) == (1, 2)


def execute(bank: Bank, statement: str) -> None:
    with schema.writing(bank.engine) as connection:
        connection.exec_driver_sql(statement)


def test_banks_of_other_models_are_refused_by_name(source: Bank, space: UnitSpace, tmp_path: Path) -> None:
    for number, (options, words) in enumerate(
        (
            ({"image_size": 20}, r"its image_size is \(16, 16\), the bank's is \(20, 20\)"),
            ({"image_size": 16, "mean": [0.1, 0.2, 0.3]}, "its mean is"),
            ({"image_size": 16, "seed": 1}, "its weights are not those"),
        )
    ):
        backbone = load_backbone("tiny_net:tiny", num_classes=3, **options)  # type: ignore[arg-type]
        found = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
        target = create_bank(tmp_path / f"{number}.db", backbone, found)
        with pytest.raises(BankError, match=words):
            merge(target, source)
        assert len(target) == 0


def test_banks_of_other_units_are_refused_by_name(source: Bank) -> None:
    header = source.header
    check_same(header, replace(header))
    with pytest.raises(BankError, match="is with the residual stream, the target's without"):
        check_same(header, replace(header, stream=True))
    with pytest.raises(BankError, match="the source's unit space is ffffffffffff, the target's"):
        check_same(header, replace(header, space="f" * 64))


def test_lessons_are_the_same_after_a_merge(bank: Bank, source: Bank) -> None:
    merge(bank, source)
    here, there = ([entry.id for entry in one.entries()] for one in (bank, source))
    for name in ("rankings", "scores", "kept"):
        assert np.array_equal(getattr(bank.lessons(here), name), getattr(source.lessons(there), name))
