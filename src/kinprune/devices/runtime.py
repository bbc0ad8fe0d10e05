"""Running an exported ONNX file with ONNX Runtime and NumPy alone: what a device needs, without PyTorch."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.errors import BackboneError, ExportError
from kinprune.precision import PRECISIONS, Precision
from kinprune.preprocessing import Preprocessing, resolved

CLASSES, PREPROCESSING, VERSION, PRECISION = (
    f"kinprune.{key}" for key in ("classes", "preprocessing", "version", "precision")
)
"""The keys of what a file says of itself."""


@dataclass(frozen=True)
class OnnxMetadata:
    """What an exported file says of itself."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    version: str
    precision: Precision = "fp32"


def read_metadata(path: str | Path) -> OnnxMetadata:
    """Classes, preprocessing, precision and Kinprune's version of an exported file, through ONNX Runtime alone.

    A file that does not say its precision is older than the others and has fp32. Raises ExportError if the file is
    none, is damaged, or is not Kinprune's.
    """
    return metadata_of(start_session(package("onnxruntime"), Path(path).expanduser(), optimise=False), path)


def predict_onnx(
    path: str | Path, images: NDArray[np.uint8], *, batch_size: int = 32, threads: int | None = None
) -> NDArray[np.float32]:
    """What an exported file answers, by ONNX Runtime and NumPy alone: ``uint8 [n, 3, h, w]`` to float32 ``[n, k]``.

    Raises ExportError for a file that cannot be used, and for images of another type or size than it takes.
    """
    session = open_session(path, threads=threads)
    expected = metadata_of(session, path).preprocessing
    check_images(images, expected, batch_size)
    return answers(session, normalised(images, expected, batch_size))


def open_session(path: str | Path, *, threads: int | None = None) -> Any:
    """ONNX Runtime's session for a file, on the CPU with ``threads`` threads; ExportError where it cannot be read."""
    return start_session(package("onnxruntime"), Path(path).expanduser(), threads=threads)


def check_images(images: NDArray[np.uint8], expected: Preprocessing, batch_size: int) -> None:
    """Refuse, with ExportError, what is not ``uint8 [n, 3, h, w]`` of the size that a file takes."""
    height, width = expected.image_size
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (3, height, width) or len(images) == 0:
        raise ExportError(
            f"the images are {images.dtype} {list(images.shape)}, expected uint8 [n, 3, {height}, {width}]: "
            "decode and resize them as the file's preprocessing says"
        )
    if batch_size < 1:
        raise ExportError(f"batch_size is {batch_size}, expected at least 1")


def normalised(images: NDArray[np.uint8], expected: Preprocessing, batch_size: int) -> list[NDArray[np.float32]]:
    """Checked images as a model's inputs, ``float32 [b, 3, h, w]`` of at most ``batch_size`` each."""
    mean, std = (np.array(three, dtype=np.float32).reshape(1, 3, 1, 1) for three in (expected.mean, expected.std))
    parts = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return [np.asarray((part.astype(np.float32) / 255 - mean) / std, dtype=np.float32) for part in parts]


def answers(session: Any, batches: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The logits of a session for batches of normalised images, together."""
    return np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches])


def package(name: str) -> ModuleType:
    """A package of the extra ``onnx``; ExportError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f'ONNX needs the package {name!r} ({error}): pip install "kinprune[onnx]"') from error


def start_session(
    runtime: ModuleType,
    path: Path,
    *,
    optimise: bool = True,
    threads: int | None = None,
    advice: str = "export it again",
) -> Any:
    """A session of a loaded ONNX Runtime, silent; ExportError where it cannot read the file."""
    if not path.is_file():
        raise ExportError(f"{path} is {'no file' if path.exists() else 'not there'}: give the file of an export")
    try:
        return session_of(str(path), optimise=optimise, threads=threads)
    except Exception as error:  # ONNX Runtime's errors have no base of their own; the cause stays attached
        raise ExportError(f"ONNX Runtime {runtime.__version__} cannot read {path.name}: {error}; {advice}") from error


def session_of(model: Any, *, optimise: bool = True, threads: int | None = None) -> Any:
    """A silent session on the CPU for a file's path or an ``onnx.ModelProto``, with ONNX Runtime's own errors."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, str) else model.SerializeToString()
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def metadata_of(session: Any, path: str | Path) -> OnnxMetadata:
    """What the file of a session says of itself; ExportError where it says nothing or no sense."""
    return parse_metadata(session.get_modelmeta().custom_metadata_map, path)


def parse_metadata(stored: dict[str, str], path: str | Path) -> OnnxMetadata:
    """What a file says of itself, from its keys and texts; ExportError where they are missing or make no sense."""
    try:
        classes = json.loads(stored[CLASSES])
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("the classes are no list of names")
        precision = stored.get(PRECISION, "fp32")
        if precision not in PRECISIONS:
            raise ValueError(f"there is no precision {precision!r}")
        preprocessing = resolved(**json.loads(stored[PREPROCESSING]))
        return OnnxMetadata(tuple(classes), preprocessing, stored[VERSION], precision)
    except (BackboneError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"{path} does not say its classes and preprocessing: export it with Kinprune") from error


def describe_metadata(
    classes: tuple[str, ...], preprocessing: Preprocessing, version: str, precision: Precision
) -> dict[str, str]:
    """The keys and texts that ``parse_metadata`` reads."""
    return {
        CLASSES: json.dumps(list(classes)),
        PREPROCESSING: json.dumps(preprocessing.to_json()),
        VERSION: version,
        PRECISION: precision,
    }
