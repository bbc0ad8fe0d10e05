"""Publishing: an adaptation's models into a directory, each with its record and its export, and one report of all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kinprune.adaptation import Adapted
from kinprune.adapted import adapted_artifact, adapted_record, summarise_adapted
from kinprune.artifact import check_destination, save
from kinprune.artifact.storage import RECORD, REPORT
from kinprune.bank import Header, write_record
from kinprune.devices import missing_package
from kinprune.errors import ArtifactError, ExportError
from kinprune.exporting import Shipped, keep_best, move_into, ship
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
    out: str | Path, names: Sequence[str] | None = None, *, overwrite: bool = False, onnx: bool | None = None
) -> Destination:
    """The places that a model, or one of each of the ``names``, takes in ``out``; asked before long work.

    ``onnx`` None exports where the packages for it are installed.

    Raises:
        ArtifactError: a place is taken or cannot be written.
        ExportError: an export was asked for and a package for it is missing.
    """
    place = Path(out).expanduser()
    folders = (place,) if names is None else tuple(place / name for name in names)
    for folder in folders:
        check_destination(folder, overwrite=overwrite)
    report = place / REPORT
    if report.exists() and not overwrite:
        raise ArtifactError(f"{report} is there already: choose another directory, or --overwrite it")
    missing = missing_package()
    if onnx and missing:
        raise ExportError(f'ONNX needs the package {missing!r}: pip install "kinprune[onnx]", or leave out the export')
    return Destination(folders, report, overwrite, missing is None if onnx is None else onnx)


def size_folders(keep: Sequence[float]) -> list[str]:
    """The names of a family's folders: ``keep-0.5`` ..."""
    return [f"keep-{ratio:g}" for ratio in keep]


def check_alternatives(goals: Sequence[object], to: Destination) -> None:
    """Refuse goals that are alternatives where nothing is exported, with ExportError: exports tell which is best."""
    if len(goals) > len(to.folders) and not to.onnx:
        raise ExportError(
            "several precisions are open, and their exports are what tells which is best: leave out --no-onnx and "
            'pip install "kinprune[onnx]", or name one with --precision'
        )


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

    ``samples`` are images of source classes for the report. Exports are tried (see ``exporting``); of alternatives,
    goals of one wish, the model that answers best is written. What is returned is in JSON's own types (see
    ``summarise_adapted``).

    Raises ExportError, with nothing written, where there are alternatives and they are not exported.
    """
    tell = on_stage or (lambda stage: None)
    check_alternatives(adapted.sizes, to)
    alternatives = len(adapted.sizes) > len(to.folders)
    with tempfile.TemporaryDirectory() if to.onnx else nullcontext() as aside:
        if not alternatives:
            _save(adapted, task, header, to, tell)
        whole, shipped = (None, None) if aside is None else ship(adapted, task, Path(aside), tell)
        if shipped is not None and alternatives:
            adapted, shipped = keep_best(adapted, shipped)
            _save(adapted, task, header, to, tell)
        for one, folder in zip(shipped or (), to.folders, strict=shipped is not None):
            move_into(one, folder)
    tell("report")
    latencies = None if shipped is None else (whole, *(one.latency_ms for one in shipped))
    tried = None if shipped is None else [one.tried() for one in shipped]
    write_report(to.report, adapted, task, samples=samples, latencies=latencies, tried=tried)
    summary = {"out": [str(folder) for folder in to.folders], "report": str(to.report), **summarise_adapted(adapted)}
    if shipped is not None:
        summary["latency_ms"] = whole
        _tell_shipped(summary, adapted, shipped)
    return summary


def _save(adapted: Adapted, task: DecodedTask, header: Header, to: Destination, tell: Callable[[str], None]) -> None:
    for folder, sized in zip(to.folders, adapted.sizes, strict=True):
        tell("saving")
        save(adapted_artifact(adapted, sized, task), folder, overwrite=to.overwrite)
        write_record(adapted_record(adapted, sized, task), header, folder / RECORD)


def _tell_shipped(summary: dict[str, Any], adapted: Adapted, shipped: Sequence[Shipped]) -> None:
    for size, sized, one in zip(summary["sizes"], adapted.sizes, shipped, strict=True):
        size.update(one.to_json(sized))
