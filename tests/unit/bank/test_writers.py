"""Many at once: processes that write the same records, readers beside writers, removers beside those who add."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import kinprune as kp
from kinprune.backbones import Backbone
from kinprune.bank import Bank, Record, create_bank, merge, open_bank, verify
from kinprune.bank.claims import claims
from kinprune.bank.storage import drop_unreferenced
from kinprune.errors import BankError
from kinprune.units import UnitSpace

Make = Callable[..., Record]
HERE = Path(__file__).resolve().parent
PROCESSES, RECORDS = 4, 12


def start_writers(address: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(kp.__file__).parents[1]), str(HERE.parents[1] / "data")])
    return subprocess.Popen(
        [sys.executable, str(HERE / "writers.py"), address, str(PROCESSES), str(RECORDS)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_each_record_is_claimed_and_added_by_exactly_one_of_several_processes(bank: Bank, make_record: Make) -> None:
    """And whoever reads meanwhile sees whole records only."""
    running = start_writers(bank.address)
    looks = 0
    while running.poll() is None:
        ids = [number for chunk in bank.probes(chunk=3) for number in chunk.ids]
        lessons = bank.lessons(ids)
        for entry, scores in zip(bank.entries(ids), lessons.scores, strict=True):
            expected = make_record(entry.details["seed"])
            assert entry.key == expected.key and np.array_equal(scores, expected.scores)
            assert bank.tensors(entry).keys() == expected.tensors.keys()
        looks += 1
        time.sleep(0.05)
    output, errors = running.communicate()
    assert running.returncode == 0, errors
    for what in ("claimed", "added"):
        lines = [line.split()[1:] for line in output.splitlines() if line.startswith(what)]
        assert len(lines) == PROCESSES
        assert sorted(int(number) for line in lines for number in line) == list(range(RECORDS)), what
    assert len({entry.key for entry in claims(bank)}) == RECORDS
    assert looks > 1 and len(bank) == len(bank.keys()) == RECORDS
    assert verify(bank).whole and verify(bank).unreferenced == verify(bank).leftovers == ()


@contextmanager
def in_threads(*jobs: Callable[[], None]) -> Iterator[None]:
    """Run jobs over and over, beside what stands in the ``with``; what they raise is raised at its end."""
    stop = threading.Event()

    def again(job: Callable[[], None]) -> None:
        while not stop.is_set():
            job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        running = [pool.submit(again, job) for job in jobs]
        try:
            yield
        finally:
            stop.set()
    for one in running:
        one.result()


def test_weights_stay_while_records_that_share_them_come_and_go(bank: Bank, make_record: Make) -> None:
    """Two add and remove records of the same weights, another drops what is unused: no record loses its weights."""
    first = make_record(0)
    shared = [make_record(seed, tensors=first.tensors, mask=first.mask) for seed in range(4)]

    def come_and_go(own: Bank, records: list[Record]) -> None:
        for record in records:
            assert own.add(record)
            [entry] = [entry for entry in own.entries() if entry.key == record.key]
            assert own.tensors(entry).keys() == first.tensors.keys()
            own.remove([entry.id])

    one, two, three = (open_bank(bank.address) for _ in range(3))
    with in_threads(
        lambda: come_and_go(one, shared[:2]),
        lambda: come_and_go(two, shared[2:]),
        lambda: drop_unreferenced(three, three.store.digests()) and None,
    ):
        for _ in range(8):
            report = verify(bank, weights=False)
            assert report.whole, report.problems
    assert len(bank) == 0


def test_readers_never_see_half_a_record(bank: Bank, make_record: Make) -> None:
    writer = open_bank(bank.address)

    def come_and_go() -> None:
        writer.add(make_record(1))
        writer.remove([entry.id for entry in writer.entries() if entry.key == make_record(1).key])

    bank.add(make_record(0))
    with in_threads(come_and_go):
        for _ in range(40):
            for chunk in bank.probes(chunk=1):
                assert len(chunk.probes) == 1
            for entry in bank.entries():
                try:
                    record = bank.record(entry)
                except BankError as error:  # removed between the list and the record, as a whole
                    assert entry.key == make_record(1).key and ("no record" in str(error) or "not in" in str(error))
                else:
                    assert np.array_equal(record.scores, make_record(entry.details["seed"]).scores)


def test_two_that_make_the_same_bank(place: object, backbone: Backbone, space: UnitSpace) -> None:
    """One of them makes it, the others are told so; or it is not there at all."""

    def make(_: int) -> Bank | str:
        try:
            return create_bank(place.address, backbone, space, store=place.store)  # type: ignore[attr-defined]
        except BankError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(make, range(3)))
    [made] = [outcome for outcome in outcomes if isinstance(outcome, Bank)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert all("already holds" in text or "holds weights already" in text for text in refused), refused
    assert verify(made).whole


def test_merging_beside_a_writer(
    bank: Bank, tmp_path: Path, backbone: Backbone, space: UnitSpace, make_record: Make
) -> None:
    source = create_bank(tmp_path / "source.db", backbone, space)
    for seed in range(6):
        source.add(make_record(seed))
    writer = open_bank(bank.address)
    with ThreadPoolExecutor(2) as pool:
        merged = pool.submit(merge, bank, source)
        added = sum(pool.submit(writer.add, make_record(seed)).result() for seed in reversed(range(6)))
        assert added + merged.result()[0] == 6
    assert len(bank) == 6 and verify(bank).whole
