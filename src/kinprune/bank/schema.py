"""The tables of a bank, and how its database is reached: SQLite by default, PostgreSQL for a team."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from kinprune.errors import BankError

VERSION = "0001"
"""The newest migration, and the only schema that this version reads and writes."""

BUSY_SECONDS = 60
"""How long a writer waits for others before it gives up."""

metadata = MetaData()

bank = Table(
    "bank",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("header", Text, nullable=False),
    Column("store", Text, nullable=False),
    Column("created", String(32), nullable=False),
    Column("seal", String(64), nullable=False),
)

record = Table(
    "record",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("classes", Text, nullable=False),
    Column("dense", Float(53), nullable=False),
    Column("start", Float(53), nullable=False),
    Column("final", Float(53), nullable=False),
    Column("created", String(32), nullable=False),
    Column("weights", String(64), nullable=False, index=True),
    Column("weight_bytes", Integer, nullable=False),
    Column("details", Text, nullable=False),
    Column("seal", String(64), nullable=False),
    sqlite_autoincrement=True,
)

# Apart from the list, and from each other: ranking all tasks reads every probe and nothing else.
probe = Table(
    "probe",
    metadata,
    Column("record", Integer, ForeignKey("record.id", ondelete="CASCADE"), primary_key=True),
    Column("key", String(64), nullable=False),
    Column("classes", Integer, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("seal", String(64), nullable=False),
)

units = Table(
    "units",
    metadata,
    Column("record", Integer, ForeignKey("record.id", ondelete="CASCADE"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
    Column("seal", String(64), nullable=False),
)


def parse_address(address: str | Path) -> URL:
    """A database's URL from what a person types: a file's path, ``sqlite:///path`` or ``postgresql+psycopg://...``."""
    text = str(address)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise BankError(f"{text} is no address of a bank ({error}): {_EXPECTED}") from error
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise BankError(f"a bank cannot be in {url.get_backend_name()!r}: {_EXPECTED}")
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise BankError(f"{text} names no file: {_EXPECTED}")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


_EXPECTED = "expected a file such as bank.db, sqlite:///bank.db, or postgresql+psycopg://user@host/name"


def connect(url: URL) -> Engine:
    """An engine on a bank's database. Writes in SQLite take the write lock at once, so that two never deadlock."""
    try:
        if url.get_backend_name() == "postgresql":
            return create_engine(url, pool_pre_ping=True)
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    except (ImportError, NoSuchModuleError) as error:
        raise BankError(
            f"a bank at {url.render_as_string()} needs a package that is not installed ({error}): "
            "pip install 'kinprune[postgresql]'"
        ) from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us: the driver's own begin too late
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads; what goes wrong in the database is said as a BankError."""
    with _told(engine), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes all or nothing."""
    with _told(engine), engine.connect().execution_options(writes=True) as connection, connection.begin():
        yield connection


@contextmanager
def _told(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise BankError(
            f"the bank's database {engine.url.render_as_string()} fails: {str(error.orig).strip()}: check that it is "
            "reachable, complete and writable, and try again"
        ) from error
