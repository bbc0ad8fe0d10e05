"""``kinprune prune``: one task, one model, one budget, from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kinprune.cli.options import (
    BatchSize, Classes, Device, ImageColumn, ImageSize, Json, LabelColumn, Random, Seed, Shots, TestFraction, Threads,
    Weights, begin, chosen_classes, count, guarded, quantity, say, show_json, size,
)  # fmt: skip

if TYPE_CHECKING:
    from kinprune.backbones import Backbone
    from kinprune.selection import Budget

_BUDGET = "Budget: one or more, all hold"
_TRAINING = "Fine-tuning"


@guarded
def prune_command(
    data: Annotated[str, typer.Argument(help="Image folder, parquet file or folder, hf://owner/name, torchvision:NAME.")],
    model: Annotated[str, typer.Option("--model", help="A timm model name, or module:factory of your own code.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the artifact.")],
    keep: Annotated[float | None, typer.Option(help="Share of units to keep.", rich_help_panel=_BUDGET)] = None,
    max_params: Annotated[
        str | None, typer.Option(help="Most parameters: 1.5M, 30%.", rich_help_panel=_BUDGET)
    ] = None,
    max_macs: Annotated[
        str | None, typer.Option(help="Most multiply-accumulates an image: 200M, 25%.", rich_help_panel=_BUDGET)
    ] = None,
    max_weights: Annotated[
        str | None, typer.Option(help="Most bytes of weights: 4MB, 4MiB, 20%.", rich_help_panel=_BUDGET)
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most peak memory, one image: weights and activations.", rich_help_panel=_BUDGET)
    ] = None,
    weights: Weights = None,
    random: Random = False,
    image_size: ImageSize = None,
    method: Annotated[
        str, typer.Option(help="random, l1, l2, bn-scale, activation, taylor, snip or synflow.")
    ] = "taylor",
    rounds: Annotated[int, typer.Option(min=1, help="1 is one-shot; more prune step by step.")] = 1,
    round_steps: Annotated[int, typer.Option(min=0, help="Steps of fine-tuning between rounds.")] = 25,
    allocation: Annotated[
        str, typer.Option(help="layer: the same share of every layer; global: scores compared over all layers.")
    ] = "layer",
    multiple: Annotated[int, typer.Option(min=1, help="Round widths to multiples of this, such as 8 or 16.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Cut residual-stream channels too.")] = False,
    reconstruct: Annotated[bool, typer.Option(help="Let layers behind removed units be solved again.")] = True,
    head: Annotated[str, typer.Option(help="Closed-form classifier: ridge or class-mean.")] = "ridge",
    steps: Annotated[int, typer.Option(min=0, help="Mini-batches; 0: closed form.", rich_help_panel=_TRAINING)] = 60,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default: by optimiser.", rich_help_panel=_TRAINING)
    ] = None,
    optimiser: Annotated[str, typer.Option(help="auto, sgd or adamw.", rich_help_panel=_TRAINING)] = "auto",
    flip: Annotated[
        bool, typer.Option("--flip", help="Mirror images at random.", rich_help_panel=_TRAINING)
    ] = False,
    classes: Classes = None,
    shots: Shots = None,
    test_fraction: TestFraction = 0.2,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")] = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Prune a model for one task to a budget, fine-tune it and save it.

    Ctrl-C while fine-tuning keeps the best model so far and saves it.
    """
    limits = {"max_params": max_params, "max_macs": max_macs, "max_weights": max_weights, "max_memory": max_memory}
    budget_of = _budget(keep, limits)
    begin(device, threads)
    from kinprune.artifact import check_destination, save
    from kinprune.backbones import load_backbone
    from kinprune.delivery import artifact_of, summarise
    from kinprune.pruning import Plan, prune
    from kinprune.tasks import decode, load_task
    from kinprune.training import Recipe

    check_destination(out, overwrite=overwrite)
    recipe = Recipe(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, optimiser=_choice(optimiser), flip=flip,
        seed=seed,
    )  # fmt: skip
    task = load_task(
        data, classes=chosen_classes(classes), shots=shots, test_fraction=test_fraction, seed=seed,
        image_column=image_column, label_column=label_column,
    )  # fmt: skip
    backbone = load_backbone(
        model, num_classes=len(task.classes), weights=weights, random=random, seed=seed, image_size=image_size
    )
    plan = Plan(
        budget_of(backbone, stream), criterion=_choice(method), rounds=rounds, round_steps=round_steps,
        allocation=_choice(allocation), multiple=multiple, stream=stream, reconstruct=reconstruct, head=_choice(head),
        recipe=recipe,
    )  # fmt: skip
    say(f"{task.name}: {len(task.train):,} training and {len(task.test):,} test images of {len(task.classes)} classes")
    decoded = decode(task, backbone.preprocessing, progress=True, threads=threads)
    with _bar() as on_step:
        pruned = prune(backbone, decoded, plan, device=device, on_step=on_step)
    save(artifact_of(pruned, backbone, decoded), out, overwrite=overwrite)
    summary = {"out": str(out), "task": task.name, "model": model, "method": method, **summarise(pruned)}
    if json:
        show_json(summary)
    else:
        _print(summary)


def _choice(text: str) -> Any:
    """A word that the library checks against its own list."""
    return text


def _budget(keep: float | None, limits: dict[str, str | None]) -> Callable[[Backbone, bool], Budget]:
    """Check the budget's form now; give its numbers once the backbone is there to take shares of."""
    if keep is None and all(text is None for text in limits.values()):
        from kinprune.errors import BudgetError

        raise BudgetError(
            "no budget was given, expected one or more of --keep 0.1, --max-params 1.5M, --max-macs 200M, "
            "--max-weights 4MB, --max-memory 8MB"
        )
    units = {"max_params": "count", "max_macs": "count", "max_weights": "bytes", "max_memory": "bytes"}
    names = {
        "max_params": "parameters", "max_macs": "macs", "max_weights": "weight_bytes", "max_memory": "peak_memory_bytes",
    }  # fmt: skip
    for name, text in limits.items():
        quantity(text, f"--{name.replace('_', '-')}", unit=units[name], whole=1)

    def resolve(backbone: Backbone, stream: bool) -> Budget:
        from kinprune.selection import Budget
        from kinprune.units import find_units

        whole: dict[str, int | None] = dict.fromkeys(names.values())
        if any(text is not None and text.strip().endswith("%") for text in limits.values()):
            size_ = backbone.preprocessing.image_size
            space = find_units(backbone.model, size_, stream=stream, head=backbone.head)
            costs = space.cost(space.whole_mask())
            whole = {name: getattr(costs, name) for name in names.values()}
        values = {
            names[name]: quantity(text, f"--{name.replace('_', '-')}", unit=units[name], whole=whole[names[name]])
            for name, text in limits.items()
        }
        return Budget(keep=keep, **values)

    return resolve


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar over training steps, on standard error, on a terminal only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        stages = {"": progress.add_task("units and closed form", total=None)}

        def on_step(stage: str, step: int, steps: int) -> None:
            if stage not in stages:
                progress.update(next(iter(reversed(stages.values()))), visible=False)
                stages[stage] = progress.add_task(stage, total=steps)
            progress.update(stages[stage], completed=step)

        yield on_step


def _print(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table()
    for name, justify in (("", "left"), ("whole", "right"), ("pruned", "right"), ("share", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    whole, costs = summary["whole"], summary["costs"]
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("units", "units", count), ("parameters", "parameters", count), ("MACs", "macs", count),
        ("weights", "weight_bytes", size), ("peak memory", "peak_memory_bytes", size),
    )  # fmt: skip
    for title, name, text in rows:
        table.add_row(title, text(whole[name]), text(costs[name]), f"{costs[name] / whole[name]:.1%}")
    table.add_row("accuracy", f"{summary['accuracy_dense']:.1%}", f"{summary['accuracy']:.1%}", "")
    table.add_row("  before any step", "", f"{summary['accuracy_closed_form']:.1%}", "")
    console.print(table)
    if summary["note"]:
        console.print(f"Note: {summary['note']}.", highlight=False, soft_wrap=True)
    if summary["stopped"]:
        console.print(f"Stopped after {len(summary['losses'])} steps; this is the best model so far.", highlight=False, soft_wrap=True)
    seconds = ", ".join(f"{stage} {value:.1f}" for stage, value in summary["seconds"].items())
    console.print(f"Seconds: {seconds}.", highlight=False, soft_wrap=True)
    console.print(f"Saved to {summary['out']}", highlight=False, soft_wrap=True)
