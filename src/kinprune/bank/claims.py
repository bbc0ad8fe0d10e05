"""Claims: who works on which record that a bank does not have yet, so that no two builders do the same work.

A claim runs out by itself: a builder that died keeps nobody waiting for longer than it asked for. It only saves work. A
record is added whole and once whether it was claimed or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, delete, func, insert, select, text, update

from kinprune.bank import schema
from kinprune.bank.retrying import retried
from kinprune.bank.storage import Bank, parts
from kinprune.errors import BankError

Claimed = Literal["yes", "done", "taken"]
"""The answer to a claim: it is the owner's now, the bank has the record already, or it is another's."""


@dataclass(frozen=True)
class ClaimEntry:
    """A record under way: its key, who works on it, and for how many seconds more nobody else may."""

    key: str
    owner: str
    seconds: float


@retried
def claim(bank: Bank, key: str, owner: str, seconds: float) -> Claimed:
    """Claim the record of a key for an owner and for so many seconds from now.

    ``yes`` where the claim is new, where another's had run out and is taken over, and where it was the owner's: it runs
    out that many seconds from now then, too. ``done`` where the bank has the record, ``taken`` where it is another's.

    Raises:
        BankError: the key has no or over 64 characters, there is no owner, or the seconds are no positive number.
    """
    _check(owner, seconds)
    if not 0 < len(key) <= 64:
        raise BankError(f"a key of {len(key)} characters was claimed, expected 1 to 64 (see record_key)")
    of_key = schema.claim.c.key == key
    with schema.writing(bank.engine) as connection:
        if connection.execute(select(schema.record.c.id).where(schema.record.c.key == key)).first() is not None:
            return "done"
        now = _clock(connection)
        held = connection.execute(select(schema.claim).where(of_key)).first()
        if held is not None and held.owner != owner and held.until > now:
            return "taken"
        values = {"owner": owner, "until": now + seconds}
        if held is None:
            connection.execute(insert(schema.claim).values(key=key, **values))
        else:
            connection.execute(update(schema.claim).where(of_key).values(values))
    return "yes"


@retried
def renew(bank: Bank, keys: Collection[str], owner: str, seconds: float) -> set[str]:
    """Let an owner's claims run out that many seconds from now, and return the keys that it still holds.

    A claim that ran out and that nobody took over is still held. One that is missing in the answer was taken over, or
    its record is in the bank.

    Raises:
        BankError: there is no owner, or the seconds are no positive number.
    """
    _check(owner, seconds)
    held: set[str] = set()
    if keys:
        with schema.writing(bank.engine) as connection:
            until = _clock(connection) + seconds
            for part in parts(sorted(keys)):
                own = (schema.claim.c.owner == owner) & schema.claim.c.key.in_(part)
                held.update(connection.execute(select(schema.claim.c.key).where(own)).scalars())
                connection.execute(update(schema.claim).where(own).values(until=until))
    return held


@retried
def release(bank: Bank, keys: Collection[str], owner: str) -> None:
    """Give up an owner's claims, so that others need not wait until they run out; those of others stay."""
    if keys:
        with schema.writing(bank.engine) as connection:
            for part in parts(sorted(keys)):
                own = (schema.claim.c.owner == owner) & schema.claim.c.key.in_(part)
                connection.execute(delete(schema.claim).where(own))


@retried
def claims(bank: Bank) -> list[ClaimEntry]:
    """The records under way, the claim that runs out next first; those that ran out are not among them."""
    with schema.reading(bank.engine) as connection:
        now = _clock(connection)
        query = select(schema.claim).where(schema.claim.c.until > now)
        rows = connection.execute(query.order_by(schema.claim.c.until, schema.claim.c.key)).all()
    return [ClaimEntry(row.key, row.owner, row.until - now) for row in rows]


@retried
def count_claims(bank: Bank) -> int:
    """How many records are under way."""
    with schema.reading(bank.engine) as connection:
        query = select(func.count()).select_from(schema.claim).where(schema.claim.c.until > _clock(connection))
        return int(connection.execute(query).scalar_one())


@retried
def drop_expired(bank: Bank) -> int:
    """Remove the claims that ran out, and return how many they were."""
    with schema.writing(bank.engine) as connection:
        return connection.execute(delete(schema.claim).where(schema.claim.c.until <= _clock(connection))).rowcount


def _check(owner: str, seconds: float) -> None:
    if not owner:
        raise BankError("a claim without an owner was asked for: name who works on the record")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise BankError(f"a claim for {seconds} seconds was asked for, expected a positive number")


def _clock(connection: Connection) -> float:
    """Seconds by the clock that all who share the bank go by: the server's, or that of a file's one machine."""
    if connection.dialect.name == "postgresql":
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    return time.time()
