"""``kinprune kin`` and ``kinprune adapt``: what a bank knows of a task like this, and the model that comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinprune.cli import kin_options as own
from kinprune.cli import options as shared
from kinprune.cli import prune_options as pruning
from kinprune.cli.output import console, count, say, size
from kinprune.cli.prune import stage_bar
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import Limit
from kinprune.errors import BudgetError

if TYPE_CHECKING:
    from kinprune.selection import Budget
    from kinprune.units import Costs


@guarded
def kin_command(
    data: pruning.Data,
    bank: own.Address,
    classes: shared.Classes = None,
    shots: shared.Shots = None,
    test_fraction: shared.TestFraction = 0.2,
    image_column: shared.ImageColumn = None,
    label_column: shared.LabelColumn = None,
    neighbours: own.Neighbours = "10",
    measure: own.Measure = "leep",
    exact: own.Exact = 0,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
) -> dict[str, Any] | None:
    """Show the source tasks of a bank that are nearest to a task: one pass of its training images tells."""
    begin(device, threads)
    from kinprune.adapted import summarise_neighbour
    from kinprune.bank import open_bank
    from kinprune.bank.backbone import bank_space, load_bank_backbone
    from kinprune.calibration import head_inputs
    from kinprune.kin import find_kin, rank_exactly
    from kinprune.tasks import decode, load_task
    from kinprune.transferability import Target

    search = own.search_of(neighbours, measure=measure, exact=exact, seed=seed)
    opened = open_bank(bank)
    task = load_task(
        data,
        classes=shared.chosen_classes(classes),
        shots=shots,
        test_fraction=test_fraction,
        seed=seed,
        image_column=image_column,
        label_column=label_column,
    )
    backbone = load_bank_backbone(opened, len(task.classes), seed=seed)
    decoded = decode(task, backbone.preprocessing, progress=True, threads=threads)
    backbone.model.to(device)
    with stage_bar() as on_step:
        on_step("features", 0, 0)
        features = head_inputs(backbone.model, backbone.head, decoded.train.images, backbone.preprocessing)
        target = Target(features.float().numpy(), decoded.train.labels.numpy(), len(task.classes))
        on_step("kin", 0, 0)
        found = find_kin(opened, target, task.classes, search)
        if search.exact and search.which == "nearest":
            space = bank_space(opened, backbone)
            found = rank_exactly(found, opened, backbone, space, decoded.train.images, target, search, device)
    rows = [summarise_neighbour(neighbour) for neighbour in found]
    if json:
        return {"task": task.name, "classes": list(task.classes), "measure": measure, "neighbours": rows}
    _print_kin(rows, measure)
    return None


@guarded
def adapt_command(
    data: pruning.Data,
    bank: own.Address,
    out: pruning.Out,
    classes: shared.Classes = None,
    shots: shared.Shots = None,
    test_fraction: shared.TestFraction = 0.2,
    image_column: shared.ImageColumn = None,
    label_column: shared.LabelColumn = None,
    method: own.Vote = "smsp",
    neighbours: own.Neighbours = "10",
    measure: own.Measure = "leep",
    exact: own.Exact = 0,
    weighting: own.Weighting = "softmax",
    temperature: own.Temperature = None,
    inherit: own.Inherit = "average",
    blend: own.Blend = 0.0,
    keep: pruning.Keep = None,
    sizes: own.Sizes = None,
    max_params: pruning.MaxParams = None,
    max_macs: pruning.MaxMacs = None,
    max_weights: pruning.MaxWeights = None,
    max_memory: pruning.MaxMemory = None,
    allocation: pruning.Allocation = "layer",
    multiple: pruning.Multiple = 1,
    reconstruct: pruning.Reconstruct = True,
    head: pruning.Head = "ridge",
    steps: pruning.Steps = 60,
    batch_size: pruning.MiniBatch = 64,
    learning_rate: pruning.LearningRate = None,
    optimiser: pruning.Optimiser = "auto",
    flip: pruning.Flip = False,
    onnx: own.Onnx = False,
    overwrite: pruning.Overwrite = False,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
) -> dict[str, Any] | None:
    """Make a bank's model small for a new task, in one shot, from what pruning for its nearest kin taught.

    Ctrl-C while fine-tuning keeps the best model so far and saves it; before that nothing is written.
    """
    limits = {
        "parameters": max_params,
        "macs": max_macs,
        "weight_bytes": max_weights,
        "peak_memory_bytes": max_memory,
    }
    given = {name: wanted for name, wanted in limits.items() if wanted is not None}
    ratios = own.sizes_of(sizes) if sizes is not None else [keep]
    if sizes is not None and keep is not None:
        raise BudgetError("both --keep and --sizes are given, expected one of them")
    if ratios == [None] and not given:
        raise BudgetError(
            "no budget was given, expected one or more of --keep 0.1, --sizes 0.5,0.2,0.1, --max-params 1.5M, "
            "--max-macs 200M, --max-weights 4MB, --max-memory 8MB"
        )
    begin(device, threads)
    from kinprune.adaptation import AdaptPlan, adapt
    from kinprune.adapted import adapted_artifact, summarise_adapted
    from kinprune.artifact import check_destination, save
    from kinprune.bank import open_bank
    from kinprune.bank.backbone import bank_space, load_bank_backbone
    from kinprune.selection import select
    from kinprune.tasks import decode, load_task
    from kinprune.training import Recipe
    from kinprune.voting import TEMPERATURE

    folders = [out] if sizes is None else [out / f"keep-{ratio:g}" for ratio in ratios]
    for folder in folders:
        check_destination(folder, overwrite=overwrite)
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimiser=_word(optimiser),
        flip=flip,
        seed=seed,
    )
    plan = AdaptPlan(
        method=_word(method),
        search=own.search_of(neighbours, measure=measure, exact=exact, seed=seed),
        weighting=_word(weighting),
        temperature=TEMPERATURE if temperature is None else temperature,
        inheritance=_word(inherit),
        blend=blend,
        allocation=_word(allocation),
        multiple=multiple,
        reconstruct=reconstruct,
        head=_word(head),
        recipe=recipe,
    )
    opened = open_bank(bank)
    task = load_task(
        data,
        classes=shared.chosen_classes(classes),
        shots=shots,
        test_fraction=test_fraction,
        seed=seed,
        image_column=image_column,
        label_column=label_column,
    )
    backbone = load_bank_backbone(opened, len(task.classes), seed=seed)
    space = bank_space(opened, backbone)
    budgets = [_budget(ratio, given, space.cost(space.whole_mask())) for ratio in ratios]
    for budget in budgets:  # whether it can be reached depends on no score: refused before images are decoded
        select(space, _zeros(len(space)), budget, multiple=multiple)
    say(f"{task.name}: {len(task.train):,} training and {len(task.test):,} test images of {len(task.classes)} classes")
    decoded = decode(task, backbone.preprocessing, progress=True, threads=threads)
    with stage_bar() as on_step:
        adapted = adapt(decoded, opened, budgets, plan, backbone=backbone, device=device, on_step=on_step)
    for folder, sized in zip(folders, adapted.sizes, strict=True):
        artifact = adapted_artifact(adapted, sized, decoded)
        save(artifact, folder, overwrite=overwrite)
        if onnx:
            _export(folder)
    names = [str(folder) for folder in folders]
    summary = {"out": names, "task": task.name, "bank": len(opened), **summarise_adapted(adapted)}
    if json:
        return summary
    _print_kin(summary["neighbours"], measure)
    _print_sizes(summary)
    return None


def _word(text: str) -> Any:
    """A word that the library checks against its own list."""
    return text


def _zeros(units: int) -> Any:
    import numpy as np

    return np.zeros(units)


def _budget(ratio: float | None, given: dict[str, Limit], whole: Costs) -> Budget:
    from kinprune.selection import Budget

    return Budget(keep=ratio, **{name: wanted.of(getattr(whole, name)) for name, wanted in given.items()})


def _export(folder: Path) -> None:
    from kinprune.artifact import load
    from kinprune.artifact.storage import EXPORTED
    from kinprune.devices import export_onnx

    export_onnx(load(folder), folder / EXPORTED)


def _print_kin(rows: list[dict[str, Any]], measure: str) -> None:
    from rich.table import Table

    weighed = "weight" in rows[0]
    table = Table(title="Kin: the source tasks asked, nearest first", title_justify="left")
    for name, justify in (("id", "right"), (measure, "right"), *([("weight", "right")] if weighed else [])):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("classes")
    table.add_column("shared")
    for row in rows[:10]:
        weight = [f"{row['weight']:.2f}"] if weighed else []
        table.add_row(
            str(row["id"]), f"{row['similarity']:.3f}", *weight, ", ".join(row["classes"]), ", ".join(row["shared"])
        )
    shown = console()
    shown.print(table)
    if len(rows) > 10:
        shown.print(f"... and {len(rows) - 10} more")


def _print_sizes(summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("closed form", "fine-tuned", "parameters", "MACs", "weights"):
        table.add_column(name, justify="right", no_wrap=True)

    def cells(costs: dict[str, int]) -> tuple[str, str, str]:
        return count(costs["parameters"]), count(costs["macs"]), size(costs["weight_bytes"])

    table.add_row("whole model", f"{summary['accuracy_dense']:.1%}", "", *cells(summary["whole"]))
    for sized in summary["sizes"]:
        accuracy = f"{sized['accuracy_closed_form']:.1%}", f"{sized['accuracy']:.1%}"
        name = f"keep {sized['budget']['keep']:g}" if "keep" in sized["budget"] else "pruned"
        table.add_row(name, *accuracy, *cells(sized["costs"]))
    shown = console()
    shown.print(table)
    for sized in summary["sizes"]:
        if sized["note"]:
            shown.print(f"Note: {sized['note']}.")
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in summary["seconds"].items())
    shown.print(f"Took {sum(summary['seconds'].values()):.1f} s: {seconds}.")
    for folder in summary["out"]:
        shown.print(f"Saved to {folder}", soft_wrap=True)
