"""Opening and making banks: what is no bank, other schemas, read-only places, the migrations, a stored bank."""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, create_bank, open_bank, schema, upgrade_bank, verify
from kinprune.bank.claims import claim, claims
from kinprune.bank.migrating import upgrade
from kinprune.bank.retrying import LostConnection
from kinprune.errors import BankError
from kinprune.units import UnitSpace

Make = Callable[..., Record]
STORED = Path(__file__).resolve().parents[2] / "data"
STARTER = STORED.parents[1] / "starter"
RANKING, COUNTS = [6, 7, 2, 1, 4, 5, 3, 0], [44, 75, 20]
"""Of its record 4."""


def run(address: str, *statements: str) -> None:
    """Change a database behind the bank's back."""
    with schema.connected(schema.parse_address(address)) as engine, schema.writing(engine) as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_no_file_is_no_bank(tmp_path: Path) -> None:
    for ask in (open_bank, upgrade_bank):
        with pytest.raises(BankError, match=r"there is no bank at .*none.db"):
            ask(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 4096])
def test_garbage_is_no_bank(tmp_path: Path, content: bytes, backbone: Backbone, space: UnitSpace) -> None:
    path = tmp_path / "bank.db"
    path.write_bytes(content)
    for ask in (open_bank, upgrade_bank, lambda place: create_bank(place, backbone, space)):
        with pytest.raises(BankError, match=r"bank.db fails: (file is not a database|database disk image)"):
            ask(path)
    assert path.read_bytes() == content


def test_a_file_that_was_cut_off_is_told(sqlite_bank: Bank, make_record: Make, tmp_path: Path) -> None:
    for seed in range(20):
        sqlite_bank.add(make_record(seed))
    sqlite_bank.close()
    path = tmp_path / "bank.db"
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(BankError, match=r"malformed|not a database|damaged|no bank"):
            report = verify(open_bank(path))
            assert not report.whole
            raise BankError(str(report.problems))


def test_a_database_of_something_else_is_no_bank_and_is_left_alone(
    tmp_path: Path, make_database: Callable[[], str], backbone: Backbone, space: UnitSpace
) -> None:
    for address, store in ((str(tmp_path / "other.db"), None), (make_database(), str(tmp_path / "weights"))):
        if store is None:
            sqlite3.connect(address).close()
        run(address, "CREATE TABLE record (number INTEGER)")
        for ask in (open_bank, upgrade_bank):
            with pytest.raises(BankError, match="is a database, but no bank"):
                ask(address)
        with pytest.raises(BankError, match="has a table 'record' of something else"):
            create_bank(address, backbone, space, store=store)
    assert list(tmp_path.glob("*weights*")) == []


def test_a_bank_is_made_only_once(bank: Bank, backbone: Backbone, space: UnitSpace, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="already holds a bank: open it"):
        create_bank(bank.address, backbone, space, store=str(tmp_path / "more"))
    assert len(bank) == 0 and not (tmp_path / "more").exists()


def test_a_bank_needs_a_folder(tmp_path: Path, backbone: Backbone, space: UnitSpace) -> None:
    with pytest.raises(BankError, match="there is no folder"):
        create_bank(tmp_path / "no" / "bank.db", backbone, space)


def test_making_that_broke_off_can_be_done_again(
    place: Any, backbone: Backbone, space: UnitSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kinprune.bank.opening.now", broken)
        create_bank(place.address, backbone, space, store=place.store)
    with pytest.raises(BankError, match="no bank"):
        open_bank(place.address)
    shutil.rmtree(place.weights)
    assert len(create_bank(place.address, backbone, space, store=place.store)) == 0


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE alembic_version SET version_num = '9999'", "has the schema 9999, .*newer"),
        ("DELETE FROM alembic_version", "does not say which schema"),
    ],
)
def test_newer_and_unknown_schemas_are_refused(bank: Bank, statement: str, words: str) -> None:
    run(bank.address, statement)
    for ask in (open_bank, upgrade_bank):
        with pytest.raises(BankError, match=words):
            ask(bank.address)


def test_an_older_schema_says_how_to_upgrade(bank: Bank) -> None:
    run(bank.address, "UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(BankError, match="has the schema 0000, expected 0002: run 'kinprune bank upgrade'"):
        open_bank(bank.address)


def test_an_upgrade_of_the_newest_changes_nothing(bank: Bank, make_record: Make) -> None:
    bank.add(make_record(0))
    assert upgrade_bank(bank.address) == (schema.VERSION, schema.VERSION)
    assert verify(open_bank(bank.address)).whole


def test_migrations_make_the_tables_that_the_code_reads(place: Any) -> None:
    with schema.connected(schema.parse_address(place.address)) as engine:
        with schema.writing(engine) as connection:
            upgrade(connection)
        with schema.reading(engine) as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, schema.metadata) == []
            assert schema.read_version(connection) == schema.VERSION
            tables = inspect(connection)
            for name, table in schema.metadata.tables.items():
                columns = {column["name"]: column for column in tables.get_columns(name)}
                assert list(columns) == table.c.keys()
                for column in table.c:
                    assert columns[column.name]["nullable"] == column.nullable, (name, column.name)
                assert tables.get_pk_constraint(name)["constrained_columns"] == table.primary_key.columns.keys()
            [reference] = tables.get_foreign_keys("probe")
            assert reference["options"]["ondelete"] == "CASCADE"


def test_a_failed_migration_leaves_nothing(place: Any) -> None:
    with schema.connected(schema.parse_address(place.address)) as engine:
        with pytest.raises(ZeroDivisionError), schema.writing(engine) as connection:
            upgrade(connection)
            raise ZeroDivisionError
        with schema.reading(engine) as connection:
            assert inspect(connection).get_table_names() == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("mysql://me@here/bank", "cannot be in 'mysql'"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("://", "no address of a bank"),
    ],
)
def test_bad_addresses_are_refused(address: str, words: str) -> None:
    with pytest.raises(BankError, match=words):
        open_bank(address)


@pytest.mark.parametrize(
    "address", ["postgresql://me:hunter2@/bank?host={}", "postgresql:///bank?password=hunter2&host={}"]
)
def test_a_server_that_is_not_there_is_told_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("kinprune.bank.retrying.RETRY_SECONDS", 0.0)
    with pytest.raises(LostConnection, match=r"cannot be reached .* run the same command again") as caught:
        open_bank(address.format(tmp_path))
    assert "hunter2" not in str(caught.value)


def test_a_url_of_a_file_is_the_file(sqlite_bank: Bank, make_record: Make, tmp_path: Path) -> None:
    sqlite_bank.add(make_record(0))
    assert len(open_bank(f"sqlite:///{tmp_path / 'bank.db'}")) == 1


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder and its files that this process cannot write; root becomes somebody else for a while."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65_534)
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_bank_on_a_read_only_disk_can_be_read(backbone: Backbone, space: UnitSpace, make_record: Make) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        folder = Path(name) / "a 100% #1 place?"
        folder.mkdir()
        Path(name).chmod(0o755)
        made = create_bank(folder / "bank.db", backbone, space)
        made.add(make_record(0))
        made.close()
        with read_only(folder):
            bank = open_bank(folder / "bank.db")
            assert np.array_equal(bank.lessons([1]).scores[0], make_record(0).scores)
            assert verify(bank).whole
            for write in (lambda: bank.add(make_record(1)), lambda: bank.remove([1])):
                with pytest.raises(BankError, match=r"readonly database|cannot be written"):
                    write()
            bank.close()
        assert sorted(path.name for path in folder.iterdir()) == ["bank.db", "bank.db.weights"]


@pytest.mark.parametrize("version", ["0001", "0002"])
def test_a_stored_bank_of_each_schema_can_be_read(tmp_path: Path, make_record: Make, version: str) -> None:
    """See tests/data/make_bank.py."""
    shutil.copytree(STORED / f"bank_{version}", tmp_path / "bank")
    address = tmp_path / "bank" / "bank.db"
    with closing(sqlite3.connect(address)) as file:
        assert file.execute("SELECT version_num FROM alembic_version").fetchall() == [(version,)]
    if version != schema.VERSION:
        with pytest.raises(BankError, match=f"has the schema {version}, expected {schema.VERSION}: run 'kinprune bank"):
            open_bank(address)
    assert upgrade_bank(address) == (version, schema.VERSION)
    assert [path.name for path in sorted((tmp_path / "bank").iterdir())] == ["bank.db", "bank.db.weights"]
    bank = open_bank(address)
    report = verify(bank)
    assert report.whole and report.records == 3 and report.unreferenced == ()
    assert [(entry.id, entry.name) for entry in bank.entries()] == [(1, "fruit 0"), (3, "fruit 2"), (4, "fruit 3")]
    assert bank.keys() == {make_record(seed).key for seed in (0, 2, 3)}
    record = bank.record(bank.entries([4])[0])
    assert record.ranking[:8].tolist() == RANKING and record.classes == ("class 0", "class 1", "class 2")
    assert record.accuracy.final == 0.9 and record.details["seed"] == 3
    assert record.probe.counts.tolist() == COUNTS and record.tensors["first.weight"].shape == (4, 3, 3, 3)
    assert claims(bank) == [] and claim(bank, "a key", "another builder", 60) == "yes"
    assert bank.add(make_record(5)) and verify(bank).whole


def test_an_upgrade_brings_a_bank_in_postgresql_from_the_first_schema(
    make_database: Callable[[], str], tmp_path: Path, backbone: Backbone, space: UnitSpace, make_record: Make
) -> None:
    bank = create_bank(make_database(), backbone, space, store=str(tmp_path / "weights"))
    bank.add(make_record(0))
    run(bank.address, "DROP TABLE claim", "UPDATE alembic_version SET version_num = '0001'")
    with pytest.raises(BankError, match=f"schema 0001, expected {schema.VERSION}: run 'kinprune bank upgrade'"):
        open_bank(bank.address)
    assert upgrade_bank(bank.address) == ("0001", schema.VERSION)
    upgraded = open_bank(bank.address)
    assert verify(upgraded).whole and len(upgraded) == 1
    assert claim(upgraded, make_record(0).key, "ann", 60) == "done" and claim(upgraded, "k", "ann", 60) == "yes"


def test_the_starter_is_of_the_newest_schema_and_one_file() -> None:
    with closing(sqlite3.connect(f"file:{STARTER / 'bank.db'}?mode=ro&immutable=1", uri=True)) as file:
        assert file.execute("SELECT version_num FROM alembic_version").fetchall() == [(schema.VERSION,)]
        assert file.execute("SELECT count(*) FROM record").fetchone() == (10,)
    assert (STARTER / "bank.db").stat().st_size < 512_000


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://user:secret@host:abc/name",
        "postgresql://user:se@cret@host:abc/name",
        "postgresql://host:abc/name?password=secret&sslpassword=secret",
    ],
)
def test_a_port_that_is_no_number_is_refused_without_showing_the_password(address: str) -> None:
    with pytest.raises(BankError, match="is no address of a bank") as refused:
        open_bank(address)
    assert "cret" not in str(refused.value)


def test_a_bank_is_shown_without_passwords(make_database: Callable[[], str], bank: Bank) -> None:
    address = make_database().replace("kinprune@", "kinprune:secret@") + "&sslpassword=secret"
    shown = Bank(address, bank.header, bank.store, bank.engine)
    assert "secret" not in repr(shown) and "secret" not in shown.shown
    assert shown.shown.startswith("postgresql+psycopg://kinprune:***@/postgres?host=")
    assert (
        schema.shown_address("a folder/bank.db")
        == schema.shown_address("sqlite:///a folder/bank.db")
        == "a folder/bank.db"
    )
