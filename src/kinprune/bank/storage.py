"""A bank in its database: created, opened, written and read. A write is all or nothing, and safe beside others."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Connection, Engine, Row, delete, func, insert, inspect, select
from sqlalchemy.engine import URL
from torch import Tensor

from kinprune.backbones import Backbone, BackboneSpec
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.bank import schema
from kinprune.bank.coding import seal
from kinprune.bank.probes import ProbeChunk
from kinprune.bank.record import Entry, Header, Record, check_record
from kinprune.bank.retrying import retried, retry
from kinprune.bank.rows import Rows, altered, entry_of, insert_rows, now, probe_of, rows_of, units_of
from kinprune.bank.weights import WeightStore, digest_of, is_digest, pack, unpack
from kinprune.errors import BankError
from kinprune.units import Mask, UnitSpace

CHUNK = 1024
"""Records read at a time. Thousands would be slower: the memory of so many probes is not used again for the next."""

PAGE = 32_768
"""Bytes of a page of a SQLite file: usual probes lie whole in one, and are read twice as fast as from 4,096."""

PART = 500
"""Values named in one statement."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Lessons:
    """What some records say of the units, in the order asked: each ``[n, u]``."""

    rankings: NDArray[np.int64]
    scores: NDArray[np.float16]
    kept: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Bank:
    """An open bank. Any number of processes may read and write it at the same time; readers see whole records only.

    Where the connection to its database or its weights is lost, whatever was asked is tried again for a minute, and
    then a ``LostConnection`` says so: a BankError, after which the same can be asked again.
    """

    address: str = field(repr=False)  # it may hold a password
    header: Header
    store: WeightStore
    engine: Engine

    @property
    def shown(self) -> str:
        """The address as it may be shown: without a password."""
        return schema.shown_address(self.address)

    @retried
    def __len__(self) -> int:
        """The number of records."""
        with schema.reading(self.engine) as connection:
            return int(connection.execute(select(func.count()).select_from(schema.record)).scalar_one())

    def close(self) -> None:
        """Let go of the database. A SQLite file that nobody has open is all in one file, and can be moved."""
        self.engine.dispose()

    def add(self, record: Record) -> bool:
        """Write a record and its weights, all or nothing; False where the bank has its key already.

        Weights are halved where half precision holds them, the probe's weights and means always (see ``Record``).

        Raises:
            BankError: the record does not fit this bank, or cannot be written. It is not in the bank then; a file of
                weights may stay that nothing refers to (see ``clean``).
        """
        check_record(self.header, record)
        content = pack(record.tensors)
        return write_rows(self, rows_of(record, self.header, content), content)

    @retried
    def keys(self) -> set[str]:
        """The keys of all records."""
        with schema.reading(self.engine) as connection:
            return set(connection.execute(select(schema.record.c.key)).scalars())

    @retried
    def find(self, keys: Sequence[str]) -> dict[str, Entry]:
        """The lines of those of some keys that the bank has."""
        query = select(schema.record)
        with schema.reading(self.engine) as connection:
            rows = [
                row for part in parts(keys) for row in connection.execute(query.where(schema.record.c.key.in_(part)))
            ]
        return {row.key: entry_of(row) for row in rows}

    @retried
    def entries(self, ids: Sequence[int] | None = None) -> list[Entry]:
        """The lines of records, in the order of ``ids``, or all by id."""
        query = select(schema.record).order_by(schema.record.c.id)
        with schema.reading(self.engine) as connection:
            if ids is None:
                return [entry_of(row) for row in connection.execute(query)]
            found = {
                row.id: row for part in parts(ids) for row in connection.execute(query.where(_is_in("record", part)))
            }
        _check_found(ids, found)
        return [entry_of(found[int(number)]) for number in ids]

    def probes(self, chunk: int = CHUNK, *, ids: Sequence[int] | None = None, after: int = 0) -> Iterator[ProbeChunk]:
        """The probes of all records above an id, or of those of these ids that are there, some at a time, by id."""
        if ids is not None:
            for part in parts(sorted(ids), min(chunk, PART)):
                yield ProbeChunk.of(self._probe_rows(_is_in("probe", part), len(part)), self.header.features)
            return
        last = after
        while rows := self._probe_rows(schema.probe.c.record > last, chunk):
            yield ProbeChunk.of(rows, self.header.features)
            last = rows[-1].record

    @retried
    def _probe_rows(self, those: ColumnElement[bool], most: int) -> Sequence[Row[Any]]:
        query = select(schema.probe).where(those).order_by(schema.probe.c.record).limit(most)
        with schema.reading(self.engine) as connection:
            return connection.execute(query).all()

    @retried
    def lessons(self, ids: Sequence[int]) -> Lessons:
        """Rankings, scores and kept units of records, in the order of ``ids``."""
        query = select(schema.units, schema.record.c.key).join(schema.record)
        with schema.reading(self.engine) as connection:
            found = {
                row.record: row for part in parts(ids) for row in connection.execute(query.where(_is_in("units", part)))
            }
        _check_found(ids, found)
        shape = (len(ids), self.header.units)
        lessons = Lessons(np.empty(shape, np.int64), np.empty(shape, np.float16), np.empty(shape, np.bool_))
        for place, number in enumerate(ids):
            row = found[int(number)]
            lessons.rankings[place], lessons.scores[place], lessons.kept[place] = units_of(row, row.key, self.header)
        return lessons

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """The pruned weights of a record, as they were stored (half precision where it holds them)."""
        return unpack(self.store.get(entry.weights))

    @retried
    def record(self, entry: Entry) -> Record:
        """A whole record."""
        with schema.reading(self.engine) as connection:
            row = connection.execute(select(schema.probe).where(schema.probe.c.record == entry.id)).first()
        lessons = self.lessons([entry.id])
        if row is None or row.key != entry.key:
            raise BankError(altered(entry.id, "probe"))
        return Record(
            key=entry.key,
            name=entry.name,
            classes=entry.classes,
            ranking=lessons.rankings[0],
            scores=lessons.scores[0],
            mask=Mask(lessons.kept[0], self.header.space),
            probe=probe_of(row, self.header.features),
            accuracy=entry.accuracy,
            tensors=self.tensors(entry),
            details=entry.details,
        )

    def remove(self, ids: Sequence[int]) -> None:
        """Remove records, damaged ones too, and the weights that no other record refers to.

        Raises:
            BankError: one is not there; nothing is removed then.
        """
        weights: set[str] = set()
        sent = False

        def take_out() -> None:
            nonlocal sent
            with schema.writing(self.engine) as connection:
                found: set[int] = set()
                for part in parts(ids):
                    rows = connection.execute(
                        select(schema.record.c.id, schema.record.c.weights).where(_is_in("record", part))
                    ).all()
                    weights.update(str(row.weights) for row in rows)
                    found.update(row.id for row in rows)
                    for table in (schema.probe, schema.units):  # what is left of a damaged record goes too
                        gone = delete(table).where(_is_in(table.name, part)).returning(table.c.record)
                        found.update(connection.execute(gone).scalars())
                    connection.execute(delete(schema.record).where(_is_in("record", part)))
                if not sent:  # else they are gone where only the answer was lost
                    _check_found(ids, found)
                sent = True

        retry(take_out)
        drop_unreferenced(self, weights)

    @retried
    def referenced(self) -> set[str]:
        """The hashes of all weights that the bank refers to, the backbone's among them."""
        with schema.reading(self.engine) as connection:
            weights = connection.execute(select(schema.record.c.weights)).scalars()
            return {*weights, self.header.backbone_weights}


def write_rows(bank: Bank, rows: Rows, content: bytes) -> bool:
    """Write a record's rows and the file of its weights; False where the bank has its key already."""
    query = select(schema.record.c.seal).where(schema.record.c.key == rows.record["key"])
    uploaded: list[str] = []
    sent = False

    def write() -> bool:
        nonlocal sent
        before = sent  # an earlier try came to its end, and its answer was lost: what is there may be its record
        with schema.reading(bank.engine) as connection:
            found = connection.execute(query).scalar()
        if found is None:
            uploaded.append(bank.store.put(content))
            with schema.writing(bank.engine) as connection:
                if insert_rows(connection, rows):
                    bank.store.put(content)  # writes only where another has removed the file as unused since then
                    sent = True
                else:
                    found = connection.execute(query).scalar()
        if found is not None:
            drop_unreferenced(bank, uploaded)
        return found is None or (before and found == rows.record["seal"])

    return retry(write)


def drop_unreferenced(bank: Bank, digests: Iterable[str]) -> list[str]:
    """Remove those of some files of weights that no record refers to, and return them.

    Beside writers this is safe: files go while the write lock is held, and a writer makes sure of its record's file
    while it holds the lock itself.
    """
    dropped: list[str] = []
    for part in parts(sorted(set(digests) - {bank.header.backbone_weights}), 50):  # others wait meanwhile
        dropped += _drop(bank, part)
    return dropped


@retried
def _drop(bank: Bank, digests: Sequence[str]) -> list[str]:
    query = select(schema.record.c.weights).where(schema.record.c.weights.in_(digests))
    with schema.writing(bank.engine) as connection:
        used = set(connection.execute(query).scalars())
        unused = [digest for digest in digests if digest not in used and is_digest(digest)]
        for digest in unused:
            bank.store.remove(digest)
    return unused


def create_bank(
    address: str | Path, backbone: Backbone, space: UnitSpace, *, stream: bool = False, store: str | None = None
) -> Bank:
    """Make a new bank for a backbone and its unit space, and open it.

    ``address`` is a file's path or a database's URL. ``store`` is where weights go, any address fsspec knows; beside
    a SQLite file where none is given. The backbone's own weights are stored too, so that a bank can be used alone.

    Raises:
        BankError: there is a bank already, or the address cannot be used.
    """
    stored = pack(_stored_backbone(backbone), {"architecture": backbone.spec.architecture}, lossless=True)
    head = backbone.model.get_parameter(f"{backbone.head}.weight")
    header = Header(
        spec=backbone.spec,
        preprocessing=backbone.preprocessing,
        backbone=backbone.fingerprint,
        space=space.fingerprint,
        stream=stream,
        groups=tuple((group.name, group.size) for group in space.groups),
        features=int(head.shape[1]),
        backbone_weights=digest_of(stored),
    )
    return _create(address, header, stored, store)


def create_like(address: str | Path, source: Bank, *, store: str | None = None) -> Bank:
    """Make a new bank of another's backbone and units, without its records, and open it; see ``create_bank``."""
    return _create(address, source.header, source.store.get(source.header.backbone_weights), store)


def _create(address: str | Path, header: Header, stored: bytes, store: str | None) -> Bank:
    """``stored`` is the file of the backbone's weights."""
    url = schema.parse_address(address)
    place = _store_of(url, store)
    if url.database and url.get_backend_name() == "sqlite":
        _check_folder(Path(url.database))
    with schema.connected(url) as engine:
        _check_free(engine)
        weights = WeightStore(_resolved(url, place))
        if store is not None and next(weights.digests(), None) is not None:
            raise BankError(
                f"{place} holds weights already: give the bank a folder of its own, for what its records do not refer "
                "to is removed there; a bank whose making broke off leaves one file, which you can remove"
            )
        weights.put(stored)
        _create_tables(engine, header, place)
    return open_bank(address)


@retried
def bank_exists(address: str | Path) -> bool:
    """Whether there is something at an address that ``open_bank`` is to open, or to refuse; else it is free."""
    url = schema.parse_address(address)
    if url.get_backend_name() == "sqlite":
        path = Path(url.database or "")
        return path.is_file() and path.stat().st_size > 0
    with schema.connected(url) as engine, schema.reading(engine) as connection:
        return inspect(connection).has_table("bank")


@retried
def open_bank(address: str | Path) -> Bank:
    """Open a bank. BankError where there is none, or one of another schema version."""
    url = schema.parse_address(address)
    name = schema.shown(url)
    if url.database and url.get_backend_name() == "sqlite" and not Path(url.database).is_file():
        raise BankError(f"there is no bank at {url.database}: make one with 'kinprune bank build', or correct the path")
    with schema.connected(url) as engine, schema.reading(engine) as connection:
        if not inspect(connection).has_table("alembic_version") or not inspect(connection).has_table("bank"):
            raise BankError(f"{name} is a database, but no bank: make one with 'kinprune bank build'")
        version = schema.read_version(connection)
        if version != schema.VERSION:
            older = version < schema.VERSION
            raise BankError(
                f"{name} has the schema {version}, expected {schema.VERSION}: "
                + ("run 'kinprune bank upgrade' on it" if older else "it was made by a newer Kinprune, upgrade that")
            )
        row = connection.execute(select(schema.bank).where(schema.bank.c.id == 1)).one_or_none()
    if row is None or seal("bank", "header", row.header, row.store) != row.seal:
        raise BankError(f"the header of {name} was altered or is gone: restore the bank from a copy")
    return Bank(str(address), _header(row.header), WeightStore(_resolved(url, row.store)), schema.connect(url))


@retried
def _check_free(engine: Engine) -> None:
    with schema.reading(engine) as connection:
        _check_no_bank(connection)


def _check_no_bank(connection: Connection) -> None:
    """Refuse a database with a bank, with tables of a bank's names, or a file with any table at all."""
    name, tables = schema.shown(connection.engine.url), set(inspect(connection).get_table_names())
    if {"bank", "alembic_version"} <= tables:
        raise BankError(f"{name} already holds a bank: open it, or choose another address")
    taken = tables if connection.dialect.name == "sqlite" else tables & {*schema.metadata.tables, "alembic_version"}
    if taken:
        raise BankError(f"{name} has a table '{min(taken)}' of something else: choose another address for the bank")


def _create_tables(engine: Engine, header: Header, place: str) -> None:
    from kinprune.bank.migrating import upgrade

    if engine.url.get_backend_name() == "sqlite" and engine.url.database:
        try:
            with closing(sqlite3.connect(engine.url.database, schema.BUSY_SECONDS)) as file:
                file.execute(f"PRAGMA page_size={PAGE}")
                file.execute("PRAGMA journal_mode=WAL")  # the file remembers it; readers then never wait
        except sqlite3.Error as error:
            raise BankError(f"{engine.url.database} cannot be made ({error}): check access and free space") from error
    text = _header_text(header)
    values = {"id": 1, "header": text, "store": place, "created": now(), "seal": seal("bank", "header", text, place)}
    sent = False

    def make() -> None:
        nonlocal sent
        with schema.writing(engine) as connection:
            if sent and inspect(connection).has_table("bank"):  # an earlier try came to its end: this may be its bank
                made = connection.execute(select(schema.bank.c.seal).where(schema.bank.c.id == 1)).scalar()
                if made == values["seal"]:
                    return
            _check_no_bank(connection)
            upgrade(connection)
            connection.execute(insert(schema.bank).values(values))
            sent = True

    retry(make)


def _header_text(header: Header) -> str:
    content = {
        "spec": header.spec.to_json(),
        "preprocessing": header.preprocessing.to_json(),
        **{name: getattr(header, name) for name in _PLAIN},
    }
    return json.dumps(content, sort_keys=True, allow_nan=False)


_PLAIN = ("backbone", "space", "stream", "groups", "features", "backbone_weights")


def _header(text: str) -> Header:
    content = json.loads(text)
    return Header(
        spec=BackboneSpec.from_json(content["spec"]),
        preprocessing=resolve_preprocessing({}, Hints(), **content["preprocessing"]),
        **{name: content[name] for name in _PLAIN if name != "groups"},
        groups=tuple((name, size) for name, size in content["groups"]),
    )


def _store_of(url: URL, store: str | None) -> str:
    """The place of the weights as the bank remembers it: beside a SQLite file by name alone, so that both can move."""
    if store is not None:
        return store if "://" in store else str(Path(store).expanduser().resolve())
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BankError(
            f"a bank at {schema.shown(url)} needs a place for its weights that all its users reach: give --store, "
            "a path or an address such as s3://bucket/folder"
        )
    return f"./{Path(url.database).name}.weights"


def _resolved(url: URL, place: str) -> str:
    """Where the weights are: beside a SQLite file under the name they were made with, or, if that is gone, its own."""
    if not place.startswith("./"):
        return place
    file = Path(url.database or ".").resolve()
    made, renamed = (file.with_name(name) for name in (place[2:], f"{file.name}.weights"))
    return str(renamed if renamed.is_dir() and not made.is_dir() else made)


def _check_folder(path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise BankError(f"{path} cannot be made: there is no folder {path.resolve().parent}")


def _stored_backbone(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{backbone.head}.")}


def parts(items: Sequence[T], most: int | None = None) -> Iterator[list[T]]:
    """The items, at most so many at a time, else as many as one statement can name."""
    step = most or PART
    return (list(items[start : start + step]) for start in range(0, len(items), step))


def _is_in(table: str, ids: Sequence[int]) -> ColumnElement[bool]:
    column = schema.record.c.id if table == "record" else schema.metadata.tables[table].c.record
    return column.in_([int(number) for number in ids])


def _check_found(ids: Sequence[int], found: Container[int]) -> None:
    missing = [int(number) for number in ids if int(number) not in found]
    if missing:
        raise BankError(f"the bank has no record {missing[0]}: 'kinprune bank ls' lists them")
