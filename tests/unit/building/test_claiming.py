"""The claims of builds: prolonged while a build lives, and nobody waits for one that is known to be dead."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kinprune as kp
from kinprune.bank import Bank, create_bank, create_like
from kinprune.bank.claims import claim, claims
from kinprune.bank.retrying import RETRY_SECONDS
from kinprune.building.claiming import Claims, drop_dead, owner_name
from kinprune.units import find_units

KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    backbone = kp.load_backbone("test_resnet", num_classes=2, random=True, image_size=32)
    space = find_units(backbone.model, backbone.preprocessing.image_size, head=backbone.head)
    return create_bank(tmp_path / "bank.db", backbone, space)


def test_claims_are_prolonged_until_they_are_given_up(bank: Bank) -> None:
    mine, other = Claims(bank, lease=1.0), Claims(bank, lease=1.0)
    assert mine.take(KEY) == "yes" and other.take(KEY) == "taken"
    time.sleep(2.5)
    assert other.take(KEY) == "taken" and [entry.key for entry in claims(bank)] == [KEY]
    mine.close()
    assert claims(bank) == [] and other.take(KEY) == "yes"
    other.close()


def test_a_task_that_is_done_is_not_prolonged(bank: Bank) -> None:
    mine = Claims(bank, lease=0.4)
    mine.take(KEY)
    mine.drop(KEY, done=True)
    deadline = time.monotonic() + 20
    while claims(bank) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert claims(bank) == []
    mine.close()


def test_a_task_that_failed_is_free_at_once(bank: Bank) -> None:
    mine = Claims(bank)
    assert mine.take(KEY) == mine.take(OTHER) == "yes"
    mine.drop(KEY, done=False)
    assert [entry.key for entry in claims(bank)] == [OTHER]
    mine.close()


def test_claims_of_a_killed_build_of_this_machine_are_given_up(bank: Bank) -> None:
    code = "from kinprune.building.claiming import owner_name; print(owner_name(), flush=True); input()"
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout is not None
    owner = running.stdout.readline().strip()
    elsewhere = "another-machine:pid/1/2/3"
    assert claim(bank, KEY, owner, 600) == claim(bank, OTHER, elsewhere, 600) == "yes"
    drop_dead(bank)
    assert {entry.key for entry in claims(bank)} == {KEY, OTHER}, "it lives"
    running.kill()
    running.communicate()
    drop_dead(bank)
    assert [entry.owner for entry in claims(bank)] == [elsewhere], "of other machines nothing is known"


@pytest.mark.skipif(sys.platform != "linux", reason="when a process began is read from /proc, which is Linux's")
def test_a_process_that_has_the_number_of_a_dead_one_is_another(bank: Bank) -> None:
    machine, process, began, rest = owner_name().split("/")
    claim(bank, KEY, "/".join((machine, process, str(int(began) - 1), rest)), 600)
    claim(bank, OTHER, owner_name(), 600)
    drop_dead(bank)
    assert [entry.key for entry in claims(bank)] == [OTHER]


@pytest.mark.parametrize("owner", ["somebody", "", "a/b", "a/b/c/d"])
def test_owners_of_another_form_are_left_alone(bank: Bank, owner: str) -> None:
    if owner:
        claim(bank, KEY, owner, 600)
    drop_dead(bank)
    assert len(claims(bank)) == bool(owner)


def test_a_build_whose_bank_is_gone_ends_at_once(bank: Bank, postgresql: Any, make_database: Callable[[], str]) -> None:
    """It has waited before it gave up; to give up its claims it does not wait again."""
    shared = create_like(make_database(), bank, store=f"{bank.store.url}-shared")
    mine = Claims(shared)
    assert mine.take(KEY) == "yes"
    postgresql.stop()
    try:
        began = time.monotonic()
        mine.close()
        assert time.monotonic() - began < RETRY_SECONDS / 2
    finally:
        postgresql.start()
    assert [entry.owner for entry in claims(shared)] == [mine.owner], "it runs out by itself"


def test_claims_outlast_a_server_that_is_away_for_a_while(
    bank: Bank, postgresql: Any, make_database: Callable[[], str]
) -> None:
    shared = create_like(make_database(), bank, store=f"{bank.store.url}-shared")
    mine = Claims(shared, lease=4.0)
    assert mine.take(KEY) == "yes"
    postgresql.stop()
    time.sleep(1.5)
    postgresql.start()
    time.sleep(4.0)
    assert [entry.owner for entry in claims(shared)] == [mine.owner]
    mine.close()
    assert claims(shared) == []
