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
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from kinprune.bank.retrying import LostConnection, retry
from kinprune.errors import BankError

VERSION = "0002"
"""The newest migration, and the only schema that this version reads and writes."""

BUSY_SECONDS = 60
"""How long a writer waits for others before it gives up."""

IDLE_SECONDS = 30
"""How long PostgreSQL waits for a writer in the middle of a transaction, which others wait for, before it ends it."""

_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 40_000,
}
"""When libpq gives up a server that has gone without a word: else hours later. What a URL says comes first."""

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
        safe = re.sub("(password=)[^&]*", r"\1***", re.sub("//.*@", "//***@", text))
        raise BankError(f"{safe} is no address of a bank ({error}): {_EXPECTED}") from error
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
            more = {name: value for name, value in _PATIENCE.items() if name not in url.query}
            engine = create_engine(url, pool_pre_ping=True, isolation_level="READ COMMITTED", connect_args=more)
            event.listen(engine, "begin", _begin_postgresql)
            return engine
        engine = create_engine(_unless_read_only(url), connect_args={"timeout": BUSY_SECONDS})
    except (ImportError, NoSuchModuleError) as error:
        raise BankError(
            f"a bank at {shown(url)} needs a package that is not installed ({error}): "
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
        # Who has gone in the middle must not hold the lock that all others wait for.
        limits = {"lock_timeout": BUSY_SECONDS, "idle_in_transaction_session_timeout": IDLE_SECONDS}
        sets = ", ".join(f"set_config('{name}', '{seconds}s', true)" for name, seconds in limits.items())
        connection.exec_driver_sql(f"SELECT {sets}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS})")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads; what goes wrong in the database is said as a BankError.

    A server that cannot be reached is tried for a while. One that is lost in the middle is a ``LostConnection``: who
    can begin anew is ``retried``.
    """
    with _told(engine), retry(lambda: _connection(engine)) as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes all or nothing; after a ``LostConnection`` at its end nobody knows which."""
    with (
        _told(engine),
        retry(lambda: _connection(engine)).execution_options(writes=True) as connection,
        connection.begin(),
    ):
        yield connection


def _connection(engine: Engine) -> Connection:
    with _told(engine):
        return engine.connect()


@contextmanager
def _told(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        place, why = f"the bank's database {shown(engine.url)}", " ".join(str(error.orig).split())
        if engine.dialect.name == "postgresql" and _is_lost(error):
            raise LostConnection(place, why) from error
        raise BankError(
            f"{place} fails: {why}: check that it is reachable, complete and writable, and try again"
        ) from error


def _is_lost(error: DBAPIError) -> bool:
    """Whether a server ended the connection, cannot be reached, or is too busy for one more: it may be back soon."""
    if error.connection_invalidated:
        return True
    state = getattr(error.orig, "sqlstate", None)
    if not isinstance(error, OperationalError) or any(words in str(error.orig) for words in _REFUSED):
        return False
    return state is None or state[:2] == "08" or state in _COMES_BACK


_COMES_BACK = ("57P01", "57P02", "57P03", "53300")
"""PostgreSQL's codes of a server that is shut down, crashed, starting, or has too many connections."""

_REFUSED = (
    "password authentication failed",
    "no password supplied",
    "does not exist",
    "pg_hba.conf",
    "does not support SSL",
    "certificate verify failed",
)
"""Said at connecting, where there is no code yet, of what no second try would change."""


def shown(url: URL) -> str:
    """A database's URL without its passwords, to be shown."""
    return url.difference_update_query([name for name in url.query if "password" in name.lower()]).render_as_string()


def shown_address(address: str | Path) -> str:
    """A bank's address as it may be shown: a file's path, or a URL without its passwords."""
    url = parse_address(address)
    return str(url.database) if url.get_backend_name() == "sqlite" else shown(url)


def read_version(connection: Connection) -> str:
    """The schema that a database says it has; BankError where it says nothing."""
    version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if version is None:
        raise BankError(
            f"{shown(connection.engine.url)} does not say which schema it has: it was altered; restore "
            "the bank from a copy"
        )
    return str(version)
