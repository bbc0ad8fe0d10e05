"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.values import between, three, whole

if TYPE_CHECKING:
    from kinprune.tasks import Task

SECTIONS = DATA, MODEL, KIN, BUDGET, DEVICE, PRUNING, TRAINING, RUNNING = (
    "Data",
    "Model",
    "Kin",
    "Budget (one or more, all of them hold)",
    "Device",
    "Pruning",
    "Fine-tuning",
    "Running and output",
)
"""The sections of a command's help, in their order."""

ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="A timm model name, such as resnet18, or MODULE:FACTORY for a function of your own that returns one.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        rich_help_panel=MODEL,
        help="The model's weights in a safetensors file; without it, those that timm publishes are fetched.",
    ),
]
Random = Annotated[
    bool, typer.Option("--random", rich_help_panel=MODEL, help="Start from newly initialised weights, on purpose.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="PIXELS",
        parser=whole(1),
        rich_help_panel=MODEL,
        help="Side of the square that images are resized to. [default: the model's own]",
    ),
]
Mean = Annotated[
    Any,
    typer.Option(
        "--mean",
        metavar="R,G,B",
        parser=three,
        rich_help_panel=MODEL,
        help="Mean of each colour, for pixels from 0 to 1. [default: the model's own]",
    ),
]
Std = Annotated[
    Any,
    typer.Option(
        "--std",
        metavar="R,G,B",
        parser=three,
        rich_help_panel=MODEL,
        help="Standard deviation of each colour. [default: the model's own]",
    ),
]
Interpolation = Annotated[
    str | None,
    typer.Option(
        "--interpolation",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="How images are resized: nearest, bilinear or bicubic. [default: the model's own]",
    ),
]
CropPct = Annotated[
    float | None,
    typer.Option(
        "--crop-pct",
        metavar="SHARE",
        rich_help_panel=MODEL,
        help="Share of the resized image's side that the centre crop keeps. [default: the model's own]",
    ),
]
Stream = Annotated[
    bool, typer.Option("--stream", rich_help_panel=PRUNING, help="Cut the channels of the residual stream too.")
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="A,B,...",
        rich_help_panel=DATA,
        help="Only these classes, in this order: names with commas between them. [default: all]",
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        "--shots",
        metavar="N",
        parser=whole(1),
        rich_help_panel=DATA,
        help="At most N training images of each class. [default: all]",
    ),
]
TestFraction = Annotated[
    float,
    typer.Option(
        "--test-fraction",
        metavar="SHARE",
        parser=between(0, 1, "0.2"),
        rich_help_panel=DATA,
        help="Share of each class kept for testing, where the data have no test part of their own.",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(
        "--image-column",
        metavar="NAME",
        rich_help_panel=DATA,
        help="Column of the images in parquet data, where it is not plain which.",
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label-column",
        metavar="NAME",
        rich_help_panel=DATA,
        help="Column of the labels in parquet data, where it is not plain which.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", parser=whole(1), rich_help_panel=RUNNING, help="Images that are run at a time."
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", rich_help_panel=RUNNING, help="Print one JSON object on standard output, all else on standard error."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        parser=whole(0),
        rich_help_panel=RUNNING,
        help="Decides all that is random: the same seed gives the same result.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", rich_help_panel=RUNNING, help="Where to compute: cpu, cuda or cuda:N."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", parser=whole(1), rich_help_panel=RUNNING, help="CPU threads. [default: all cores]"
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="NUMBER",
        parser=between(0, math.inf, "0.0001"),
        rich_help_panel=RUNNING,
        help="Largest difference from PyTorch's logits that is accepted, in parts of the greatest logit; int8 is "
        "checked by its answers instead. [default: 0.0001, for fp16 0.02]",
    ),
]


def chosen_classes(text: str | None) -> list[str] | None:
    """``a,b,c`` as a list, without empty names."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def load_data(
    data: str,
    classes: str | None,
    shots: int | None,
    test_fraction: float,
    *,
    image_column: str | None,
    label_column: str | None,
    seed: int,
) -> Task:
    """The task that the options of the section Data ask for, not yet decoded."""
    from kinprune.tasks import load_task

    return load_task(
        data,
        classes=chosen_classes(classes),
        shots=shots,
        test_fraction=test_fraction,
        seed=seed,
        image_column=image_column,
        label_column=label_column,
    )
