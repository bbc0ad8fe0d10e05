"""The options of ``kinprune bank``: how source tasks are drawn and pruned, and which bank they go to.

How to prune has its defaults in ``building.SOURCE_PLAN``, which is too slow to import for ``--help``: an option that
was not given is None here, and the help says in words what that means.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import DATA, MODEL, PRUNING, RUNNING, TRAINING
from kinprune.cli.values import between, share, whole
from kinprune.errors import BankError

if TYPE_CHECKING:
    from kinprune.building import Cluster
    from kinprune.pruning import Plan

TASKS, CLASSES = 20, 5
"""How many source tasks a build draws, and of how many classes each, unless something else is asked for: beside a broad
task, more of them gave no more (docs/evidence.md, questions 2 and 4)."""

_ADDRESS = "a file such as bank.db, or postgresql://USER@HOST/NAME"

Bank = Annotated[str, typer.Argument(metavar="BANK", help=f"The bank: {_ADDRESS}.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help=f"The bank to copy into: {_ADDRESS}.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE", help="Banks of the same backbone whose records are copied; they stay as they are."
    ),
]
Id = Annotated[int, typer.Argument(metavar="ID", parser=whole(1), help="A record's number, as ls shows it.")]
Ids = Annotated[list[int], typer.Argument(metavar="ID", parser=whole(1), help="Numbers of records, as ls shows them.")]
Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA",
        help="Labelled images, one or more: image folders with a sub-folder for each class, parquet files or folders "
        "of them, hf://OWNER/NAME, or torchvision:NAME?root=DIR.",
    ),
]
Address = Annotated[
    str,
    typer.Option("--bank", metavar="URL", rich_help_panel=RUNNING, help=f"The bank, made if need be: {_ADDRESS}."),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        rich_help_panel=MODEL,
        help="A timm model name, such as resnet18, or MODULE:FACTORY for a function of your own that returns one. "
        "[default: the bank's own; needed for a new bank]",
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        rich_help_panel=PRUNING,
        help="Cut the channels of the residual stream too: for good when the bank is made, it remembers.",
    ),
]
Tasks = Annotated[
    int | None,
    typer.Option(
        "--tasks",
        metavar="N",
        parser=whole(0),
        rich_help_panel=DATA,
        help="Source tasks to draw, in turn from each DATA; more later keep those that were. 0 for the broad ones "
        f"alone, which give nearly all that is gained. [default: {TASKS}]",
    ),
]
ClassCount = Annotated[
    int | None,
    typer.Option(
        "--classes",
        metavar="N",
        parser=whole(2),
        rich_help_panel=DATA,
        help=f"Classes of each source task, drawn at random. [default: {CLASSES}]",
    ),
]
Whole = Annotated[
    bool, typer.Option("--whole", rich_help_panel=DATA, help="Each DATA is one source task with all its classes.")
]
BroadSteps = Annotated[
    int | None,
    typer.Option(
        "--broad-steps",
        metavar="N",
        parser=whole(0),
        rich_help_panel=DATA,
        help="One more, broad source task for each DATA: all its classes, fine-tuned for N mini-batches; every new "
        "task can start from it. 0 for none. [default: 20 times --steps]",
    ),
]
LeaveOut = Annotated[
    str | None,
    typer.Option(
        "--leave-out",
        metavar="A,B,...",
        rich_help_panel=DATA,
        help="Classes that no source task may have: names with commas between them.",
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="SHARE",
        parser=share,
        rich_help_panel=PRUNING,
        help="Share of the units (filters, heads, nodes) to keep: 0.1 or 10%. [default: 0.1]",
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        "--rounds",
        metavar="N",
        parser=whole(1),
        rich_help_panel=PRUNING,
        help="Prune in N rounds, with fine-tuning in between; 1 is one shot. [default: 2]",
    ),
]
RoundSteps = Annotated[
    int | None,
    typer.Option(
        "--round-steps",
        metavar="N",
        parser=whole(0),
        rich_help_panel=PRUNING,
        help="Mini-batches of fine-tuning between two rounds. [default: 20]",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        rich_help_panel=PRUNING,
        help="What says how important a unit is: random, l1, l2, bn-scale, activation, taylor, snip or synflow. "
        "[default: taylor]",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        metavar="NAME",
        rich_help_panel=PRUNING,
        help="layer keeps the same share of every layer; global compares importance over all layers. [default: layer]",
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(
        "--multiple",
        metavar="N",
        parser=whole(1),
        rich_help_panel=PRUNING,
        help="Round the widths of layers to multiples of N, such as 8 or 16. [default: 1]",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        metavar="N",
        parser=whole(0),
        rich_help_panel=TRAINING,
        help="Mini-batches of fine-tuning at the end; 0 leaves the models in closed form. [default: 60]",
    ),
]
MiniBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        parser=whole(1),
        rich_help_panel=TRAINING,
        help="Images in a mini-batch. [default: 64]",
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
    str | None,
    typer.Option(
        "--optimiser",
        metavar="NAME",
        rich_help_panel=TRAINING,
        help="auto (sgd for models with batch norm, adamw for others), sgd or adamw. [default: auto]",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        rich_help_panel=RUNNING,
        help="Where a new bank's weights go: a folder, or an address such as s3://BUCKET/FOLDER. [default: beside "
        "the bank's file]",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "--workers",
        metavar="N",
        parser=whole(1),
        rich_help_panel=RUNNING,
        help="Processes that prune at the same time and share the cores.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        rich_help_panel=RUNNING,
        help="Prune on a Ray cluster: auto, HOST:PORT, or local for one on this machine. It gets images and model.",
    ),
]
TaskCpus = Annotated[
    int | None,
    typer.Option(
        "--task-cpus",
        metavar="N",
        parser=whole(1),
        rich_help_panel=RUNNING,
        help="With --ray: processors for each source task. [default: 1]",
    ),
]
TaskGpus = Annotated[
    float | None,
    typer.Option(
        "--task-gpus",
        metavar="X",
        parser=between(0.01, 16, "0.25"),
        rich_help_panel=RUNNING,
        help="With --ray: GPUs for each source task, such as 0.25 for four at a time on one. [default: none]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        parser=whole(1),
        rich_help_panel=RUNNING,
        help="CPU threads, of one worker. [default: all cores]",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", parser=whole(1), rich_help_panel=RUNNING, help="The N newest. [default: 100]"),
]
Before = Annotated[
    int | None,
    typer.Option(
        "--before",
        metavar="ID",
        parser=whole(1),
        rich_help_panel=RUNNING,
        help="Only records older than this one: the page before the one that begins with it.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", rich_help_panel=RUNNING, help="Remove without asking.")]
Clean = Annotated[
    bool,
    typer.Option(
        "--clean",
        rich_help_panel=RUNNING,
        help="Remove files of the weights that no record refers to, if they are older than a day.",
    ),
]
CheckWeights = Annotated[
    bool,
    typer.Option(
        "--weights/--no-weights", rich_help_panel=RUNNING, help="Read every file of weights too: slow, and sure."
    ),
]


def cluster_of(
    address: str | None, cpus: int | None, gpus: float | None, device: str, workers: int, threads: int | None
) -> tuple[Cluster | None, str]:
    """The cluster that was asked for, and the device that its machines, or this one, compute on."""
    if address is None:
        if cpus is not None or gpus is not None:
            raise BankError("--task-cpus and --task-gpus are for a Ray cluster: give --ray, or leave them out")
        return None, device
    if workers > 1 or threads is not None:
        raise BankError("--ray decides how many tasks run at a time: leave out --workers and --threads")
    if device not in ("cpu", "cuda") or (device == "cuda" and gpus is None):
        raise BankError(f"--ray with --device {device}: give --task-gpus 1 (or a part of one) to compute on GPUs")
    from kinprune.building.cluster import Cluster, check_reachable

    cluster = Cluster(address, cpus or 1, gpus or 0.0)
    check_reachable(cluster)  # before a new bank is made
    return cluster, "cuda" if gpus else "cpu"


def plan_of(*, seed: int, stream: bool, flip: bool, **given: Any) -> Plan:
    """``building.SOURCE_PLAN`` with what was given in its place.

    ``given``: ``keep``, fields of ``Plan`` and of ``Recipe``, by their names there; None where nothing was given.
    """
    from kinprune.building import SOURCE_PLAN
    from kinprune.selection import Budget

    wanted = {name: value for name, value in given.items() if value is not None}
    budget = Budget(keep=wanted.pop("keep")) if "keep" in wanted else SOURCE_PLAN.budget
    trained: dict[str, Any] = {
        name: wanted.pop(name) for name in ("steps", "batch_size", "learning_rate", "optimiser") if name in wanted
    }
    if flip:
        trained["flip"] = True
    recipe = replace(SOURCE_PLAN.recipe, seed=seed, **trained)
    return replace(SOURCE_PLAN, budget=budget, stream=stream, recipe=recipe, **wanted)
