"""``kinprune eval``, ``predict`` and ``export``: what one does with an artifact."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kinprune.cli.options import (
    BatchSize, Device, ImageColumn, Json, LabelColumn, Seed, Shots, TestFraction, Threads, begin, guarded, say,
    show_json, size,
)  # fmt: skip

Directory = Annotated[Path, typer.Argument(help="An artifact's directory.")]


@guarded
def eval_command(
    directory: Directory,
    data: Annotated[str, typer.Argument(help="Labelled images, as for prune; their test part is used.")],
    batch_size: BatchSize = 128,
    test_fraction: TestFraction = 0.2,
    shots: Shots = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Measure an artifact on a task's test images.

    The classes are the artifact's own. Where the data have no split, give the seed and share the artifact was made
    with, or training images are among those tested.
    """
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.evaluation import evaluate
    from kinprune.tasks import decode, load_task

    artifact = load(directory)
    task = load_task(
        data, classes=list(artifact.classes), shots=shots, test_fraction=test_fraction, seed=seed,
        image_column=image_column, label_column=label_column,
    )  # fmt: skip
    decoded = decode(task, artifact.preprocessing, progress=True, threads=threads)
    found = evaluate(artifact.model, decoded.test, artifact.preprocessing, batch_size=batch_size, device=device)
    if json:
        show_json({"artifact": str(directory), "task": task.name, "classes": list(artifact.classes), **found.to_json()})
    else:
        _print_evaluation(artifact.classes, found)


def _print_evaluation(classes: tuple[str, ...], found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
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
    console.print(table)
    console.print(f"Accuracy {found.accuracy:.2%} on {found.n:,} images, loss {found.loss:.3f}.", highlight=False, soft_wrap=True)


@guarded
def predict_command(
    directory: Directory,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show for each image.")] = 1,
    batch_size: BatchSize = 64,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Say what is on images."""
    begin(device, threads)
    import torch

    from kinprune.artifact import load
    from kinprune.errors import TaskError
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
        show_json({"artifact": str(directory), "predictions": answers})
        return
    for answer in answers:
        classes: Any = answer["classes"]
        listed = ", ".join(f"{found['name']} ({found['probability']:.1%})" for found in classes)
        typer.echo(f"{answer['image']}: {listed}")


@guarded
def export_command(
    directory: Directory,
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default: model.onnx in DIRECTORY.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a logit that is accepted.")] = 1e-4,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Write an artifact in another runtime's format, and check that it answers the same there."""
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.devices import export_onnx
    from kinprune.errors import ExportError

    if format != "onnx":
        raise ExportError(f"there is no export format '{format}', expected onnx")
    artifact = load(directory)
    path = directory / "model.onnx" if out is None else out
    say(f"exporting {artifact.spec.name} to {path}")
    found = export_onnx(artifact, path, tolerance=tolerance)
    if json:
        show_json({"artifact": str(directory), "format": format, **{k: str(v) if isinstance(v, Path) else v
                                                                    for k, v in asdict(found).items()}})  # fmt: skip
    else:
        typer.echo(
            f"{path}: {size(found.bytes)}, opset {found.opset}, logits within {found.max_difference:.1e} of PyTorch's"
        )
