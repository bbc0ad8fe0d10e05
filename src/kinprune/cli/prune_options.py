"""The options of ``kinprune prune`` alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from kinprune.cli.options import BUDGET, PRUNING, RUNNING, TRAINING
from kinprune.cli.values import Limit, between, limit, share, whole

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="An image folder with a sub-folder for each class (or train/ and test/ with those), a parquet file or "
        "a folder of them, hf://OWNER/NAME, or torchvision:NAME?root=DIR.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", rich_help_panel=RUNNING, help="Directory to write the artifact to.")
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="SHARE",
        parser=share,
        rich_help_panel=BUDGET,
        help="Share of the units (filters, heads, nodes) to keep: 0.1 or 10%.",
    ),
]
MaxParams = Annotated[
    Limit | None,
    typer.Option(
        "--max-params",
        metavar="COUNT",
        parser=limit("count"),
        rich_help_panel=BUDGET,
        help="Most parameters: 1.5M, or 30% of the whole model's.",
    ),
]
MaxMacs = Annotated[
    Limit | None,
    typer.Option(
        "--max-macs",
        metavar="COUNT",
        parser=limit("count"),
        rich_help_panel=BUDGET,
        help="Most multiply-accumulates for one image: 200M, or 25% of the whole model's.",
    ),
]
MaxWeights = Annotated[
    Limit | None,
    typer.Option(
        "--max-weights",
        metavar="BYTES",
        parser=limit("bytes"),
        rich_help_panel=BUDGET,
        help="Most bytes of weights: 4MB, 4MiB, or 20% of the whole model's.",
    ),
]
MaxMemory = Annotated[
    Limit | None,
    typer.Option(
        "--max-memory",
        metavar="BYTES",
        parser=limit("bytes"),
        rich_help_panel=BUDGET,
        help="Most memory while one image runs, weights and activations: 8MB, or 50% of the whole model's.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel=PRUNING,
        help="What says how important a unit is: random, l1, l2, bn-scale, activation, taylor, snip or synflow.",
    ),
]
Allocation = Annotated[
    str,
    typer.Option(
        "--allocation",
        metavar="NAME",
        rich_help_panel=PRUNING,
        help="layer keeps the same share of every layer; global compares importance over all layers.",
    ),
]
Multiple = Annotated[
    int,
    typer.Option(
        "--multiple",
        metavar="N",
        parser=whole(1),
        rich_help_panel=PRUNING,
        help="Round the widths of layers to multiples of N, such as 8 or 16.",
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        "--rounds",
        metavar="N",
        parser=whole(1),
        rich_help_panel=PRUNING,
        help="Prune in N rounds, with fine-tuning in between; 1 is one shot.",
    ),
]
RoundSteps = Annotated[
    int,
    typer.Option(
        "--round-steps",
        metavar="N",
        parser=whole(0),
        rich_help_panel=PRUNING,
        help="Mini-batches of fine-tuning between two rounds.",
    ),
]
Reconstruct = Annotated[
    bool,
    typer.Option(
        "--reconstruct/--no-reconstruct",
        rich_help_panel=PRUNING,
        help="Solve the layers behind removed units again, so that they answer as before.",
    ),
]
Head = Annotated[
    str,
    typer.Option(
        "--head",
        metavar="NAME",
        rich_help_panel=PRUNING,
        help="The closed-form classifier that fine-tuning starts from: ridge or class-mean.",
    ),
]
Steps = Annotated[
    int,
    typer.Option(
        "--steps",
        metavar="N",
        parser=whole(0),
        rich_help_panel=TRAINING,
        help="Mini-batches of fine-tuning; 0 leaves the model in closed form.",
    ),
]
MiniBatch = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", parser=whole(1), rich_help_panel=TRAINING, help="Images in a mini-batch."
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate",
        metavar="NUMBER",
        parser=between(0, math.inf, "0.001"),
        rich_help_panel=TRAINING,
        help="Highest learning rate. [default: 0.01 for sgd, 0.0001 for adamw]",
    ),
]
Optimiser = Annotated[
    str,
    typer.Option(
        "--optimiser",
        metavar="NAME",
        rich_help_panel=TRAINING,
        help="auto (sgd for models with batch norm, adamw for others), sgd or adamw.",
    ),
]
Flip = Annotated[
    bool,
    typer.Option(
        "--flip", rich_help_panel=TRAINING, help="Mirror half of the images: not for digits, letters or signs."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=RUNNING, help="Replace an artifact that is in --out already.")
]
