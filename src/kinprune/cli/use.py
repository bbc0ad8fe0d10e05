"""``kinprune eval``, ``predict`` and ``export``: what one does with an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import (
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
from kinprune.cli.output import console, say
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import whole
from kinprune.errors import ExportError, TaskError
from kinprune.quantities import byte_count

if TYPE_CHECKING:
    from kinprune.evaluation import Evaluation

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="An artifact's directory, as prune wrote it.")]


@guarded
def eval_command(
    directory: Directory,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Labelled images, as for prune; their test part is measured on.")
    ],
    batch_size: BatchSize = 128,
    test_fraction: TestFraction = 0.2,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Measure an artifact's accuracy on a task's test images.

    The classes are the artifact's own. Where the data have no test part, give the --seed and --test-fraction that the
    artifact was made with, or training images are among those tested.
    """
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.evaluation import evaluate
    from kinprune.tasks import decode, load_task

    artifact = load(directory)
    task = load_task(
        data,
        classes=list(artifact.classes),
        test_fraction=test_fraction,
        seed=seed,
        image_column=image_column,
        label_column=label_column,
    )
    decoded = decode(task, artifact.preprocessing, progress=True, threads=threads)
    found = evaluate(artifact.model, decoded.test, artifact.preprocessing, batch_size=batch_size, device=device)
    if json:
        return {"artifact": str(directory), "task": task.name, "classes": list(artifact.classes), **found.to_json()}
    _print_evaluation(artifact.classes, found)
    return None


def _print_evaluation(classes: tuple[str, ...], found: Evaluation) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("class", overflow="fold")
    for name in ("accuracy", "images", "most often taken for"):
        table.add_column(name, justify="right")
    for number, name in enumerate(classes):
        row = found.confusion[number].copy()
        total, row[number] = int(row.sum()), 0
        mistaken = f"{classes[int(row.argmax())]} ({int(row.max())})" if row.max() > 0 else ""
        share = found.per_class[number]
        table.add_row(name, "" if share is None else f"{share:.1%}", str(total), mistaken)
    shown = console()
    shown.print(table)
    shown.print(f"Accuracy {found.accuracy:.2%} on {found.n:,} images, loss {found.loss:.3f}.")


@guarded
def predict_command(
    directory: Directory,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files, or folders of them.")],
    top: Annotated[
        int,
        typer.Option(
            "--top",
            metavar="N",
            parser=whole(1),
            rich_help_panel=RUNNING,
            help="Show the N most probable classes of each image.",
        ),
    ] = 1,
    batch_size: BatchSize = 64,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Say which class images are of, with its probability."""
    begin(device, threads)
    import torch

    from kinprune.artifact import load
    from kinprune.evaluation import predict
    from kinprune.progress import track
    from kinprune.tasks import decode_image, list_images

    artifact = load(directory)
    paths = [path for given in images for path in (list_images(given) if given.is_dir() else [given])]
    if not paths:
        raise TaskError(f"there is no image in {', '.join(map(str, images))}: give image files or folders with some")
    decoded = torch.stack([decode_image(path, artifact.preprocessing) for path in track(paths, "reading images")])
    probabilities = predict(artifact.model, decoded, artifact.preprocessing, batch_size=batch_size, device=device)
    best = probabilities.topk(min(top, len(artifact.classes)), dim=1)
    answers = [
        {
            "image": str(path),
            "classes": [
                {"name": artifact.classes[place], "probability": round(value, 6)}
                for value, place in zip(values, places, strict=True)
            ],
        }
        for path, values, places in zip(paths, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    if json:
        return {"artifact": str(directory), "predictions": answers}
    for answer in answers:
        classes: Any = answer["classes"]
        listed = ", ".join(f"{found['name']} ({found['probability']:.1%})" for found in classes)
        typer.echo(f"{answer['image']}: {listed}")
    return None


@guarded
def export_command(
    directory: Directory,
    format: Annotated[
        str, typer.Option("--format", metavar="NAME", rich_help_panel=RUNNING, help="The format: onnx.")
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", rich_help_panel=RUNNING, help="File to write. [default: model.onnx in DIR]"
        ),
    ] = None,
    tolerance: Tolerance = 1e-4,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Write an artifact as ONNX, checked in ONNX Runtime.

    The file takes batches of any size and knows its classes and preprocessing. It is only kept if ONNX Runtime gives
    the same logits as PyTorch.
    """
    if format != "onnx":
        raise ExportError(f"there is no export format '{format}', expected onnx")
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.devices import export_onnx

    artifact = load(directory)
    path = directory / "model.onnx" if out is None else out
    say(f"exporting {artifact.spec.name} to {path}")
    found = export_onnx(artifact, path, tolerance=tolerance, seed=seed)
    if json:
        return {"artifact": str(directory), "format": format, **asdict(found), "path": str(found.path)}
    close = f"logits within {found.max_difference:.1e} of PyTorch's"
    typer.echo(f"{path}: {byte_count(found.bytes)}, opset {found.opset}, {close}")
    return None
