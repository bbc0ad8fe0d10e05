"""``kinprune units``: what of a model can be pruned, what cannot, and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import MODEL, Device, ImageSize, Json, Seed, Stream, Threads
from kinprune.cli.output import console
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import whole
from kinprune.quantities import byte_count, count

if TYPE_CHECKING:
    from rich.table import Table

    from kinprune.units import UnitSpace


@guarded
def units_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A timm model name, or MODULE:FACTORY of your own code.")
    ],
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            rich_help_panel=MODEL,
            help="The model's weights in a safetensors file: checked that they fit, and asked for the image size.",
        ),
    ] = None,
    random: Annotated[bool, typer.Option("--random", hidden=True)] = False,
    image_size: ImageSize = None,
    num_classes: Annotated[
        int,
        typer.Option(
            "--num-classes", metavar="N", parser=whole(1), rich_help_panel=MODEL, help="Outputs of the classifier."
        ),
    ] = 1000,
    stream: Stream = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> dict[str, Any] | None:
    """Show a model's units: what they cost, and what cannot be cut.

    Costs are for one image: parameters, multiply-accumulates (MACs), bytes of weights, peak memory while it runs.
    Weights are not needed: without --weights nothing is fetched and the architecture alone is built.
    """
    begin(device, threads)
    from kinprune.backbones import load_backbone
    from kinprune.units import find_units

    backbone = load_backbone(
        model,
        num_classes=num_classes,
        weights=weights,
        random=random or weights is None,
        seed=seed,
        image_size=image_size,
    )
    space = find_units(backbone.model, backbone.preprocessing.image_size, stream=stream, head=backbone.head)
    described = _describe(model, space, backbone.preprocessing.image_size)
    if json:
        return described
    _print(described)
    return None


def _describe(model: str, space: UnitSpace, image_size: tuple[int, int]) -> dict[str, Any]:
    """The unit space in JSON's own types; each group with what keeping a single unit of it would save."""
    whole = space.cost(space.whole_mask())
    groups = []
    for number, group in enumerate(space.groups):
        counts = space.sizes.copy()
        counts[number] = 1
        alone = space.costs.of(counts)
        groups.append(
            {
                "name": group.name,
                "kind": group.kind,
                "units": group.size,
                "width": group.width,
                "normalised": group.normalised,
                "parameters": (whole.parameters - alone.parameters) * group.size // max(group.size - 1, 1),
                "macs": (whole.macs - alone.macs) * group.size // max(group.size - 1, 1),
            }
        )
    return {
        "model": model,
        "image_size": list(image_size),
        "fingerprint": space.fingerprint,
        "costs": asdict(whole),
        "smallest": asdict(space.costs.of([1] * len(space.groups))),
        "groups": groups,
        "whole": [asdict(whole) for whole in space.whole],
    }


def _print(described: dict[str, Any]) -> None:
    shown = console()
    shown.print(_groups(described))
    if described["whole"]:
        shown.print(_kept_whole(described["whole"]))
    costs, smallest = described["costs"], described["smallest"]
    shown.print(
        f"{costs['units']:,} units in {len(described['groups'])} groups. Parameters {count(costs['parameters'])} "
        f"(down to {count(smallest['parameters'])}), MACs {count(costs['macs'])} (down to {count(smallest['macs'])}), "
        f"weights {byte_count(costs['weight_bytes'])}, peak memory {byte_count(costs['peak_memory_bytes'])}."
    )


def _groups(described: dict[str, Any]) -> Table:
    from rich.table import Table

    sides = " x ".join(map(str, described["image_size"]))
    table = Table(title=f"{described['model']}, images of {sides} pixels", title_style="")
    table.add_column("group", overflow="fold")
    table.add_column("kind")
    wide = any(group["width"] > 1 for group in described["groups"])
    for name in ("units x width" if wide else "units", "parameters", "MACs"):
        table.add_column(name, justify="right")
    normalised = any(group["normalised"] for group in described["groups"])
    if normalised:
        table.add_column("note")
    for group in described["groups"]:
        width = f" x {group['width']}" if group["width"] > 1 else ""
        note = ["normalised over the units" if group["normalised"] else ""] if normalised else []
        table.add_row(
            group["name"],
            group["kind"],
            f"{group['units']}{width}",
            count(group["parameters"]),
            count(group["macs"]),
            *note,
        )
    return table


def _kept_whole(layers: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(layer["reason"], []).append(layer["layer"])
    table = Table(title="Kept whole", title_style="")
    table.add_column("why")
    table.add_column("layers", justify="right")
    table.add_column("such as", overflow="fold")
    for reason, names in reasons.items():
        table.add_row(reason, str(len(names)), ", ".join(names[:3]))
    return table
