"""Goals: what is asked of a model on a device, and what masks cost there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.device import Device, Profile
from kinprune.devices.prediction import LatencyModel
from kinprune.devices.profile import latency_of, preferred_multiple
from kinprune.errors import DeviceError
from kinprune.precision import PRECISIONS, Precision
from kinprune.selection import Budget
from kinprune.units import CostModel, Costs, UnitSpace

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DeviceCosts:
    """What masks cost in a precision; with a profile, in milliseconds too (as ``selection.CostFunctions``).

    ``latency_ms`` is what is hardly ever exceeded: a budget in milliseconds is to be met, not met on average.
    """

    base: CostModel
    precision: Precision
    latency: LatencyModel | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "latency_ms" and self.latency is not None:
            return self.latency.bound
        raise AttributeError(name)

    def parameters(self, counts: Counts) -> Counts:
        return self.base.parameters(counts)

    def macs(self, counts: Counts) -> Counts:
        return self.base.macs(counts)

    def weight_bytes(self, counts: Counts) -> Counts:
        return self.base.weight_bytes(counts, self.precision)

    def peak_memory_bytes(self, counts: Counts) -> Counts:
        return self.base.peak_memory_bytes(counts, self.precision)

    def of(self, counts: Sequence[int] | Counts) -> Costs:
        return self.base.of(counts, self.precision)

    def predicted_ms(self, counts: Counts) -> float | None:
        """The latency that is to be expected of counts ``[g]``; None without a profile."""
        return None if self.latency is None else float(self.latency.predict(counts[None])[0])


@dataclass(frozen=True, eq=False)
class Goal:
    """One model that is asked for: its budget, and the device and precision that the budget counts in.

    ``device`` is None where no device was named; ``multiple`` is what widths are rounded to there, ``profile`` what
    latencies are foretold from. Goals of one ``device`` are alternatives: the one whose model answers best is kept.
    """

    budget: Budget
    costs: DeviceCosts
    device: str | None = None
    multiple: int = 1
    profile: Profile | None = None

    @property
    def precision(self) -> Precision:
        """What the exported model stores its numbers in."""
        return self.costs.precision


def plain_goal(budget: Budget, space: UnitSpace, precision: Precision = "fp32", multiple: int = 1) -> Goal:
    """A goal without a device."""
    return Goal(budget, DeviceCosts(space.costs, precision), multiple=multiple)


def goals_of(
    device: Device, space: UnitSpace, limits: Mapping[str, Any], *, multiple: int = 1, keep: float | None = None
) -> list[Goal]:
    """The goals of a device for a unit space: one for each precision that is open.

    ``limits``, named as in ``Budget``, come before the device's own; a share of the units to ``keep`` may be added.
    Widths are multiples of what the profile prefers and of ``multiple``.

    Raises:
        DeviceError: the device has no limit, was profiled with another backbone, or has no profile in a precision
            that a limit in milliseconds needs.
    """
    limits = {**device.limits, **limits}
    if not limits and keep is None:
        raise DeviceError(
            f"{device.name} sets no limit and no budget was given: add --max-latency 5ms or another limit, or set one "
            "with kinprune device set"
        )
    goals = [
        _goal(device, precision, space, limits, multiple, keep)
        for precision in _open(device, needs_profile="latency_ms" in limits)
    ]
    if not goals:
        found = ", ".join(one.precision for one in device.profiles) or "none"
        wanted = "fp32" if device.precision == "auto" else device.precision
        raise DeviceError(
            f"{device.name} has a limit in milliseconds but no profile to foretell it (precision {device.precision}, "
            f"profiled: {found}): make one with kinprune device profile --precision {wanted}"
        )
    return goals


def _open(device: Device, *, needs_profile: bool) -> list[Precision]:
    wanted = [one for one in PRECISIONS if device.precision in ("auto", one)]
    return [one for one in wanted if device.profile(one) is not None or not needs_profile]


def _goal(
    device: Device,
    precision: Precision,
    space: UnitSpace,
    limits: Mapping[str, Any],
    multiple: int,
    keep: float | None,
) -> Goal:
    profile = device.profile(precision)
    latency = None if profile is None else latency_of(profile, space)
    preferred = 1 if latency is None else preferred_multiple(latency)
    costs = DeviceCosts(space.costs, precision, latency)
    return Goal(Budget(keep=keep, **limits), costs, device.name, int(np.lcm(multiple, preferred)), profile)
