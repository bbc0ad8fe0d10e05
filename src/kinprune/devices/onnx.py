"""ONNX: a pruned model as one file that ONNX Runtime and others run, checked against PyTorch before it is kept.

The model takes ``images`` (normalised, float32 ``[batch, 3, h, w]``) and gives ``logits`` (float32 ``[batch, k]``) for
any batch. The file knows its classes and preprocessing, so that it can be used alone: ``read_metadata`` and
``predict_onnx`` need nothing but ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.artifact import Artifact
from kinprune.artifact.description import installed
from kinprune.artifact.files import directory_beside, settle, settle_names
from kinprune.backbones.checkpoint import Hints
from kinprune.backbones.inputs import resolve_preprocessing
from kinprune.errors import BackboneError, ExportError
from kinprune.preprocessing import Preprocessing

OPSET = 20
"""The default version of the operators: the first with a GELU of its own, read by ONNX Runtime from 1.17 on."""

OLDEST_OPSET = 18  # PyTorch translates to this one or newer
CHECKED_BATCHES = (1, 2, 5)
_LOGGERS = ("onnx_ir", "onnxscript", "torch.export", "torch.fx", "torch.onnx")


@dataclass(frozen=True)
class OnnxExport:
    """An exported model.

    ``bytes`` is the size of all its files. ``max_difference`` is the greatest difference of a logit from PyTorch's, in
    parts of the greatest logit where that is above 1; None if unchecked. ``runtime`` is ONNX Runtime's version.
    """

    path: Path
    bytes: int
    max_difference: float | None
    opset: int
    runtime: str | None


@dataclass(frozen=True)
class OnnxMetadata:
    """What an exported file says of itself."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    version: str


def export_onnx(
    model: Artifact | nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    opset: int = OPSET,
    check: bool = True,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> OnnxExport:
    """Export an artifact, or a model with its ``classes`` and ``preprocessing``, to the file ``path``.

    It is one file, unless the weights take more than 1.5 GB: then they are in ``<path>.data`` beside it. With
    ``check``, ONNX Runtime answers random images (by ``seed``) in batches of 1, 2 and 5. A file of before is replaced
    once the new one is complete and right. The model is not changed and may lie on any device.

    Raises:
        ExportError: a package is missing, ``path`` cannot be written, the model cannot be exported, or ONNX Runtime
            answers otherwise than PyTorch by more than ``tolerance``. Nothing is left behind.
    """
    target = _check_target(Path(path).expanduser())
    own, names, expected = _parts(model, classes, preprocessing)
    newest = _package("onnx").defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportError(f"opset is {opset}, expected {OLDEST_OPSET} to {newest}: {OPSET} runs nearly everywhere")
    _package("onnxscript")
    runtime = _package("onnxruntime") if check else None
    outputs = _run(own, _images(expected, 1, seed)).shape[1]
    if outputs != len(names):
        raise ExportError(f"{len(names)} classes are given, but the model makes {outputs} logits: name every class")
    difference = None
    try:
        with directory_beside(target, "tmp") as temporary:
            program = _translate(own, _images(expected, 2, seed), opset)
            _describe(program.model, names, expected)
            program.save(temporary / target.name)
            if runtime is not None:
                difference = _compare(own, runtime, temporary / target.name, expected, seed)
                if not difference <= tolerance:
                    raise ExportError(
                        f"ONNX Runtime {runtime.__version__} answers otherwise than PyTorch by {difference:.2g}, "
                        f"expected at most {tolerance:.2g}: try another opset than {opset}, or a greater tolerance"
                    )
            size = _publish(temporary, target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}): free space, or choose another folder") from error
    return OnnxExport(target, size, difference, opset, runtime.__version__ if runtime is not None else None)


def read_metadata(path: str | Path) -> OnnxMetadata:
    """Classes, preprocessing and Kinprune's version of an exported file, through ONNX Runtime alone.

    Raises ExportError if the file is none, is damaged, or is not Kinprune's.
    """
    session = _session(_package("onnxruntime"), Path(path).expanduser(), optimise=False)
    return _metadata(session, path)


def predict_onnx(path: str | Path, images: NDArray[np.uint8], *, batch_size: int = 32) -> NDArray[np.float32]:
    """What an exported file answers, by ONNX Runtime and NumPy alone: ``uint8 [n, 3, h, w]`` to float32 ``[n, k]``.

    Raises ExportError for a file that cannot be used, and for images of another type or size than it takes.
    """
    session = _session(_package("onnxruntime"), Path(path).expanduser())
    expected = _metadata(session, path).preprocessing
    height, width = expected.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, height, width) or len(images) == 0:
        raise ExportError(
            f"the images are {images.dtype} {list(images.shape)}, expected uint8 [n, 3, {height}, {width}]: "
            "decode and resize them as the file's preprocessing says"
        )
    if batch_size < 1:
        raise ExportError(f"batch_size is {batch_size}, expected at least 1")
    mean, std = (np.array(three, dtype=np.float32).reshape(1, 3, 1, 1) for three in (expected.mean, expected.std))
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    answers = [
        session.run(["logits"], {"images": (batch.astype(np.float32) / 255 - mean) / std})[0] for batch in batches
    ]
    return np.concatenate(answers)


def open_session(path: str | Path, *, threads: int | None = None) -> Any:
    """ONNX Runtime's session for a file, on the CPU with ``threads`` threads; ExportError where it cannot be read."""
    return _session(_package("onnxruntime"), Path(path).expanduser(), threads=threads)


def missing_package(*, check: bool = True) -> str | None:
    """The first package that an export needs and that is not installed; None where all are."""
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def _check_target(path: Path) -> Path:
    folder = path.absolute().parent
    if path.suffix != ".onnx":
        raise ExportError(f"{path} does not end in .onnx: add it")
    if path.is_dir():
        raise ExportError(f"{path} is a folder, expected a file: choose another name")
    if not folder.is_dir():
        raise ExportError(f"the folder {folder} is not there, so {path.name} cannot be written: make it first")
    if not os.access(folder, os.W_OK):
        raise ExportError(f"the folder {folder} may not be written to: choose another one")
    return path


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f'ONNX needs the package {name!r} ({error}): pip install "kinprune[onnx]"') from error


def _parts(
    model: Artifact | nn.Module, classes: Sequence[str] | None, preprocessing: Preprocessing | None
) -> tuple[nn.Module, tuple[str, ...], Preprocessing]:
    if isinstance(model, Artifact):
        return _own_copy(model.model), model.classes, model.preprocessing
    if classes is None or preprocessing is None:
        raise ExportError("a model is given without its classes or preprocessing: give both, or an artifact")
    return _own_copy(model), tuple(classes), preprocessing


def _own_copy(model: nn.Module) -> nn.Module:
    """The model in float32, evaluation mode and on the CPU; tensors that are so already are shared."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    own = copy.deepcopy(model, memo).eval()
    for module in own.modules():
        # PyTorch translates operations in place by way of many small ones, which takes twice the time.
        if vars(module).get("inplace") is True:
            module.inplace = False  # type: ignore[assignment]
    return own


def _images(preprocessing: Preprocessing, batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, *preprocessing.image_size, generator=torch.Generator().manual_seed(seed + batch))


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> Tensor:
    try:
        answers: Any = model(images)
    except RuntimeError as error:
        raise ExportError(f"the model does not run on images of {list(images.shape)}: {error}") from error
    if not isinstance(answers, Tensor) or answers.dim() != 2 or len(answers) != len(images):
        raise ExportError("the model gives no logits [batch, classes]: export an image classifier")
    return answers


def _translate(model: nn.Module, images: Tensor, opset: int) -> torch.onnx.ONNXProgram:
    try:
        with _quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its inner life in warnings, logs and prints: what matters it raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _describe(model: Any, classes: Sequence[str], preprocessing: Preprocessing) -> None:
    """Write what the file is to know, and remove what it should not: where on this machine each operation was made."""
    for node in model.graph:
        node.doc_string = None
        for item in (node, *node.outputs):
            item.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props["kinprune.classes"] = json.dumps(list(classes))
    model.metadata_props["kinprune.preprocessing"] = json.dumps(preprocessing.to_json())
    model.metadata_props["kinprune.version"] = installed("kinprune")


def _compare(model: nn.Module, runtime: ModuleType, path: Path, preprocessing: Preprocessing, seed: int) -> float:
    session = _session(runtime, path, advice=f"try a lower opset, down to {OLDEST_OPSET}")
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = _images(preprocessing, batch, seed)
        expected = _run(model, images).numpy()
        try:
            found = session.run(["logits"], {"images": images.numpy()})[0]
        except Exception as error:  # ONNX Runtime's errors have no base of their own; the cause stays attached
            raise ExportError(f"ONNX Runtime cannot run the model on a batch of {batch}: {error}") from error
        if found.shape != expected.shape:
            raise ExportError(f"ONNX Runtime answers {list(found.shape)}, expected {list(expected.shape)}")
        scale = max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(found - expected).max()) / scale
        worst = difference if not difference <= worst else worst  # NaN is the worst
    return worst


def _publish(temporary: Path, target: Path) -> int:
    """Move the model's files into place, its weights first where they are apart; returns their size."""
    settle(temporary)
    files = sorted(temporary.iterdir(), key=lambda file: file.name == target.name)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.replace(target.with_name(file.name))
    settle_names(target.absolute().parent)
    return size


def _session(
    runtime: ModuleType,
    path: Path,
    *,
    optimise: bool = True,
    threads: int | None = None,
    advice: str = "export it again",
) -> Any:
    if not path.is_file():
        raise ExportError(f"{path} is {'no file' if path.exists() else 'not there'}: give the file of an export")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no base of their own; the cause stays attached
        raise ExportError(f"ONNX Runtime {runtime.__version__} cannot read {path.name}: {error}; {advice}") from error


def _metadata(session: Any, path: str | Path) -> OnnxMetadata:
    stored = session.get_modelmeta().custom_metadata_map
    try:
        classes = json.loads(stored["kinprune.classes"])
        preprocessing = resolve_preprocessing({}, Hints(), **json.loads(stored["kinprune.preprocessing"]))
        return OnnxMetadata(tuple(classes), preprocessing, stored["kinprune.version"])
    except (BackboneError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} does not say its classes and preprocessing: export it with Kinprune") from error
