"""A bank in its database: written and read. A write is all or nothing, and safe beside others."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import ColumnElement, Engine, Row, delete, func, select
from torch import Tensor

from kinprune.bank import schema
from kinprune.bank.probes import ProbeChunk
from kinprune.bank.record import Entry, Header, Record, check_record
from kinprune.bank.retrying import retried, retry
from kinprune.bank.rows import Rows, altered, entry_of, insert_rows, probe_of, rows_of, units_of
from kinprune.bank.weights import WeightStore, is_digest, pack, unpack
from kinprune.errors import BankError
from kinprune.units import Mask

CHUNK = 1024
"""Records read at a time. Thousands would be slower: the memory of so many probes is not used again for the next."""

CHUNK_BYTES, FETCHED = 32_000_000, 16
"""Bytes of probes after which no more are read at a time, and how many come at once."""

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

    def __bool__(self) -> bool:
        """An open bank is true, without records too; nothing is read for that."""
        return True

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
        for part in [None] if ids is None else parts(sorted(ids)):
            last = after
            while rows := self._probe_rows(_probes_above(last, part), chunk):
                yield ProbeChunk.of(rows, self.header.features)
                last = rows[-1].record

    @retried
    def _probe_rows(self, those: ColumnElement[bool], most: int) -> list[Row[Any]]:
        """At most so many, and fewer where they are large: a probe of a thousand classes has megabytes."""
        query = select(schema.probe).where(those).order_by(schema.probe.c.record).limit(most)
        rows: list[Row[Any]] = []
        size = 0
        with schema.reading(self.engine) as connection:
            result = connection.execute(query)
            while size < CHUNK_BYTES and (some := result.fetchmany(FETCHED)):
                rows += some
                size += sum(len(row.content) for row in some)
        return rows

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


def parts(items: Sequence[T], most: int | None = None) -> Iterator[list[T]]:
    """The items, at most so many at a time, else as many as one statement can name."""
    step = most or PART
    return (list(items[start : start + step]) for start in range(0, len(items), step))


def _probes_above(last: int, ids: Sequence[int] | None) -> ColumnElement[bool]:
    """Probes of records above a number. Of two bounds SQLite may take the lower, and go through all up to the other."""
    return schema.probe.c.record > last if ids is None else _is_in("probe", [each for each in ids if each > last])


def _is_in(table: str, ids: Sequence[int]) -> ColumnElement[bool]:
    column = schema.record.c.id if table == "record" else schema.metadata.tables[table].c.record
    return column.in_([int(number) for number in ids])


def _check_found(ids: Sequence[int], found: Container[int]) -> None:
    missing = [int(number) for number in ids if int(number) not in found]
    if missing:
        raise BankError(f"the bank has no record {missing[0]}: 'kinprune bank ls' lists them")
