"""``kinprune prune``: one task, one model, one budget, from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kinprune.cli import device_options
from kinprune.cli import options as shared
from kinprune.cli import prune_options as own
from kinprune.cli.output import console, say, stage_bar
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import word
from kinprune.errors import BudgetError, DeviceError
from kinprune.quantities import byte_count, count

if TYPE_CHECKING:
    from kinprune.backbones import Backbone
    from kinprune.devices.device import Device, Wanted
    from kinprune.devices.goal import Goal
    from kinprune.pruning import Plan


@guarded
def prune_command(
    data: own.Data,
    model: shared.ModelName,
    out: own.Out,
    classes: shared.Classes = None,
    shots: shared.Shots = None,
    test_fraction: shared.TestFraction = 0.2,
    image_column: shared.ImageColumn = None,
    label_column: shared.LabelColumn = None,
    weights: shared.Weights = None,
    random: shared.Random = False,
    image_size: shared.ImageSize = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    interpolation: shared.Interpolation = None,
    crop_pct: shared.CropPct = None,
    keep: own.Keep = None,
    max_params: own.MaxParams = None,
    max_macs: own.MaxMacs = None,
    max_weights: own.MaxWeights = None,
    max_memory: own.MaxMemory = None,
    max_latency: device_options.MaxLatency = None,
    device_profile: device_options.DeviceProfile = None,
    precision: device_options.PrecisionOption = None,
    method: own.Method = "taylor",
    allocation: own.Allocation = "layer",
    multiple: own.Multiple = 1,
    stream: shared.Stream = False,
    rounds: own.Rounds = 1,
    round_steps: own.RoundSteps = 25,
    reconstruct: own.Reconstruct = True,
    head: own.Head = "ridge",
    steps: own.Steps = 60,
    batch_size: own.MiniBatch = 64,
    learning_rate: own.LearningRate = None,
    optimiser: own.Optimiser = "auto",
    flip: own.Flip = False,
    distil: own.Distil = True,
    train_memory: own.TrainMemory = None,
    overwrite: own.Overwrite = False,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
) -> dict[str, Any] | None:
    """Prune a model for one task to a budget, fine-tune it and save it.

    Ctrl-C while fine-tuning keeps the best model so far and saves it; before that nothing is written.
    """
    given = own.limits_of(max_params, max_macs, max_weights, max_memory)
    on = device_options.read_devices(device_profile, None, threads=None, batch=None)
    wanted = device_options.check_precision(precision)
    if keep is None and max_latency is None and not given and not on:
        raise BudgetError(own.no_budget("--keep 0.1"))
    begin(device, threads)
    from kinprune.artifact import check_destination, save
    from kinprune.backbones import load_backbone
    from kinprune.backbones.spec import check_name
    from kinprune.delivery import artifact_of, summarise
    from kinprune.pruning import Plan, prune
    from kinprune.selection import Budget
    from kinprune.tasks import decode

    check_destination(out, overwrite=overwrite)
    check_name(model)
    recipe = own.recipe_of(steps, batch_size, learning_rate=learning_rate, optimiser=optimiser, flip=flip, seed=seed)
    # Limits in per cent need the model: all else is refused before the data are looked at.
    plan = Plan(
        Budget(keep=keep or 1),
        criterion=word(method),
        rounds=rounds,
        round_steps=round_steps,
        allocation=word(allocation),
        multiple=multiple,
        stream=stream,
        reconstruct=reconstruct,
        distil=distil,
        head=word(head),
        recipe=recipe,
    )
    task = shared.load_data(
        data, classes, shots, test_fraction, image_column=image_column, label_column=label_column, seed=seed
    )
    backbone = load_backbone(
        model,
        num_classes=len(task.classes),
        weights=weights,
        random=random,
        seed=seed,
        image_size=image_size,
        mean=mean,
        std=std,
        interpolation=interpolation,
        crop_pct=crop_pct,
    )
    goal = _aim(plan, backbone, own.Asked(keep, given, max_latency), on, wanted)
    plan = replace(plan, budget=goal.budget, multiple=goal.multiple)
    say(f"{task.name}: {len(task.train):,} training and {len(task.test):,} test images of {len(task.classes)} classes")
    decoded = decode(task, backbone.preprocessing, progress=True, threads=threads)
    with stage_bar() as on_step:
        pruned = prune(
            backbone, decoded, plan, device=device, on_step=on_step, train_memory=train_memory, costs=goal.costs
        )
    save(artifact_of(pruned, backbone, decoded), out, overwrite=overwrite)
    summary = {"out": str(out), "task": task.name, "model": model, "method": method, **summarise(pruned)}
    summary |= {"device": goal.device, "precision": goal.precision}
    summary["predicted_ms"] = goal.costs.predicted_ms(pruned.space.counts(pruned.selection.mask.kept))
    if json:
        return summary
    _print(summary)
    return None


def _aim(plan: Plan, backbone: Backbone, asked: own.Asked, devices: Sequence[Device], precision: Wanted | None) -> Goal:
    """What is asked of the model, in numbers: limits in per cent are shares of the backbone's costs."""
    from kinprune.devices.goal import reachable_goals
    from kinprune.units import find_units

    space = find_units(backbone.model, backbone.preprocessing.image_size, stream=plan.stream, head=backbone.head)
    budget = own.amounts_of(asked, space.cost(space.whole_mask()))
    goals = reachable_goals(space, device_options.goals_for(space, [budget], devices, precision, plan.multiple))
    if len(goals) > 1:
        found = ", ".join(goal.precision for goal in goals)
        raise DeviceError(
            f"several precisions are open ({found}), and prune makes one model: name one with --precision"
        )
    return goals[0]


def _print(summary: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in ("whole", "pruned", "share"):
        table.add_column(name, justify="right")
    whole, costs = summary["whole"], summary["costs"]
    rows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("units", "units", count),
        ("parameters", "parameters", count),
        ("MACs", "macs", count),
        ("weights", "weight_bytes", byte_count),
        ("peak memory", "peak_memory_bytes", byte_count),
    )
    for title, name, text in rows:
        table.add_row(title, text(whole[name]), text(costs[name]), f"{costs[name] / whole[name]:.1%}")
    closed_form = f"{summary['accuracy_dense']:.1%}", f"{summary['accuracy_closed_form']:.1%}"
    table.add_row("accuracy in closed form", *closed_form, "")
    table.add_row("accuracy fine-tuned", "", f"{summary['accuracy']:.1%}", "")
    shown = console()
    shown.print(table)
    if summary["note"]:
        shown.print(f"Note: {summary['note']}.")
    if summary["predicted_ms"] is not None:
        shown.print(f"{summary['predicted_ms']:.3g} ms foretold on {summary['device']}, in {summary['precision']}.")
    if "training_memory" in summary:
        told = own.told_of_memory(summary["training_memory"])
        shown.print(f"{told[0].upper()}{told[1:]}")
    if summary["stopped"]:
        steps, best = len(summary["losses"]), summary["best_step"]
        shown.print(f"Stopped after {steps} steps; kept is the best model so far, of step {best}.")
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in summary["seconds"].items())
    shown.print(f"Took {sum(summary['seconds'].values()):.1f} s: {seconds}.")
    shown.print(f"Saved to {summary['out']}", soft_wrap=True)
