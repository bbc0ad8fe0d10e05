"""How commands begin and end: threads and device, errors and interruptions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from kinprune.cli.output import say
from kinprune.errors import BackboneError, KinpruneError

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors a user can cause into one message on standard error and exit code 2, Ctrl-C into 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KinpruneError as error:
            say(f"kinprune: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            say("kinprune: interrupted; nothing was written")
            raise typer.Exit(130) from interrupt

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
