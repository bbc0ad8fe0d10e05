"""Trying again, by a clock that only the pauses move."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kinprune.bank import retrying
from kinprune.bank.retrying import FIRST_PAUSE, LONGEST_PAUSE, RETRY_SECONDS, LostConnection, retried, retry
from kinprune.errors import BankError


class Clock:
    """Takes the place of the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retrying, "time", clock)
    return clock


def failing(times: int, then: str = "done") -> Callable[[], str]:
    left = [LostConnection("the store", f"refused {number}") for number in range(times)]

    def run() -> str:
        if left:
            raise left.pop(0)
        return then

    return run


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 8))
def test_what_fails_a_few_times_is_done_in_the_end(times: int) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrying, "time", clock)
        assert retry(failing(times)) == "done"
    assert len(clock.pauses) == times
    for number, pause in enumerate(clock.pauses):
        longest = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)
        assert longest / 2 <= pause <= longest


def test_after_a_minute_it_is_said(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "kinprune"),
        pytest.raises(LostConnection, match=r"the store cannot be reached \(refused \d+; tried again for 60 seconds\)"),
    ):
        retry(failing(1000))
    assert clock.now == pytest.approx(100 + RETRY_SECONDS)
    [record] = caplog.records  # once, as soon as there is something to wait for
    assert "the store cannot be reached (refused 4): trying again" in record.getMessage()


def test_short_losses_are_not_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    retry(failing(3))
    assert caplog.records == []


@pytest.mark.parametrize("error", [BankError("damaged"), KeyboardInterrupt(), OSError("disk")])
def test_other_errors_are_raised_at_once(clock: Clock, error: BaseException) -> None:
    def run() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        retry(run)
    assert raised.value is error and clock.pauses == []
    assert retry(failing(1)) == "done"  # nothing is left of it


def test_of_operations_within_each_other_the_outermost_is_run_again(clock: Clock) -> None:
    steps: list[str] = []
    flaky = failing(2)

    @retried
    def inner() -> str:
        steps.append("inner")
        return flaky()

    @retried
    def outer(name: str) -> str:
        """What it does."""
        steps.append(name)
        return inner()

    assert outer("outer") == "done" and outer.__doc__ == "What it does."
    assert steps == ["outer", "inner"] * 3 and len(clock.pauses) == 2


def test_threads_try_again_for_themselves(clock: Clock) -> None:
    """Where one is in the middle of an operation, another's own is an outermost one all the same."""
    done: list[str] = []

    def outer() -> None:
        thread = threading.Thread(target=lambda: done.append(retry(failing(1, "in the thread"))))
        thread.start()
        thread.join()

    retry(outer)
    assert done == ["in the thread"]
