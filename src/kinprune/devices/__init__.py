"""Devices: pruned models in the form a device runs.

Each name is imported when it is first used: an exported model runs without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinprune.devices.calibration import Agreement
    from kinprune.devices.executorch import export_executorch
    from kinprune.devices.exported import Exported, evaluate_exported, open_exported
    from kinprune.devices.kit_run import time_models
    from kinprune.devices.onnx import OnnxExport, export_onnx, missing_package
    from kinprune.devices.program import ProgramExport
    from kinprune.devices.pt2 import export_pt2
    from kinprune.devices.runtime import OnnxMetadata, predict_onnx, read_metadata

_HOMES = {
    "Agreement": "calibration",
    "Exported": "exported",
    "OnnxExport": "onnx",
    "OnnxMetadata": "runtime",
    "ProgramExport": "program",
    "evaluate_exported": "exported",
    "export_executorch": "executorch",
    "export_onnx": "onnx",
    "export_pt2": "pt2",
    "missing_package": "onnx",
    "open_exported": "exported",
    "predict_onnx": "runtime",
    "read_metadata": "runtime",
    "time_models": "kit_run",
}

__all__ = [
    "Agreement",
    "Exported",
    "OnnxExport",
    "OnnxMetadata",
    "ProgramExport",
    "evaluate_exported",
    "export_executorch",
    "export_onnx",
    "export_pt2",
    "missing_package",
    "open_exported",
    "predict_onnx",
    "read_metadata",
    "time_models",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kinprune.devices' has no attribute {name!r}")
    return getattr(import_module(f"kinprune.devices.{_HOMES[name]}"), name)
