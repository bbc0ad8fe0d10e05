"""``kinprune units``: what of a model can be pruned, what cannot, and what it costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import (
    Device, ImageSize, Json, Random, Seed, Threads, Weights, begin, count, guarded, show_json, size,
)  # fmt: skip

if TYPE_CHECKING:
    from kinprune.units import UnitSpace


@guarded
def units_command(
    model: Annotated[str, typer.Argument(help="A timm model name, or module:factory of your own code.")],
    weights: Weights = None,
    random: Random = False,
    image_size: ImageSize = None,
    num_classes: Annotated[int, typer.Option("--num-classes", min=1, help="Outputs of the classifier.")] = 1000,
    stream: Annotated[bool, typer.Option("--stream", help="Residual-stream channels too.")] = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Show a model's units: groups, parameters, MACs, and what cannot be pruned.

    Weights are not needed: without --weights the architecture alone is built.
    """
    begin(device, threads)
    from kinprune.backbones import load_backbone
    from kinprune.units import find_units

    backbone = load_backbone(
        model, num_classes=num_classes, weights=weights, random=random or weights is None, seed=seed,
        image_size=image_size,
    )  # fmt: skip
    space = find_units(backbone.model, backbone.preprocessing.image_size, stream=stream, head=backbone.head)
    described = _describe(model, space, backbone.preprocessing.image_size)
    if json:
        show_json(described)
    else:
        _print(described)


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
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{described['model']} at {' x '.join(map(str, described['image_size']))} px", title_style="")
    for name, justify in (("group", "left"), ("kind", "left"), ("units", "right"), ("parameters", "right"),
                          ("MACs", "right"), ("", "left")):  # fmt: skip
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    for group in described["groups"]:
        note = "statistics run over the units" if group["normalised"] else ""
        width = f" x {group['width']}" if group["width"] > 1 else ""
        table.add_row(
            group["name"], group["kind"], f"{group['units']}{width}", count(group["parameters"]),
            count(group["macs"]), note,
        )  # fmt: skip
    console.print(table)
    reasons: dict[str, list[dict[str, Any]]] = {}
    for layer in described["whole"]:
        reasons.setdefault(layer["reason"], []).append(layer)
    if reasons:
        kept = Table(title="kept whole", title_style="")
        for name in ("why", "layers", "such as"):
            kept.add_column(name, overflow="fold")
        for reason, layers in reasons.items():
            kept.add_row(reason, str(len(layers)), ", ".join(layer["layer"] for layer in layers[:3]))
        console.print(kept)
    costs, smallest = described["costs"], described["smallest"]
    console.print(
        f"{costs['units']:,} units in {len(described['groups'])} groups. Parameters {count(costs['parameters'])} "
        f"(down to {count(smallest['parameters'])}), MACs {count(costs['macs'])} (down to {count(smallest['macs'])}), "
        f"weights {size(costs['weight_bytes'])}, peak memory {size(costs['peak_memory_bytes'])}.",
        highlight=False,
        soft_wrap=True,
    )
