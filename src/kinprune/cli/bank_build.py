"""``kinprune bank build`` and ``add``: source tasks are pruned from scratch, or were adapted, and go into a bank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kinprune.cli import bank_options as own
from kinprune.cli import options as shared
from kinprune.cli.bank_add import TaskOrRecord, add_record, record_file, refuse_options
from kinprune.cli.bank_progress import shown_progress
from kinprune.cli.output import console, say
from kinprune.cli.prune_options import Flip
from kinprune.cli.running import begin, guarded
from kinprune.errors import BankError, KinpruneError, TaskError

if TYPE_CHECKING:
    from kinprune.bank import Bank
    from kinprune.building import Build, Cluster, Done, Source
    from kinprune.pruning import Plan


@guarded
def build_command(
    data: own.Data,
    bank: own.Address,
    tasks: own.Tasks = None,
    classes: own.ClassCount = None,
    whole: own.Whole = False,
    broad_steps: own.BroadSteps = None,
    leave_out: own.LeaveOut = None,
    shots: shared.Shots = None,
    test_fraction: shared.TestFraction = 0.2,
    image_column: shared.ImageColumn = None,
    label_column: shared.LabelColumn = None,
    model: own.Model = None,
    weights: shared.Weights = None,
    random: shared.Random = False,
    image_size: shared.ImageSize = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    interpolation: shared.Interpolation = None,
    crop_pct: shared.CropPct = None,
    keep: own.Keep = None,
    method: own.Method = None,
    allocation: own.Allocation = None,
    multiple: own.Multiple = None,
    stream: own.Stream = False,
    rounds: own.Rounds = None,
    round_steps: own.RoundSteps = None,
    steps: own.Steps = None,
    batch_size: own.MiniBatch = None,
    learning_rate: own.LearningRate = None,
    optimiser: own.Optimiser = None,
    flip: Flip = False,
    store: own.Store = None,
    workers: own.Workers = 1,
    ray: own.Ray = None,
    task_cpus: own.TaskCpus = None,
    task_gpus: own.TaskGpus = None,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: own.Threads = None,
) -> dict[str, Any] | None:
    """Fill a bank: draw source tasks from labelled images, prune the model for each, and keep what was learned.

    Each task's record is in the bank as soon as it is done. Run again, a build goes on where it was stopped; with more
    --tasks it makes the bank larger. The first task of a DATA is a broad one, of all its classes.
    """
    if workers > 1 and threads is not None:
        raise BankError("--threads is for one worker, several share the cores evenly: leave out --threads or --workers")
    if whole and (tasks, classes, broad_steps) != (None, None, None):
        raise TaskError(
            "--whole makes each DATA one task, nothing is drawn: leave out --tasks, --classes and --broad-steps"
        )
    cluster, device = own.cluster_of(ray, task_cpus, task_gpus, device, workers, threads)
    begin("cpu" if cluster else device, threads)  # a GPU, if any, is on the cluster
    plan = own.plan_of(
        keep=keep,
        criterion=method,
        allocation=allocation,
        multiple=multiple,
        stream=stream,
        rounds=rounds,
        round_steps=round_steps,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimiser=optimiser,
        flip=flip,
        seed=seed,
    )
    place = _Place(bank, store, model, _given(weights, random, image_size, mean, std, interpolation, crop_pct), seed)
    found = _find(place)
    from kinprune.building import BROAD_TIMES, Source, broaden, sample_sources

    read = _read(
        [Source(text, None, shots, test_fraction, image_column, label_column) for text in data],
        shared.chosen_classes(leave_out) or [],
    )
    sources, few, drawn = read, classes or own.CLASSES, own.TASKS if tasks is None else tasks
    if not whole:
        long = BROAD_TIMES * plan.recipe.steps if broad_steps is None else broad_steps
        sources = broaden(read, few, long) if broad_steps != 0 else []
        sources += sample_sources(read, drawn, few, seed=seed) if drawn else []
    if not sources:
        raise TaskError(
            "--tasks is 0 and there is no broad task (it has more classes than --classes, and --broad-steps above 0): "
            "nothing would be built; ask for a task"
        )
    opened, plan = _open(place, found, len(sources[-1].classes or ()) if whole else few, plan)
    return _report(_build(opened, sources, plan, _Workers(workers, device, cluster)), json)


@guarded
def add_command(
    context: typer.Context,
    data: TaskOrRecord,
    bank: own.Address,
    classes: shared.Classes = None,
    shots: shared.Shots = None,
    test_fraction: shared.TestFraction = 0.2,
    image_column: shared.ImageColumn = None,
    label_column: shared.LabelColumn = None,
    model: own.Model = None,
    weights: shared.Weights = None,
    random: shared.Random = False,
    image_size: shared.ImageSize = None,
    mean: shared.Mean = None,
    std: shared.Std = None,
    interpolation: shared.Interpolation = None,
    crop_pct: shared.CropPct = None,
    keep: own.Keep = None,
    method: own.Method = None,
    allocation: own.Allocation = None,
    multiple: own.Multiple = None,
    stream: own.Stream = False,
    rounds: own.Rounds = None,
    round_steps: own.RoundSteps = None,
    steps: own.Steps = None,
    batch_size: own.MiniBatch = None,
    learning_rate: own.LearningRate = None,
    optimiser: own.Optimiser = None,
    flip: Flip = False,
    store: own.Store = None,
    json: shared.Json = False,
    seed: shared.Seed = 0,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
) -> dict[str, Any] | None:
    """Add one whole task to a bank: the model is pruned for it from scratch, and what was learned is kept.

    Where DATA is what kinprune adapt wrote, nothing is pruned: an existing bank of the same model learns from it.
    """
    record = record_file(data)
    if record is not None:
        refuse_options(context, record)
        return _report(_add_record(record, bank), json)
    begin(device, threads)
    plan = own.plan_of(
        keep=keep,
        criterion=method,
        allocation=allocation,
        multiple=multiple,
        stream=stream,
        rounds=rounds,
        round_steps=round_steps,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimiser=optimiser,
        flip=flip,
        seed=seed,
    )
    place = _Place(bank, store, model, _given(weights, random, image_size, mean, std, interpolation, crop_pct), seed)
    found = _find(place)
    from kinprune.building import Source

    chosen = shared.chosen_classes(classes)
    named = None if chosen is None else tuple(chosen)
    sources = _read([Source(data, named, shots, test_fraction, image_column, label_column)], [])
    opened, plan = _open(place, found, len(sources[-1].classes or ()), plan)
    return _report(_build(opened, sources, plan, _Workers(1, device, None)), json)


@dataclass(frozen=True)
class _Place:
    """The bank that was asked for, and the model: ``options`` are those of ``load_backbone`` that were given."""

    address: str
    store: str | None
    model: str | None
    options: dict[str, Any]
    seed: int


def _given(
    weights: Path | None,
    random: bool,
    image_size: int | None,
    mean: Any,
    std: Any,
    interpolation: str | None,
    crop_pct: float | None,
) -> dict[str, Any]:
    """The options of the model that were given, by their names in ``load_backbone``."""
    options = {
        "weights": weights,
        "random": random or None,
        "image_size": image_size,
        "mean": mean,
        "std": std,
        "interpolation": interpolation,
        "crop_pct": crop_pct,
    }
    return {name: value for name, value in options.items() if value is not None}


def _find(place: _Place) -> Bank | None:
    """The bank, if it is there; whatever can be refused before data are looked at is."""
    from kinprune.backbones.spec import check_name
    from kinprune.bank import bank_exists, open_bank
    from kinprune.bank.schema import parse_address
    from kinprune.bank.weights import WeightStore

    url = parse_address(place.address)
    if place.model is not None:
        check_name(place.model)
    if bank_exists(place.address):
        bank = open_bank(place.address)
        if place.model is None and place.options:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in place.options)
            raise BankError(f"the bank has its own model, to which {flags} cannot be applied: leave out {flags}")
        if place.store is not None and _full(place.store) != bank.store.url:
            raise BankError(
                f"the bank's weights are in {bank.store.shown}, --store says another place: leave out --store"
            )
        return bank
    if place.model is None:
        raise BankError(
            f"there is no bank at {shown_address(place.address)}: correct --bank, or give --model to make a new one"
        )
    if url.get_backend_name() == "sqlite":
        folder = Path(url.database or "").resolve().parent
        if Path(url.database or "").is_dir():
            raise BankError(f"{url.database} is a folder, a bank is a file: give a name in it, such as bank.db")
        if not folder.is_dir():
            raise BankError(f"{url.database} cannot be made: there is no folder {folder}; make it, or correct --bank")
    elif place.store is None:
        raise BankError(
            f"a bank at {shown_address(place.address)} needs a place for its weights that all its users reach: give "
            "--store, a path or an address such as s3://bucket/folder"
        )
    if place.store is not None:
        for _ in WeightStore(_full(place.store)).digests():  # refused here where it cannot be reached
            break
    return None


def _full(store: str) -> str:
    return store if "://" in store else str(Path(store).expanduser().resolve())


def shown_address(address: str) -> str:
    """A bank's address as it may be shown: without a password."""
    from kinprune.bank import schema

    return schema.shown_address(address)


def _read(sources: Sequence[Source], left_out: Sequence[str]) -> list[Source]:
    """The sources with their classes by name, without those left out; all are loaded, none is decoded."""
    from kinprune.tasks.classes import suggest

    twice = [source.data for place, source in enumerate(sources) if source.data in {s.data for s in sources[:place]}]
    if twice:
        raise TaskError(f"{twice[0]} is given more than once: give each DATA once")
    known = [source.load().classes for source in sources]
    every = list(dict.fromkeys(name for names in known for name in names))
    for name in left_out:
        if name not in every:
            raise TaskError(f"--leave-out: there is no class {name!r} in the data; {suggest(name, every)}")
    chosen = [tuple(name for name in names if name not in left_out) for names in known]
    for source, names in zip(sources, chosen, strict=True):
        if len(names) < 2:
            raise TaskError(f"--leave-out leaves {source.data} fewer than two classes: leave out fewer, or that DATA")
    return [replace(source, classes=names) for source, names in zip(sources, chosen, strict=True)]


def _open(place: _Place, found: Bank | None, classes: int, plan: Plan) -> tuple[Bank, Plan]:
    """The bank, made if need be, and the plan on its unit space; refuses other models, and budgets out of reach.

    How a random model begins depends on its number of ``classes``.
    """
    from kinprune.backbones import load_backbone
    from kinprune.bank import check_backbone, check_space, create_bank
    from kinprune.bank.backbone import load_bank_backbone
    from kinprune.pruning import unit_space

    if found is not None and place.model is None:
        backbone = load_bank_backbone(found, classes)
    else:
        backbone = load_backbone(str(place.model), num_classes=classes, seed=place.seed, **place.options)
    if found is None:
        space = unit_space(backbone, plan)
        return create_bank(place.address, backbone, space, stream=plan.stream, store=place.store), plan
    check_backbone(found.header, backbone.fingerprint, backbone.spec, backbone.preprocessing)
    plan = replace(plan, stream=plan.stream or found.header.stream)
    check_space(found.header, unit_space(backbone, plan))
    return found, plan


@dataclass(frozen=True)
class _Workers:
    """Who prunes: ``workers`` processes on a device of this machine, or a cluster."""

    workers: int
    device: str
    cluster: Cluster | None

    @property
    def beginning(self) -> str:
        """What is done before the first task."""
        if self.cluster is not None:
            return "starting Ray" if self.cluster.address == "local" else "giving the images and the model to Ray"
        return "reading the sources" if self.workers == 1 else f"starting {self.workers} workers"


def _build(bank: Bank, sources: Sequence[Source], plan: Plan, who: _Workers) -> dict[str, Any]:
    """Build, show how far it is, and sum up in JSON's own types; where it breaks off, say what is kept."""
    from kinprune.building import build

    done: list[Done] = []
    started = time.perf_counter()
    place, model = shown_address(bank.address), bank.header.spec.name
    say(f"{place}: {records_text(len(bank))} for {model}; source tasks asked for: {len(sources):,}")
    try:
        with shown_progress(who.beginning) as shown:

            def on_task(task: Done, number: int, of: int) -> None:
                done.append(task)
                if shown.on_task is not None:
                    shown.on_task(task, number, of)

            watch = replace(shown, on_task=on_task)
            built = build(bank, sources, plan, workers=who.workers, device=who.device, cluster=who.cluster, watch=watch)
    except KeyboardInterrupt as interrupt:
        say(f"kinprune: interrupted; {kept_text(bank)}")
        raise typer.Exit(130) from interrupt
    except KinpruneError:
        if done:
            say(kept_text(bank))
        raise
    if built.failed:
        raise TaskError(_failed_text(built.failed, kept_text(bank)))
    return _summary(bank, built, [task for task in done if task.seconds], time.perf_counter() - started)


def _failed_text(failed: Sequence[str], kept: str) -> str:
    count = "1 source task" if len(failed) == 1 else f"{len(failed):,} source tasks"
    named = "".join(f"\n  {text}" for text in dict.fromkeys(failed))
    return f"{count} could not be read, all others were done ({kept}):{named}"


def _add_record(record: Path, address: str) -> dict[str, Any]:
    from kinprune.building import Build, Done

    started = time.perf_counter()
    bank, read, added = add_record(record, address)
    seconds = time.perf_counter() - started
    done = [Done(read.name, read.accuracy, seconds, added)] if added else []
    return _summary(bank, Build(len(done), 1 - len(done)), done, seconds)


def records_text(count: int) -> str:
    """``1 record``, ``2 records``."""
    return "1 record" if count == 1 else f"{count:,} records"


def kept_text(bank: Bank) -> str:
    """What a build or a merge that broke off leaves behind."""
    count = len(bank)
    return f"{records_text(count)} {'is' if count == 1 else 'are'} in the bank; run the same command again to go on"


def _summary(bank: Bank, built: Build, done: Sequence[Done], seconds: float) -> dict[str, Any]:
    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "bank": shown_address(bank.address),
        "added": built.added,
        "present": built.present,
        "records": len(bank),
        "accuracy_dense": mean([task.accuracy.dense for task in done]),
        "accuracy_closed_form": mean([task.accuracy.start for task in done]),
        "accuracy": mean([task.accuracy.final for task in done]),
        "seconds_per_task": mean([task.seconds for task in done]),
        "seconds": seconds,
    }


def _report(summary: dict[str, Any], json: bool) -> dict[str, Any] | None:
    if json:
        return summary
    shown = console()
    shown.print(
        f"{summary['added']:,} added to {summary['bank']}, {summary['present']:,} already there; "
        f"{summary['records']:,} records in all.",
        soft_wrap=True,
    )
    if summary["accuracy"] is not None:
        shown.print(
            f"Mean accuracy of the new: whole model {summary['accuracy_dense']:.1%}, "
            f"closed form {summary['accuracy_closed_form']:.1%}, fine-tuned {summary['accuracy']:.1%}; "
            f"{summary['seconds_per_task']:.1f} s a task.",
            soft_wrap=True,
        )
    return None
