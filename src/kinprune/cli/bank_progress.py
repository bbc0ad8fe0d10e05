"""How far a build is: a bar on a terminal, a line a task elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kinprune.cli.output import say

if TYPE_CHECKING:
    from rich.progress import TaskID

    from kinprune.building import Done, Watch


def time_left(elapsed: float, finished: float, remaining: int, workers: int) -> float:
    """Seconds that a build will still take, after ``elapsed`` of them finished some tasks.

    The tasks under way beside the one just finished are taken as half done: without that, the first of four workers
    to finish would make the build look four times as long as it will be.
    """
    half_done = (min(workers, remaining + 1) - 1) / 2
    return elapsed * (remaining - half_done) / (finished + half_done)


def duration(seconds: float) -> str:
    """A duration for people: 45 s, 12 min, 3.5 h."""
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 89.5 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def shown_progress(first: str) -> Iterator[Watch]:
    """What ``build`` calls while it is shown how far it is; ``first`` says what is done before the first task."""
    from rich.console import Console

    from kinprune.building import Watch

    # isatty first: FORCE_COLOR makes rich call a file a terminal.
    if sys.stderr is not None and sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal:
        with _bars(first) as watch:
            yield watch
    else:
        waiting = set[int]()

        def on_wait(count: int) -> None:
            if count not in waiting:  # said once, not every two seconds
                waiting.add(count)
                say(waiting_text(count))

        yield Watch(_say_task, None, on_wait)


def waiting_text(count: int) -> str:
    """What is said while nothing is left to do but what others are at."""
    return f"waiting for {'1 task' if count == 1 else f'{count:,} tasks'} that another build is at"


def _say_task(done: Done, number: int, of: int) -> None:
    found = done.accuracy
    already = "" if done.added else ", was already there"
    say(
        f"{number}/{of} {done.name}: whole {found.dense:.1%}, closed form {found.start:.1%}, "
        f"fine-tuned {found.final:.1%}, {done.seconds:.1f} s{already}"
    )


@contextmanager
def _bars(first: str) -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from kinprune.building import Watch

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
    )
    left = _estimate()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks = progress.add_task("source tasks", total=None, text=first)
        bar: TaskID | None = None

        def on_task(done: Done, number: int, of: int) -> None:
            nonlocal bar
            if bar is not None:
                progress.remove_task(bar)
                bar = None
            text = f"{number}/{of}, {left(done, of - number)} left; {done.name} {done.accuracy.final:.1%}"
            progress.update(tasks, completed=number, total=of, text=text)

        def on_step(stage: str, step: int, steps: int) -> None:
            nonlocal bar
            if step == 0 or bar is None:
                if bar is None and progress.tasks[0].total is None:
                    progress.update(tasks, text="")
                if bar is not None:
                    progress.remove_task(bar)
                bar = progress.add_task(stage, total=steps or None, text="")
            progress.update(bar, completed=step, text=f"{step}/{steps}" if steps else "")

        yield Watch(on_task, on_step, lambda count: progress.update(tasks, text=waiting_text(count)))


def _estimate() -> Callable[[Done, int], str]:
    """Called after each task with how many remain; the clock begins when the first of them began.

    A broad task counts as many of those that remain.
    """
    began, finished = 0.0, 0

    def estimate(done: Done, remaining: int) -> str:
        nonlocal began, finished
        now = time.monotonic()
        began, finished = began or now - done.seconds, finished + done.work
        one = done.remaining / remaining if remaining else done.work
        return duration(time_left(now - began, finished / one, remaining, done.beside + 1))

    return estimate


@contextmanager
def counted(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of records on a terminal, for what reads a whole bank."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Console(stderr=True)
    off = not sys.stderr.isatty() or shown.is_dumb_terminal
    with Progress(*columns, console=shown, transient=True, disable=off) as progress:
        bar = progress.add_task(description, total=None)
        yield lambda done, of: progress.update(bar, completed=done, total=of)
