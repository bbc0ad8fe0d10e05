"""How fast a bank is filled on one device: source tasks an hour, beside a plain loop over torch-pruning.

    python -m benchmarks.build --data DIR --weights DIR [--tasks 8] [--device cuda] [--threads 1] [--json]

``DIR`` of data holds ``cifar100``, ``DIR`` of weights ``resnet18_tinyimagenet64.safetensors``,
``mobilenetv2_100.safetensors`` and ``vit_tiny_patch16_224.safetensors``. The ways take turns, task by task, so that
what else the machine does hits all of them. Every finished run is a line of ``--out`` with the ending ``.jsonl``; run
again, it goes on where it stopped. What is compared is said on the page that it writes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

import kinprune as kp
from benchmarks.plain_loop import PlainLoop
from kinprune.building import SOURCE_PLAN, Source, sample_sources
from kinprune.delivery import versions
from kinprune.pruning import Plan, prune, unit_space
from kinprune.selection import select

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet18": ("resnet18_tinyimagenet64", 64),
    "mobilenetv2_100": ("mobilenetv2_100", 96),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", 96),
}
DATA, LABELS, CLASSES, SHOTS = "cifar100", "fine_label", 5, 100
OWN = "kinprune"
PLAIN = ("plain", "plain, taught", "plain, 3 x steps")
WAYS = (OWN, *PLAIN)
Row = dict[str, Any]
Run = Callable[[kp.Backbone, Source, Plan, argparse.Namespace], Row]


def main(words: Sequence[str] | None = None, plan: Plan = SOURCE_PLAN) -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tasks", type=int, default=8, help="source tasks of each model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "build.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    lines = options.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = [json.loads(text) for text in lines.read_text().splitlines()] if lines.exists() else []
    for row in measure(rows, plan, options):
        rows.append(row)
        with lines.open("a") as out:
            out.write(json.dumps(row) + "\n")
        if not options.json:
            print(line(row), flush=True)
    options.out.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(rows))
    told = {f"{one['model']} : {one['way']}": one["times"] for one in compare(rows)}
    print(json.dumps({"times_faster": told, "seconds": round(time.perf_counter() - started, 1)}))


def measure(rows: Sequence[Row], plan: Plan, options: argparse.Namespace) -> Iterator[Row]:
    """The rows that are missing: each task in all ways one after the other, first in another one each time."""
    done = {(*setting(row), row["task"], row["way"]) for row in rows}
    for model in options.models:
        key = (model, options.device, options.threads)
        todo = [(task, way) for task in range(options.tasks) for way in turn(options.ways, task)]
        todo = [run for run in todo if (*key, *run) not in done]
        if not todo:
            continue
        backbone, sources = prepare(model, options)
        warm_up(backbone, sources[0], plan, options)
        for task, way in todo:
            yield {
                "model": model,
                "device": options.device,
                "threads": options.threads,
                "task": task,
                "way": way,
                **RUNS[way](backbone, sources[task], plan, options),
            }


def turn(ways: Sequence[str], by: int) -> list[str]:
    by %= len(ways)
    return [*ways[by:], *ways[:by]]


def prepare(model: str, options: argparse.Namespace) -> tuple[kp.Backbone, list[Source]]:
    """The backbone, and the source tasks as ``kinprune bank build`` draws them."""
    weights, size = MODELS[model]
    path = options.weights / f"{weights}.safetensors"
    backbone = kp.load_backbone(model, num_classes=CLASSES, weights=path, image_size=size)
    whole = Source(str(options.data / DATA), shots=SHOTS, label_column=LABELS)
    return backbone, sample_sources([whole], options.tasks, CLASSES)


def warm_up(backbone: kp.Backbone, source: Source, plan: Plan, options: argparse.Namespace) -> None:
    """A few steps in each way, not counted: libraries load and compile on first use."""
    plan = replace(plan, round_steps=1, recipe=replace(plan.recipe, steps=1))
    for way in options.ways:
        RUNS[way](backbone, source, plan, options)


@dataclass(eq=False)
class Stages:
    """Seconds and processor seconds by stage."""

    device: str
    seconds: dict[str, float] = field(default_factory=dict)
    processor: float = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.processor += time.process_time() - cpu


def own(backbone: kp.Backbone, source: Source, plan: Plan, options: argparse.Namespace) -> Row:
    """What a build does for one source task, but for writing its record."""
    stages = Stages(options.device)
    with stages("read"):
        task = kp.decode(source.load(), backbone.preprocessing, threads=options.threads)
    with stages("all"):
        pruned = prune(backbone, task, plan, device=options.device)
    del stages.seconds["all"]
    return result(pruned.model, pruned.final.accuracy, stages.seconds | pruned.seconds, stages.processor)


def plain(*, taught: bool = False, longer: int = 1) -> Run:
    """The plain loop, with or without the whole model as teacher, with ``longer`` times the steps."""

    def run(backbone: kp.Backbone, source: Source, plan: Plan, options: argparse.Namespace) -> Row:
        recipe = replace(plan.recipe, steps=longer * plan.recipe.steps)
        plan = replace(plan, round_steps=longer * plan.round_steps, recipe=recipe)
        space = unit_space(backbone, plan)
        counts = space.counts(select(space, np.zeros(len(space)), plan.budget).mask.kept).tolist()
        stages = Stages(options.device)
        with stages("read"):
            task = kp.decode(source.load(), backbone.preprocessing, threads=options.threads)
        model, accuracy = PlainLoop(backbone, task, plan, space, counts, taught, options.device, stages).run()
        return result(model, accuracy, stages.seconds, stages.processor)

    return run


RUNS = dict(zip(WAYS, (own, plain(), plain(taught=True), plain(longer=3)), strict=True))


def result(model: nn.Module, accuracy: float, seconds: dict[str, float], processor: float) -> Row:
    return {
        "accuracy": accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "processor": round(processor, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def compare(rows: Sequence[Row]) -> list[Row]:
    """Each plain way of each model beside ours, on the tasks that both have done."""
    found = []
    for key in dict.fromkeys(map(setting, rows)):
        by_way = {way: {row["task"]: row for row in rows if setting(row) == key and row["way"] == way} for way in WAYS}
        for way in PLAIN:
            pairs = [(row, by_way[way][task]) for task, row in by_way[OWN].items() if task in by_way[way]]
            if pairs:
                named = dict(zip(("model", "device", "threads"), key, strict=True))
                found.append(named | {"way": way, **judge(pairs)})
    return found


def setting(row: Row) -> tuple[str, str, int]:
    return row["model"], row["device"], row["threads"]


def judge(pairs: Sequence[tuple[Row, Row]]) -> Row:
    """How many times as long the other way takes, and how much better ours answers, over tasks done both ways."""
    own, other = ([total(pair[side]) for pair in pairs] for side in (0, 1))
    gains = [first["accuracy"] - second["accuracy"] for first, second in pairs]
    return {
        "tasks": len(pairs),
        "times": round(sum(other) / sum(own), 2),
        "times_processor": round(sum(b["processor"] for _, b in pairs) / sum(a["processor"] for a, _ in pairs), 2),
        "an_hour": [round(3600 * len(pairs) / sum(side)) for side in (own, other)],
        "accuracy": [mean(pair[side]["accuracy"] for pair in pairs) for side in (0, 1)],
        "gain": mean(gains),
        "gain_error": stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
        "parameters": [pairs[0][side]["parameters"] for side in (0, 1)],
    }


def total(row: Row) -> float:
    return float(sum(row["seconds"].values()))


def line(row: Row) -> str:
    """One run, for people."""
    stages = ", ".join(f"{name} {value:.1f}" for name, value in row["seconds"].items())
    return (
        f"{row['model']}, task {row['task']}, {row['way']}: {total(row):.1f} s ({stages}), "
        f"processor {row['processor']:.1f} s, accuracy {row['accuracy']:.1%}"
    )


def page(rows: Sequence[Row]) -> str:
    """What was found as a page of Markdown."""
    head = (
        "| model | device | beside | tasks | an hour | times | times, processor | accuracy | gain in points |\n"
        + "|---" * 9
        + "|\n"
    )
    return TOLD + head + "".join(map(compared, compare(rows))) + "\n" + stages_table(rows)


TOLD = (
    "# Filling a bank\n\n"
    "Made by `python -m benchmarks.build --data DIR --weights DIR`: source tasks of five CIFAR-100 classes, 100 "
    "training images a class, pruned as `kinprune bank build` does it, to a tenth of the units inside blocks in two "
    "rounds of 20 steps and 60 last ones. *plain* is the same written with torch-pruning alone "
    "(benchmarks/plain_loop.py): a head fitted to features, Taylor scores, as many units of the same layers, the same "
    "steps, batches, optimiser and learning rates, float32, all training images to learn from, the last state kept; "
    "MobileNetV2's folded batch norms are trained like any others. *plain, taught* has the whole model as teacher too, "
    "asked in every step, where Kinprune's answers each image once, and *plain, 3 x steps* has three times the steps. "
    "The ways take turns on each task. An hour: "
    "source tasks an hour, ours and theirs. Times: seconds of the other way in parts of ours, more is better; "
    "processor: the same in processor time, which is what counts where the machine does other things too. "
    "Accuracy is on 500 test images a task, ours and theirs; the gain is ours less theirs, paired, with its standard "
    "error over tasks. Whether small models train faster stacked is in [stacked.md](stacked.md).\n\n"
)


def compared(one: Row) -> str:
    error = "" if one["gain_error"] is None else f" ± {100 * one['gain_error']:.1f}"
    return (
        f"| {one['model']} | {one['device']}, {one['threads']} | {one['way']} | {one['tasks']} "
        f"| {one['an_hour'][0]}, {one['an_hour'][1]} | {one['times']:.2f} | {one['times_processor']:.2f} "
        f"| {one['accuracy'][0]:.1%}, {one['accuracy'][1]:.1%} | {100 * one['gain']:+.1f}{error} |\n"
    )


def stages_table(rows: Sequence[Row]) -> str:
    """Mean seconds of each stage."""
    text = "Mean seconds of each stage:\n\n| model | device | way | stages | together |\n|---|---|---|---|---|\n"
    for key in dict.fromkeys((*setting(row), row["way"]) for row in rows):
        same = [row for row in rows if (*setting(row), row["way"]) == key]
        stages = ", ".join(
            f"{name} {mean(row['seconds'].get(name, 0.0) for row in same):.1f}" for name in same[0]["seconds"]
        )
        text += f"| {key[0]} | {key[1]}, {key[2]} | {key[3]} | {stages} | {mean(map(total, same)):.1f} |\n"
    return text


if __name__ == "__main__":
    main()
