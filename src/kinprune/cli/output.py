"""What commands print: one JSON object, or text and tables for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console


def show_json(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite would not be JSON and are an error."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def say(text: str) -> None:
    """A line for people, on standard error."""
    typer.echo(text, err=True)


def console() -> Console:
    """Standard output for tables. Names of classes and files are shown as they are: ``[b]`` is no markup in them."""
    return Console(markup=False, emoji=False, highlight=False)


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar of the stage under way, on standard error, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"), TimeElapsedColumn())
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("units", total=None, done="")

        def on_step(stage: str, step: int, steps: int) -> None:
            nonlocal bar
            if step == 0:
                progress.remove_task(bar)
                bar = progress.add_task(stage, total=steps or None, done="")
            progress.update(bar, completed=step, done=f"{step}/{steps}" if steps else "")

        yield on_step
