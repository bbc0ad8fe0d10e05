"""Building a bank for real: stopped in every way and gone on with, it has the records of a build that was not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import kinprune as kp
from kinprune.bank import Bank, clean, open_bank, verify
from kinprune.bank.claims import claims
from kinprune.building import BROAD_IMAGES, SOURCE_PLAN, Build, Done, Source, Watch, broaden, build, key_of
from kinprune.errors import BankError

BUILDER = Path(__file__).with_name("builder.py")
CLASSES = ("apple", "pear", "plum", "fig")


@pytest.fixture(scope="module")
def builder(load_builder: Callable[[], ModuleType]) -> ModuleType:
    """The module that the other processes run."""
    return load_builder()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread everywhere: sums over several are other numbers in the last place."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(cores)[:2])
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_folder: Callable[..., Path]) -> str:
    return str(make_folder(tmp_path_factory.mktemp("data") / "fruit", CLASSES, 10, 32))


@pytest.fixture(scope="module")
def whole(empty_bank: Path, images: str, builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """A bank whose build nothing stopped."""
    bank = open_bank(shutil.copytree(empty_bank, tmp_path_factory.mktemp("whole") / "bank") / "bank.db")
    seen: list[tuple[str, int, int, bool]] = []

    def tell(done: Done, number: int, of: int) -> None:
        seen.append((done.name, number, of, done.added))

    assert build(bank, builder.sources(images), builder.PLAN, watch=Watch(tell)) == Build(builder.TASKS, 0)
    assert [number for _, number, of, added in seen if of == builder.TASKS and added] == [1, 2, 3, 4, 5]
    return bank


@pytest.fixture
def bank(empty_bank: Path, tmp_path: Path) -> Bank:
    """An empty bank of the same backbone."""
    return open_bank(shutil.copytree(empty_bank, tmp_path / "bank") / "bank.db")


def assert_same_records(bank: Bank, whole: Bank) -> None:
    """The same keys, once each, and behind each the same numbers bit for bit."""
    report = verify(bank)
    assert report.whole and report.unreferenced == (), report
    entries, expected = ({entry.key: entry for entry in one.entries()} for one in (bank, whole))
    assert entries.keys() == expected.keys() and len(bank) == len(expected)
    for key, entry in entries.items():
        assert (entry.classes, entry.accuracy) == (expected[key].classes, expected[key].accuracy)
        assert entry.weights == expected[key].weights  # the hash of every byte of them
        found, put = bank.record(entry), whole.record(expected[key])
        assert np.array_equal(found.ranking, put.ranking) and found.scores.tobytes() == put.scores.tobytes()
        assert found.mask == put.mask
        for name in ("weights", "biases", "means", "counts"):
            assert np.array_equal(getattr(found.probe, name), getattr(put.probe, name))


def start(bank: Bank, images: str, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(BUILDER), bank.address, images, str(workers)],
        env={**os.environ, "PYTHONPATH": str(Path(kp.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_first(running: subprocess.Popen[str]) -> None:
    assert running.stdout is not None and running.stderr is not None
    line = running.stdout.readline()
    assert line.startswith("done 1 of 5"), line + running.stderr.read()


def wait_for_end_of_group(group: int) -> None:
    """Return once no process of a group is left."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("the workers outlived their builder")


def test_what_a_build_writes(whole: Bank, images: str, builder: ModuleType) -> None:
    assert verify(whole).whole and len(whole) == builder.TASKS
    tasks = [source.load() for source in builder.sources(images)]
    assert [entry.key for entry in whole.entries()] == [key_of(task, builder.PLAN) for task in tasks]
    assert len({entry.classes for entry in whole.entries()}) == builder.TASKS
    for entry, task in zip(whole.entries(), tasks, strict=True):
        record = whole.record(entry)
        assert record.classes == task.classes and record.probe.weights.shape[0] == 2
        assert record.details["task_digest"] == task.digest and record.details["plan"]["rounds"] == 2
        space_counts = [np.count_nonzero(part) for part in np.split(record.mask.kept, bounds(whole))]
        assert space_counts == [max(1, int(size * 0.3 + 1e-9)) for _, size in whole.header.groups]
        assert (record.ranking[record.mask.kept] < np.repeat(space_counts, space_counts)).all()


def bounds(bank: Bank) -> list[int]:
    """Where groups end, but for the last."""
    return np.cumsum([size for _, size in bank.header.groups])[:-1].tolist()


def test_a_broad_source_has_all_classes_and_only_as_many_images_as_fit() -> None:
    classes = tuple(f"c{number}" for number in range(40))
    many, few = Source("many", classes, shots=300), Source("few", ("a", "b"))
    (broad,) = broaden([many, few], 5, 700)
    assert (broad.classes, broad.shots, broad.steps) == (classes, BROAD_IMAGES // 40, 700)
    assert broaden([replace(many, shots=10)], 5, 1)[0].shots == 10
    plan = broad.plan(SOURCE_PLAN)
    assert plan.recipe.steps == 700 and replace(plan, recipe=SOURCE_PLAN.recipe) == SOURCE_PLAN
    assert many.plan(SOURCE_PLAN) is SOURCE_PLAN


def test_a_second_build_has_nothing_to_do(whole: Bank, images: str, builder: ModuleType) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a task was pruned again")

    assert build(whole, builder.sources(images), builder.PLAN, watch=Watch(never)) == Build(0, builder.TASKS)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_was_killed_goes_on(
    bank: Bank, whole: Bank, images: str, builder: ModuleType, workers: int
) -> None:
    running = start(bank, images, workers)
    wait_for_first(running)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    wait_for_end_of_group(running.pid)
    go_on(bank, whole, images, builder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_build_that_was_interrupted_goes_on(
    bank: Bank, whole: Bank, images: str, builder: ModuleType, workers: int
) -> None:
    """Ctrl-C: with one worker, in the middle of the second task's fine-tuning."""
    done = 0

    def on_task(*_: object) -> None:
        nonlocal done
        done += 1
        if workers > 1:
            signal.raise_signal(signal.SIGINT)

    def on_step(stage: str, step: int, steps: int) -> None:
        if done and stage == "fine-tuning" and step:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(bank, builder.sources(images), builder.PLAN, workers=workers, watch=Watch(on_task, on_step))
    assert active_children() == []
    go_on(bank, whole, images, builder)


def go_on(bank: Bank, whole: Bank, images: str, builder: ModuleType, workers: int = 1) -> None:
    """Build again what was stopped: nothing is lost, nothing is there twice, and nobody waits for a dead build."""

    def never(count: int) -> None:
        raise AssertionError("waited for a task of the build that was stopped")

    before = len(bank)
    assert 1 <= before < builder.TASKS and verify(bank).whole
    finished = build(bank, builder.sources(images), builder.PLAN, workers=workers, watch=Watch(on_wait=never))
    assert claims(bank) == []
    assert finished == Build(builder.TASKS - before, before)
    clean(bank, older_than_seconds=0)  # weights of a record that was being written
    assert_same_records(bank, whole)


def test_a_lost_worker_is_told_and_several_go_on(bank: Bank, whole: Bank, images: str, builder: ModuleType) -> None:
    def kill(*_: object) -> None:
        os.kill(next(child.pid for child in active_children() if child.pid), signal.SIGKILL)

    with pytest.raises(BankError, match=r"a worker of the build was lost .* run the same build again"):
        build(bank, builder.sources(images), builder.PLAN, workers=2, watch=Watch(kill))
    assert active_children() == []
    go_on(bank, whole, images, builder, workers=2)


def test_two_builds_at_once_share_the_tasks(bank: Bank, whole: Bank, images: str, builder: ModuleType) -> None:
    """Each task is pruned by one of them, and both end when all are in the bank."""
    other = start(bank, images, 1)
    own: list[Done] = []
    built = build(bank, builder.sources(images), builder.PLAN, watch=Watch(lambda done, *_: own.append(done)))
    said, errors = other.communicate(timeout=100)
    assert other.returncode == 0, errors
    theirs = re.search(r"Build\(added=(\d+), present=(\d+)", said)
    assert theirs is not None and built.added + int(theirs[1]) == builder.TASKS == built.added + built.present
    assert sum(done.added for done in own) == built.added and all(done.added == bool(done.seconds) for done in own)
    clean(bank, older_than_seconds=0)
    assert_same_records(bank, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_with_damaged_images_are_left_out_and_said(
    bank: Bank, whole: Bank, images: str, builder: ModuleType, tmp_path: Path, workers: int
) -> None:
    folder = shutil.copytree(images, tmp_path / "fruit")
    damaged = folder / "apple" / "0003.png"
    damaged.write_bytes(bytes(damaged.stat().st_size))  # of the same size: nothing else tells
    sources = builder.sources(str(folder))
    bad = [source for source in sources if "apple" in (source.classes or ())]
    built = build(bank, sources, builder.PLAN, workers=workers)
    assert 0 < len(bad) < len(sources) and built.added == len(sources) - len(bad) == len(bank)
    assert len(built.failed) == len(bad) and all("0003.png" in text for text in built.failed)
    shutil.copy(Path(images) / "apple" / "0003.png", damaged)
    assert build(bank, sources, builder.PLAN, workers=workers) == Build(len(bad), len(sources) - len(bad))
    found, expected = ({entry.key: entry.weights for entry in one.entries()} for one in (bank, whole))
    assert found == expected
