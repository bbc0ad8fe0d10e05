"""Options that ask for models of a device: its file, its latency, the precision of its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import BUDGET, DEVICE
from kinprune.cli.values import time, whole
from kinprune.errors import BudgetError, DeviceError

if TYPE_CHECKING:
    from kinprune.devices.device import Device, Wanted
    from kinprune.devices.goal import Goal
    from kinprune.units import UnitSpace

MaxLatency = Annotated[
    float | None,
    typer.Option(
        "--max-latency",
        metavar="TIME",
        parser=time,
        rich_help_panel=BUDGET,
        help="Longest time of one run on the device of --device-profile: 5ms.",
    ),
]
DeviceProfile = Annotated[
    Path | None,
    typer.Option(
        "--device-profile",
        metavar="FILE",
        rich_help_panel=DEVICE,
        help="The device that the model is for, a file of kinprune device: its limits hold, and widths are those it "
        "likes.",
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="FILE,...",
        rich_help_panel=DEVICE,
        help="Files of several devices: one model for each, within its own limits, all from one score mask.",
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        rich_help_panel=DEVICE,
        help="How the exported model stores numbers: fp32, fp16, int8, or auto for the one that answers held-back "
        "images best within the limits. [default: the device's own, else fp32]",
    ),
]
InferenceThreads = Annotated[
    int | None,
    typer.Option(
        "--inference-threads",
        metavar="N",
        parser=whole(1),
        rich_help_panel=DEVICE,
        help="CPU threads that the model will run with on the device; refused if it was profiled with others.",
    ),
]
InferenceBatch = Annotated[
    int | None,
    typer.Option(
        "--inference-batch",
        metavar="N",
        parser=whole(1),
        rich_help_panel=DEVICE,
        help="Images that it will run at a time; refused if the device was profiled with others.",
    ),
]


def read_devices(
    one: Path | None, several: str | None, *, threads: int | None, batch: int | None
) -> tuple[Device, ...]:
    """The devices that were asked for, checked against how their models are to run."""
    if one is not None and several is not None:
        raise DeviceError("both --device-profile and --devices are given, expected one of them")
    paths = [] if one is None else [one]
    if several is not None:
        paths = [Path(part.strip()) for part in several.split(",") if part.strip()]
        if not paths:
            raise DeviceError("--devices names no file, expected some such as pi.json,phone.json")
    if not paths:
        if threads is not None or batch is not None:
            raise DeviceError("--inference-threads and --inference-batch are of a device: give --device-profile too")
        return ()
    from kinprune.devices.device import read_device
    from kinprune.devices.profile import check_setting

    devices = tuple(read_device(path) for path in paths)
    names = [device.name for device in devices]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DeviceError(f"two devices are called {twice!r}: give one another name with kinprune device set --name")
    for device in devices:
        for profile in device.profiles:
            check_setting(device, profile, threads, batch)
    return devices


def check_precision(name: str | None) -> Wanted | None:
    """A precision that there is, or *auto*; None where none was given."""
    known = ("auto", "fp32", "fp16", "int8")
    if name is not None and name not in known:
        raise DeviceError(f"there is no precision '{name}', expected one of: {', '.join(known)}")
    return name  # type: ignore[return-value]


def goals_for(
    space: UnitSpace,
    budgets: Sequence[Mapping[str, Any]],
    devices: Sequence[Device],
    precision: Wanted | None,
    multiple: int,
) -> list[Goal]:
    """The goals of every budget and device, widths rounded to ``multiple``; several budgets are of one device, or none.

    What cannot be reached, in no precision that is open, is refused with BudgetError.
    """
    from kinprune.devices.goal import goals_of, plain_goal
    from kinprune.precision import PRECISIONS
    from kinprune.selection import Budget

    goals: list[Goal] = []
    if not devices:
        open_to = [one for one in PRECISIONS if (precision or "fp32") in ("auto", one)]
        for wish, budget in enumerate(budgets):
            goals += [plain_goal(Budget(**budget), space, one, multiple=multiple, wish=wish) for one in open_to]
        return goals
    if len(devices) > 1 and len(budgets) > 1:
        raise BudgetError("both --sizes and several devices are given, expected one of them")
    for number, device in enumerate(devices):
        for place, budget in enumerate(budgets):
            wish = number + place
            goals += goals_of(device, space, budget, precision=precision, multiple=multiple, wish=wish)
    return goals
