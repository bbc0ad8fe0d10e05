"""What a bank and its records look like on a terminal, from what ``--json`` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kinprune.cli.output import console
from kinprune.quantities import byte_count

if TYPE_CHECKING:
    from rich.table import Table

NAME, CLASSES, TAKEN = 16, 8, 61
"""Widths in a list: the most of a name, the least of a name and of classes, and of all else together."""


def records_table(listed: Sequence[dict[str, Any]]) -> Table:
    """A list of records, a line each."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("classes", no_wrap=True)
    for name in ("images", "whole", "closed\nform", "fine-\ntuned", "kept", "weights", "made"):
        table.add_column(name, justify="right", no_wrap=True)
    free = console().width - TAKEN
    named = max(min(max(len(found["name"]) for found in listed), NAME, free - CLASSES), CLASSES)
    for found in listed:
        images, classes = found["images"], f"{len(found['classes'])}: {', '.join(found['classes'])}"
        table.add_row(
            str(found["id"]),
            _short(found["name"], named),
            _short(classes, max(free - named, CLASSES)),
            f"{sum(images.values()):,}" if images else "",
            *(f"{found[name]:.1%}" for name in ("accuracy_dense", "accuracy_closed_form", "accuracy", "kept_share")),
            byte_count(found["weight_bytes"]),
            found["created"][:10],
        )
    return table


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def print_record(found: dict[str, Any]) -> None:
    """Everything of one record."""
    from rich.table import Table

    details = found["details"]
    images, plan, seconds = found["images"], details.get("plan"), details.get("seconds")
    facts = {
        "record": f"{found['id']} of {found['bank']}",
        "key": found["key"],
        "name": found["name"],
        "data": details.get("data"),
        "classes": ", ".join(found["classes"]),
        "images": f"{images['train']:,} training, {images['test']:,} test" if images else None,
        "accuracy": f"whole model {found['accuracy_dense']:.1%}, closed form {found['accuracy_closed_form']:.1%}, "
        f"fine-tuned {found['accuracy']:.1%}",
        "weights": f"{byte_count(found['weight_bytes'])}, {found['weights']}",
        "made": f"{found['created'][:19].replace('T', ' ')} UTC",
        "plan": _plain(plan) if plan else None,
        "seconds": ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()) if seconds else None,
        "versions": ", ".join(f"{name} {text}" for name, text in details.get("versions", {}).items()) or None,
    }
    _print_facts({name: text for name, text in facts.items() if text is not None})
    table = Table()
    table.add_column("group", overflow="fold")
    for name in ("units", "kept", "share"):
        table.add_column(name, justify="right")
    for name, width in found["groups"].items():
        table.add_row(name, str(width), str(len(found["kept"][name])), f"{len(found['kept'][name]) / width:.1%}")
    total = sum(found["groups"].values())
    kept = sum(map(len, found["kept"].values()))
    table.add_section()
    table.add_row("all", f"{total:,}", f"{kept:,}", f"{kept / total:.1%}")
    console().print(table)


def _plain(plan: dict[str, Any], prefix: str = "") -> str:
    """A plan on one line: ``budget.keep 0.1, criterion taylor, ...``; what is None is left out."""
    parts = [
        _plain(value, f"{prefix}{name}.") if isinstance(value, dict) else f"{prefix}{name} {value}"
        for name, value in plan.items()
        if value is not None
    ]
    return ", ".join(parts)


def print_info(found: dict[str, Any]) -> None:
    """What a bank is about."""
    _print_facts(_info_facts(found))


def _info_facts(found: dict[str, Any]) -> dict[str, str]:
    backbone, space, taken = found["backbone"], found["space"], found["bytes"]
    preprocessing = found["preprocessing"]
    groups = list(space["groups"].items())
    named = ", ".join(f"{name} ({width})" for name, width in groups[:4])
    return {
        "bank": f"{found['bank']}, schema {found['schema']}",
        "backbone": f"{backbone['name']}, {backbone['features']} features, {backbone['fingerprint'][:12]}",
        "images": f"{' x '.join(map(str, preprocessing['image_size']))} pixels, {preprocessing['interpolation']}, "
        f"crop {preprocessing['crop_pct']:g}, mean {_numbers(preprocessing['mean'])}, "
        f"std {_numbers(preprocessing['std'])}",
        "units": f"{space['units']:,} in {len(groups)} groups, {'with' if space['stream'] else 'without'} the residual "
        f"stream, {space['fingerprint'][:12]}",
        "groups": f"{named}{', ...' if len(groups) > 4 else ''}",
        "records": f"{found['records']:,}, of {found['classes']:,} different classes",
        **({"under way": f"{found['under_way']:,} more, claimed by builders"} if found["under_way"] else {}),
        "size": f"database {byte_count(taken['database'])}, pruned weights {byte_count(taken['weights'])}, "
        "backbone's weights " + ("gone" if taken["backbone"] is None else byte_count(taken["backbone"])),
        "weights in": found["store"],
    }


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def _print_facts(facts: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(name, text)
    console().print(table)
