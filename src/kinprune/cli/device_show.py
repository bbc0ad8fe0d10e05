"""What is shown of a device: its limits, how it was timed, and what its latencies say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kinprune.cli.output import console
from kinprune.quantities import byte_count, count, milliseconds

if TYPE_CHECKING:
    from kinprune.devices.device import Device, Profile
    from kinprune.units import UnitSpace

LEVELS = (0.5, 0.2, 0.1, 0.05)
_FORMS = {
    "parameters": lambda value: f"{count(value)} parameters",
    "macs": lambda value: f"{count(value)} MACs",
    "weight_bytes": lambda value: f"{byte_count(value)} of weights",
    "peak_memory_bytes": lambda value: f"{byte_count(value)} of memory",
    "latency_ms": milliseconds,
}


def describe_device(device: Device, space: UnitSpace | None = None) -> dict[str, Any]:
    """A device in JSON's own types; with a unit space what is foretold of it."""
    return {
        "name": device.name,
        "precision": device.precision,
        "limits": dict(device.limits),
        "profiles": [_describe(profile, space) for profile in device.profiles],
    }


def _describe(profile: Profile, space: UnitSpace | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "precision": profile.precision,
        "model": profile.model,
        "image_size": list(profile.image_size),
        "runtime": profile.runtime,
        "machine": dict(profile.machine),
        "threads": profile.threads,
        "batch": profile.batch,
        "samples": len(profile.counts),
        "whole_ms": profile.milliseconds[0],
        "fastest_ms": min(profile.milliseconds),
    }
    if space is None:
        return found
    from kinprune.devices.profile import latency_of, preferred_multiple
    from kinprune.devices.widths import round_counts

    model = latency_of(profile, space)
    multiple = preferred_multiple(model)
    levels = {
        f"{level:g}": float(model.predict(round_counts(space, space.sizes * level, multiple)[None])[0])
        for level in LEVELS
    }
    return {**found, "error": model.error, "margin": model.margin, "multiple": multiple, "foretold_ms": levels}


def print_device(device: Device, space: UnitSpace | None = None) -> None:
    """A device for people."""
    from rich.table import Table

    shown = console()
    limits = ", ".join(_FORMS[name](value) for name, value in device.limits.items()) or "none"
    shown.print(f"{device.name}: limits {limits}; precision {device.precision}.")
    if not device.profiles:
        shown.print("It was not timed: limits in milliseconds need a profile.")
        return
    described = [_describe(profile, space) for profile in device.profiles]
    table = Table()
    for name in ("", "whole", *(f"keep {level:g}" for level in LEVELS if space is not None), "error", "widths"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for one in described:
        foretold = [milliseconds(value) for value in one.get("foretold_ms", {}).values()]
        told = [f"{one['error']:.1%}", f"{one['multiple']}"] if "error" in one else ["", ""]
        table.add_row(one["precision"], milliseconds(one["whole_ms"]), *foretold, *told)
    shown.print(table)
    first = described[0]
    size = " x ".join(str(side) for side in first["image_size"])
    shown.print(
        f"{first['model']} at {size} pixels in {first['runtime']}, threads {first['threads']}, batch {first['batch']}, "
        f"on {first['machine'].get('processor', 'an unknown processor')}."
    )
    if space is not None:
        shown.print(
            "Foretold for a share of all units kept; error: median, on models that had no part in the fit; "
            "widths: multiples that the device likes."
        )
