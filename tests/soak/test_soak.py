"""Builds under fire for minutes: builders, servers and machines are killed at random, and every task is recorded once.

``make soak`` runs them; ``KINPRUNE_SOAK_SECONDS`` says for how long each goes on. They use this machine alone, and end.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kinprune.bank import Bank, clean, create_like, open_bank, verify
from kinprune.bank.claims import claims
from kinprune.building import Cluster, Source, Watch, build
from kinprune.pruning import Plan

BUILDER = Path(__file__).parents[1] / "integration" / "builder.py"
CLASSES = tuple(f"fruit{number}" for number in range(30))
SECONDS = float(os.environ.get("KINPRUNE_SOAK_SECONDS", "240"))
STORE = 80 * 2**20


@pytest.fixture(scope="module")
def builder(load_builder: Callable[[], ModuleType]) -> ModuleType:
    return load_builder()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> str:
    return str(make_folder(tmp_path_factory.mktemp("data") / "fruit", CLASSES, 10, 32))


@pytest.fixture
def make_bank(empty_bank: Path) -> Callable[..., Bank]:
    source = open_bank(empty_bank / "bank.db")
    return lambda address, store=None: create_like(address, source, store=store)


@contextmanager
def every(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Something is done about so often while the block lasts, by a thread."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(random.uniform(0.5, 1.5) * seconds):
            do()

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def check(bank: Bank, alone: Bank, sources: Sequence[Source], plan: Plan) -> None:
    """The bank is whole and has each task once; of the first few it has what one process makes of them alone."""
    clean(bank, older_than_seconds=0)
    report, entries = verify(bank), bank.entries()
    assert report.whole, report
    assert len(entries) == len(sources) == len({entry.key for entry in entries}) and claims(bank) == []
    torch.set_num_threads(1)
    build(alone, sources[:5], plan)
    found = {entry.key: entry.weights for entry in entries}
    assert {entry.key: entry.weights for entry in alone.entries()}.items() <= found.items()


def test_builders_and_servers_die_at_random(
    postgresql: Any,
    make_database: Callable[[], str],
    s3: Callable[[], str],
    s3_server: Any,
    images: str,
    builder: ModuleType,
    make_bank: Callable[..., Bank],
    tmp_path: Path,
) -> None:
    """Three builders on one bank, as long as they are: whoever is dead is started again."""
    address = make_database()
    bank = make_bank(address, s3())
    tasks = 40
    command = [sys.executable, str(BUILDER), address, images, "1", "--tasks", str(tasks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen(command, env=environment) for _ in range(3)]
    until = time.monotonic() + SECONDS

    def hurt() -> None:
        what = random.choice(("builder", "builder", "database", "storage"))
        if what == "builder":
            random.choice(running).kill()
            return
        server = postgresql if what == "database" else s3_server
        server.stop()
        time.sleep(random.uniform(0, 3))
        server.start()

    with every(5, hurt):
        while time.monotonic() < until and len(bank) < tasks:
            time.sleep(1)
            for place, process in enumerate(running):
                if process.poll() not in (None, 0):
                    running[place] = subprocess.Popen(command, env=environment)
    for process in running:
        process.kill()
        process.wait()
    build(bank, builder.sources(images, tasks), builder.PLAN)
    check(bank, make_bank(tmp_path / "alone.db"), builder.sources(images, tasks), builder.PLAN)


def test_machines_of_a_cluster_die_at_random(
    images: str, builder: ModuleType, make_bank: Callable[..., Bank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Machines

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    machines = Machines(initialize_head=True, head_node_args=head)

    def add() -> Any:
        return machines.add_node(num_cpus=1, object_store_memory=STORE)

    working = [add(), add(), add()]

    killed = 0

    def hurt(*_: object) -> None:
        """After one task in three; by this thread, for Ray begins no machine in another."""
        nonlocal killed
        if random.random() < 0.3:
            machines.remove_node(working.pop(random.randrange(3)), allow_graceful=False)
            working.append(add())
            killed += 1

    bank, plan, tasks = make_bank(tmp_path / "bank.db"), builder.longer(50), 5
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until or killed < 3:  # larger and larger
            tasks += 5
            sources, cluster = builder.sources(images, tasks), Cluster(machines.address)
            build(bank, sources, plan, cluster=cluster, watch=Watch(hurt))
    finally:
        machines.shutdown()
    check(bank, make_bank(tmp_path / "alone.db"), sources, plan)
