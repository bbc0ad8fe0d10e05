"""Settling: a limit in milliseconds on this very machine is met by timing the model, not by foretelling it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from kinprune.devices.goal import Goal
from kinprune.devices.onnx import export_onnx, missing_package
from kinprune.devices.profile import is_here
from kinprune.devices.timing import Setting, time_loads
from kinprune.errors import BudgetError
from kinprune.preprocessing import Preprocessing
from kinprune.selection import Selection

CALIBRATION_IMAGES = 8
ROUNDS_OF_CUTS = 4
"""How often a model that runs slower than it may is cut further."""
BELOW = 0.98
"""How far below the limit the next cut aims: a timing has errors of its own."""


def settle(
    limit: float,
    selection: Selection,
    pick: Callable[[float], Selection],
    milliseconds: Callable[[Selection], float],
) -> Selection:
    """The selection, or a smaller one, whose model keeps a limit in milliseconds as it is timed.

    ``pick`` selects under another limit, ``milliseconds`` times a selection's model. Where nothing smaller is left,
    the smallest is given, slower than it may be.
    """
    aim = limit
    for _ in range(ROUNDS_OF_CUTS):
        found = milliseconds(selection)
        if found <= limit:
            break
        aim *= BELOW * limit / found
        try:
            selection = pick(aim)
        except BudgetError:
            break
    return selection


def timed_here(goal: Goal) -> bool:
    """Whether a goal has a limit in milliseconds on a device that is this machine, and models can be timed here."""
    profile = goal.profile
    return goal.budget.latency_ms is not None and profile is not None and is_here(profile) and not missing_package()


def time_model(
    model: nn.Module, goal: Goal, classes: Sequence[str], preprocessing: Preprocessing, images: Tensor
) -> float:
    """Milliseconds that a small model of ``classes`` takes on this machine in the slowest of a few loads, run as the
    goal's profile was made: a limit is to hold in any.

    ``images``, ``uint8 [n, 3, h, w]``, calibrate int8.
    """
    profile = goal.profile
    assert profile is not None
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "model.onnx"
        export_onnx(
            model,
            path,
            classes=classes,
            preprocessing=preprocessing,
            check=False,
            precision=goal.precision,
            calibration=images[:CALIBRATION_IMAGES] if goal.precision == "int8" else None,
        )
        return float(time_loads([path], [Setting(profile.threads, profile.batch)]).max())
