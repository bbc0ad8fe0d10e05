"""``kinprune export``: an artifact in the form that a device runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import (
    DATA,
    RUNNING,
    BatchSize,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Seed,
    TestFraction,
    Threads,
    Tolerance,
)
from kinprune.cli.output import say
from kinprune.cli.running import begin, guarded
from kinprune.errors import ExportError
from kinprune.precision import PRECISIONS, Precision
from kinprune.quantities import byte_count

if TYPE_CHECKING:
    from kinprune.artifact import Artifact
    from kinprune.tasks import DecodedTask

SUFFIXES = {"onnx": ".onnx", "executorch": ".pte", "pt2": ".pt2"}


@guarded
def export_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's directory, as prune wrote it.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            rich_help_panel=RUNNING,
            help="onnx for ONNX Runtime and most others, executorch for phones, pt2 for PyTorch's own torch.export.",
        ),
    ] = "onnx",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="NAME",
            rich_help_panel=RUNNING,
            help="How ONNX stores numbers: fp32; fp16, in half the bytes; int8, in a quarter and faster, needs --data.",
        ),
    ] = "fp32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            rich_help_panel=RUNNING,
            help="File to write. [default: model.onnx, model.pte or model.pt2 in DIR]",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel=DATA,
            help="Labelled images, as for eval: the training part calibrates int8, the test part says what the file "
            "is worth.",
        ),
    ] = None,
    test_fraction: TestFraction = 0.2,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 128,
    tolerance: Tolerance = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Write an artifact for a device: as ONNX, for ExecuTorch or as PT2, in fp32, fp16 or int8.

    The file knows its classes and preprocessing; kinprune predict and eval take it. It is run by the runtime that it
    is for, compared with PyTorch, and only kept if it answers alike. ONNX and PT2 take batches of any size,
    ExecuTorch one image at a time.
    """
    exact = _check(format, precision, data)
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.tasks import decode, load_task

    artifact = load(directory)
    path = directory / f"model{SUFFIXES[format]}" if out is None else out
    task = None
    if data is not None:
        found = load_task(
            data,
            classes=list(artifact.classes),
            test_fraction=test_fraction,
            seed=seed,
            image_column=image_column,
            label_column=label_column,
        )
        task = decode(found, artifact.preprocessing, progress=True, threads=threads)
    say(f"exporting {artifact.spec.name} to {path}")
    made = _export(artifact, path, format, exact, task, tolerance, seed)
    accuracies = {} if task is None else _accuracies(artifact, path, task, batch_size, device, threads)
    if json:
        return {"artifact": str(directory), "format": format, **made, **accuracies, "path": str(path)}
    _tell(path, made, accuracies)
    return None


def _check(format: str, precision: str, data: str | None) -> Precision:
    """Refuse what cannot be done, before anything is loaded."""
    if format not in SUFFIXES:
        raise ExportError(f"there is no export format '{format}', expected {', '.join(SUFFIXES)}")
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision '{precision}', expected {', '.join(PRECISIONS)}")
    if format != "onnx" and precision != "fp32":
        raise ExportError(f"{format} is written in fp32 only, not in {precision}: use --format onnx, or leave it out")
    if precision == "int8" and data is None:
        raise ExportError(
            "int8 is calibrated on labelled images, and none are given: add --data with the data the model was made for"
        )
    return precision


def _export(
    artifact: Artifact,
    path: Path,
    format: str,
    precision: Precision,
    task: DecodedTask | None,
    tolerance: float | None,
    seed: int,
) -> dict[str, Any]:
    if format == "onnx":
        from kinprune.devices import export_onnx

        images = task.train.images if task is not None and precision == "int8" else None
        return asdict(
            export_onnx(artifact, path, precision=precision, calibration=images, tolerance=tolerance, seed=seed)
        )
    from kinprune.devices import export_executorch, export_pt2
    from kinprune.devices.program import TOLERANCE

    export = export_pt2 if format == "pt2" else export_executorch
    made = export(artifact, path, tolerance=TOLERANCE if tolerance is None else tolerance, seed=seed)
    return {**asdict(made), "precision": precision}


def _accuracies(
    artifact: Artifact, path: Path, task: DecodedTask, batch_size: int, device: str, threads: int | None
) -> dict[str, Any]:
    from kinprune.devices import evaluate_exported
    from kinprune.evaluation import evaluate

    before = evaluate(artifact.model, task.test, artifact.preprocessing, batch_size=batch_size, device=device)
    after = evaluate_exported(path, task.test, batch_size=batch_size, threads=threads)
    return {"task": task.name, "accuracy": before.accuracy, "accuracy_exported": after.accuracy, "n": after.n}


def _tell(path: Path, made: dict[str, Any], accuracies: dict[str, Any]) -> None:
    parts = [byte_count(made["bytes"]), made["precision"]]
    if "opset" in made:
        parts.append(f"opset {made['opset']}")
    if made.get("agreement"):
        agreed = made["agreement"]
        parts.append(f"{agreed['share']:.1%} of {agreed['images']} images answered as by PyTorch")
    else:
        parts.append(f"logits within {made['max_difference']:.1e} of PyTorch's")
    typer.echo(f"{path}: {', '.join(parts)}")
    if accuracies:
        before, after = accuracies["accuracy"], accuracies["accuracy_exported"]
        typer.echo(f"Accuracy {after:.2%} on {accuracies['n']:,} test images, {before:.2%} before the export.")
