"""Devices: what one can hold and how fast it is, as a file that a person may read and no one can change unseen.

A device has limits and, for each precision that it was timed in, a profile: how long it takes for a few hundred small
models of one backbone. The file holds what was measured; what is foretold from it is worked out when it is used. This
module needs nothing but Python: the kit that runs on devices writes the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from kinprune.errors import DeviceError
from kinprune.precision import PRECISIONS, Precision

FORMAT = 1
LIMITS = ("parameters", "macs", "weight_bytes", "peak_memory_bytes", "latency_ms")
"""The limits that a device may set, named as in ``selection.Budget``."""
LEAST_SAMPLES = 20
Wanted = Literal["auto", "fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Profile:
    """Latencies of one backbone's small models on one machine, run in one way.

    ``milliseconds`` are of one run of ``batch`` images with ``threads`` threads, for models that keep ``counts`` units
    of each group; the first is the whole model. ``units`` is the unit space's fingerprint.
    """

    model: str
    units: str
    image_size: tuple[int, int]
    precision: Precision
    runtime: str
    machine: Mapping[str, str]
    threads: int
    batch: int
    counts: tuple[tuple[int, ...], ...]
    milliseconds: tuple[float, ...]


@dataclass(frozen=True)
class Device:
    """A device: ``limits`` by their names in ``LIMITS``, the ``precision`` of its models (*auto*: the one whose model
    answers best under the limits), and a profile for each precision that it was timed in.
    """

    name: str
    limits: Mapping[str, float] = field(default_factory=dict)
    precision: Wanted = "auto"
    profiles: tuple[Profile, ...] = ()

    def profile(self, precision: Precision) -> Profile | None:
        """The profile of a precision, where there is one."""
        return next((one for one in self.profiles if one.precision == precision), None)

    def with_profile(self, profile: Profile) -> Device:
        """The device with one more profile, in the place of one of the same precision."""
        others = tuple(one for one in self.profiles if one.precision != profile.precision)
        return replace(self, profiles=tuple(sorted((*others, profile), key=lambda one: one.precision)))


def this_machine() -> dict[str, str]:
    """What tells this machine from others: what matters for how fast a model runs, and a hash of its name.

    Virtual machines say little of their processors: the name keeps two of them apart.
    """
    name = hashlib.sha256(platform.node().encode()).hexdigest()[:12]
    return {"system": platform.system(), "processor": _processor(), "cores": str(os.cpu_count()), "name": name}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model", "Hardware"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_device(device: Device, path: Path) -> None:
    """Write a device's file; one that is there is replaced once the new one is complete."""
    check_device(device)
    content = {"kinprune_device": FORMAT, **asdict(device)}
    text = _render({**content, "digest": _digest(content)})
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.write_text(text)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DeviceError(f"{path} cannot be written ({error.strerror}): choose another place") from error


def read_device(path: str | Path) -> Device:
    """A device from its file. Raises DeviceError where it is damaged, was altered, or is of a newer version."""
    place = Path(path).expanduser()
    try:
        content = json.loads(place.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"{place} cannot be read ({error}): give a file of kinprune device") from error
    except (ValueError, RecursionError) as error:
        raise DeviceError(f"{place} is damaged, it is no JSON ({error}): make it again, or copy it again") from error
    number = content.get("kinprune_device") if isinstance(content, dict) else None
    if type(number) is not int:
        raise DeviceError(f"{place} describes no device: give a file that kinprune device wrote")
    if number > FORMAT:
        raise DeviceError(f"{place} has format {number}, here up to {FORMAT} is read: upgrade Kinprune")
    given = {key: value for key, value in content.items() if key != "digest"}
    if content.get("digest") != _digest(given):
        raise DeviceError(f"{place} was altered or damaged after it was written: change it with kinprune device set")
    try:
        device = _device({key: value for key, value in given.items() if key != "kinprune_device"})
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"{place} is no whole description of a device ({error}): make it again") from error
    check_device(device)
    return device


def _device(content: Mapping[str, Any]) -> Device:
    profiles = [
        Profile(
            **{
                **one,
                "image_size": tuple(one["image_size"]),
                "counts": tuple(tuple(row) for row in one["counts"]),
                "milliseconds": tuple(one["milliseconds"]),
            }
        )
        for one in content["profiles"]
    ]
    return Device(**{**content, "profiles": tuple(profiles)})


def check_device(device: Device) -> None:
    """Raise DeviceError where a device contradicts itself."""
    if not device.name or device.name in (".", "..") or set("/\\") & set(device.name):
        raise DeviceError(f"a device cannot be called {device.name!r}: expected a name that a folder can have")
    if device.precision not in get_args(Wanted):
        raise DeviceError(f"there is no precision '{device.precision}', expected one of: {', '.join(get_args(Wanted))}")
    for name, limit in device.limits.items():
        if name not in LIMITS:
            raise DeviceError(f"{device.name} limits {name!r}, expected one of: {', '.join(LIMITS)}")
        if type(limit) not in (int, float) or not math.isfinite(limit) or limit <= 0:
            raise DeviceError(f"the limit {name} of {device.name} is {limit!r}, expected a number above 0")
    for profile in device.profiles:
        _check_profile(device.name, profile)
    if len({profile.precision for profile in device.profiles}) < len(device.profiles):
        raise DeviceError(f"{device.name} has two profiles of the same precision: profile it again")


def _check_profile(name: str, profile: Profile) -> None:
    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise DeviceError(f"the profile of {name} {problem}: profile it again")

    require(profile.precision in PRECISIONS, f"is of the unknown precision {profile.precision!r}")
    for count in (profile.threads, profile.batch, *profile.image_size):
        require(type(count) is int and count >= 1, f"has threads, batch or pixels of {count!r}")
    require(len(profile.counts) == len(profile.milliseconds), "has not as many models as latencies")
    require(len(profile.counts) >= LEAST_SAMPLES, f"has fewer than {LEAST_SAMPLES} models")
    widths = {len(row) for row in profile.counts}
    require(len(widths) == 1, "has models of different numbers of groups")
    require(all(type(kept) is int and kept >= 1 for row in profile.counts for kept in row), "keeps less than one unit")
    require(
        all(type(value) is float and math.isfinite(value) and value > 0 for value in profile.milliseconds),
        "has a latency that is no time",
    )


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _render(content: Mapping[str, Any]) -> str:
    """JSON with a line a key, and a line a profile's key."""
    profiles = [
        "{" + ",\n   ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in one.items()) + "}"
        for one in content["profiles"]
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "profiles"]
    return "{\n" + ",\n".join([*lines, ' "profiles": [' + ",\n  ".join(profiles) + "]"]) + "\n}\n"
