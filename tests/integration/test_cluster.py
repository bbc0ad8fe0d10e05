"""Building on a Ray cluster of several machines (raylets of their own on this one), which lose some in the middle."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kinprune.bank import Bank, clean, open_bank, verify
from kinprune.bank.claims import claims
from kinprune.building import Build, Cluster, Done, Watch, build
from kinprune.building.cluster import _tasks_on
from kinprune.errors import BankError

BUILDER = Path(__file__).with_name("builder.py")
CLASSES = ("apple", "pear", "plum", "fig")
STORE = 80 * 2**20
STEPS = 30
"""Of a task: it takes some seconds."""


@pytest.fixture(scope="module", autouse=True)
def quiet_ray() -> Iterator[None]:
    """Ray tells its makers nothing, and workers start with one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A cluster with a head that takes no tasks."""
    if importlib.util.find_spec("ray") is None:
        reason = "needs Ray: pip install 'kinprune[ray]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    from ray.cluster_utils import Cluster as Machines

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    found = Machines(initialize_head=True, head_node_args=head)
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def builder(load_builder: Callable[[], ModuleType]) -> ModuleType:
    """With tasks that last long enough for a machine to be lost in the middle."""
    module = load_builder()
    module.PLAN = module.longer(STEPS)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> str:
    return str(make_folder(tmp_path_factory.mktemp("data") / "fruit", CLASSES, 10, 32))


@pytest.fixture
def bank(empty_bank: Path, tmp_path: Path) -> Bank:
    return open_bank(shutil.copytree(empty_bank, tmp_path / "bank") / "bank.db")


@pytest.fixture(scope="module")
def expected(
    empty_bank: Path, images: str, builder: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The hash of every byte of each record's weights, by its key, as this process alone makes them."""
    bank = open_bank(shutil.copytree(empty_bank, tmp_path_factory.mktemp("whole") / "bank") / "bank.db")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the cluster: sums over several are other numbers in the last place
    build(bank, builder.sources(images), builder.PLAN)
    torch.set_num_threads(threads)
    return weights_of(bank)


def weights_of(bank: Bank) -> dict[str, str]:
    """Of a bank that is whole and has no record twice."""
    clean(bank, older_than_seconds=0)
    report = verify(bank)
    entries = bank.entries()
    assert report.whole and len({entry.classes for entry in entries}) == len(entries)
    return {entry.key: entry.weights for entry in entries}


def add(machines: Any, cpus: int) -> Any:
    return machines.add_node(num_cpus=cpus, object_store_memory=STORE)


def test_a_machine_lost_in_the_middle_costs_no_task_and_doubles_none(
    machines: Any, bank: Bank, images: str, builder: ModuleType, expected: dict[str, str], tmp_path: Path
) -> None:
    """Two machines at work and a third task queued: the one that is lost has a task, which is begun again.

    The images are gone by then as well: machines get them from the build alone.
    """
    kept, lost = add(machines, 1), add(machines, 1)
    folder = shutil.copytree(images, tmp_path / "fruit")
    done: list[Done] = []
    killer = threading.Thread(target=machines.remove_node, args=(lost,), kwargs={"allow_graceful": False})

    def on_task(one: Done, number: int, of: int) -> None:
        done.append(one)
        if number == 1:
            killer.start()
            shutil.rmtree(folder)

    try:
        cluster = Cluster(machines.address)
        built = build(bank, builder.sources(str(folder)), builder.PLAN, cluster=cluster, watch=Watch(on_task))
    finally:
        killer.join()
        machines.remove_node(kept)
    assert built == Build(builder.TASKS, 0) and [one.added for one in done] == [True] * builder.TASKS
    assert weights_of(bank) == expected


def test_a_build_that_was_killed_goes_on_and_the_cluster_is_free_for_it(
    machines: Any, bank: Bank, images: str, builder: ModuleType, expected: dict[str, str]
) -> None:
    node = add(machines, 2)
    command = [sys.executable, str(BUILDER), bank.address, images, "1", f"--steps={STEPS}", f"--ray={machines.address}"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None and running.stderr is not None
        line = running.stdout.readline()
        assert line.startswith("done 1 of 5"), line + running.stderr.read()
        running.kill()
        running.communicate()
        before = len(bank)
        built = build(bank, builder.sources(images), builder.PLAN, cluster=Cluster(machines.address))
    finally:
        running.kill()
        machines.remove_node(node)
    assert 1 <= before < builder.TASKS and built == Build(builder.TASKS - before, before)
    assert weights_of(bank) == expected and claims(bank) == []


def test_what_ray_complains_of_is_not_printed_among_results(
    machines: Any, bank: Bank, images: str, builder: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    node = add(machines, 1)
    try:
        build(bank, builder.sources(images, 1), builder.PLAN, cluster=Cluster(machines.address))
    finally:
        machines.remove_node(node)
    capsys.readouterr()
    lost = {"lines": ["a machine was lost"], "pid": "raylet", "is_err": False}
    ray._private.worker.print_to_stdstream(lost, ignore_prefix=False)
    said = capsys.readouterr()
    assert said.out == "" and "a machine was lost" in said.err


def test_what_no_machine_has_is_refused(
    machines: Any, bank: Bank, images: str, builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinprune.building.cluster.READY_SECONDS", 0.5)
    for cluster in (Cluster(machines.address, cpus=64), Cluster(machines.address, gpus=0.5)):
        with pytest.raises(BankError, match="no machine of the cluster"):
            build(bank, builder.sources(images), builder.PLAN, cluster=cluster)
    assert len(bank) == 0 and claims(bank) == []


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_an_address_without_a_cluster_is_refused_at_once(
    bank: Bank, images: str, builder: ModuleType, address: str
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(BankError, match=r"no Ray cluster can be used at .*ray start --head"):
        build(bank, builder.sources(images), builder.PLAN, cluster=Cluster(address))


@pytest.mark.parametrize("address", ["", "nowhere", "local:", "host:99999", "host:6379/x", "http://host:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(BankError, match=r"is no Ray cluster: expected local, auto"):
        Cluster(address)


@pytest.mark.parametrize(
    ("cpus", "gpus", "machine", "tasks"),
    [
        (1, 0.0, (4, 0), 4),
        (3, 0.0, (8, 2), 2),
        (1, 0.25, (16, 2), 8),
        (1, 0.25, (4, 2), 4),
        (1, 0.3, (16, 1), 3),
        (2, 2.0, (16, 5), 2),
        (1, 0.5, (16, 0), 0),
    ],
)
def test_how_many_tasks_a_machine_takes(cpus: int, gpus: float, machine: tuple[int, int], tasks: int) -> None:
    assert _tasks_on(Cluster("auto", cpus, gpus), *machine) == tasks


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0.0), (1, -0.5), (1, 1.5)])
def test_impossible_shares_are_refused(cpus: int, gpus: float) -> None:
    with pytest.raises(BankError, match="expected at least 1 CPU"):
        Cluster("auto", cpus, gpus)
