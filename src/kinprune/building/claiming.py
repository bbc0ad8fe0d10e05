"""The claims of one build: taken before a task is begun, prolonged while it lasts, given up at its end."""

from __future__ import annotations

import os
import platform
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from kinprune.bank import Bank
from kinprune.bank.claims import Claimed, claim, claims, release, renew
from kinprune.bank.retrying import once
from kinprune.errors import BankError

LEASE = 60.0
"""Seconds that a claim holds without being prolonged: so long others wait for the tasks of a machine that is gone."""

RENEWALS = 4
"""How often a claim is prolonged in that time."""


class Claims:
    """The tasks that a build has claimed in a bank; a thread prolongs them until ``close``."""

    def __init__(self, bank: Bank, lease: float = LEASE) -> None:
        self.bank, self.lease, self.owner = bank, lease, owner_name()
        self._held: set[str] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._prolong, daemon=True)
        drop_dead(bank)
        self._thread.start()

    def take(self, key: str) -> Claimed:
        """Claim a task: ``yes``, ``done`` where the bank has its record, ``taken`` where another builder is at it."""
        answer = claim(self.bank, key, self.owner, self.lease)
        if answer == "yes":
            with self._lock:
                self._held.add(key)
        return answer

    def drop(self, key: str, *, done: bool) -> None:
        """The task is not under way here any more. Where it is done its record has ended the claim, else that is."""
        with self._lock:
            self._held.discard(key)
        if not done:
            release(self.bank, [key], self.owner)

    def close(self) -> None:
        """Give up what is still claimed. Where the bank cannot be reached, claims run out by themselves."""
        self._ended.set()
        self._thread.join()
        with suppress(BankError), once():
            release(self.bank, self._held, self.owner)

    def _prolong(self) -> None:
        while not self._ended.wait(self.lease / RENEWALS):
            with self._lock:
                held = set(self._held)
            with suppress(BankError), once():  # the build itself says so where it needs the bank
                renew(self.bank, held, self.owner, self.lease)


def owner_name() -> str:
    """A name for this build that tells others on this machine whether it still runs."""
    return f"{_machine()}/{os.getpid()}/{_started(os.getpid())}/{secrets.token_hex(4)}"


def drop_dead(bank: Bank) -> None:
    """Give up the claims of builds on this machine that were killed, so that nobody waits for them."""
    for entry in claims(bank):
        if _is_dead(entry.owner):
            release(bank, [entry.key], entry.owner)


def _is_dead(owner: str, started: Callable[[int], str] | None = None) -> bool:
    """Whether a build was on this machine and is not any more. Of other machines nothing is known."""
    machine, _, rest = owner.partition("/")
    process, _, rest = rest.partition("/")
    began = rest.partition("/")[0]
    if machine != _machine() or not process.isdecimal() or not began:
        return False
    return (started or _started)(int(process)) != began


def _machine() -> str:
    """Name this machine and the set of processes that is seen from here: containers may share a name."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return f"{platform.node()}:{processes}".replace("/", "_")


def _started(process: int) -> str:
    """When a process began, as Linux counts it; empty where it does not run, or where that is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return fields[19]
    except (OSError, IndexError):
        return ""
