"""The tables of a bank, and how its database is reached: SQLite by default, PostgreSQL for a team."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

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

VERSION = "0002"
"""The newest migration, and the only schema that this version reads and writes."""

BUSY_SECONDS = 60
"""How long a writer waits for others before it gives up."""

WRITERS = 7_205_771_348
"""The advisory lock that writers in PostgreSQL take; any number that other programs are unlikely to use."""

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

# Who works on a record that is not there yet, until when on the clock that ``claims`` goes by.
claim = Table(
    "claim",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("until", Float(53), nullable=False),
)


def parse_address(address: str | Path) -> URL:
    """A database's URL from what a person types: a file's path, ``sqlite:///path`` or ``postgresql+psycopg://...``."""
    text = str(address)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:  # ValueError: a port that is no number
        shown = re.sub(r"//[^@]*@", "//***@", text)  # it may hold a password
        raise BankError(f"{shown} is no address of a bank ({error}): {_EXPECTED}") from error
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise BankError(f"a bank cannot be in {url.get_backend_name()!r}: {_EXPECTED}")
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise BankError(f"{text} names no file: {_EXPECTED}")
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


_EXPECTED = "expected a file such as bank.db, sqlite:///bank.db, or postgresql+psycopg://user@host/name"


def connect(url: URL) -> Engine:
    """An engine on a bank's database. One transaction writes at a time: it takes the write lock at its beginning.

    So that no two can deadlock, and that what a writer has read (a key that is not there, weights that nobody refers
    to) is still true when it writes.
    """
    try:
        if url.get_backend_name() == "postgresql":
            engine = create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED")
            event.listen(engine, "begin", _begin_postgresql)
            return engine
        engine = create_engine(_unless_read_only(url), connect_args={"timeout": BUSY_SECONDS})
    except (ImportError, NoSuchModuleError) as error:
        raise BankError(
            f"a bank at {url.render_as_string()} needs a package that is not installed ({error}): "
            "pip install 'kinprune[postgresql]'"
        ) from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def connected(url: URL) -> Iterator[Engine]:
    """An engine for a while: its connections are closed at the end."""
    engine = connect(url)
    try:
        yield engine
    finally:
        engine.dispose()


def _unless_read_only(url: URL) -> URL:
    """A bank in a folder that cannot be written (a read-only disk) is read as it is: SQLite could not lock it there."""
    path = Path(url.database or "")
    writable = os.access(path.resolve().parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    if writable or not path.is_file() or Path(f"{path}-wal").exists():
        return url
    address = f"file:{quote(str(path.resolve()))}"
    return url.set(database=address).update_query_dict({"mode": "ro", "immutable": "1", "uri": "true"})


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by us: the driver's own begin too late
    for pragma in ("synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writes", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS})")


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


def read_version(connection: Connection) -> str:
    """The schema that a database says it has; BankError where it says nothing."""
    version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if version is None:
        raise BankError(
            f"{connection.engine.url.render_as_string()} does not say which schema it has: it was altered; restore "
            "the bank from a copy"
        )
    return str(version)
