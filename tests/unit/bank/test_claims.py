"""Claims: one holder a key; they run out, are taken over, renewed and released, and end with the record."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, clean, create_bank, merge, open_bank, schema, verify
from kinprune.bank.claims import claim, claims, count_claims, drop_expired, release, renew
from kinprune.errors import BankError
from kinprune.units import UnitSpace

Make = Callable[..., Record]
LONG, SHORT = 300.0, 0.05


def expire(bank: Bank, *keys: str) -> None:
    """Let claims run out now."""
    with schema.writing(bank.engine) as connection:
        connection.execute(schema.claim.update().where(schema.claim.c.key.in_(keys)).values(until=1.0))


def held(bank: Bank) -> dict[str, str]:
    return {entry.key: entry.owner for entry in claims(bank)}


def test_a_claim_keeps_others_out_until_it_runs_out(bank: Bank) -> None:
    assert claim(bank, "k", "ann", LONG) == "yes"
    assert claim(bank, "k", "bob", LONG) == "taken" and claim(bank, "other", "bob", LONG) == "yes"
    assert claim(bank, "k", "ann", 2 * LONG) == "yes"  # its own: it only lasts longer
    [other, entry] = claims(bank)
    assert (other.key, other.owner, entry.key, entry.owner) == ("other", "bob", "k", "ann")
    assert LONG < entry.seconds <= 2 * LONG and 0 < other.seconds <= LONG and count_claims(bank) == 2
    expire(bank, "k")
    assert held(bank) == {"other": "bob"} and count_claims(bank) == 1
    assert claim(bank, "k", "bob", LONG) == "yes"
    assert claim(bank, "k", "ann", LONG) == "taken" and held(bank) == {"k": "bob", "other": "bob"}


def test_a_claim_lasts_its_seconds(bank: Bank) -> None:
    """By the real clock: PostgreSQL's own where it is the database."""
    assert claim(bank, "k", "ann", SHORT) == "yes"
    deadline = time.monotonic() + 60
    while claim(bank, "k", "bob", LONG) == "taken":
        assert time.monotonic() < deadline
    assert held(bank) == {"k": "bob"}


def test_postgresql_goes_by_its_own_clock(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock is a day ahead takes nothing over that another still holds."""
    claim(bank, "k", "ann", LONG)
    real = time.time
    monkeypatch.setattr("kinprune.bank.claims.time.time", lambda: real() + 86_400)
    ahead = claim(bank, "k", "bob", LONG)
    assert ahead == ("taken" if bank.engine.dialect.name == "postgresql" else "yes")


def test_renewing_says_what_is_still_held(bank: Bank, make_record: Make) -> None:
    done = make_record(0)
    for key in ("mine", "mine too", "lost", "given up", done.key):
        assert claim(bank, key, "ann", 10) == "yes"
    expire(bank, "mine too", "lost")
    assert claim(bank, "lost", "bob", 10) == "yes"
    release(bank, ["given up", "never claimed"], "ann")
    bank.add(done)
    keys = ["mine", "mine too", "lost", "given up", done.key, "never claimed"]
    assert renew(bank, keys, "ann", LONG) == {"mine", "mine too"}  # what ran out and nobody took is still its own
    assert {entry.key: entry.seconds > 10 for entry in claims(bank)} == {"mine": True, "mine too": True, "lost": False}
    assert renew(bank, [], "ann", LONG) == set()


def test_releasing_leaves_the_claims_of_others(bank: Bank) -> None:
    claim(bank, "a", "ann", LONG)
    claim(bank, "b", "bob", LONG)
    release(bank, ["a", "b"], "ann")
    release(bank, [], "ann")
    assert held(bank) == {"b": "bob"} and claim(bank, "a", "bob", LONG) == "yes"


def test_a_record_ends_the_claim_of_its_key(bank: Bank, make_record: Make) -> None:
    """Whoever adds it, and in the same transaction: nobody sees the key neither claimed nor there."""
    record = make_record(0)
    assert claim(bank, record.key, "ann", LONG) == "yes" and claim(bank, "other", "ann", LONG) == "yes"
    assert bank.add(record)
    assert claim(bank, record.key, "ann", LONG) == "done" and held(bank) == {"other": "ann"}
    bank.remove([bank.entries()[0].id])
    assert claim(bank, record.key, "bob", LONG) == "yes"


def test_an_add_that_fails_leaves_the_claim(bank: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> str:
        raise ZeroDivisionError

    record = make_record(0)
    claim(bank, record.key, "ann", LONG)
    put = type(bank.store).put
    calls = iter([put, fail])  # the second is within the transaction, after the rows
    monkeypatch.setattr(type(bank.store), "put", lambda store, content: next(calls)(store, content))
    with pytest.raises(ZeroDivisionError):
        bank.add(record)
    monkeypatch.undo()
    assert len(bank) == 0 and held(bank) == {record.key: "ann"}


def test_claims_are_the_bank_s_own(
    bank: Bank, tmp_path: Path, backbone: Backbone, space: UnitSpace, make_record: Make
) -> None:
    """A merge copies none; one on a record that comes so is over."""
    source = create_bank(tmp_path / "source.db", backbone, space)
    source.add(make_record(0))
    claim(source, "in the source", "ann", LONG)
    claim(bank, make_record(0).key, "bob", LONG)
    claim(bank, "in the target", "bob", LONG)
    merge(bank, source)
    assert held(bank) == {"in the target": "bob"} and held(source) == {"in the source": "ann"}


def test_cleaning_removes_what_ran_out(bank: Bank) -> None:
    for key in ("a", "b", "c"):
        claim(bank, key, "ann", LONG)
    expire(bank, "a", "b")
    assert verify(bank).whole and clean(bank) == ()
    with schema.reading(bank.engine) as connection:
        assert connection.execute(schema.claim.select()).scalars().all() == ["c"]
    expire(bank, "c")
    assert drop_expired(bank) == 1 and drop_expired(bank) == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"key": ""}, "key of 0 characters"),
        ({"key": "k" * 65}, "key of 65 characters"),
        ({"owner": ""}, "without an owner"),
        ({"seconds": 0}, "for 0 seconds"),
        ({"seconds": float("nan")}, "for nan seconds"),
        ({"seconds": float("inf")}, "for inf seconds"),
    ],
)
def test_bad_claims_are_refused(sqlite_bank: Bank, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(BankError, match=words):
        claim(sqlite_bank, **{"key": "k", "owner": "ann", "seconds": LONG, **changed})
    if "key" not in changed:
        with pytest.raises(BankError, match=words):
            renew(sqlite_bank, **{"keys": ["k"], "owner": "ann", "seconds": LONG, **changed})
    assert claims(sqlite_bank) == []


def test_each_key_is_held_by_exactly_one_of_many(bank: Bank) -> None:
    """Eight threads with connections of their own claim the same keys, some of which had run out."""
    keys = [f"key {number}" for number in range(24)]
    for key in keys[::2]:
        claim(bank, key, "gone", LONG)
    expire(bank, *keys)

    def take(number: int) -> set[str]:
        own, owner = open_bank(bank.address), f"builder {number}"
        mine = {key for key in random.Random(number).sample(keys, len(keys)) if claim(own, key, owner, LONG) == "yes"}
        assert renew(own, keys, owner, LONG) == mine
        own.close()
        return mine

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, range(8)))
    assert sorted(key for mine in taken for key in mine) == sorted(keys)
    assert held(bank) == {key: f"builder {number}" for number, mine in enumerate(taken) for key in mine}


def test_builders_that_claim_and_add_do_no_work_twice(bank: Bank, make_record: Make) -> None:
    """One of four dies with its claim, which another takes over: every record is there, one of them by a second."""
    records = [make_record(seed) for seed in range(6)]
    claim(bank, records[3].key, "dead", SHORT)
    deadline = time.monotonic() + 60

    def build(number: int) -> list[str]:
        own, done, todo = open_bank(bank.address), [], list(records)
        random.Random(number).shuffle(todo)
        while todo:
            assert time.monotonic() < deadline
            record = todo.pop(0)
            answer = claim(own, record.key, f"builder {number}", LONG)
            if answer == "yes":
                assert own.add(replace(record, name=f"builder {number}"))
                done.append(record.key)
            elif answer == "taken":
                todo.append(record)
        own.close()
        return done

    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(build, range(4)))
    assert sorted(key for done in built for key in done) == sorted(record.key for record in records)
    assert bank.keys() == {record.key for record in records} and claims(bank) == []
