from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kinprune as kp
from kinprune.devices.device import Device, Profile
from kinprune.devices.goal import DeviceCosts, goals_of, plain_goal, reachable_goals
from kinprune.devices.profile import check_setting, is_here, latency_of
from kinprune.errors import BudgetError, DeviceError
from kinprune.selection import CostFunctions
from kinprune.units import UnitSpace


def select(space: UnitSpace, goal: kp.Goal) -> kp.Selection:
    scores = np.random.default_rng(0).random(len(space))
    return kp.select(space, scores, goal.budget, multiple=goal.multiple, costs=goal.costs)


def test_a_limit_in_milliseconds_is_met_as_foretold_and_used(device: Device, space: UnitSpace) -> None:
    (goal,) = goals_of(device, space, {})
    found = select(space, goal)
    counts = space.counts(found.mask.kept)
    assert goal.costs.latency_ms(counts[None])[0] <= 0.9
    assert goal.costs.predicted_ms(counts) > 0.75
    assert goal.multiple == 8
    assert all(count % 8 == 0 or count == size for count, size in zip(counts, space.sizes, strict=True))


def test_less_time_is_a_smaller_model(device: Device, space: UnitSpace) -> None:
    sizes = []
    for limit in (2.0, 1.5, 1.0, 0.8):
        (goal,) = goals_of(device, space, {"latency_ms": limit})
        sizes.append(select(space, goal).costs.macs)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_an_impossible_latency_is_refused_with_the_fastest_that_can_be_reached(
    device: Device, space: UnitSpace
) -> None:
    goals = goals_of(device, space, {"latency_ms": 0.01})
    with pytest.raises(
        BudgetError, match=r"pi, fp32: the budget of 0.01 ms cannot be reached: .* still needs "
    ) as told:
        reachable_goals(space, goals)
    fastest = float(str(told.value).split("still needs ")[1].split(":")[0])
    assert reachable_goals(space, goals_of(device, space, {"latency_ms": fastest}))


def test_a_limit_in_milliseconds_needs_a_profile(space: UnitSpace) -> None:
    with pytest.raises(DeviceError, match=r"no profile to foretell it .* profiled: none.*kinprune device profile"):
        goals_of(Device("mcu", {"latency_ms": 5}), space, {})
    with pytest.raises(BudgetError, match="needs a device's profile"):
        select(space, plain_goal(kp.Budget(latency_ms=5), space))


def test_a_profile_in_another_precision_does_not_serve(device: Device, space: UnitSpace) -> None:
    with pytest.raises(DeviceError, match=r"precision int8, profiled: fp32.*--precision int8"):
        goals_of(device, space, {}, precision="int8")


def test_a_device_without_limits_needs_a_budget(profile: Profile, space: UnitSpace) -> None:
    bare = Device("pi", profiles=(profile,))
    with pytest.raises(DeviceError, match="sets no limit and no budget was given"):
        goals_of(bare, space, {})
    goals = goals_of(bare, space, {"keep": 0.5})
    assert [goal.precision for goal in goals] == ["fp32", "fp16", "int8"]
    assert [goal.multiple for goal in goals] == [8, 1, 1]


def test_what_is_asked_for_comes_before_the_devices_own(device: Device, space: UnitSpace) -> None:
    (goal,) = goals_of(device, space, {"latency_ms": 1.5, "parameters": 50_000}, multiple=3)
    assert goal.budget == kp.Budget(latency_ms=1.5, parameters=50_000)
    assert goal.multiple == 24


def test_alternatives_that_cannot_be_reached_are_left_out(space: UnitSpace) -> None:
    small = int(DeviceCosts(space.costs, "int8").weight_bytes(space.sizes[None])[0])
    device = Device("mcu", {"weight_bytes": small})
    goals = reachable_goals(space, goals_of(device, space, {}))
    assert "int8" in {goal.precision for goal in goals}
    eight = next(goal for goal in goals if goal.precision == "int8")
    assert select(space, eight).costs.weight_bytes <= small
    least = DeviceCosts(space.costs, "int8").weight_bytes(np.ones((1, len(space.sizes)), dtype=np.int64))[0]
    assert least < DeviceCosts(space.costs, "fp32").weight_bytes(np.ones((1, len(space.sizes)), dtype=np.int64))[0]
    only = reachable_goals(space, goals_of(Device("mcu", {"weight_bytes": int(least)}), space, {}))
    assert [goal.precision for goal in only] == ["int8"]


def test_costs_of_a_device_are_cost_functions(device: Device, space: UnitSpace) -> None:
    (goal,) = goals_of(device, space, {})
    costs: CostFunctions = goal.costs
    assert costs.parameters(space.sizes[None])[0] == space.costs.parameters(space.sizes[None])[0]
    assert not hasattr(DeviceCosts(space.costs, "fp32"), "latency_ms")
    assert DeviceCosts(space.costs, "fp32").predicted_ms(space.sizes) is None


def test_another_number_of_threads_or_images_is_refused(device: Device, profile: Profile) -> None:
    check_setting(device, profile, None, 1)
    with pytest.raises(DeviceError, match=r"profiled with threads 1, and threads 2 is asked for"):
        check_setting(device, profile, 2, None)
    with pytest.raises(DeviceError, match=r"profiled with batch 1, and batch 4"):
        check_setting(device, profile, 1, 4)


def test_a_profile_of_elsewhere_is_not_of_here(profile: Profile) -> None:
    assert not is_here(profile)


def test_the_whole_model_is_foretold(profile: Profile, space: UnitSpace) -> None:
    found = latency_of(profile, space).predict(space.sizes[None])[0]
    assert abs(found / profile.milliseconds[0] - 1) < 0.05


def test_more_margin_asks_for_a_smaller_model(device: Device, profile: Profile, space: UnitSpace) -> None:
    noise = np.exp(np.random.default_rng(3).normal(0, 0.15, len(profile.milliseconds)))
    shaky = replace(profile, milliseconds=tuple((np.array(profile.milliseconds) * noise).tolist()))
    (sure,) = goals_of(device, space, {"latency_ms": 1.5})
    (unsure,) = goals_of(replace(device, profiles=(shaky,)), space, {"latency_ms": 1.5})
    assert unsure.costs.latency is not None
    assert unsure.costs.latency.margin > 0.1
    assert select(space, unsure).costs.macs < select(space, sure).costs.macs
