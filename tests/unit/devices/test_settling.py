from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import kinprune as kp
from kinprune.devices.goal import goals_of
from kinprune.devices.settling import ROUNDS_OF_CUTS, settle, timed_here
from kinprune.errors import BudgetError
from kinprune.units import UnitSpace


def pick(space: UnitSpace, macs: float) -> kp.Selection:
    return kp.select(space, np.arange(len(space), dtype=float), kp.Budget(macs=int(macs)))


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.3, 3.0])
def test_a_model_that_is_slower_than_foretold_is_cut_until_it_keeps_the_limit(space: UnitSpace, slower: float) -> None:
    """A device that takes ``slower`` times as many microseconds as the model has thousands of operations."""
    limit = 1_000_000.0
    timed: list[float] = []

    def milliseconds(selection: kp.Selection) -> float:
        timed.append(slower * selection.costs.macs)
        return timed[-1]

    first = pick(space, limit)
    found = settle(limit, first, lambda aim: pick(space, aim), milliseconds)
    assert slower * found.costs.macs <= limit
    assert found.costs.macs > 0.8 * limit / max(slower, 1)
    assert (found is first) == (slower <= 1)
    assert len(timed) <= ROUNDS_OF_CUTS


def test_where_nothing_smaller_is_left_the_smallest_is_given(space: UnitSpace) -> None:
    def refuse(aim: float) -> kp.Selection:
        raise BudgetError("nothing smaller")

    first = pick(space, 1_000_000)
    assert settle(1.0, first, refuse, lambda one: 2.0) is first


def test_only_limits_in_milliseconds_on_this_machine_are_timed(device: kp.Device, space: UnitSpace) -> None:
    (elsewhere,) = goals_of(device, space, {})
    assert not timed_here(elsewhere)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from kinprune.devices.device import this_machine

    own = replace(device.profiles[0], machine=this_machine(), runtime=f"onnxruntime {onnxruntime.__version__}")
    (here,) = goals_of(device.with_profile(own), space, {})
    assert timed_here(here)
    (loose,) = goals_of(replace(device.with_profile(own), limits={"macs": 1e6}), space, {})
    assert not timed_here(loose)
