"""How commands begin and end: threads and device, errors and interruptions."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec

import typer

from kinprune.cli.output import say, show_json
from kinprune.errors import BackboneError, KinpruneError

P = ParamSpec("P")


def guarded(command: Callable[P, dict[str, Any] | None]) -> Callable[P, None]:
    """Make a command of a function that gives what ``--json`` is to show, or None where it has shown its results.

    The errors a user can cause become one message on standard error and exit code 2, Ctrl-C becomes 130.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            # What a model of someone's own prints must not come between JSON's lines.
            with contextlib.redirect_stdout(sys.stderr) if kwargs["json"] else contextlib.nullcontext():
                answer = command(*args, **kwargs)
        except KinpruneError as error:
            say(f"kinprune: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            say("kinprune: interrupted; nothing was written")
            raise typer.Exit(130) from interrupt
        if answer is not None:
            show_json(answer)

    return run


def begin(device: str, threads: int | None) -> None:
    """Set the threads and check the device, before anything is loaded."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise BackboneError(f"there is no device '{device}', expected cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise BackboneError(f"the device '{device}' is not supported, expected cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"the device '{device}' was asked for, but PyTorch sees no GPU here: use --device cpu")
    if found.type == "cuda" and found.index is not None and found.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise BackboneError(f"the device '{device}' was asked for, but the last GPU here is cuda:{last}: use that one")
