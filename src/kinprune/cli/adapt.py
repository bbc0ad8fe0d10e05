"""``kinprune adapt``: a bank's model, made small for a new task in one shot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kinprune.cli import device_options
from kinprune.cli import kin_options as own
from kinprune.cli import options as shared
from kinprune.cli import prune_options as pruning
from kinprune.cli.kin import print_kin
from kinprune.cli.output import console, say, stage_bar
from kinprune.cli.running import begin, guarded
from kinprune.cli.values import word
from kinprune.errors import BudgetError
from kinprune.quantities import byte_count, count

if TYPE_CHECKING:
    from torch import Tensor

    from kinprune.bank import Bank
    from kinprune.preprocessing import Preprocessing
    from kinprune.tasks import Task


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
    score_mask: own.ScoreMask = "kept",
    neighbours: own.Neighbours = "10",
    measure: own.Measure = "leep",
    exact: own.Exact = 0,
    weighting: own.Weighting = "softmax",
    temperature: own.Temperature = None,
    inherit: own.Inherit = "auto",
    blend: own.Blend = None,
    keep: pruning.Keep = None,
    sizes: own.Sizes = None,
    max_params: pruning.MaxParams = None,
    max_macs: pruning.MaxMacs = None,
    max_weights: pruning.MaxWeights = None,
    max_memory: pruning.MaxMemory = None,
    max_latency: device_options.MaxLatency = None,
    device_profile: device_options.DeviceProfile = None,
    devices: device_options.Devices = None,
    precision: device_options.PrecisionOption = None,
    inference_threads: device_options.InferenceThreads = None,
    inference_batch: device_options.InferenceBatch = None,
    allocation: pruning.Allocation = "layer",
    multiple: pruning.Multiple = 1,
    reconstruct: pruning.Reconstruct = True,
    head: pruning.Head = "ridge",
    steps: pruning.Steps = 60,
    batch_size: pruning.MiniBatch = 64,
    learning_rate: pruning.LearningRate = None,
    optimiser: pruning.Optimiser = "auto",
    flip: pruning.Flip = False,
    distil: pruning.Distil = True,
    train_memory: pruning.TrainMemory = None,
    onnx: own.Onnx = None,
    kin_data: own.KinData = None,
    overwrite: pruning.Overwrite = False,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
) -> dict[str, Any] | None:
    """Make a bank's model small for a new task, in one shot, from what pruning for its nearest kin taught.

    Ctrl-C while fine-tuning keeps the best model so far and saves it; before that nothing is written.
    """
    given = pruning.limits_of(max_params, max_macs, max_weights, max_memory)
    ratios = None if sizes is None else own.sizes_of(sizes)
    if ratios is not None and keep is not None:
        raise BudgetError("both --keep and --sizes are given, expected one of them")
    on = device_options.read_devices(device_profile, devices, threads=inference_threads, batch=inference_batch)
    wanted = device_options.check_precision(precision)
    if ratios is None and keep is None and max_latency is None and not given and not on:
        raise BudgetError(pruning.no_budget("--keep 0.1, --sizes 0.5,0.2,0.1"))
    begin(device, threads)
    from kinprune.adapt_plan import AdaptPlan
    from kinprune.adaptation import adapt
    from kinprune.admission import check_goals, check_training_memory
    from kinprune.bank import open_bank
    from kinprune.bank.backbone import bank_space, load_bank_backbone
    from kinprune.publishing import check_alternatives, plan_destination, publish, size_folders
    from kinprune.tasks import decode
    from kinprune.voting import TEMPERATURE

    names = size_folders(ratios) if ratios else [one.name for one in on] if devices else None
    destination = plan_destination(out, names, overwrite=overwrite, onnx=onnx)
    recipe = pruning.recipe_of(
        steps, batch_size, learning_rate=learning_rate, optimiser=optimiser, flip=flip, seed=seed
    )
    plan = AdaptPlan(
        method=word(method),
        score_mask=word(score_mask),
        search=own.search_of(neighbours, measure=measure, exact=exact, seed=seed),
        weighting=word(weighting),
        temperature=TEMPERATURE if temperature is None else temperature,
        inheritance=word(inherit),
        blend=blend,
        allocation=word(allocation),
        multiple=multiple,
        reconstruct=reconstruct,
        distil=distil,
        head=word(head),
        train_memory=train_memory,
        recipe=recipe,
    )
    opened = open_bank(bank)
    task = shared.load_data(
        data, classes, shots, test_fraction, image_column=image_column, label_column=label_column, seed=seed
    )
    pictured = [
        shared.load_data(source, None, None, 0.2, image_column=image_column, label_column=label_column, seed=seed)
        for source in kin_data or []
    ]
    backbone = load_bank_backbone(opened, len(task.classes), seed=seed)
    space = bank_space(opened, backbone)
    whole = space.cost(space.whole_mask())
    budgets = [pruning.amounts_of(pruning.Asked(ratio, given, max_latency), whole) for ratio in (ratios or (keep,))]
    goals = check_goals(space, device_options.goals_for(space, budgets, on, wanted, multiple), plan)
    check_alternatives(goals, destination)
    check_training_memory(backbone, space, goals, plan)
    say(f"{task.name}: {len(task.train):,} training and {len(task.test):,} test images of {len(task.classes)} classes")
    samples = _samples(opened, pictured, backbone.preprocessing)
    decoded = decode(task, backbone.preprocessing, progress=True, threads=threads)
    with stage_bar() as on_step:
        adapted = adapt(decoded, opened, goals, plan, backbone=backbone, space=space, device=device, on_step=on_step)
        with _saying_what_is_there(out, destination.folders):
            published = publish(
                adapted,
                decoded,
                opened.header,
                destination,
                samples=samples,
                on_stage=lambda stage: on_step(stage, 0, 0),
            )
    summary = {"task": task.name, "bank": len(opened), **published}
    if json:
        return summary
    print_kin(summary["neighbours"], measure)
    _print_sizes(summary)
    return None


def _samples(bank: Bank, sources: Sequence[Task], preprocessing: Preprocessing) -> dict[str, Tensor]:
    """An image of each class that both the bank and the sources have: read before any work, for one may be damaged."""
    from kinprune.bank.listing import class_names
    from kinprune.tasks import decode_samples

    if not sources:
        return {}
    known = class_names(bank)
    found: dict[str, Tensor] = {}
    for source in sources:
        found |= decode_samples(source, known, preprocessing)
    return found


@contextmanager
def _saying_what_is_there(out: Path, folders: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        whole = f"what is in {out} is whole, --overwrite completes it"
        there = whole if any(folder.exists() for folder in folders) else "no model was written yet"
        say(f"kinprune: interrupted while saving; {there}")
        raise typer.Exit(130) from interrupt


def _print_sizes(summary: dict[str, Any]) -> None:
    from rich.table import Table

    timed = "latency_ms" in summary
    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("start", "tuned", "params", "MACs", "weights", *(["exported", "latency"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)

    def cells(costs: dict[str, int], row: dict[str, Any]) -> tuple[str, ...]:
        exported = f"{row['accuracy_exported']:.1%}" if "accuracy_exported" in row else ""
        latency = [exported, f"{row['latency_ms']:.2f} ms"] if timed else []
        return count(costs["parameters"]), count(costs["macs"]), byte_count(costs["weight_bytes"]), *latency

    table.add_row("whole model", f"{summary['accuracy_dense']:.1%}", "", *cells(summary["whole"], summary))
    for sized in summary["sizes"]:
        accuracy = f"{sized['accuracy_closed_form']:.1%}", f"{sized['accuracy']:.1%}"
        table.add_row(_size_name(sized), *accuracy, *cells(sized["costs"], sized))
    shown = console()
    shown.print(table)
    told = "; latency: one image in ONNX Runtime on this machine, one thread" if timed else ""
    shown.print(f"Accuracy on the test images: start in closed form, tuned after fine-tuning{told}.")
    for sized in summary["sizes"]:
        for line in _remarks(sized):
            shown.print(line)
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in summary["seconds"].items())
    shown.print(f"Took {sum(summary['seconds'].values()):.1f} s: {seconds}.")
    for folder in summary["out"]:
        shown.print(f"Saved to {folder}", soft_wrap=True)
    shown.print(f"Report: {summary['report']}", soft_wrap=True)


def _size_name(sized: dict[str, Any]) -> str:
    keep = f"keep {sized['budget']['keep']:g}" if "keep" in sized["budget"] else "pruned"
    name = sized.get("device") or keep
    precision = sized.get("precision", "fp32")
    return name if precision == "fp32" else f"{name}, {precision}"


def _remarks(sized: dict[str, Any]) -> list[str]:
    """What a person is told of a model beside its row: unused budget, and how its device was met."""
    name = _size_name(sized)
    lines = [f"Note, {name}: {sized['note']}."] if sized["note"] else []
    if sized.get("predicted_ms") is not None:
        asked = f", at most {sized['budget']['latency_ms']:g} ms asked" if "latency_ms" in sized["budget"] else ""
        run = f"{sized['latency_threads']} threads, batch {sized['latency_batch']}"
        where = "measured here" if sized["latency_on_device"] else "on this machine, which is not the device"
        lines.append(
            f"{name}: {sized['predicted_ms']:.3g} ms foretold{asked}; {sized['latency_ms']:.3g} ms {where} ({run})."
        )
    if sized.get("memory"):
        asked_bytes = byte_count(sized["budget"]["peak_memory_bytes"])
        lines.append(f"{name}: {byte_count(sized['memory']['peak_bytes'])} of memory measured, {asked_bytes} asked.")
    if sized.get("training_memory"):
        lines.append(f"{name}: {pruning.told_of_memory(sized['training_memory'])}")
    return lines
