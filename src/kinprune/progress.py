"""Progress of long stages, on standard error: a bar for what lasts, nothing for what is over at once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar, overload

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
SHOW_AFTER = 0.5  # seconds; a stage over sooner than this would only flicker

_terminal = threading.Lock()  # one bar at a time: a stage inside another stays silent


@overload
def track(steps: int, description: str, enabled: bool = True, *, total: int | None = None) -> Iterator[int]: ...
@overload
def track(steps: Iterable[T], description: str, enabled: bool = True, *, total: int | None = None) -> Iterator[T]: ...
def track(
    steps: Iterable[T] | int, description: str, enabled: bool = True, *, total: int | None = None
) -> Iterator[T] | Iterator[int]:
    """Yield each of ``steps`` (or 0 .. ``steps`` - 1), showing on standard error how far along they are.

    Shown only on a terminal, where ``enabled``, and from half a second on; the bar is removed at the end.
    ``total`` is needed for a bar over an iterable without a length. Inside another shown stage it is silent.
    """
    iterable: Iterable[Any] = range(steps) if isinstance(steps, int) else steps
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not enabled or not _on_terminal():
        return iter(iterable)
    return _shown(iterable, description, total)


def _on_terminal() -> bool:
    # isatty first: FORCE_COLOR makes rich call a file a terminal.
    return sys.stderr is not None and sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal


def _shown(steps: Iterable[T], description: str, total: int | None) -> Iterator[T]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    stage = progress.add_task(description, total=total)
    started, shown = time.monotonic(), False
    try:
        for step in steps:
            yield step
            progress.advance(stage)
            if not shown and time.monotonic() - started >= SHOW_AFTER and _terminal.acquire(blocking=False):
                shown = True
                progress.start()
    finally:
        if shown:
            progress.stop()
            _terminal.release()
