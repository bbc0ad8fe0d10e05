"""A bank of thousands beside a small one: what is asked for decides memory and rows read, not what there is."""

from __future__ import annotations

import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from sqlalchemy import event, insert

from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, create_bank, schema
from kinprune.bank.listing import newest
from kinprune.bank.rows import rows_of
from kinprune.bank.weights import pack
from kinprune.kin import Search, find_kin
from kinprune.transferability import Target, leading, transferability
from kinprune.units import UnitSpace

FEW, MANY = 2500, 10_000
"""Records: more than are read at a time, and four times as many."""


@dataclass(frozen=True)
class Banks:
    small: Bank
    large: Bank


@pytest.fixture(scope="module")
def banks(
    backbone: Backbone, space: UnitSpace, make_record: Callable[..., Record], tmp_path_factory: pytest.TempPathFactory
) -> Banks:
    folder = tmp_path_factory.mktemp("scale")
    made = []
    for count in (FEW, MANY):
        made.append(create_bank(folder / f"{count}.db", backbone, space))
        write(made[-1], make_record(0), count)
    return Banks(*made)


def write(bank: Bank, like: Record, count: int) -> None:
    """So many records in one transaction, each with a probe of its own; all have one file of weights."""
    random, content = np.random.default_rng(0), pack(like.tensors)
    bank.store.put(content)
    tables: dict[str, list[dict[str, object]]] = {"record": [], "probe": [], "units": []}
    for number in range(1, count + 1):
        weights = random.normal(size=like.probe.weights.shape).astype(np.float32)
        one = replace(like, key=f"{number * 7919 % 100_003:06d}", probe=replace(like.probe, weights=weights))
        rows = rows_of(one, bank.header, content)
        tables["record"].append({"id": number, **rows.record})
        tables["probe"].append({"record": number, **rows.probe})
        tables["units"].append({"record": number, **rows.units})
    with schema.writing(bank.engine) as connection:
        for table, values in tables.items():
            connection.execute(insert(schema.metadata.tables[table]), values)


def target_of(bank: Bank) -> Target:
    random, labels = np.random.default_rng(1), np.arange(300, dtype=np.int64) % 3
    own = 2 * random.normal(size=(3, bank.header.features))
    features = own[labels] + random.normal(size=(300, bank.header.features))
    return Target(features.astype(np.float32), labels, 3)


def peak(run: Callable[[], object]) -> int:
    """The most bytes that Python and numpy held at one time beyond what they had."""
    run()  # what is made once counts for nobody
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@contextmanager
def counted(bank: Bank) -> Iterator[list[int]]:
    """How often ten steps were taken by SQLite's machine: what is read takes some a row."""
    steps = [0]

    def step() -> int:
        steps[0] += 1
        return 0

    def watch(connection: sqlite3.Connection, *_: object) -> None:
        connection.set_progress_handler(step, 10)

    bank.engine.dispose()  # only new connections are watched
    event.listen(bank.engine, "connect", watch)
    try:
        yield steps
    finally:
        event.remove(bank.engine, "connect", watch)
        bank.engine.dispose()


def work(bank: Bank, ask: Callable[[Bank], object]) -> int:
    with counted(bank) as steps:
        ask(bank)
    return steps[0]


@pytest.mark.parametrize("which", ["nearest", "random", "farthest"])
def test_memory_to_find_kin_does_not_grow_with_the_bank(
    banks: Banks, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leading, "LEADERS", 50)
    monkeypatch.setattr(leading, "LEADERS_EACH", 10)
    target, search = target_of(banks.small), Search(count=5, which=which)  # type: ignore[arg-type]
    small, large = (peak(lambda bank=bank: find_kin(bank, target, (), search)) for bank in (banks.small, banks.large))
    assert large < 1.3 * small


def test_kin_of_a_large_bank_are_those_of_highest_transferability(banks: Banks) -> None:
    target = target_of(banks.large)
    scores: dict[str, float] = {}
    for chunk in banks.large.probes():
        for places, sources in chunk.by_classes(np.arange(len(chunk))):
            scores |= zip((chunk.keys[p] for p in places), transferability("leep", target, sources), strict=True)
    found = find_kin(banks.large, target, (), Search(count=10))
    best = sorted(scores, key=lambda key: -scores[key])[:10]
    assert len({neighbour.entry.key for neighbour in found} & set(best)) >= 9
    for neighbour in found:
        assert neighbour.similarity == pytest.approx(scores[neighbour.entry.key], rel=1e-5)


def test_a_page_and_lessons_and_lines_are_read_without_the_rest(banks: Banks) -> None:
    ids = [3, 700, 1400]
    asked: list[Callable[[Bank], object]] = [
        lambda bank: newest(bank, 20),
        lambda bank: newest(bank, 20, before=900),
        lambda bank: bank.lessons(ids),
        lambda bank: bank.entries(ids),
        lambda bank: list(bank.probes(ids=ids)),
        lambda bank: bank.find([f"{7919 * 5:06d}"]),
    ]
    for ask in asked:
        small, large = work(banks.small, ask), work(banks.large, ask)
        assert 0 < large <= 1.2 * small + 1
    assert work(banks.large, Bank.entries) > 3 * work(banks.small, Bank.entries)  # the count does tell


def test_reading_all_probes_goes_over_each_once(banks: Banks) -> None:
    small, large = (work(bank, lambda bank: list(bank.probes())) for bank in (banks.small, banks.large))
    assert large <= 1.2 * MANY / FEW * small


def test_drawn_ones_do_not_depend_on_when_they_came(banks: Banks) -> None:
    target = target_of(banks.small)

    def drawn(bank: Bank, seed: int, **more: object) -> list[str]:
        found = find_kin(bank, target, (), Search(count=8, which="random", seed=seed), **more)  # type: ignore[arg-type]
        return sorted(neighbour.entry.key for neighbour in found)

    assert drawn(banks.small, 0) == drawn(banks.small, 0) != drawn(banks.small, 1)
    without = drawn(banks.small, 0, without=set(drawn(banks.small, 0)))
    assert len(without) == 8 and not set(without) & set(drawn(banks.small, 0))
    # Every record is as likely: of four times as many, about a quarter of the drawn are those of the small bank.
    shared = [len(set(drawn(banks.small, seed)) & set(drawn(banks.large, seed))) for seed in range(8)]
    assert 3 <= sum(shared) <= 30
