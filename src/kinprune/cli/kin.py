"""``kinprune kin``: what a bank knows of tasks like this one."""

from __future__ import annotations

from typing import Any

from kinprune.cli import kin_options as own
from kinprune.cli import options as shared
from kinprune.cli import prune_options as pruning
from kinprune.cli.output import console, stage_bar
from kinprune.cli.running import begin, guarded
from kinprune.quantities import some_names


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
    from kinprune.tasks import decode
    from kinprune.transferability import Target

    search = own.search_of(neighbours, measure=measure, exact=exact, seed=seed)
    opened = open_bank(bank)
    task = shared.load_data(
        data, classes, shots, test_fraction, image_column=image_column, label_column=label_column, seed=seed
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
    print_kin(rows, measure)
    return None


def print_kin(rows: list[dict[str, Any]], measure: str) -> None:
    """A table of the neighbours, as ``summarise_neighbour`` tells of them."""
    from rich.table import Table

    weighed = "weight" in rows[0]
    table = Table(title="Kin: the source tasks asked, nearest first", title_justify="left")
    for name, justify in (("id", "right"), (measure, "right"), *([("weight", "right")] if weighed else [])):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("classes")
    table.add_column("shared")
    for row in rows[:10]:
        weight = [f"{row['weight']:.2f}"] if weighed else []
        names = (some_names(row["classes"]), some_names(row["shared"]))
        table.add_row(str(row["id"]), f"{row['similarity']:.3f}", *weight, *names)
    shown = console()
    shown.print(table)
    if len(rows) > 10:
        shown.print(f"... and {len(rows) - 10} more")
