"""Options that several commands share, and how commands begin and end."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from kinprune.errors import BackboneError, BudgetError, KinpruneError

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, all else on standard error.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Decides everything random; the same seed repeats a run.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; default: all cores.")]
Weights = Annotated[Path | None, typer.Option("--weights", help="A safetensors file with the model's weights.")]
Random = Annotated[bool, typer.Option("--random", help="Newly initialised weights, on purpose.")]
ImageSize = Annotated[
    int | None, typer.Option("--image-size", help="Side of the images in pixels; default: the model's own.")
]
Classes = Annotated[str | None, typer.Option("--classes", help="Only these classes: names with commas between them.")]
Shots = Annotated[int | None, typer.Option("--shots", help="At most so many training images of each class.")]
ImageColumn = Annotated[str | None, typer.Option("--image-column", help="The column of images in parquet data.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="The column of labels in parquet data.")]
TestFraction = Annotated[
    float, typer.Option("--test-fraction", help="Share kept for testing where the data have no split of their own.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images at a time.")]

_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*|%)")
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
    "k": 10**3, "m": 10**6, "g": 10**9,
}  # fmt: skip


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors a user can cause into one line on standard error and exit code 2, Ctrl-C into 130."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KinpruneError as error:
            typer.echo(f"kinprune: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            typer.echo("kinprune: interrupted; nothing was written", err=True)
            raise typer.Exit(130) from interrupt

    return run


def begin(device: str, threads: int | None) -> str:
    """Set the threads and check the device, before anything is loaded."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise BackboneError(f"there is no device '{device}', expected cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"the device '{device}' was asked for, but PyTorch sees no GPU here: use --device cpu")
    if kind not in ("cpu", "cuda"):
        raise BackboneError(f"the device '{device}' is not supported, expected cpu, cuda or cuda:N")
    return device


def quantity(text: str | None, option: str, *, unit: str, whole: int | None = None) -> int | None:
    """A count or size as people write it (``1.5M``, ``8MB``, ``4MiB``, ``50%`` of ``whole``), as an integer.

    ``unit`` is "count" or "bytes". Raises BudgetError naming the option.
    """
    if text is None:
        return None
    match = _QUANTITY.fullmatch(text.strip())
    scales = _BYTES if unit == "bytes" else _COUNTS
    example = "8MB, 512KiB or 50%" if unit == "bytes" else "1500000, 1.5M or 50%"
    if match is None or (match[2] != "%" and match[2].lower() not in scales):
        raise BudgetError(f"{option} is '{text}', expected a number such as {example}")
    if match[2] == "%":
        if whole is None:
            raise BudgetError(f"{option} is '{text}', expected an absolute number such as {example.split(' or')[0]}")
        return int(float(match[1]) / 100 * whole)
    return int(float(match[1]) * scales[match[2].lower()])


def chosen_classes(text: str | None) -> list[str] | None:
    """``a,b,c`` as a list, without empty names."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def show_json(value: Any) -> None:
    """One JSON object on standard output; numbers that are not finite would not be JSON and are an error."""
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def say(text: str) -> None:
    """A line for people, on standard error."""
    typer.echo(text, err=True)


def count(value: float) -> str:
    """A count for people: 1.24 M."""
    for scale, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= scale:
            return f"{value / scale:.3g}{name}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes for people: 4.62 MB."""
    return count(value).rstrip() + "B" if value >= 1e3 else f"{value:.0f} B"
