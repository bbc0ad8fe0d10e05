"""Records as rows of a bank's tables, and back: what is sealed, and what is said where a seal is broken."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Row, delete, insert, select

from kinprune.bank import schema
from kinprune.bank.coding import check_length, decode_probe, decode_units, encode_probe, encode_units, seal
from kinprune.bank.record import Accuracy, Entry, Header, Record
from kinprune.bank.weights import digest_of
from kinprune.calibration import Probe
from kinprune.errors import BankError

Values = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """A record's rows in three tables, without the number that each bank gives it."""

    record: Values
    probe: Values
    units: Values


def rows_of(record: Record, header: Header, content: bytes) -> Rows:
    """The rows of a record whose weights are the file ``content``.

    Raises:
        BankError: its details are no JSON, or its probe has numbers too large for half precision.
    """
    probe, units = encode_probe(record.probe), encode_units(record, header.groups)
    values = {
        "key": record.key,
        "name": _plain(record.name),
        "classes": json.dumps(record.classes),
        "dense": float(record.accuracy.dense),
        "start": float(record.accuracy.start),
        "final": float(record.accuracy.final),
        "created": now(),
        "weights": digest_of(content),
        "weight_bytes": len(content),
        "details": _details(record),
    }
    return Rows(
        {**values, "seal": _entry_seal(values)},
        {
            "key": record.key,
            "classes": len(record.classes),
            "content": probe,
            "seal": seal(record.key, "probe", probe),
        },
        {"content": units, "seal": seal(record.key, "units", units)},
    )


def _plain(name: str) -> str:
    """A name as every database can hold it: a file's name may have bytes that are no text."""
    return name.encode("utf-8", "replace").decode().replace("\0", "?")


def _details(record: Record) -> str:
    try:
        return json.dumps(dict(record.details), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BankError(
            f"the record cannot be stored: its details are no JSON ({error}): use text, finite numbers, lists and "
            "mappings only"
        ) from error


def insert_rows(connection: Connection, rows: Rows) -> bool:
    """Write a record's rows in a transaction that holds the write lock; False where its key is there already.

    A claim of its key goes: there is nothing left to work on.
    """
    connection.execute(delete(schema.claim).where(schema.claim.c.key == rows.record["key"]))
    found = connection.execute(select(schema.record.c.id).where(schema.record.c.key == rows.record["key"])).first()
    if found is not None:
        return False
    number = connection.execute(insert(schema.record).values(rows.record).returning(schema.record.c.id)).scalar_one()
    connection.execute(insert(schema.probe).values({"record": number, **rows.probe}))
    connection.execute(insert(schema.units).values({"record": number, **rows.units}))
    return True


def entry_of(row: Row[Any]) -> Entry:
    """A record's line; BankError where it was altered."""
    if _entry_seal(row._mapping) != row.seal:
        raise BankError(altered(row.id, "description"))
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


def probe_of(row: Row[Any], features: int) -> Probe:
    """A record's probe, from its row; BankError where it was altered."""
    check_probe(row, features)
    return decode_probe(row.content, row.classes, features)


def check_probe(row: Row[Any], features: int) -> None:
    """BankError where the row of a probe was altered."""
    if seal(row.key, "probe", row.content) != row.seal:
        raise BankError(altered(row.record, "probe"))
    check_length(row.content, row.classes, features)  # of the classes no seal tells


def units_of(
    row: Row[Any], key: str, header: Header
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.bool_]]:
    """Ranking, scores and kept units of the record with a key, from their row; BankError where it was altered."""
    if seal(key, "units", row.content) != row.seal:
        raise BankError(altered(row.record, "ranking and scores"))
    return decode_units(row.content, header.groups)


def altered(number: int, what: str) -> str:
    """What is said of a record that is not as it was written."""
    return (
        f"record {number}: its {what} changed after it was written: restore the bank from a copy, or remove the "
        f"record (kinprune bank rm BANK {number})"
    )


def _entry_seal(values: Mapping[Any, Any]) -> str:
    return seal(values["key"], "record", *(str(values[name]) for name in _SEALED))


_SEALED = ("name", "classes", "dense", "start", "final", "created", "weights", "weight_bytes", "details")


def now() -> str:
    """The moment, in universal time, as rows have it: so fine that two who write the same have rows of their own."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
