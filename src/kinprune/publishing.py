"""Publishing: an adaptation's models into a directory, each with its record and its export, and one report of all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kinprune.adaptation import Adapted
from kinprune.adapted import adapted_artifact, adapted_record, summarise_adapted
from kinprune.artifact import check_destination, save
from kinprune.artifact.storage import EXPORTED, RECORD, REPORT
from kinprune.bank import Header, write_record
from kinprune.devices import export_onnx, measure_latencies, missing_package
from kinprune.errors import ArtifactError, ExportError
from kinprune.report import write_report
from kinprune.tasks import DecodedTask


@dataclass(frozen=True)
class Destination:
    """Where an adaptation goes: a directory for each model, and the report beside or above them."""

    folders: tuple[Path, ...]
    report: Path
    overwrite: bool
    onnx: bool


def plan_destination(
    out: str | Path, keep: Sequence[float] | None = None, *, overwrite: bool = False, onnx: bool | None = None
) -> Destination:
    """The places that a model, or with ``keep`` a family ``keep-0.5`` ..., takes in ``out``; asked before long work.

    ``onnx`` None exports where the packages for it are installed.

    Raises:
        ArtifactError: a place is taken or cannot be written.
        ExportError: an export was asked for and a package for it is missing.
    """
    place = Path(out).expanduser()
    folders = (place,) if keep is None else tuple(place / f"keep-{ratio:g}" for ratio in keep)
    for folder in folders:
        check_destination(folder, overwrite=overwrite)
    report = place / REPORT
    if report.exists() and not overwrite:
        raise ArtifactError(f"{report} is there already: choose another directory, or --overwrite it")
    missing = missing_package()
    if onnx and missing:
        raise ExportError(f'ONNX needs the package {missing!r}: pip install "kinprune[onnx]", or leave out the export')
    return Destination(folders, report, overwrite, missing is None if onnx is None else onnx)


def publish(
    adapted: Adapted,
    task: DecodedTask,
    header: Header,
    to: Destination,
    *,
    samples: Mapping[str, Tensor] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write every model with its record (``kinprune bank add`` takes it), its export and the report; tell all of it.

    ``samples`` are images of source classes for the report. With an export, latencies are measured, the whole model's
    beside them. What is returned is in JSON's own types (see ``summarise_adapted``).
    """
    tell = on_stage or (lambda stage: None)
    for folder, sized in zip(to.folders, adapted.sizes, strict=True):
        tell("saving")
        save(adapted_artifact(adapted, sized, task), folder, overwrite=to.overwrite)
        write_record(adapted_record(adapted, sized, task), header, folder / RECORD)
    latencies = _export(adapted, task, to.folders, tell) if to.onnx else None
    tell("report")
    write_report(to.report, adapted, task, samples=samples, latencies=latencies)
    summary = {"out": [str(folder) for folder in to.folders], "report": str(to.report), **summarise_adapted(adapted)}
    if latencies is not None:
        summary["latency_ms"] = latencies[0]
        for size, latency in zip(summary["sizes"], latencies[1:], strict=True):
            size["latency_ms"] = latency
    return summary


def _export(
    adapted: Adapted, task: DecodedTask, folders: Sequence[Path], tell: Callable[[str], None]
) -> tuple[float, ...]:
    """Each model to ONNX beside it, and the milliseconds of the whole model and of each, one thread, one image."""

    def export(model: nn.Module, path: Path) -> Path:
        tell("export")
        return export_onnx(model, path, classes=task.classes, preprocessing=task.preprocessing).path

    with tempfile.TemporaryDirectory() as aside:
        whole = export(adapted.whole_model, Path(aside) / EXPORTED)
        small = [export(sized.model, folder / EXPORTED) for sized, folder in zip(adapted.sizes, folders, strict=True)]
        tell("latency")
        return tuple(measure_latencies([whole, *small]))
