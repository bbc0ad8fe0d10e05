"""Kinprune: prune one pre-trained vision model for many small tasks, structurally and to exact budgets.

Everything public is here; each name is imported when it is first used, so that ``import kinprune`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinprune.adapt_plan import AdaptPlan
    from kinprune.adaptation import Adapted, adapt
    from kinprune.adapted import adapted_artifact
    from kinprune.artifact import Artifact, load, save
    from kinprune.backbones import Backbone, BackboneSpec, load_backbone
    from kinprune.bank import Bank, create_bank, open_bank
    from kinprune.calibration import closed_form
    from kinprune.delivery import artifact_of
    from kinprune.devices import OnnxExport, export_onnx, predict_onnx
    from kinprune.devices.device import Device, read_device, write_device
    from kinprune.devices.goal import Goal, goals_of
    from kinprune.errors import KinpruneError
    from kinprune.evaluation import Evaluation, evaluate, predict
    from kinprune.importance import Batch, normalise, rank, score
    from kinprune.kin import Neighbour, Search, find_kin
    from kinprune.preprocessing import Preprocessing
    from kinprune.pruning import Plan, Pruned, prune
    from kinprune.selection import Budget, Selection, select, select_family
    from kinprune.tasks import (
        DecodedTask,
        Split,
        Task,
        decode,
        decode_image,
        load_task,
        load_torchvision,
        task_from_arrays,
    )
    from kinprune.training import Recipe, TrainingResult, fine_tune
    from kinprune.units import Costs, Group, Mask, UnitSpace, extract, find_units

_HOMES = {
    "adapt_plan": ("AdaptPlan",),
    "adaptation": ("Adapted", "adapt"),
    "adapted": ("adapted_artifact",),
    "artifact": ("Artifact", "load", "save"),
    "backbones": ("Backbone", "BackboneSpec", "load_backbone"),
    "bank": ("Bank", "create_bank", "open_bank"),
    "calibration": ("closed_form",),
    "delivery": ("artifact_of",),
    "devices": ("OnnxExport", "export_onnx", "predict_onnx"),
    "devices.device": ("Device", "read_device", "write_device"),
    "devices.goal": ("Goal", "goals_of"),
    "errors": ("KinpruneError",),
    "evaluation": ("Evaluation", "evaluate", "predict"),
    "importance": ("Batch", "normalise", "rank", "score"),
    "kin": ("Neighbour", "Search", "find_kin"),
    "preprocessing": ("Preprocessing",),
    "pruning": ("Plan", "Pruned", "prune"),
    "selection": ("Budget", "Selection", "select", "select_family"),
    "tasks": (
        "DecodedTask",
        "Split",
        "Task",
        "decode",
        "decode_image",
        "load_task",
        "load_torchvision",
        "task_from_arrays",
    ),
    "training": ("Recipe", "TrainingResult", "fine_tune"),
    "units": ("Costs", "Group", "Mask", "UnitSpace", "extract", "find_units"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdaptPlan",
    "Adapted",
    "Artifact",
    "Backbone",
    "BackboneSpec",
    "Bank",
    "Batch",
    "Budget",
    "Costs",
    "DecodedTask",
    "Device",
    "Evaluation",
    "Goal",
    "Group",
    "KinpruneError",
    "Mask",
    "Neighbour",
    "OnnxExport",
    "Plan",
    "Preprocessing",
    "Pruned",
    "Recipe",
    "Search",
    "Selection",
    "Split",
    "Task",
    "TrainingResult",
    "UnitSpace",
    "adapt",
    "adapted_artifact",
    "artifact_of",
    "closed_form",
    "create_bank",
    "decode",
    "decode_image",
    "evaluate",
    "export_onnx",
    "extract",
    "find_kin",
    "find_units",
    "fine_tune",
    "goals_of",
    "load",
    "load_backbone",
    "load_task",
    "load_torchvision",
    "normalise",
    "open_bank",
    "predict",
    "predict_onnx",
    "prune",
    "rank",
    "read_device",
    "save",
    "score",
    "select",
    "select_family",
    "task_from_arrays",
    "write_device",
]

try:
    __version__ = version("kinprune")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kinprune' has no attribute {name!r}")
    value = getattr(import_module(f"kinprune.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
