"""A PostgreSQL server that goes and comes back, and connections that are cut at chosen moments, right at COMMIT too."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, create_bank, merge, open_bank, schema, upgrade_bank, verify
from kinprune.bank.claims import claim, claims, release, renew
from kinprune.bank.retrying import LostConnection
from kinprune.errors import BankError
from kinprune.units import UnitSpace

Make = Callable[..., Record]
Cut = Callable[[int, bytes], str | None]


class Proxy:
    """A port of this machine that leads to a server's socket, and cuts the connection where ``cut`` says so.

    ``cut(number, message)`` of each message to the server, counted: ``before`` it goes there, or ``after`` the server
    has answered, whose answer is lost then.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.cut, self.count, self.cuts = target, (lambda number, message: None), 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def watch(self, cut: Cut) -> None:
        self.count, self.cuts, self.cut = 0, 0, cut

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        with closing(client), closing(socket.socket(socket.AF_UNIX)) as server, suppress(OSError):
            server.connect(str(self.target))
            while True:
                for end in select.select([client, server], [], [])[0]:
                    content = end.recv(1 << 20)
                    if not content:
                        return
                    if end is server:
                        client.sendall(content)
                        continue
                    verdict = self.cut(self.count, content)
                    self.count += 1
                    self.cuts += verdict is not None
                    if verdict == "before":
                        return
                    server.sendall(content)
                    if verdict == "after":
                        answer = b""
                        while answer[-6:-1] != b"Z\0\0\0\5":  # ready for the next
                            answer += server.recv(1 << 20)
                        return


@pytest.fixture
def proxy(postgresql: Any) -> Iterator[Proxy]:
    with Proxy(postgresql.folder / ".s.PGSQL.5432") as proxy:
        yield proxy


@pytest.fixture
def near(make_database: Callable[[], str], tmp_path: Path, backbone: Backbone, space: UnitSpace) -> Bank:
    """A bank in PostgreSQL, reached by its socket."""
    return create_bank(make_database(), backbone, space, store=str(tmp_path / "weights"))


def through(proxy: Proxy, address: str) -> str:
    """The same database's address, by way of the proxy."""
    options = address.partition("&")[2]
    return f"postgresql://kinprune@127.0.0.1:{proxy.port}/postgres?sslmode=disable&gssencmode=disable&{options}"


@pytest.fixture
def far(near: Bank, proxy: Proxy) -> Bank:
    """The same bank, reached by way of the proxy, and connected."""
    bank = open_bank(through(proxy, near.address))
    assert len(bank) == 0
    return bank


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinprune.bank.retrying.FIRST_PAUSE", 0.002)


def at(wanted: int, how: str) -> Cut:
    return lambda number, message: how if number == wanted else None


def at_first_commit(how: str) -> Cut:
    seen: list[bytes] = []

    def cut(number: int, message: bytes) -> str | None:
        if b"COMMIT\0" not in message or seen:
            return None
        seen.append(message)
        return how

    return cut


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_record_is_added_and_removed_once_wherever_the_connection_is_cut(
    near: Bank, far: Bank, proxy: Proxy, make_record: Make, how: str
) -> None:
    records = [make_record(0), make_record(1)]
    near.add(records[0])  # so that both keep something
    [first] = near.entries()
    proxy.watch(lambda number, message: None)
    assert far.add(records[1])
    messages = proxy.count
    far.remove([near.entries()[-1].id])
    assert messages > 8 and proxy.count > messages + 4
    for wanted in range(messages):
        claim(near, records[1].key, "ann", 600)
        proxy.watch(at(wanted, how))
        assert far.add(records[1]) is True, wanted
        assert proxy.cuts == 1
        assert far.add(records[1]) is False and claims(near) == []
        [_, second] = near.entries()
        assert second.key == records[1].key and near.tensors(second)
        proxy.watch(at(wanted, how))
        far.remove([second.id])
        assert near.entries() == [first] and set(near.store.digests()) == near.referenced()
    assert verify(near).whole


def test_what_another_adds_meanwhile_is_not_taken_for_ones_own(
    near: Bank, far: Bank, proxy: Proxy, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is cut before COMMIT arrives, and another adds the very same before it is tried again."""
    pause, theirs = time.sleep, []

    def add_theirs(seconds: float) -> None:
        pause(seconds)
        if not theirs:
            thread = threading.Thread(target=lambda: theirs.append(near.add(make_record(0))))
            thread.start()
            thread.join()

    monkeypatch.setattr("kinprune.bank.retrying.time.sleep", add_theirs)
    proxy.watch(at_first_commit("before"))
    assert far.add(make_record(0)) is False
    assert proxy.cuts == 1 and theirs == [True]
    assert len(near) == 1 and verify(near).whole and verify(near).unreferenced == ()


@pytest.mark.parametrize("how", ["before", "after"])
def test_commits_whose_answer_is_lost(
    near: Bank, far: Bank, proxy: Proxy, make_record: Make, sqlite_bank: Bank, how: str
) -> None:
    """Claims, merges and upgrades give the answer that they would have given."""

    def cut_once(operation: Callable[[], Any]) -> Any:
        proxy.watch(at_first_commit(how))
        answer = operation()
        assert proxy.cuts == 1
        return answer

    assert cut_once(lambda: claim(far, "k", "ann", 600)) == "yes"
    assert claim(near, "k", "bob", 600) == "taken"
    assert cut_once(lambda: claim(far, "k", "bob", 600)) == "taken"
    assert cut_once(lambda: renew(far, ["k", "other"], "ann", 900)) == {"k"} and claims(near)[0].seconds > 600
    cut_once(lambda: release(far, ["k"], "ann"))
    assert claims(near) == []
    for seed in range(2):
        sqlite_bank.add(make_record(seed))
    assert cut_once(lambda: merge(far, sqlite_bank)) == (2, 0)
    assert merge(far, sqlite_bank) == (0, 2)
    with schema.writing(near.engine) as connection:
        connection.exec_driver_sql("DROP TABLE claim")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    assert cut_once(lambda: upgrade_bank(far.address)) == ("0001", schema.VERSION)
    assert verify(near).whole and len(near) == 2


@pytest.mark.parametrize("how", ["before", "after"])
def test_a_bank_is_made_once_where_the_answer_is_lost(
    proxy: Proxy, make_database: Callable[[], str], tmp_path: Path, backbone: Backbone, space: UnitSpace, how: str
) -> None:
    proxy.watch(at_first_commit(how))
    bank = create_bank(through(proxy, make_database()), backbone, space, store=str(tmp_path / "weights"))
    assert proxy.cuts == 1 and len(bank) == 0 and verify(bank).whole
    with pytest.raises(BankError, match="already holds a bank"):
        create_bank(bank.address, backbone, space, store=str(tmp_path / "more"))


def test_reading_goes_on_wherever_the_connection_is_cut(near: Bank, far: Bank, proxy: Proxy, make_record: Make) -> None:
    records = [make_record(seed) for seed in range(3)]
    for record in records:
        near.add(record)
    entries = near.entries()

    def read() -> None:
        assert far.keys() == set(far.find([record.key for record in records])) == {record.key for record in records}
        assert far.entries() == entries and len(far) == 3
        assert [chunk.keys for chunk in far.probes(chunk=2)] == [
            (records[0].key, records[1].key),
            (records[2].key,),
        ]
        assert np.array_equal(far.lessons([entries[1].id]).scores[0], records[1].scores)
        assert np.array_equal(far.record(entries[2]).ranking, records[2].ranking)
        assert far.referenced() == near.referenced() and claims(far) == [] and verify(far).whole
        other = open_bank(far.address)
        other.close()

    proxy.watch(lambda number, message: None)
    read()
    assert proxy.count > 25
    for wanted in range(0, proxy.count, 5):
        proxy.watch(at(wanted, "before"))
        read()
        assert proxy.cuts == 1


def test_writers_and_readers_outlive_a_restart_of_the_server(
    postgresql: Any, near: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six write the same records while the server crashes and starts again; each record is one writer's."""
    records = [make_record(seed) for seed in range(60)]
    crashed, ended = threading.Event(), threading.Event()

    def write(number: int) -> int:
        own, added = open_bank(near.address), 0
        for place, record in enumerate(records if number % 2 else records[::-1]):
            if place == 28:  # so that the last are written after the last crash, however slow this machine is
                assert crashed.wait(60)
            added += own.add(record)
        own.close()
        return added

    def look() -> int:
        own, looks = open_bank(near.address), 0
        while not ended.is_set():
            for entry in own.entries():
                scores = own.lessons([entry.id]).scores[0]
                assert np.array_equal(scores, records[entry.details["seed"]].scores)
                assert os.path.getsize(own.store._path(entry.weights)) == entry.weight_bytes
            looks += 1
        own.close()
        return looks

    with ThreadPoolExecutor(7) as pool:
        looking = pool.submit(look)
        writing = [pool.submit(write, number) for number in range(6)]
        try:
            for share in (0.2, 0.5):
                while len(near) < share * len(records):
                    time.sleep(0.001)
                postgresql.stop()
                postgresql.start()
            postgresql.stop()
            crashed.set()
            postgresql.start()
            added = [job.result() for job in writing]
        finally:
            ended.set()
        assert looking.result() > 0
    assert sum(added) == len(records) == len(near)
    assert verify(near).whole and verify(near).unreferenced == ()


def test_a_server_that_stays_away_is_said_and_the_bank_goes_on_when_it_is_back(
    postgresql: Any, near: Bank, make_record: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinprune.bank.retrying.RETRY_SECONDS", 0.05)
    near.add(make_record(0))
    source_keys = near.keys()
    postgresql.stop()
    try:
        for ask in (
            near.keys,
            lambda: near.add(make_record(1)),
            lambda: near.remove([1]),
            lambda: list(near.probes()),
            lambda: claim(near, "k", "ann", 60),
            lambda: open_bank(near.address),
            lambda: upgrade_bank(near.address),
            lambda: verify(near),
        ):
            with pytest.raises(
                LostConnection, match=r"the bank's database .* cannot be reached .* run the same command"
            ):
                ask()
    finally:
        postgresql.start()
    assert near.keys() == source_keys and near.add(make_record(1))
    assert verify(near).whole and len(near) == 2


def test_what_no_second_try_would_change_is_said_at_once(
    postgresql: Any, near: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause(_: float) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr("kinprune.bank.retrying.time.sleep", pause)
    for address in (postgresql.url.replace("kinprune@", "stranger@"), postgresql.url.replace("/postgres", "/nothing")):
        with pytest.raises(BankError, match="does not exist") as refused:
            open_bank(address)
        assert not isinstance(refused.value, LostConnection)


def test_a_server_with_too_many_connections_is_waited_for(postgresql: Any, near: Bank) -> None:
    near.close()
    held: list[psycopg.Connection[Any]] = []
    with pytest.raises(psycopg.OperationalError, match="too many clients"):
        while True:
            held.append(psycopg.connect(postgresql.url.replace("+psycopg", "")))
    timer = threading.Timer(0.2, lambda: [connection.close() for connection in held])
    timer.start()
    assert near.keys() == set()
    timer.join()


def test_a_writer_that_says_nothing_loses_the_lock(near: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its machine may be gone without a word: others wait no longer than a while."""
    monkeypatch.setattr(schema, "IDLE_SECONDS", 0.2)
    other = open_bank(near.address)
    with pytest.raises(LostConnection), schema.writing(near.engine) as connection:
        assert claim(other, "k", "bob", 60) == "yes"
        connection.exec_driver_sql("SELECT 1")
    assert claim(near, "k", "ann", 60) == "taken"
