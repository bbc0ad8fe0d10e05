"""The options of ``kinprune kin`` and ``kinprune adapt``: which bank is asked, and who in it counts as kin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import KIN, RUNNING
from kinprune.cli.values import between, share, whole

if TYPE_CHECKING:
    from kinprune.kin import Search

Address = Annotated[
    str,
    typer.Option(
        "--bank",
        metavar="URL",
        rich_help_panel=KIN,
        help="The bank to learn from: a file such as bank.db, or postgresql://USER@HOST/NAME.",
    ),
]
Measure = Annotated[
    str,
    typer.Option(
        "--measure",
        metavar="NAME",
        rich_help_panel=KIN,
        help="How nearness is measured: leep, n-leep, logme, nce, h-score or class-mean.",
    ),
]
Neighbours = Annotated[
    str,
    typer.Option(
        "--neighbours",
        metavar="K",
        rich_help_panel=KIN,
        help="How many of the nearest source tasks are asked; all, or as controls random or farthest.",
    ),
]
Exact = Annotated[
    int,
    typer.Option(
        "--exact",
        metavar="N",
        parser=whole(0),
        rich_help_panel=KIN,
        help="Compare the N nearest again by running the images through their own pruned models.",
    ),
]
Weighting = Annotated[
    str,
    typer.Option(
        "--weighting",
        metavar="NAME",
        rich_help_panel=KIN,
        help="softmax lets nearer neighbours count more, uniform all the same.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="NUMBER",
        parser=between(0, math.inf, "2"),
        rich_help_panel=KIN,
        help="Of softmax, in standard deviations of the similarities: higher is more equal. [default: 2]",
    ),
]
Inherit = Annotated[
    str,
    typer.Option(
        "--inherit",
        metavar="NAME",
        rich_help_panel=KIN,
        help="Where the kept units' weights come from: average (of the neighbours that kept them), nearest, backbone; "
        "auto takes what answers best in closed form.",
    ),
]
Blend = Annotated[
    float | None,
    typer.Option(
        "--blend",
        metavar="SHARE",
        rich_help_panel=KIN,
        help="How much the task's own importance counts beside the neighbours', from 0 to 1. [default: the "
        "better one of 0 and 1 in closed form]",
    ),
]
Vote = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel=KIN,
        help="smsp makes one score mask for every size, mvp lets the neighbours vote for each.",
    ),
]
ScoreMask = Annotated[
    str,
    typer.Option(
        "--score-mask",
        metavar="NAME",
        rich_help_panel=KIN,
        help="Of which smsp makes its mask: kept, the units that the neighbours' own models have; soft, their mean "
        "soft scores.",
    ),
]
Sizes = Annotated[
    str | None,
    typer.Option(
        "--sizes",
        metavar="A,B,...",
        rich_help_panel=RUNNING,
        help="Several keep ratios, such as 0.5,0.2,0.1: a model each, in folders keep-0.5 ... of --out.",
    ),
]
KinData = Annotated[
    list[str] | None,
    typer.Option(
        "--kin-data",
        metavar="DATA",
        rich_help_panel=RUNNING,
        help="Where images of source tasks are, to show some in the report; may be given more than once.",
    ),
]
Onnx = Annotated[
    bool | None,
    typer.Option(
        "--onnx/--no-onnx",
        rich_help_panel=RUNNING,
        help="Export each model to ONNX beside it and measure its latency. [default: where the packages are there]",
    ),
]


def search_of(neighbours: str, *, measure: str, exact: int, seed: int) -> Search:
    """What ``--neighbours`` and its companions ask for."""
    from kinprune.errors import BankError
    from kinprune.kin import Search

    text: Any = neighbours.strip().lower()
    if text in ("all", "random", "farthest"):
        return Search(measure=measure, which=text, exact=exact, seed=seed)
    try:
        count = whole(1)(text)
    except typer.BadParameter as error:
        raise BankError(
            f"--neighbours is '{neighbours}', expected a whole number of at least 1, all, random or farthest"
        ) from error
    return Search(measure=measure, count=count, exact=exact, seed=seed)


def sizes_of(text: str) -> list[float]:
    """The keep ratios of ``--sizes``, as they were given."""
    from kinprune.errors import BudgetError

    try:
        values = [share(part) for part in text.split(",") if part.strip()]
    except typer.BadParameter as error:
        raise BudgetError(f"--sizes is '{text}': {error.message}") from error
    if not values or len(set(values)) < len(values):
        raise BudgetError(f"--sizes is '{text}', expected different keep ratios such as 0.5,0.2,0.1")
    return values
