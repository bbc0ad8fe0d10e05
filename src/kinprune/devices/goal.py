"""Goals: what is asked of a model on a device, and what masks cost there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.device import Device, Profile, Wanted
from kinprune.devices.prediction import LatencyModel
from kinprune.devices.profile import latency_of, preferred_multiple
from kinprune.errors import BudgetError, DeviceError
from kinprune.precision import PRECISIONS, Precision
from kinprune.selection import Budget, select
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
    latencies are foretold from. Goals with the same ``wish``, a number, are alternatives: the one whose model answers
    best is kept.
    """

    budget: Budget
    costs: DeviceCosts
    device: str | None = None
    multiple: int = 1
    profile: Profile | None = None
    wish: int = 0

    @property
    def precision(self) -> Precision:
        """What the exported model stores its numbers in."""
        return self.costs.precision


def plain_goal(
    budget: Budget, space: UnitSpace, precision: Precision = "fp32", *, multiple: int = 1, wish: int = 0
) -> Goal:
    """A goal without a device."""
    return Goal(budget, DeviceCosts(space.costs, precision), multiple=multiple, wish=wish)


def goals_of(
    device: Device,
    space: UnitSpace,
    budget: Mapping[str, Any],
    *,
    precision: Wanted | None = None,
    multiple: int = 1,
    wish: int = 0,
) -> list[Goal]:
    """The goals of a device for a unit space: one for each precision that is open.

    ``budget`` has values named as in ``Budget``, which come before the device's own limits. Widths are multiples of
    what the profile prefers and of ``multiple``. ``precision`` comes before the device's own.

    Raises:
        DeviceError: the device has no limit, was profiled with another backbone, or has no profile in a precision
            that a limit in milliseconds needs.
    """
    limits = {**device.limits, **budget}
    if not limits:
        raise DeviceError(
            f"{device.name} sets no limit and no budget was given: add --max-latency 5ms or another limit, or set one "
            "with kinprune device set"
        )
    wanted = device.precision if precision is None else precision
    asked = [one for one in PRECISIONS if wanted in ("auto", one)]
    if "latency_ms" in limits:
        asked = [one for one in asked if device.profile(one) is not None]
    if not asked:
        found = ", ".join(one.precision for one in device.profiles) or "none"
        raise DeviceError(
            f"{device.name} has a limit in milliseconds but no profile to foretell it (precision {wanted}, profiled: "
            f"{found}): make one with kinprune device profile --precision {'fp32' if wanted == 'auto' else wanted}"
        )
    return [_goal(device, one, space, Budget(**limits), multiple, wish) for one in asked]


def _goal(device: Device, precision: Precision, space: UnitSpace, budget: Budget, multiple: int, wish: int) -> Goal:
    profile = device.profile(precision)
    latency = None if profile is None else latency_of(profile, space)
    preferred = 1 if latency is None else preferred_multiple(latency)
    costs = DeviceCosts(space.costs, precision, latency)
    return Goal(budget, costs, device.name, math.lcm(multiple, preferred), profile, wish)


def reachable_goals(space: UnitSpace, goals: Sequence[Goal]) -> list[Goal]:
    """Those of the goals whose budgets can be reached, whatever the scores are.

    Raises BudgetError, with the smallest that can be reached, where none of a wish's alternatives can.
    """
    found: list[Goal] = []
    refused: dict[int, BudgetError] = {}
    for goal in goals:
        try:
            select(space, np.zeros(len(space)), goal.budget, multiple=goal.multiple, costs=goal.costs)
        except BudgetError as error:
            on = "" if goal.device is None else f"{goal.device}, {goal.precision}: "
            refused.setdefault(goal.wish, BudgetError(f"{on}{error}"))
        else:
            found.append(goal)
    for wish in sorted(refused):
        if wish not in {goal.wish for goal in found}:
            raise refused[wish]
    return found
