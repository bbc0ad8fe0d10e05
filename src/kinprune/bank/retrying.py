"""Trying again: what fails because a server is out of reach for a while goes on by itself when it is back."""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from kinprune.errors import BankError

RETRY_SECONDS = 60.0
"""For how long an operation is tried again before the user is told."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two tries: each pause is up to twice as long as the one before."""

NOTICE = 1.0
"""The pause from which on a person is told what they wait for."""

P = ParamSpec("P")
T = TypeVar("T")

_under_way: ContextVar[bool] = ContextVar("kinprune_retrying", default=False)
_log = logging.getLogger("kinprune")


class LostConnection(BankError):
    """A bank's database or store cannot be reached: ``what`` and where, and ``why``."""

    def __init__(self, what: str, why: str, tried: float | None = None) -> None:
        again = "" if tried is None else f"; tried again for {tried:.0f} seconds"
        super().__init__(
            f"{what} cannot be reached ({why}{again}): what was written before is whole; see that the server runs and "
            "that this machine reaches it, then run the same command again to go on"
        )
        self.what, self.why = what, why


def retry(operation: Callable[[], T]) -> T:
    """The result of an operation that is run again, from its beginning, as long as it raises ``LostConnection``.

    It must be right to run it twice: also where the first time was done and only the answer was lost. Of operations
    within each other the outermost is run again, so that nothing goes on in the middle of a transaction that is gone.

    Raises:
        LostConnection: it still did after ``RETRY_SECONDS``.
    """
    if _under_way.get():
        return operation()
    began, pause, told = time.monotonic(), FIRST_PAUSE, False
    with once():
        while True:
            try:
                return operation()
            except LostConnection as error:
                tried = time.monotonic() - began
                if tried >= RETRY_SECONDS:
                    raise LostConnection(error.what, error.why, tried) from error
                if pause >= NOTICE and not told:
                    _log.warning("%s cannot be reached (%s): trying again", error.what, error.why)
                    told = True
            # Of their own length, so that many who lost the same server do not all come back at once.
            time.sleep(min(pause * random.Random().uniform(0.5, 1), RETRY_SECONDS - tried))
            pause = min(2 * pause, LONGEST_PAUSE)


@contextmanager
def once() -> Iterator[None]:
    """Inside, nothing is tried again: for what can wait for its next turn, or is not worth waiting for."""
    token = _under_way.set(True)
    try:
        yield
    finally:
        _under_way.reset(token)


def retried(function: Callable[P, T]) -> Callable[P, T]:
    """A function that is run again where the connection is lost (see ``retry``)."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return retry(lambda: function(*args, **kwargs))

    return run
