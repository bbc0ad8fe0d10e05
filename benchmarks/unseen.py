"""Unseen tasks: adapting with a bank against pruning each task from nothing, with the same images and steps.

    python benchmarks/unseen.py --bank BANK [BANK ...] --data DIR [--stage validation|test] [--json]

The unseen classes are those of ``DIR`` that no source task of the bank has. Eight of them make the validation tasks, on
which defaults are chosen, the others the test tasks. Every method gets the same images, closed-form
start, steps and seed. Every finished run is a line of ``--out``; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import kinprune as kp
from kinprune.adapt_plan import AdaptPlan
from kinprune.adaptation import adapt
from kinprune.bank import Bank, open_bank
from kinprune.bank.backbone import load_bank_backbone
from kinprune.calibration import ClosedForm, head_inputs, solve_probe
from kinprune.delivery import versions
from kinprune.evaluation import evaluate, lay_out
from kinprune.kin import Search
from kinprune.pruning import prune
from kinprune.training import Recipe, fine_tune, hold_back

RESULTS = Path(__file__).parent / "results"
CLASSES, SHOTS, VALIDATION_CLASSES = 5, 100, 8
STEPS = (15, 60)
BASELINES = ("random", "l1", "taylor")
METHODS = ("smsp", "taylor", "l1", "random")
TRAINED = ("smsp", "all neighbours", "backbone's weights", "taylor")
"""What is trained on the validation tasks too."""

SINGLE_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "smsp": {},
    "mvp": {"method": "mvp"},
    "3 neighbours": {"search": Search(count=3)},
    "5 neighbours": {"search": Search(count=5)},
    "20 neighbours": {"search": Search(count=20)},
    "all neighbours": {"search": Search(which="all")},
    "random neighbours": {"search": Search(which="random")},
    "farthest neighbours": {"search": Search(which="farthest")},
    "by n-leep": {"search": Search(measure="n-leep")},
    "by class-mean": {"search": Search(measure="class-mean")},
    "uniform": {"weighting": "uniform"},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.5": {"temperature": 0.5},
    "average's weights": {"inheritance": "average"},
    "backbone's weights": {"inheritance": "backbone"},
    "nearest's weights": {"inheritance": "nearest"},
    "blend 0.25": {"blend": 0.25},
    "blend 0.5": {"blend": 0.5},
    "global": {"allocation": "global"},
}
"""What the closed-form start is compared under: the defaults with one thing changed."""
VALIDATED = (*SINGLE_CHANGES, "taylor")


@dataclass(frozen=True)
class Start:
    """A pruned model in closed form, before any step."""

    model: nn.Module
    closed_form: ClosedForm
    dense: float
    accuracy: float
    inherited: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--label-column", default="fine_label")
    parser.add_argument("--stage", choices=("validation", "test"), default="test")
    parser.add_argument("--tasks", type=int, default=10, help="validation: a third of it")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=RESULTS / "unseen.jsonl")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for address in options.bank:
        bank = open_bank(address)
        for classes in draw_tasks(bank, options):
            run_task(bank, classes, rows, options)
    options.out.with_suffix(".md").write_text(report(rows))
    print(json.dumps({"runs": len(rows), "seconds": round(time.perf_counter() - started, 1)}))


def draw_tasks(bank: Bank, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Random tasks of the classes that no source task of the bank has, apart for validation and test."""
    seen = {name for entry in bank.entries() for name in entry.classes}
    every = kp.load_task(options.data, label_column=options.label_column).classes
    unseen = sorted(set(every) - seen)
    mixed = [unseen[place] for place in np.random.default_rng(0).permutation(len(unseen))]
    validating = options.stage == "validation"
    chosen = mixed[:VALIDATION_CLASSES] if validating else mixed[VALIDATION_CLASSES:]
    generator = np.random.default_rng(1)
    count = max(options.tasks // 3, 1) if validating else options.tasks
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < count:
        task = tuple(sorted(generator.choice(chosen, CLASSES, replace=False).tolist()))
        if task not in drawn:
            drawn.append(task)
    return drawn


def run_task(bank: Bank, classes: tuple[str, ...], rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """All runs of one task that are not among the rows."""
    model = bank.header.spec.name
    key = {"stage": options.stage, "model": model, "keep": options.keep, "classes": list(classes)}
    done = {row["run"] for row in rows if all(row[name] == value for name, value in key.items())}
    todo = [run for run in (METHODS if options.stage == "test" else VALIDATED) if run not in done]
    if not todo:
        return
    backbone = load_bank_backbone(bank, CLASSES)
    task = kp.decode(
        kp.load_task(options.data, classes=classes, shots=SHOTS, label_column=options.label_column),
        backbone.preprocessing,
    )
    teacher = teach(backbone, task)
    for run in todo:
        start = begin(run, task, bank, backbone, options.keep)
        trained = train(start, task, teacher) if options.stage == "test" or run in TRAINED else {}
        row = {
            **key,
            "run": run,
            "size": list(task.preprocessing.image_size),
            "sources": len(bank),
            "dense": start.dense,
            "0": start.accuracy,
            **trained,
            "inherited": start.inherited,
            "seconds": round(start.seconds, 2),
            "versions": versions(),
        }
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not options.json:
            print(json.dumps(row), flush=True)


def teach(backbone: kp.Backbone, task: kp.DecodedTask) -> nn.Module:
    """The whole model with a closed-form head, as ``prune`` and ``adapt`` make their teacher."""
    fit, _ = hold_back(task.train, Recipe().hold_back, Recipe().seed)
    model = copy.deepcopy(backbone.model)
    lay_out(model)
    features = head_inputs(model, backbone.head, fit.images, task.preprocessing)
    solve_probe(model, backbone.head, features, fit.labels, len(task.classes))
    return model


def begin(method: str, task: kp.DecodedTask, bank: Bank, backbone: kp.Backbone, keep: float) -> Start:
    """The start of a method in closed form."""
    budget, still = kp.Budget(keep=keep), Recipe(steps=0)
    started = time.perf_counter()
    if method in BASELINES:
        pruned = prune(backbone, task, kp.Plan(budget, criterion=method, recipe=still))  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        return Start(
            pruned.model, pruned.closed_form, pruned.dense.accuracy, pruned.start.accuracy, "backbone", seconds
        )
    plan = AdaptPlan(**{"method": "smsp", **SINGLE_CHANGES[method]}, recipe=still)
    adapted = adapt(task, bank, budget, plan, backbone=backbone)
    sized = adapted.sizes[0]
    seconds = time.perf_counter() - started
    way = f"{sized.inherited}, {adapted.voters} voters, blend {adapted.blend:g}"
    return Start(sized.model, sized.closed_form, adapted.dense.accuracy, sized.start.accuracy, way, seconds)


def train(start: Start, task: kp.DecodedTask, teacher: nn.Module) -> dict[str, float]:
    """The test accuracy after each number of steps, each from the same start."""
    found = {}
    for steps in STEPS:
        recipe = Recipe(steps=steps)
        fit, guard = hold_back(task.train, recipe.hold_back, recipe.seed)
        model = copy.deepcopy(start.model)
        result = fine_tune(
            model, fit, task.preprocessing, recipe, held_back=guard, teacher=teacher, begin=start.closed_form.trainable
        )
        judged = evaluate(model, task.test, task.preprocessing).accuracy if result.best_step else start.accuracy
        found[str(steps)] = judged
    return found


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """All tables, as Markdown."""
    text = ["# Unseen tasks: kin against pruning from nothing\n"]
    for stage, title in (("test", "Test tasks"), ("validation", "Validation tasks")):
        for model in sorted({row["model"] for row in rows if row["stage"] == stage}):
            chosen = [row for row in rows if row["stage"] == stage and row["model"] == model]
            text.append(f"## {title}, {model} at {chosen[0]['size'][0]} pixels, keep {chosen[0]['keep']:g}\n")
            text.append(table(chosen))
    return "\n".join(text)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row a run: the mean over tasks, and what it is better than ``smsp`` by, with an interval over tasks."""
    columns = [name for name in ("0", *map(str, STEPS)) if any(name in row for row in rows)]
    reference = {tuple(row["classes"]): row for row in rows if row["run"] == "smsp"}
    lines = [
        "| run | tasks | dense | " + " | ".join(f"{name} steps | kin's lead" for name in columns) + " |",
        "|---|---:|---:|" + "---:|---:|" * len(columns),
    ]
    for run in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == run]
        cells = []
        for name in columns:
            values = [row[name] for row in mine if name in row]
            pairs = [
                reference[tuple(row["classes"])][name] - row[name]
                for row in mine
                if name in row and name in reference.get(tuple(row["classes"]), {})
            ]
            cells += [f"{np.mean(values):.1%}" if values else "", lead(pairs) if run != "smsp" else ""]
        dense = np.mean([row["dense"] for row in mine])
        lines.append(f"| {run} | {len(mine)} | {dense:.1%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def lead(differences: Sequence[float]) -> str:
    """The mean of paired differences in points, with a 95 % bootstrap interval over tasks."""
    if not differences:
        return ""
    values = 100 * np.array(differences)
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{values.mean():+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
