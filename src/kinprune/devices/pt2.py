"""PT2: a pruned model as a program of ``torch.export``, which PyTorch runs, compiles and lowers to other devices.

A ``.pt2`` file is an archive of JSON and plain tensors, but what PyTorch reads it with goes further: it unpickles, and
evaluates text, where the archive asks for that. So Kinprune writes files that ask for neither, and reads no others:
``check_archive`` goes through the archive before PyTorch does.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.artifact import Artifact
from kinprune.artifact.files import directory_beside
from kinprune.devices.program import (
    KEY,
    TOLERANCE,
    ProgramExport,
    compare_program,
    describe_program,
    read_program_metadata,
)
from kinprune.devices.quiet import quiet
from kinprune.devices.runtime import OnnxMetadata
from kinprune.devices.source import CHECKED_BATCHES, check_classes, check_target, publish, random_images, source_of
from kinprune.errors import ExportError
from kinprune.preprocessing import Preprocessing

_MODEL, _SAMPLES, _EXTRA = "models/model.json", "data/sample_inputs/model.pt", f"extra/{KEY}.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_PLAIN = frozenset({"archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"})
_OPERATION = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.\w+")
_EXPRESSION = re.compile(
    r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=True)*\)|Integer\(-?\d+\)|(Mul|Add|Pow|Max|Min)\(|[\d(), ])+"
)
_DEEPEST = 40


def export_pt2(
    model: Artifact | nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> ProgramExport:
    """Export an artifact, or a model with its ``classes`` and ``preprocessing``, to the file ``path``, in fp32.

    The program takes normalised images, ``float32 [batch, 3, h, w]``, in batches of any size. It is read again and
    run on random images (by ``seed``) before it takes the place of a file of before. The model is not changed.

    Raises:
        ExportError: ``path`` cannot be written, the model cannot be exported, or the program answers otherwise than
            the model by more than ``tolerance``. Nothing is left behind.
    """
    target = check_target(Path(path).expanduser(), ".pt2")
    source = source_of(model, classes, preprocessing)
    check_classes(source, seed)
    program = trace(source.model, random_images(source.preprocessing, 2, seed))
    try:
        with directory_beside(target, "tmp") as temporary:
            written = temporary / target.name
            with quiet():
                torch.export.save(program, str(written), extra_files={f"{KEY}.json": describe_program(source)})
            _, answer = open_pt2(written)
            runtime = f"PyTorch {torch.__version__}"
            difference = compare_program(
                source, lambda images: answer([images.numpy()]), runtime, tolerance, seed, CHECKED_BATCHES
            )
            size = publish(temporary, target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written ({error}): free space, or choose another folder") from error
    return ProgramExport(target, size, difference, torch.__version__)


def trace(model: nn.Module, images: Tensor, *, dynamic: bool = True) -> Any:
    """A model as an exported program, without sample inputs and without where on this machine its code lies.

    For batches of any size where ``dynamic``, else of that of ``images``. Raises ExportError.
    """
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    try:
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            program = torch.export.export(model.requires_grad_(False), (images,), dynamic_shapes=shapes)
    except Exception as error:  # the tracer raises errors of many kinds; the cause stays attached
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(
            f"PyTorch cannot export the model: {reason}; have no branch on values in its forward, or try a newer "
            "PyTorch"
        ) from error
    program.example_inputs = None
    vars(program).pop("_guards_code", None)
    program._guards_code = []
    for node in program.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    return program


def open_pt2(path: Path) -> tuple[OnnxMetadata, Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]]]:
    """What a file says of itself, and what answers batches of normalised images. Raises ExportError."""
    check_archive(path)
    extra = {f"{KEY}.json": ""}
    try:
        with quiet():
            module = torch.export.load(str(path), extra_files=extra).module()
    except Exception as error:  # the reader raises errors of many kinds; the cause stays attached
        raise ExportError(f"PyTorch {torch.__version__} cannot read {path.name}: {error}; export it again") from error
    metadata = read_program_metadata(extra[f"{KEY}.json"], path)

    @torch.no_grad()
    def answer(batches: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = torch.cat([module(torch.from_numpy(batch)) for batch in batches]).numpy()
        return found

    return metadata, answer


def check_archive(path: Path) -> None:
    """Refuse, with ExportError, a file of which PyTorch would unpickle or evaluate a part when it reads it."""
    if not path.is_file():
        raise ExportError(f"{path} is {'no file' if path.exists() else 'not there'}: give the file of an export")
    try:
        with zipfile.ZipFile(path) as archive:
            records = {"/".join(PurePosixPath(item.filename).parts[1:]): item for item in archive.infolist()}
            if len(records) != len(archive.infolist()):
                raise _refusal(path, "it has two records of the same name")
            for name, item in records.items():
                known = name in {*_PLAIN, _MODEL, _EXTRA, *_CONFIGS} or _TENSOR.fullmatch(name)
                if not known and not (name == _SAMPLES and item.file_size == 0):
                    raise _refusal(path, f"it has a record {name!r}")
            configs = [json.loads(archive.read(records[name])) for name in _CONFIGS]
            model = json.loads(archive.read(records[_MODEL]))
            json.loads(archive.read(records[_EXTRA]))
    except (KeyError, OSError, ValueError, RecursionError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ExportError(
            f"{path} is no PT2 file of Kinprune's, or a damaged one ({error}): export it again"
        ) from error
    for config in configs:
        entries = config.get("config", {}).values() if isinstance(config, dict) else ()
        if any(entry.get("use_pickle") is not False for entry in entries):
            raise _refusal(path, "it has pickled tensors")
    for key, value in _entries(model, path):
        if key == "guards_code" and value:
            raise _refusal(path, "it has code to be evaluated")
        if key == "metadata" and value and value != {}:
            raise _refusal(path, "its operations have metadata")
        if key == "target" and isinstance(value, str) and not _OPERATION.fullmatch(value):
            raise _refusal(path, f"it calls {value!r}")
        if key == "expr_str" and not (isinstance(value, str) and _EXPRESSION.fullmatch(value)):
            raise _refusal(path, f"it has the expression {value!r}")


def _refusal(path: Path, reason: str) -> ExportError:
    return ExportError(
        f"{path} is not read, {reason}, which Kinprune does not write and reading might run: export the model again, "
        "with PyTorch 2.9 or newer"
    )


def _entries(value: Any, path: Path, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key of JSON with its value."""
    if depth > _DEEPEST:
        raise _refusal(path, "its description is nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner, path, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, path, depth + 1)
