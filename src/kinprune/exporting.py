"""Exporting: an adaptation's models in the form that devices run, each tried there before it is called done."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from kinprune.adaptation import Adapted, Sized
from kinprune.artifact.files import settle_names
from kinprune.artifact.storage import EXPORTED
from kinprune.devices import evaluate_exported, export_onnx
from kinprune.devices.goal import Goal
from kinprune.devices.memory import MemoryUse, measure_memory
from kinprune.devices.profile import is_here
from kinprune.devices.timing import Setting, time_models
from kinprune.report import Tried
from kinprune.tasks import DecodedTask, Split
from kinprune.training import hold_back

OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Shipped:
    """An exported model as this machine found it.

    ``accuracy`` is the exported file's on the test images, ``guard`` on the training images that were held back.
    ``latency_ms`` is of one run with the ``setting``'s threads and batch: the device's own where this machine is it.
    ``predicted_ms`` is what the device's profile had foretold, ``on_device`` whether the profile is of this machine.
    ``memory`` was measured where memory was limited, on Linux.
    """

    path: Path
    bytes: int
    accuracy: float
    guard: float
    latency_ms: float
    setting: Setting
    predicted_ms: float | None
    on_device: bool
    memory: MemoryUse | None

    def tried(self) -> Tried:
        """What the report tells of it."""
        return Tried(self.accuracy, None if self.memory is None else self.memory.peak_bytes)

    def to_json(self, sized: Sized) -> dict[str, Any]:
        """What a script wants to know of it."""
        goal = sized.goal
        return {
            "device": goal.device,
            "precision": goal.precision,
            "multiple": goal.multiple,
            "exported_bytes": self.bytes,
            "accuracy_exported": self.accuracy,
            "latency_ms": self.latency_ms,
            "latency_threads": self.setting.threads,
            "latency_batch": self.setting.batch,
            "latency_on_device": self.on_device,
            "predicted_ms": self.predicted_ms,
            "memory": None if self.memory is None else asdict(self.memory),
        }


def ship(adapted: Adapted, task: DecodedTask, folder: Path, tell: OnStage) -> tuple[float, tuple[Shipped, ...]]:
    """Export every model into ``folder`` and try it: the whole model's milliseconds, then what was found of each."""
    fit, guard = hold_back(task.train, adapted.plan.recipe.hold_back, adapted.plan.recipe.seed)
    whole = _export(adapted.whole_model, folder / "whole", task, None, fit, tell)
    paths = [
        _export(sized.model, folder / str(place), task, sized.goal, fit, tell)
        for place, sized in enumerate(adapted.sizes)
    ]
    tell("latency")
    settings = [_setting(sized.goal) for sized in adapted.sizes]
    latencies = time_models([whole, *paths], [Setting(), *settings])
    tell("trying the exports")
    found = []
    for sized, path, setting, latency in zip(adapted.sizes, paths, settings, latencies[1:], strict=True):
        counts = adapted.space.counts(sized.selection.mask.kept)
        accuracy = evaluate_exported(path, task.test).accuracy
        measured = sized.budget.peak_memory_bytes is not None and sys.platform == "linux"
        found.append(
            Shipped(
                path,
                path.stat().st_size,
                accuracy,
                accuracy if guard is None else evaluate_exported(path, guard).accuracy,
                latency,
                setting,
                sized.goal.costs.predicted_ms(counts),
                sized.goal.profile is not None and is_here(sized.goal.profile),
                measure_memory(path, threads=setting.threads) if measured else None,
            )
        )
    return latencies[0], tuple(found)


def keep_best(adapted: Adapted, shipped: Sequence[Shipped]) -> tuple[Adapted, tuple[Shipped, ...]]:
    """Of the models that are alternatives, the one that answers the held-back images best; of equals the fastest."""
    wishes: dict[int, list[int]] = {}
    for place, sized in enumerate(adapted.sizes):
        wishes.setdefault(sized.goal.wish, []).append(place)
    best = [
        max(places, key=lambda place: (shipped[place].guard, -shipped[place].latency_ms)) for places in wishes.values()
    ]
    return replace(adapted, sizes=tuple(adapted.sizes[place] for place in best)), tuple(shipped[one] for one in best)


def move_into(shipped: Shipped, folder: Path) -> None:
    """Move an export to where its artifact lies; weights that are in a file of their own come first."""
    files = sorted(shipped.path.parent.iterdir(), key=lambda file: file == shipped.path)
    for file in files:
        shutil.move(file, folder / file.name)
    settle_names(folder.absolute())


def _setting(goal: Goal) -> Setting:
    profile = goal.profile
    return Setting() if profile is None else Setting(profile.threads, profile.batch)


def _export(model: nn.Module, folder: Path, task: DecodedTask, goal: Goal | None, fit: Split, tell: OnStage) -> Path:
    tell("export")
    folder.mkdir()
    precision = "fp32" if goal is None else goal.precision
    calibration = fit.images if precision == "int8" else None
    return export_onnx(
        model,
        folder / EXPORTED,
        classes=task.classes,
        preprocessing=task.preprocessing,
        precision=precision,
        calibration=calibration,
    ).path
