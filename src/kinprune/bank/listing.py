"""What is said of a bank's records as a whole, or of a page of them: without reading all, or without keeping it."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import Row, Select, func, select

from kinprune.bank import schema
from kinprune.bank.record import Entry
from kinprune.bank.retrying import retried
from kinprune.bank.rows import altered, entry_of
from kinprune.bank.storage import Bank, parts
from kinprune.errors import BankError

PAGE = 1024
"""Short rows that are read at a time."""


@retried
def newest(bank: Bank, count: int, before: int | None = None) -> list[Entry]:
    """The lines of the ``count`` records with the highest ids, those below ``before`` alone; by id."""
    query = select(schema.record).order_by(schema.record.c.id.desc()).limit(count)
    if before is not None:
        query = query.where(schema.record.c.id < before)
    with schema.reading(bank.engine) as connection:
        rows = connection.execute(query).all()
    return [entry_of(row) for row in reversed(rows)]


def numbered_keys(bank: Bank) -> Iterator[tuple[int, str]]:
    """The id and key of every record, by key."""
    last = ""
    query = select(schema.record.c.id, schema.record.c.key).order_by(schema.record.c.key).limit(PAGE)
    while rows := _rows(bank, query.where(schema.record.c.key > last)):
        yield from ((int(row.id), str(row.key)) for row in rows)
        last = rows[-1].key


def pages(bank: Bank) -> Iterator[dict[int, str]]:
    """The id and key of every record, by id, some at a time; those too that come meanwhile."""
    last = 0
    query = select(schema.record.c.id, schema.record.c.key).order_by(schema.record.c.id).limit(PAGE)
    while rows := _rows(bank, query.where(schema.record.c.id > last)):
        yield {int(row.id): str(row.key) for row in rows}
        last = rows[-1].id


def known(bank: Bank, keys: Sequence[str]) -> set[str]:
    """Those of some keys that a bank has."""
    query = select(schema.record.c.key)
    return {str(row.key) for part in parts(keys) for row in _rows(bank, query.where(schema.record.c.key.in_(part)))}


def draw(bank: Bank, count: int, seed: int, without: Collection[str] = ()) -> list[int]:
    """The ids of ``count`` records (all where they are fewer), drawn by a hash of the seed and each one's key.

    The bank's order means nothing, and records that are added later change the draw only where they are drawn
    themselves. Records with a key in ``without`` take no part.
    """
    keys = ((number, key) for number, key in numbered_keys(bank) if key not in without)
    return [number for number, _ in heapq.nsmallest(count, keys, key=lambda pair: _lot(seed, pair[1]))]


def _lot(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{key}".encode("utf-8", "surrogateescape"), digest_size=16).digest()


def class_names(bank: Bank) -> set[str]:
    """The names of all classes of all records. BankError where a list of classes cannot be read."""
    names: set[str] = set()
    last = 0
    query = select(schema.record.c.id, schema.record.c.classes).order_by(schema.record.c.id).limit(PAGE)
    while rows := _rows(bank, query.where(schema.record.c.id > last)):
        for row in rows:
            try:
                names.update(json.loads(row.classes))
            except (ValueError, TypeError) as error:
                raise BankError(altered(row.id, "description")) from error
        last = rows[-1].id
    return names


@retried
def weight_bytes(bank: Bank) -> int:
    """The bytes of all records' files of weights, each counted once."""
    files = select(func.max(schema.record.c.weight_bytes).label("size")).group_by(schema.record.c.weights).subquery()
    with schema.reading(bank.engine) as connection:
        return int(connection.execute(select(func.coalesce(func.sum(files.c.size), 0))).scalar_one())


@retried
def _rows(bank: Bank, query: Select[Any]) -> Sequence[Row[Any]]:
    with schema.reading(bank.engine) as connection:
        return connection.execute(query).all()
