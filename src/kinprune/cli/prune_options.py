"""The options of ``kinprune prune``: budget, pruning, fine-tuning; ``kinprune adapt`` shares most of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import BUDGET, PRUNING, RUNNING, TRAINING
from kinprune.cli.values import Limit, between, byte_size, limit, share, whole, word
from kinprune.quantities import byte_count, plural

if TYPE_CHECKING:
    from kinprune.training import Recipe
    from kinprune.units import Costs

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
        help="Highest learning rate. [default: 0.03 for sgd, 0.0001 for adamw with 60 steps; with more, more]",
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
Distil = Annotated[
    bool,
    typer.Option(
        "--distil/--no-distil", rich_help_panel=TRAINING, help="Let the whole model's answers teach the pruned one."
    ),
]
TrainMemory = Annotated[
    int | None,
    typer.Option(
        "--train-memory",
        metavar="BYTES",
        parser=byte_size,
        rich_help_panel=TRAINING,
        help="Most memory that fine-tuning may take on top of what is taken before it: 200MB. Parts of mini-batches, "
        "recomputation and, last, fixed early layers keep it.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=RUNNING, help="Replace an artifact that is in --out already.")
]


def limits_of(
    max_params: Limit | None, max_macs: Limit | None, max_weights: Limit | None, max_memory: Limit | None
) -> dict[str, Limit]:
    """The limits that were given, by their names in ``Budget``."""
    limits = {
        "parameters": max_params,
        "macs": max_macs,
        "weight_bytes": max_weights,
        "peak_memory_bytes": max_memory,
    }
    return {name: wanted for name, wanted in limits.items() if wanted is not None}


def no_budget(shares: str) -> str:
    """What to say where no budget was given; ``shares`` shows the command's options for keep ratios."""
    return (
        f"no budget was given, expected one or more of {shares}, --max-params 1.5M, --max-macs 200M, "
        "--max-weights 4MB, --max-memory 8MB"
    )


@dataclass(frozen=True)
class Asked:
    """The options of the section Budget, as they were given."""

    keep: float | None
    limits: Mapping[str, Limit]
    max_latency: float | None = None


def amounts_of(asked: Asked, whole: Costs) -> dict[str, float]:
    """What was asked for in numbers, by the names of ``Budget``; per cents are of the ``whole`` model's costs."""
    amounts: dict[str, float | None] = {name: one.of(getattr(whole, name)) for name, one in asked.limits.items()}
    amounts |= {"keep": asked.keep, "latency_ms": asked.max_latency}
    return {name: amount for name, amount in amounts.items() if amount is not None}


def recipe_of(
    steps: int, batch_size: int, *, learning_rate: float | None, optimiser: str, flip: bool, seed: int
) -> Recipe:
    """What the options of the section Fine-tuning ask for."""
    from kinprune.training import Recipe

    return Recipe(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimiser=word(optimiser),
        flip=flip,
        seed=seed,
    )


def told_of_memory(memory: Mapping[str, Any]) -> str:
    """One line of how a fine-tuning stayed under its limit of memory."""
    peak = "not measured here" if memory["peak"] is None else f"{byte_count(memory['peak'])} taken"
    images = memory["micro_batch"]
    done = [
        "mini-batches whole" if images == memory["batch_size"] else f"{plural(images, 'image')} at a time",
        *([f"{plural(memory['recomputed'], 'block')} recomputed"] if memory["recomputed"] else []),
        *(
            [f"the first {plural(len(memory['frozen']), 'layer or block', 'layers or blocks')} not trained"]
            if memory["frozen"]
            else []
        ),
        *(["batch norms frozen"] if memory["norms_frozen"] else []),
    ]
    return f"training in {byte_count(memory['limit'])} of memory: {peak}; {', '.join(done)}."
