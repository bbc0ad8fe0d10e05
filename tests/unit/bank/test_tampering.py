"""What is altered or lost is told, by name: every column, the weights, the header; and damaged records can go."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kinprune.bank import Bank, Record, clean, open_bank, schema, verify
from kinprune.bank.rows import rows_of
from kinprune.bank.storage import write_rows
from kinprune.bank.weights import pack
from kinprune.errors import BankError

Make = Callable[..., Record]
OTHER = "0" * 64


@pytest.fixture
def bank(sqlite_bank: Bank, make_record: Make) -> Bank:
    """Three records, numbers 1 to 3."""
    for seed in range(3):
        sqlite_bank.add(make_record(seed))
    return sqlite_bank


def change(bank: Bank, statement: str, *values: object) -> None:
    """Change the file behind the bank's back."""
    with closing(sqlite3.connect(bank.address)) as file, file:
        assert file.execute(statement, values).rowcount == 1


def weights_of(bank: Bank, number: int) -> Path:
    digest = bank.entries([number])[0].weights
    return Path(bank.store.url) / digest[:2] / f"{digest}.safetensors"


RECORD_COLUMNS = {
    "key": OTHER,
    "name": "vegetables",
    "classes": '["a", "b", "c"]',
    "dense": 0.99,
    "start": 0.99,
    "final": 0.91,
    "created": "2020-01-01T00:00:00+00:00",
    "weights": OTHER,
    "weight_bytes": 7,
    "details": "{}",
    "seal": OTHER,
}


def test_every_column_is_tried() -> None:
    assert {*RECORD_COLUMNS, "id"} == set(schema.record.c.keys())
    assert set(schema.probe.c.keys()) == {"record", "key", "classes", "content", "seal"}
    assert set(schema.units.c.keys()) == {"record", "content", "seal"}
    assert set(schema.bank.c.keys()) == {"id", "header", "store", "created", "seal"}


@pytest.mark.parametrize("column", RECORD_COLUMNS)
def test_a_changed_line_is_refused_and_can_be_removed(bank: Bank, make_record: Make, column: str) -> None:
    change(bank, f"UPDATE record SET {column} = ? WHERE id = 2", RECORD_COLUMNS[column])
    with pytest.raises(BankError, match=r"record 2: its description changed .*kinprune bank rm BANK 2"):
        bank.entries()
    assert [entry.id for entry in bank.entries([1, 3])] == [1, 3]
    report = verify(bank)
    assert report.records == 3 and {problem.record for problem in report.problems} == {2}
    bank.remove([2])
    assert verify(bank).whole and [entry.id for entry in bank.entries()] == [1, 3]
    clean(bank, older_than_seconds=0)
    assert bank.add(make_record(1)) and verify(bank).whole and verify(bank).unreferenced == ()


def test_a_path_in_place_of_a_hash_reaches_no_other_file(bank: Bank, tmp_path: Path) -> None:
    precious = tmp_path / "precious.safetensors"
    precious.write_bytes(b"mine")
    change(bank, "UPDATE record SET weights = ? WHERE id = 2", "../../precious")
    bank.remove([2])
    assert precious.read_bytes() == b"mine"
    with pytest.raises(BankError, match="no hash of stored weights"):
        bank.store.get("../../precious")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("key", OTHER, "record 2: its probe changed"),
        ("classes", 4, "probe is not as long as its classes and features"),
        ("content", b"\0" * 156, "record 2: its probe changed"),
        ("seal", OTHER, "record 2: its probe changed"),
    ],
)
def test_a_changed_probe_is_refused(bank: Bank, column: str, value: object, words: str) -> None:
    entry = bank.entries([2])[0]
    change(bank, f"UPDATE probe SET {column} = ? WHERE record = 2", value)
    with pytest.raises(BankError, match=words):
        list(bank.probes())
    with pytest.raises(BankError, match=words):
        bank.record(entry)
    assert {problem.record for problem in verify(bank, weights=False).problems} == {2}
    bank.remove([2])
    assert verify(bank).whole and len(next(iter(bank.probes())).ids) == 2


@pytest.mark.parametrize(("column", "value"), [("content", b"\0" * 30), ("seal", OTHER)])
def test_a_changed_ranking_is_refused(bank: Bank, column: str, value: object) -> None:
    change(bank, f"UPDATE units SET {column} = ? WHERE record = 2", value)
    with pytest.raises(BankError, match="record 2: its ranking and scores changed"):
        bank.lessons([1, 2])
    assert [(problem.record, "ranking" in problem.what) for problem in verify(bank).problems] == [(2, True)]


@pytest.mark.parametrize("table", ["probe", "units"])
def test_exchanged_rows_are_told(bank: Bank, table: str) -> None:
    entry = bank.entries([1])[0]
    for before, after in ((1, -1), (2, 1), (-1, 2)):
        change(bank, f"UPDATE {table} SET record = ? WHERE record = ?", after, before)
    with pytest.raises(BankError, match="record 1"):
        bank.record(entry)
    assert {problem.record for problem in verify(bank, weights=False).problems} == {1, 2}


@pytest.mark.parametrize("table", ["probe", "units"])
def test_a_lost_row_is_told(bank: Bank, table: str) -> None:
    entry = bank.entries([2])[0]
    change(bank, f"DELETE FROM {table} WHERE record = 2")
    with pytest.raises(BankError, match="record 2" if table == "probe" else "no record 2"):
        bank.record(entry)
    [problem] = verify(bank).problems
    assert problem.record == 2 and problem.what.endswith("are gone")


@pytest.mark.parametrize(("table", "what"), [("probe", "a probe"), ("units", "a ranking")])
def test_a_row_without_its_record_is_told_and_can_be_removed(bank: Bank, table: str, what: str) -> None:
    source = f"INSERT INTO {table} SELECT 9, {'key, classes, ' if table == 'probe' else ''}content, seal FROM {table}"
    change(bank, f"{source} WHERE record = 1")
    [problem] = verify(bank).problems
    assert problem == (9, f"there is {what} of record 9, and no such record: remove it")
    bank.remove([9])
    assert verify(bank).whole


def damage(path: Path) -> Iterator[tuple[str, str]]:
    """Ways to damage a file of weights, with what is said of them."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    yield "one bit", "not those that were stored"
    path.write_bytes(content[:100])
    yield "cut off", "not those that were stored"
    path.unlink()
    yield "gone", "are gone|are not in"


def test_damaged_weights_are_told(bank: Bank, make_record: Make) -> None:
    entry = bank.entries([2])[0]
    for how, words in damage(weights_of(bank, 2)):
        with pytest.raises(BankError, match=words):
            bank.tensors(entry)
        [problem] = verify(bank).problems
        assert problem.record == 2 and any(word in problem.what for word in words.split("|")), how
    assert not verify(bank, weights=False).whole  # what is gone is seen without reading
    bank.remove([2])
    assert bank.add(make_record(1)) and verify(bank).whole


def test_weights_that_do_not_fit_the_mask_are_told_by_name(bank: Bank, make_record: Make) -> None:
    """Written by something that skipped the checks: seals and hashes are right, the shapes are not."""
    good = make_record(7)
    tensors = dict(good.tensors)
    for name, tensor in (
        ("first.weight", good.tensors["first.weight"][:-1]),
        ("classifier.bias", torch.zeros(5)),
        ("extra", torch.zeros(1)),
        ("norm2.bias", torch.full((6,), torch.nan)),
    ):
        tensors[name] = tensor.contiguous()
    del tensors["third.weight"]
    content = pack(tensors)
    write_rows(bank, rows_of(replace(good, tensors=tensors), bank.header, content), content)
    assert {problem.what for problem in verify(bank).problems if problem.record == 4} == {
        "its weights first.weight are [3, 3, 3, 3], expected [4, 3, 3, 3] of its mask",
        "its weights classifier.bias are [5], expected [3] of its mask",
        "its weights have extra, which is not in the backbone",
        "its weights norm2.bias are not all finite",
        "its weights have no third.weight",
    }


def test_a_file_under_the_right_hash_that_is_no_safetensors_is_told(bank: Bank, make_record: Make) -> None:
    content = b"not safetensors"
    write_rows(bank, rows_of(make_record(7), bank.header, content), content)
    with pytest.raises(BankError, match="no safetensors file"):
        bank.tensors(bank.entries([4])[0])
    [problem] = verify(bank).problems
    assert problem.record == 4 and "no safetensors file" in problem.what


def test_every_problem_is_reported_to_the_end(bank: Bank) -> None:
    weights_of(bank, 1).unlink()
    change(bank, "UPDATE record SET final = 0.1 WHERE id = 2")
    change(bank, "UPDATE units SET seal = ? WHERE record = 3", OTHER)
    seen: list[tuple[int, int]] = []
    report = verify(bank, on_record=lambda done, of: seen.append((done, of)))
    assert [problem.record for problem in report.problems] == [1, 2, 3]
    assert seen == [(1, 3), (2, 3), (3, 3)] and report.records == 3 and not report.whole


def test_lost_weights_of_the_backbone_are_told(bank: Bank) -> None:
    bank.store.remove(bank.header.backbone_weights)
    [problem] = verify(bank).problems
    assert problem.record is None and problem.what.startswith("the backbone's weights")


@pytest.mark.parametrize(("column", "value"), [("header", "{}"), ("store", "/elsewhere"), ("seal", OTHER), ("id", 2)])
def test_a_changed_header_is_refused(bank: Bank, column: str, value: object) -> None:
    change(bank, f"UPDATE bank SET {column} = ?", value)
    with pytest.raises(BankError, match=r"the header of .*bank.db was altered or is gone"):
        open_bank(bank.address)


def test_unreferenced_files_are_reported_and_cleaned_when_old(bank: Bank, tmp_path: Path) -> None:
    lonely = bank.store.put(b"nobody's")
    folder = Path(bank.store.url) / lonely[:2]
    leftover = folder / f"{lonely}.safetensors.0a1b2c3d.tmp"
    leftover.write_bytes(b"nob")
    (folder / "notes.txt").write_text("not the store's")
    report = verify(bank)
    assert report.whole and report.unreferenced == (lonely,) and report.leftovers == (str(leftover),)
    assert clean(bank) == () and leftover.exists()
    assert set(clean(bank, older_than_seconds=0)) == {lonely, str(leftover)}
    report = verify(bank)
    assert report.whole and report.unreferenced == report.leftovers == ()
    assert (folder / "notes.txt").exists()
