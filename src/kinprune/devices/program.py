"""A program: a model as an exported file of PyTorch's or ExecuTorch's own, and what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kinprune.artifact.description import installed
from kinprune.devices.runtime import OnnxMetadata, describe_metadata, parse_metadata
from kinprune.devices.source import Source, greatest_difference
from kinprune.errors import ExportError

TOLERANCE = 1e-4
KEY = "kinprune"
"""What a program calls its metadata."""


@dataclass(frozen=True)
class ProgramExport:
    """An exported program; ``bytes``, ``max_difference`` and ``runtime`` are as in ``OnnxExport``."""

    path: Path
    bytes: int
    max_difference: float
    runtime: str


def describe_program(source: Source) -> str:
    """What a program's file is to say of itself, as ASCII."""
    return json.dumps(describe_metadata(source.classes, source.preprocessing, installed("kinprune"), "fp32"))


def read_program_metadata(text: str, path: Path) -> OnnxMetadata:
    """What a program's file says of itself. Raises ExportError."""
    try:
        stored = json.loads(text)
    except ValueError:
        stored = {}
    return parse_metadata(stored if isinstance(stored, dict) else {}, path)


def compare_program(
    source: Source,
    answer: Callable[[Tensor], NDArray[np.float32]],
    runtime: str,
    tolerance: float,
    seed: int,
    batches: tuple[int, ...],
) -> float:
    """The greatest difference from PyTorch. Raises ExportError above ``tolerance``."""
    difference = greatest_difference(source, answer, runtime, seed, batches)
    if not difference <= tolerance:
        raise ExportError(
            f"{runtime} answers otherwise than PyTorch by {difference:.2g}, expected at most {tolerance:.2g}: "
            "export to ONNX, or give a greater tolerance"
        )
    return difference
