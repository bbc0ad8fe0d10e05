"""ExecuTorch: a pruned model as a ``.pte`` file for phones and small devices, lowered to XNNPACK where that can.

The program takes one image at a time: its memory is planned when it is written, and a greater batch would make it
greater for every image. The file holds no code and no pickle, and knows its classes and preprocessing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.artifact import Artifact
from kinprune.artifact.description import installed
from kinprune.artifact.files import directory_beside
from kinprune.devices.program import (
    KEY,
    TOLERANCE,
    ProgramExport,
    compare_program,
    describe_program,
    read_program_metadata,
)
from kinprune.devices.pt2 import trace
from kinprune.devices.quiet import quiet
from kinprune.devices.runtime import OnnxMetadata
from kinprune.devices.source import check_classes, check_target, publish, random_images, source_of
from kinprune.errors import ExportError
from kinprune.preprocessing import Preprocessing


def export_executorch(
    model: Artifact | nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> ProgramExport:
    """Export an artifact, or a model with its ``classes`` and ``preprocessing``, to the file ``path``, in fp32.

    The program takes one normalised image, ``float32 [1, 3, h, w]``. ExecuTorch's own runtime runs it on random
    images (by ``seed``) before it takes the place of a file of before. The model is not changed.

    Raises:
        ExportError: ExecuTorch is missing, ``path`` cannot be written, the model cannot be exported, or the program
            answers otherwise than the model by more than ``tolerance``. Nothing is left behind.
    """
    target = check_target(Path(path).expanduser(), ".pte")
    _package("executorch.runtime")
    source = source_of(model, classes, preprocessing)
    check_classes(source, seed)
    program = trace(source.model, random_images(source.preprocessing, 1, seed), dynamic=False)
    try:
        with directory_beside(target, "tmp") as temporary:
            written = temporary / target.name
            written.write_bytes(_lower(program, describe_program(source)))
            _, answer = open_executorch(written)
            runtime = f"ExecuTorch {installed('executorch')}"

            def run_each(images: Tensor) -> NDArray[np.float32]:
                return answer([images.numpy()])

            difference = compare_program(source, run_each, runtime, tolerance, seed, (1, 2))
            size = publish(temporary, target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}): free space, or choose another folder") from error
    return ProgramExport(target, size, difference, installed("executorch"))


def open_executorch(
    path: Path,
) -> tuple[OnnxMetadata, Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]]]:
    """What a file says of itself, and what answers batches of normalised images. Raises ExportError."""
    if not path.is_file():
        raise ExportError(f"{path} is {'no file' if path.exists() else 'not there'}: give the file of an export")
    runtime = _package("executorch.runtime")
    try:
        program = runtime.Runtime.get().load_program(path, verification=runtime.Verification.InternalConsistency)
        said = program.load_method(KEY).execute([])[0] if KEY in program.method_names else ""
        method = program.load_method("forward")
    except Exception as error:  # the runtime's errors have no base of their own; the cause stays attached
        raise ExportError(f"ExecuTorch cannot read {path.name}: {error}; export it again") from error
    metadata = read_program_metadata(str(said), path)

    def answer(batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        images = (torch.from_numpy(image[None].copy()) for batch in batches for image in batch)
        # An answer lies in the program's own memory, which the next one uses.
        found: NDArray[np.float32] = torch.cat([method.execute([image])[0].clone() for image in images]).numpy()
        return found

    return metadata, answer


def _lower(program: Any, said: str) -> bytes:
    exir = _package("executorch.exir")
    partitioner = _package("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    try:
        with quiet():
            edge = exir.to_edge_transform_and_lower(
                program, partitioner=[partitioner.XnnpackPartitioner()], constant_methods={KEY: said}
            )
            return bytes(edge.to_executorch().buffer)
    except Exception as error:  # lowering raises errors of many kinds; the cause stays attached
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"ExecuTorch cannot lower the model: {reason}; export to ONNX") from error


def _package(name: str) -> Any:
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ExecuTorch is not installed, or does not fit PyTorch {torch.__version__} ({error}): "
            'pip install "kinprune[executorch]"'
        ) from error
