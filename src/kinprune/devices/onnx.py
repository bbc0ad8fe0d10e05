"""ONNX: a pruned model as one file that ONNX Runtime and others run, checked against PyTorch before it is kept.

The model takes ``images`` (normalised, float32 ``[batch, 3, h, w]``) and gives ``logits`` (float32 ``[batch, k]``) for
any batch, in every precision. The file knows its classes, preprocessing and precision, so that it can be used alone:
``read_metadata`` and ``predict_onnx`` need nothing but ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.artifact import Artifact
from kinprune.artifact.description import installed
from kinprune.artifact.files import directory_beside
from kinprune.devices.calibration import Agreement, agreement, calibration_images, check_agreement
from kinprune.devices.halving import halve
from kinprune.devices.quantising import quantise
from kinprune.devices.quiet import quiet
from kinprune.devices.runtime import (
    OnnxMetadata,
    answers,
    describe_metadata,
    normalised,
    open_session,
    package,
    predict_onnx,
    read_metadata,
    start_session,
)
from kinprune.devices.source import (
    Source,
    check_classes,
    check_target,
    greatest_difference,
    publish,
    random_images,
    run,
    source_of,
)
from kinprune.errors import ExportError
from kinprune.precision import PRECISIONS, Precision
from kinprune.preprocessing import Preprocessing

__all__ = [
    "OnnxExport",
    "OnnxMetadata",
    "export_onnx",
    "missing_package",
    "open_session",
    "predict_onnx",
    "read_metadata",
]

OPSET = 20
"""The default version of the operators: the first with a GELU of its own, read by ONNX Runtime from 1.17 on."""

OLDEST_OPSET = 18  # PyTorch translates to this one or newer
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2}
"""Rounding all weights to 11 bits moves the logits of a pruned MobileNetV2 by up to 8e-3, of others by 1e-3."""


@dataclass(frozen=True)
class OnnxExport:
    """An exported model.

    ``bytes`` is the size of all its files. ``max_difference`` is the greatest difference of a logit from PyTorch's, in
    parts of the greatest logit where that is above 1; None if unchecked. ``runtime`` is ONNX Runtime's version.
    ``agreement`` says how alike an int8 file and the model answer the calibration images, None for other precisions;
    ``in_float`` names the layers that are not in int8 because too much was lost there.
    """

    path: Path
    bytes: int
    max_difference: float | None
    opset: int
    runtime: str | None
    precision: Precision = "fp32"
    agreement: Agreement | None = None
    in_float: tuple[str, ...] = ()


def export_onnx(
    model: Artifact | nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    precision: Precision = "fp32",
    calibration: Tensor | None = None,
    opset: int = OPSET,
    check: bool = True,
    tolerance: float | None = None,
    seed: int = 0,
) -> OnnxExport:
    """Export an artifact, or a model with its ``classes`` and ``preprocessing``, to the file ``path``.

    It is one file, unless the weights take more than 1.5 GB in fp32: then they are in ``<path>.data`` beside it. With
    ``check``, ONNX Runtime answers random images (by ``seed``) in batches of 1, 2 and 5; ``tolerance`` is by default
    that of ``TOLERANCES``. A file of before is replaced once the new one is complete and right. The model is not
    changed and may lie on any device.

    *fp16* halves what is stored; arithmetic is in fp32, as fast as there. *int8* needs ``calibration``, images
    ``uint8 [n, 3, h, w]`` of the kind that the model is for, of all classes: up to 256, evenly spaced, decide which
    values eight bits stand for. It is checked by its answers to them: at least half of what the model and chance
    leave to agree on has to be agreed on, and an answer must not depend on the batch. Without ``check``, no layer
    is left in float because of what it would cost in accuracy.

    Raises:
        ExportError: a package is missing, ``path`` cannot be written, the model cannot be exported, images for int8
            are missing or unfit, or ONNX Runtime answers otherwise than PyTorch by more than ``tolerance``, in int8
            like chance. Nothing is left behind.
    """
    target = check_target(Path(path).expanduser(), ".onnx")
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    source = source_of(model, classes, preprocessing)
    images = calibration_images(calibration, source.preprocessing) if precision == "int8" else None
    newest = package("onnx").defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportError(f"opset is {opset}, expected {OLDEST_OPSET} to {newest}: {OPSET} runs nearly everywhere")
    package("onnxscript")
    runtime = package("onnxruntime") if check or images is not None else None
    check_classes(source, seed)
    limit = TOLERANCES.get(precision, 0.0) if tolerance is None else tolerance
    try:
        with directory_beside(target, "tmp") as temporary:
            written = temporary / target.name
            program = _translate(source.model, random_images(source.preprocessing, 2, seed), opset)
            _describe(program.model, source, precision)
            program.save(written)
            found: Agreement | None = None
            in_float: tuple[str, ...] = ()
            if precision != "fp32":
                found, in_float = _shrink(written, source, precision, images, check)
            difference = None
            if check and precision == "int8":
                difference = _compare_batches(written, source, seed)
            elif check:
                difference = _compare(written, source, seed, limit, opset)
            size = publish(temporary, target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}): free space, or choose another folder") from error
    version = None if runtime is None else runtime.__version__
    return OnnxExport(target, size, difference, opset, version, precision, found, in_float)


def missing_package(*, check: bool = True) -> str | None:
    """The first package that an export needs and that is not installed; None where all are."""
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _translate(model: nn.Module, images: Tensor, opset: int) -> torch.onnx.ONNXProgram:
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"PyTorch cannot export the model to ONNX: {reason}; have no branch on values in its forward, "
            "or try a newer PyTorch"
        ) from error
    assert program is not None  # None comes only from the exporter of before
    batch = program.model.graph.inputs[0].shape
    if batch is None or isinstance(batch[0], int):
        raise ExportError("the model takes batches of one size only: expected one that treats images one by one")
    made = program.model.opset_imports.get("")
    if made != opset:
        raise ExportError(f"the model cannot be written with opset {opset}, only with {made}: choose that one")
    return program


def _describe(model: Any, source: Source, precision: Precision) -> None:
    """Write what the file is to know, and remove what it should not: where on this machine each operation was made."""
    for node in model.graph:
        node.doc_string = None
        for item in (node, *node.outputs):
            item.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(
        describe_metadata(source.classes, source.preprocessing, installed("kinprune"), precision)
    )


def _shrink(
    path: Path, source: Source, precision: Precision, images: NDArray[np.uint8] | None, check: bool
) -> tuple[Agreement | None, tuple[str, ...]]:
    """Put the file at ``path`` into another precision, in its place: how alike int8 answers, and what stays in float.

    Raises ExportError for weights that are beside the file, and, with ``check``, for answers in int8 like chance.
    """
    onnx = package("onnx")
    if len(list(path.parent.iterdir())) > 1:
        raise ExportError(f"the weights take more than one file can hold: export the model in fp32, not {precision}")
    if images is None:
        small = onnx.load(path)
        halve(small)
        onnx.save(small, path)
        return None, ()
    height, width = source.preprocessing.image_size
    batches = normalised(images, source.preprocessing, max(1, min(32, 32 * 96 * 96 // (height * width))))
    expected = np.concatenate([run(source.model, torch.from_numpy(batch)).numpy() for batch in batches])
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    with quiet():
        made = quantise(path, batches, expected, search=check)
    onnx.helper.set_model_props(made.model, metadata)
    onnx.save(made.model, path)
    found = agreement(made.logits, expected)
    if check:
        check_agreement(found)
    return found, made.in_float


def _compare(path: Path, source: Source, seed: int, tolerance: float, opset: int) -> float:
    runtime = package("onnxruntime")
    session = start_session(runtime, path, advice=f"try a lower opset, down to {OLDEST_OPSET}")
    difference = greatest_difference(source, lambda images: answers(session, [images.numpy()]), "ONNX Runtime", seed)
    if not difference <= tolerance:
        raise ExportError(
            f"ONNX Runtime {runtime.__version__} answers otherwise than PyTorch by {difference:.2g}, "
            f"expected at most {tolerance:.2g}: try another opset than {opset}, or a greater tolerance"
        )
    return difference


def _compare_batches(path: Path, source: Source, seed: int) -> float:
    """How far int8 is from PyTorch on random images. Raises ExportError where an answer depends on its batch."""
    session = start_session(package("onnxruntime"), path)

    def answer(images: Tensor) -> NDArray[np.float32]:
        together = answers(session, [images.numpy()])
        alone = answers(session, [image.numpy()[None] for image in images])
        scale = max(1.0, float(np.abs(alone).max()))
        if not float(np.abs(together - alone).max()) <= TOLERANCES["fp32"] * scale:
            raise ExportError("in int8 an image's answer depends on the images beside it: export in fp16 or fp32")
        return together

    return greatest_difference(source, answer, "ONNX Runtime", seed)
