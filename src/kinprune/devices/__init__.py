"""Devices: pruned models in the form a device runs."""

from kinprune.devices.latency import measure_latencies
from kinprune.devices.onnx import OnnxExport, OnnxMetadata, export_onnx, missing_package, predict_onnx, read_metadata

__all__ = [
    "OnnxExport",
    "OnnxMetadata",
    "export_onnx",
    "measure_latencies",
    "missing_package",
    "predict_onnx",
    "read_metadata",
]
