"""Running a protocol: what is missing is run, and every finished run is a line of the protocol's rows at once."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import kinprune as kp
from benchmarks.study.protocol import Part, Protocol
from benchmarks.study.starts import Start, begin
from benchmarks.study.statistics import merge
from benchmarks.study.targets import Drawn, TargetTask, draw_targets, prepare
from kinprune.backbones import load_backbone
from kinprune.bank import Bank, create_bank, open_bank
from kinprune.building import SOURCE_PLAN, Source, broaden, build, sample_sources
from kinprune.delivery import versions
from kinprune.evaluation import evaluate
from kinprune.pruning import prune, unit_space
from kinprune.training import Recipe, fine_tune

Row = dict[str, Any]
OnRow = Callable[[Row, int, int], None]


@dataclass(frozen=True)
class Places:
    """Where things are: data sets, weights, banks, and the file of rows."""

    data: Path
    weights: Path
    banks: Path
    rows: Path


@dataclass(frozen=True)
class Run:
    """One run: a method on a target task. What it is named by is its place in the rows."""

    stage: str
    task: Drawn
    method: str
    keep: float
    shots: int | None
    sources: int | None
    steps: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs apart, whatever number of steps they are trained for."""
        return (self.stage, self.task.classes, self.method, self.keep, self.shots, self.sources)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, those of one run made one (see ``merge``); a line that a kill cut off is left out.

    Nothing is written: another process may be adding rows.
    """
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return merge(rows)


def add_row(path: Path, row: Row) -> None:
    """Write a row as a line of its own, in one piece, after a line that was cut off too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        cut_off = file.seek(0, 2) > 0 and file.seek(-1, 2) >= 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut_off + json.dumps(row).encode() + b"\n")


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The key of a row's run."""
    return (row["stage"], tuple(row["classes"]), row["method"], row["keep"], row["shots"], row["sources"])


def open_or_build(protocol: Protocol, places: Places, workers: int = 1) -> Bank:
    """The protocol's bank, filled up to its number of source tasks; goes on where a build was stopped."""
    wanted, address = protocol.bank, places.banks / protocol.bank.file
    plan = replace(SOURCE_PLAN, budget=kp.Budget(keep=wanted.keep), stream=wanted.stream)
    if not address.exists():
        places.banks.mkdir(parents=True, exist_ok=True)
        weights = places.weights / wanted.weights
        backbone = load_backbone(
            wanted.model, num_classes=wanted.classes, weights=weights, image_size=wanted.image_size
        )
        create_bank(address, backbone, unit_space(backbone, plan), stream=wanted.stream)
    bank = open_bank(address)
    if len(bank) >= wanted.tasks + (wanted.broad_steps > 0):
        return bank
    source = Source(str(places.data / wanted.data), shots=wanted.shots, label_column=wanted.label_column)
    kept = tuple(name for name in source.load().classes if name not in wanted.left_out)
    chosen = [replace(source, classes=kept)]
    broad = broaden(chosen, wanted.classes, wanted.broad_steps) if wanted.broad_steps else []
    build(bank, broad + sample_sources(chosen, wanted.tasks, wanted.classes), plan, workers=workers)
    return bank


def plan_runs(protocol: Protocol, bank: Bank, data: Path, stage: str) -> list[Run]:
    """All runs of a stage, part by part, those of one part and one task together.

    A later part may ask for other numbers of steps of the same start: that is a run of its own.
    """
    drawn = draw_targets(protocol.targets, bank, data, stage)
    return list(dict.fromkeys(run for part in protocol.parts if part.stage == stage for run in _runs(part, drawn)))


def _runs(part: Part, drawn: list[Drawn]) -> Iterator[Run]:
    for task in drawn[: part.tasks]:
        for shots in part.shots:
            for keep in part.keep:
                for sources in part.sources:
                    for method in part.methods:
                        yield Run(part.stage, task, method, keep, shots, sources, part.steps)


def run_protocol(
    protocol: Protocol,
    bank: Bank,
    places: Places,
    stage: str,
    share: tuple[int, int] = (0, 1),
    on_row: OnRow | None = None,
) -> int:
    """Run what is missing of a stage; ``share`` (i, n) takes every n-th target task, for several processes.

    Returns how many runs it made. A run that is among the rows with all its steps is not made again.
    """
    rows = {key_of(row): row for row in read_rows(places.rows)}
    runs = plan_runs(protocol, bank, places.data, stage)
    tasks = list(dict.fromkeys((run.task, run.shots) for run in runs))
    mine = set(tasks[share[0] :: share[1]])
    todo = [run for run in runs if (run.task, run.shots) in mine and _missing(run, rows)]
    target: tuple[Any, TargetTask] | None = None
    made = 0
    for number, run in enumerate(todo, start=1):
        steps = _missing(run, rows)
        if not steps:  # a part before it has run them
            continue
        task = (run.task, run.shots)
        if target is None or target[0] != task:
            target = (task, prepare(protocol.targets, bank, places.data, run.task, run.shots))
        row = make_row(run, protocol.methods[run.method], target[1], steps)
        row = {"protocol": protocol.name, "model": protocol.bank.model, **row}
        add_row(places.rows, row)
        rows[run.key] = merge([rows[run.key], row])[0] if run.key in rows else row
        made += 1
        if on_row is not None:
            on_row(row, number, len(todo))
    return made


def _missing(run: Run, rows: Mapping[tuple[Any, ...], Row]) -> tuple[int, ...]:
    """The numbers of steps that no row of the run has; 0, the start, comes with any."""
    done = rows.get(run.key, {"accuracy": {}})["accuracy"]
    if not run.steps:
        return () if done else (0,)
    return tuple(steps for steps in run.steps if str(steps) not in done)


def make_row(run: Run, method: Mapping[str, Any], target: TargetTask, steps: tuple[int, ...]) -> Row:
    """One run: the start, then the test accuracy after each number of steps, each from the same start."""
    row: Row = {
        "stage": run.stage,
        "data": run.task.data,
        "classes": list(run.task.classes),
        "method": run.method,
        "keep": run.keep,
        "shots": run.shots,
        "sources": run.sources,
        "records": len(target.bank),
        "whole": target.whole,
    }
    if method["way"] == "scratch":
        accuracy, trained = {}, {}
        for number in steps:
            started = time.perf_counter()
            accuracy[str(number)] = _from_scratch(method, target, run.keep, number)
            trained[str(number)] = round(time.perf_counter() - started, 2)
        return {**row, "accuracy": accuracy, "seconds": trained, "versions": versions()}
    start = begin(method, target, run.keep, run.sources)
    accuracy = {"0": evaluate(start.model, target.task.test, target.task.preprocessing).accuracy}
    trained = {}
    for number in steps:
        if number:
            started = time.perf_counter()
            accuracy[str(number)] = _trained(start, target, number, accuracy["0"])
            trained[str(number)] = round(time.perf_counter() - started, 2)
    return {
        **row,
        "accuracy": accuracy,
        "seconds": {"start": round(start.seconds, 2), **trained},
        "details": dict(start.details),
        "versions": versions(),
    }


def _trained(start: Start, target: TargetTask, steps: int, before: float) -> float:
    model, preprocessing = copy.deepcopy(start.model), target.task.preprocessing
    result = fine_tune(
        model,
        target.fit,
        preprocessing,
        Recipe(steps=steps),
        held_back=target.guard,
        teacher=target.dense,
        begin=start.trainable,
    )
    return evaluate(model, target.task.test, preprocessing).accuracy if result.best_step else before


def _from_scratch(method: Mapping[str, Any], target: TargetTask, keep: float, steps: int) -> float:
    """Iterative Taylor pruning whose steps, times ``method['times']``, are shared by its rounds and its end."""
    rounds, every = int(method["rounds"]), int(method["times"]) * steps
    between = every // (2 * rounds)
    recipe = Recipe(steps=every - between * (rounds - 1))
    stream = target.bank.header.stream
    plan = kp.Plan(kp.Budget(keep=keep), rounds=rounds, round_steps=between, stream=stream, recipe=recipe)
    return prune(target.backbone, target.task, plan).final.accuracy
