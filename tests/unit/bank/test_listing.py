"""Pages and sums of a bank's records, on both databases."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from kinprune.bank import Bank, Record, listing
from kinprune.bank.listing import class_names, newest, numbered_keys, weight_bytes
from kinprune.errors import BankError

Make = Callable[..., Record]


@pytest.fixture
def filled(bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch) -> Bank:
    """Five records, numbers 1 to 5; two have the same weights, one has classes of its own."""
    monkeypatch.setattr(listing, "PAGE", 2)
    first = make_record(0)
    for seed in range(5):
        record = make_record(seed, tensors=first.tensors if seed == 1 else make_record(seed).tensors)
        bank.add(replace(record, classes=("cat", "dog", "class 1")) if seed == 4 else record)
    return bank


def test_the_newest_come_in_pages(filled: Bank) -> None:
    assert newest(filled, 2) == filled.entries([4, 5])
    assert newest(filled, 2, before=4) == filled.entries([2, 3])
    assert newest(filled, 2, before=2) == filled.entries([1])
    assert newest(filled, 9) == filled.entries() and newest(filled, 9, before=1) == []


def test_keys_come_with_their_numbers_in_order(filled: Bank) -> None:
    entries = sorted(filled.entries(), key=lambda entry: entry.key)
    assert list(numbered_keys(filled)) == [(entry.id, entry.key) for entry in entries]


def test_what_all_records_have_together(filled: Bank) -> None:
    entries = filled.entries()
    assert class_names(filled) == {"class 0", "class 1", "class 2", "cat", "dog"}
    assert entries[0].weights == entries[1].weights
    assert weight_bytes(filled) == sum({entry.weights: entry.weight_bytes for entry in entries}.values())


def test_an_empty_bank(bank: Bank) -> None:
    assert newest(bank, 3) == [] and list(numbered_keys(bank)) == []
    assert class_names(bank) == set() and weight_bytes(bank) == 0


def test_classes_that_cannot_be_read_are_told(sqlite_bank: Bank, make_record: Make) -> None:
    sqlite_bank.add(make_record(0))
    with closing(sqlite3.connect(sqlite_bank.address)) as file, file:
        file.execute("UPDATE record SET classes = '[\"a'")
    with pytest.raises(BankError, match="record 1: its description changed"):
        class_names(sqlite_bank)
