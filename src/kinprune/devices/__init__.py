"""Devices: pruned models in the form a device runs."""

from kinprune.devices.onnx import OnnxExport, OnnxMetadata, export_onnx, predict_onnx, read_metadata

__all__ = ["OnnxExport", "OnnxMetadata", "export_onnx", "predict_onnx", "read_metadata"]
