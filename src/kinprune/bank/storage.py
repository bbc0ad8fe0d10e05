"""A bank in its database: created, opened, written and read. A write is all or nothing, and safe beside others."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, Row, delete, func, insert, inspect, select
from sqlalchemy.engine import URL
from torch import Tensor

from kinprune.backbones import Backbone, BackboneSpec
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.bank import schema
from kinprune.bank.coding import decode_probe, decode_units, encode_probe, encode_units, seal
from kinprune.bank.record import Accuracy, Entry, Header, Record, check_record
from kinprune.bank.weights import WeightStore, pack, unpack
from kinprune.calibration import Probe
from kinprune.errors import BankError
from kinprune.units import Mask, UnitSpace

CHUNK = 8192
"""Records read at a time."""


@dataclass(frozen=True, eq=False)
class ProbeChunk:
    """The probes of some records: ``ids`` int64 ``[n]`` and ``keys`` beside them."""

    ids: NDArray[np.int64]
    keys: tuple[str, ...]
    probes: tuple[Probe, ...]


@dataclass(frozen=True, eq=False)
class Lessons:
    """What some records say of the units, in the order asked: each ``[n, u]``."""

    rankings: NDArray[np.int64]
    scores: NDArray[np.float16]
    kept: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Bank:
    """An open bank. Any number of processes may read and write it at the same time; readers see whole records only."""

    address: str
    header: Header
    store: WeightStore
    engine: Engine

    def __len__(self) -> int:
        """The number of records."""
        with schema.reading(self.engine) as connection:
            return int(connection.execute(select(func.count()).select_from(schema.record)).scalar_one())

    def add(self, record: Record) -> bool:
        """Write a record and its weights, all or nothing; False where the bank has its key already.

        Raises:
            BankError: the record does not fit this bank, or cannot be written. Nothing is changed then.
        """
        check_record(self.header, record)
        content = pack(record.tensors)
        entry = _entry_values(record, self.store.put(content), len(content))
        probe, units = encode_probe(record.probe), encode_units(record, self.header.groups)
        with schema.writing(self.engine) as connection:
            found = connection.execute(select(schema.record.c.id).where(schema.record.c.key == record.key)).first()
            if found is not None:
                return False
            number = connection.execute(insert(schema.record).values(entry).returning(schema.record.c.id)).scalar_one()
            connection.execute(
                insert(schema.probe).values(
                    record=number,
                    key=record.key,
                    classes=len(record.classes),
                    content=probe,
                    seal=seal(record.key, "probe", probe),
                )
            )
            connection.execute(
                insert(schema.units).values(record=number, content=units, seal=seal(record.key, "units", units))
            )
        return True

    def keys(self) -> set[str]:
        """The keys of all records."""
        with schema.reading(self.engine) as connection:
            return set(connection.execute(select(schema.record.c.key)).scalars())

    def entries(self, ids: Sequence[int] | None = None) -> list[Entry]:
        """The lines of records, in the order of ``ids``, or all by id."""
        query = select(schema.record).order_by(schema.record.c.id)
        with schema.reading(self.engine) as connection:
            if ids is None:
                return [_entry(row) for row in connection.execute(query)]
            found = {
                row.id: row for row in connection.execute(query.where(schema.record.c.id.in_(list(map(int, ids)))))
            }
        _check_found(ids, found)
        return [_entry(found[int(number)]) for number in ids]

    def probes(self, chunk: int = CHUNK) -> Iterator[ProbeChunk]:
        """The probes of all records, some at a time, by id."""
        last = 0
        while True:
            query = (
                select(schema.probe).where(schema.probe.c.record > last).order_by(schema.probe.c.record).limit(chunk)
            )
            with schema.reading(self.engine) as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            yield ProbeChunk(
                np.array([row.record for row in rows], dtype=np.int64),
                tuple(row.key for row in rows),
                tuple(self._probe(row) for row in rows),
            )
            last = rows[-1].record

    def _probe(self, row: Row[Any]) -> Probe:
        if seal(row.key, "probe", row.content) != row.seal:
            raise BankError(_altered(row.record, "probe"))
        return decode_probe(row.content, row.classes, self.header.features)

    def lessons(self, ids: Sequence[int]) -> Lessons:
        """Rankings, scores and kept units of records, in the order of ``ids``."""
        query = (
            select(schema.units, schema.record.c.key).join(schema.record).where(schema.units.c.record.in_(list(ids)))
        )
        with schema.reading(self.engine) as connection:
            found = {row.record: row for row in connection.execute(query)}
        _check_found(ids, found)
        for row in found.values():
            if seal(row.key, "units", row.content) != row.seal:
                raise BankError(_altered(row.record, "ranking and scores"))
        parts = [decode_units(found[number].content, self.header.groups) for number in ids]
        rankings, scores, kept = zip(*parts, strict=True)
        return Lessons(np.stack(rankings), np.stack(scores), np.stack(kept))

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """The pruned weights of a record, as they were stored (half precision where it holds them)."""
        return unpack(self.store.get(entry.weights))

    def record(self, entry: Entry) -> Record:
        """A whole record."""
        with schema.reading(self.engine) as connection:
            row = connection.execute(select(schema.probe).where(schema.probe.c.record == entry.id)).first()
        if row is None:
            raise BankError(_altered(entry.id, "probe"))
        lessons = self.lessons([entry.id])
        return Record(
            key=entry.key,
            name=entry.name,
            classes=entry.classes,
            ranking=lessons.rankings[0],
            scores=lessons.scores[0],
            mask=Mask(lessons.kept[0], self.header.space),
            probe=self._probe(row),
            accuracy=entry.accuracy,
            tensors=self.tensors(entry),
            details=entry.details,
        )

    def remove(self, ids: Sequence[int]) -> None:
        """Remove records, and the weights that no other record refers to. BankError where one is not there."""
        entries = self.entries(ids)
        with schema.writing(self.engine) as connection:
            connection.execute(delete(schema.record).where(schema.record.c.id.in_([entry.id for entry in entries])))
            unused = {entry.weights for entry in entries} - _referenced(connection)
        for digest in sorted(unused - {self.header.backbone_weights}):
            self.store.remove(digest)

    def referenced(self) -> set[str]:
        """The hashes of all weights that the bank refers to, the backbone's among them."""
        with schema.reading(self.engine) as connection:
            return _referenced(connection) | {self.header.backbone_weights}


def create_bank(
    address: str | Path, backbone: Backbone, space: UnitSpace, *, stream: bool = False, store: str | None = None
) -> Bank:
    """Make a new bank for a backbone and its unit space, and open it.

    ``address`` is a file's path or a database's URL. ``store`` is where weights go, any address fsspec knows; beside
    a SQLite file where none is given. The backbone's own weights are stored too, so that a bank can be used alone.

    Raises:
        BankError: there is a bank already, or the address cannot be used.
    """
    url = schema.parse_address(address)
    place = _store_of(url, store)
    if url.database and url.get_backend_name() == "sqlite":
        _check_new_file(Path(url.database))
    engine = schema.connect(url)
    with schema.reading(engine) as connection:
        if inspect(connection).has_table("bank"):
            raise BankError(f"{url.render_as_string()} already holds a bank: open it, or choose another address")
    head = backbone.model.get_parameter(f"{backbone.head}.weight")
    weights = WeightStore(_resolved(url, place)).put(
        pack(_stored_backbone(backbone), {"architecture": backbone.spec.architecture}, lossless=True)
    )
    header = Header(
        spec=backbone.spec,
        preprocessing=backbone.preprocessing,
        backbone=backbone.fingerprint,
        space=space.fingerprint,
        stream=stream,
        groups=tuple((group.name, group.size) for group in space.groups),
        features=int(head.shape[1]),
        backbone_weights=weights,
    )
    _create_tables(engine, header, place)
    return open_bank(address)


def open_bank(address: str | Path) -> Bank:
    """Open a bank. BankError where there is none, or one of another schema version."""
    url = schema.parse_address(address)
    name = url.render_as_string()
    if url.database and url.get_backend_name() == "sqlite" and not Path(url.database).is_file():
        raise BankError(f"there is no bank at {url.database}: make one with 'kinprune bank build', or correct the path")
    engine = schema.connect(url)
    with schema.reading(engine) as connection:
        if not inspect(connection).has_table("alembic_version") or not inspect(connection).has_table("bank"):
            raise BankError(f"{name} is a database, but no bank: make one with 'kinprune bank build'")
        version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if version != schema.VERSION:
            older = version is not None and str(version) < schema.VERSION
            raise BankError(
                f"{name} has the schema {version}, expected {schema.VERSION}: "
                + ("run 'kinprune bank upgrade' on it" if older else "it was made by a newer Kinprune, upgrade that")
            )
        row = connection.execute(select(schema.bank)).one_or_none()
    if row is None or seal("bank", "header", row.header, row.store) != row.seal:
        raise BankError(f"the header of {name} was altered or is gone: restore the bank from a copy")
    return Bank(str(address), _header(row.header), WeightStore(_resolved(url, row.store)), engine)


def _create_tables(engine: Engine, header: Header, place: str) -> None:
    from kinprune.bank.migrating import upgrade

    if engine.url.get_backend_name() == "sqlite" and engine.url.database:
        with closing(sqlite3.connect(engine.url.database)) as file:  # the file remembers it; readers then never wait
            file.execute("PRAGMA journal_mode=WAL")
    text = _header_text(header)
    with schema.writing(engine) as connection:
        upgrade(connection)
        connection.execute(
            insert(schema.bank).values(
                id=1, header=text, store=place, created=_now(), seal=seal("bank", "header", text, place)
            )
        )


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
            f"a bank at {url.render_as_string()} needs a place for its weights that all its users reach: give --store, "
            "a path or an address such as s3://bucket/folder"
        )
    return f"./{Path(url.database).name}.weights"


def _resolved(url: URL, place: str) -> str:
    return str(Path(url.database or ".").resolve().parent / place[2:]) if place.startswith("./") else place


def _check_new_file(path: Path) -> None:
    if path.exists() and path.stat().st_size > 0:
        raise BankError(f"{path} already exists: open it, or choose another path for the new bank")
    if not path.resolve().parent.is_dir():
        raise BankError(f"{path} cannot be made: there is no folder {path.resolve().parent}")


def _stored_backbone(backbone: Backbone) -> dict[str, Tensor]:
    state = backbone.model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(f"{backbone.head}.")}


def _entry_values(record: Record, weights: str, size: int) -> dict[str, Any]:
    details = json.dumps(dict(record.details), sort_keys=True, allow_nan=False)
    values = {
        "key": record.key,
        "name": record.name,
        "classes": json.dumps(record.classes),
        "dense": record.accuracy.dense,
        "start": record.accuracy.start,
        "final": record.accuracy.final,
        "created": _now(),
        "weights": weights,
        "weight_bytes": size,
        "details": details,
    }
    return {**values, "seal": _entry_seal(values)}


def _entry_seal(values: Mapping[str, Any]) -> str:
    return seal(values["key"], "record", *(str(values[name]) for name in _SEALED))


_SEALED = ("name", "classes", "dense", "start", "final", "created", "weights", "weight_bytes", "details")


def _entry(row: Row[Any]) -> Entry:
    if _entry_seal(dict(row._mapping)) != row.seal:
        raise BankError(_altered(row.id, "description"))
    return Entry(
        id=row.id,
        key=row.key,
        name=row.name,
        classes=tuple(json.loads(row.classes)),
        accuracy=Accuracy(row.dense, row.start, row.final),
        created=row.created,
        weights=row.weights,
        weight_bytes=row.weight_bytes,
        details=json.loads(row.details),
    )


def _altered(number: int, what: str) -> str:
    return (
        f"record {number}: its {what} was altered after it was written: restore the bank from a copy, or remove the "
        f"record (kinprune bank rm BANK {number})"
    )


def _check_found(ids: Sequence[int], found: Mapping[int, Any]) -> None:
    missing = [int(number) for number in ids if int(number) not in found]
    if missing:
        raise BankError(f"the bank has no record {missing[0]}: 'kinprune bank ls' lists them")


def _referenced(connection: Connection) -> set[str]:
    return set(connection.execute(select(schema.record.c.weights)).scalars())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
