"""``kinprune eval`` and ``predict``: what one does with an artifact, or with a file that it was exported to."""

from __future__ import annotations

from collections.abc import Callable
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
)
from kinprune.cli.output import console
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import whole
from kinprune.errors import ExportError, TaskError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kinprune.evaluation import Evaluation
    from kinprune.preprocessing import Preprocessing

    Ask = Callable[[list[Path], int], tuple[tuple[str, ...], NDArray[np.float32]]]

Target = Annotated[
    Path,
    typer.Argument(
        metavar="TARGET",
        help="An artifact's directory, as prune wrote it, or a file of export: .onnx, .pte or .pt2.",
    ),
]


@guarded
def eval_command(
    target: Target,
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
    """Measure the accuracy of an artifact, or of an exported file, on a task's test images.

    The classes are the artifact's own. Where the data have no test part, give the --seed and --test-fraction that the
    artifact was made with, or training images are among those tested.
    """
    exported = _is_exported(target)
    if exported:
        _check_exported(device)
    begin(device, threads)
    from kinprune.artifact import load
    from kinprune.devices import evaluate_exported, open_exported
    from kinprune.evaluation import evaluate
    from kinprune.tasks import decode, load_task

    artifact = None if exported else load(target)
    known = open_exported(target).metadata if artifact is None else artifact
    task = load_task(
        data,
        classes=list(known.classes),
        test_fraction=test_fraction,
        seed=seed,
        image_column=image_column,
        label_column=label_column,
    )
    decoded = decode(task, known.preprocessing, progress=True, threads=threads)
    if artifact is None:
        found = evaluate_exported(target, decoded.test, batch_size=batch_size, threads=threads)
    else:
        found = evaluate(artifact.model, decoded.test, artifact.preprocessing, batch_size=batch_size, device=device)
    if json:
        return {"artifact": str(target), "task": task.name, "classes": list(known.classes), **found.to_json()}
    _print_evaluation(known.classes, found)
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
    target: Target,
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
    """Say which class images are of, with its probability.

    An .onnx file needs ONNX Runtime alone, without PyTorch.
    """
    import numpy as np

    paths = _listed(images)
    ask = _exported(target, device, threads) if _is_exported(target) else _artifact(target, device, threads)
    classes, probabilities = ask(paths, batch_size)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    answers = [
        {
            "image": str(path),
            "classes": [{"name": classes[place], "probability": round(float(row[place]), 6)} for place in places],
        }
        for path, row, places in zip(paths, probabilities, best.tolist(), strict=True)
    ]
    if json:
        return {"artifact": str(target), "predictions": answers}
    for answer in answers:
        named: Any = answer["classes"]
        listed = ", ".join(f"{found['name']} ({found['probability']:.1%})" for found in named)
        typer.echo(f"{answer['image']}: {listed}")
    return None


def _listed(images: list[Path]) -> list[Path]:
    from kinprune.tasks import list_images

    paths = [path for given in images for path in (list_images(given) if given.is_dir() else [given])]
    if not paths:
        raise TaskError(f"there is no image in {', '.join(map(str, images))}: give image files or folders with some")
    return paths


def _artifact(target: Path, device: str, threads: int | None) -> Ask:
    begin(device, threads)
    import torch

    from kinprune.artifact import load
    from kinprune.evaluation import predict

    artifact = load(target)

    def ask(paths: list[Path], batch_size: int) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        pixels = torch.from_numpy(_pixels(paths, artifact.preprocessing))
        found = predict(artifact.model, pixels, artifact.preprocessing, batch_size=batch_size, device=device)
        return artifact.classes, found.numpy()

    return ask


def _exported(target: Path, device: str, threads: int | None) -> Ask:
    from kinprune.devices.exported import open_exported

    _check_exported(device)
    if target.suffix != ".onnx":
        begin(device, threads)
    exported = open_exported(target, threads=threads)

    def ask(paths: list[Path], batch_size: int) -> tuple[tuple[str, ...], NDArray[np.float32]]:
        import numpy as np

        logits = exported.logits(_pixels(paths, exported.metadata.preprocessing), batch_size=batch_size)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exported.metadata.classes, odds / odds.sum(axis=1, keepdims=True)

    return ask


def _pixels(paths: list[Path], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decoded images, ``uint8 [n, 3, h, w]``."""
    import numpy as np

    from kinprune.progress import track
    from kinprune.tasks.pixels import decode_pixels

    found = [decode_pixels(path, preprocessing, str(path)) for path in track(paths, "reading images")]
    return np.ascontiguousarray(np.stack(found).transpose(0, 3, 1, 2))


def _is_exported(target: Path) -> bool:
    from kinprune.devices.exported import is_exported

    return is_exported(target)


def _check_exported(device: str) -> None:
    if device != "cpu":
        raise ExportError(f"an exported file runs on the CPU, not on '{device}': leave out --device")
