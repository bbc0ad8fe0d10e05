"""One-shot pruning of real pre-trained models on real images: random, L1 and Taylor at three keep ratios.

    python benchmarks/oneshot.py --data DIR --weights DIR [--steps 60] [--json]

``DIR`` of data holds ``trashnet`` and ``sign-digits``, ``DIR`` of weights ``vit_tiny_patch16_224.safetensors`` and
``mobilenetv2_100.safetensors``. Every finished run is a line of ``--out``; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

import kinprune as kp
from kinprune.delivery import summarise, versions

RESULTS = Path(__file__).parent / "results"
MODELS = {"vit_tiny_patch16_224": 112, "mobilenetv2_100": 128}
DATA = ("trashnet", "sign-digits")
METHODS = ("random", "l1", "taylor")
KEEPS = (0.5, 0.2, 0.1)


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--shots", type=int, help="at most so many training images of each class")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "oneshot.jsonl")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args()
    started = time.perf_counter()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["model"], row["data"], row["method"], row["keep"]) for row in rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for model, data in product(options.models, DATA):
        todo = [run for run in product(METHODS, options.keeps) if (model, data, *run) not in done]
        if todo:
            backbone, task = prepare(model, data, options)
        for method, keep in todo:
            row = run_one(backbone, task, (model, data, method, keep), options)
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not options.json:
                print(line(row), flush=True)
    options.out.with_suffix(".md").write_text(table(rows))
    print(json.dumps({"runs": len(rows), "seconds": round(time.perf_counter() - started, 1)}))


def prepare(model: str, data: str, options: argparse.Namespace) -> tuple[kp.Backbone, kp.DecodedTask]:
    """The model with its weights, and the decoded images."""
    task = kp.load_task(options.data / data, shots=options.shots)
    weights = options.weights / f"{model}.safetensors"
    backbone = kp.load_backbone(model, num_classes=len(task.classes), weights=weights, image_size=MODELS[model])
    return backbone, kp.decode(task, backbone.preprocessing)


def run_one(
    backbone: kp.Backbone, task: kp.DecodedTask, run: tuple[str, str, Any, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Prune once and tell what a table needs."""
    model, data, method, keep = run
    plan = kp.Plan(kp.Budget(keep=keep), criterion=method, recipe=kp.Recipe(steps=options.steps))
    found = summarise(kp.prune(backbone, task, plan))
    return {
        "model": model,
        "data": data,
        "method": method,
        "keep": keep,
        "steps": options.steps,
        "shots": options.shots,
        "accuracy_dense": found["accuracy_dense"],
        "accuracy_0": found["accuracy_closed_form"],
        "accuracy": found["accuracy"],
        "parameters": found["costs"]["parameters"],
        "macs": found["costs"]["macs"],
        "parameters_dense": found["whole"]["parameters"],
        "macs_dense": found["whole"]["macs"],
        "reconstructed": found["reconstructed"],
        "seconds": found["seconds"],
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def line(row: dict[str, Any]) -> str:
    """One run, for people."""
    return (
        f"| {row['model']} | {row['data']} | {row['shots'] or 'all'} "
        f"| {row['keep']:g} | {row['method']} | {row['accuracy_dense']:.1%} "
        f"| {row['accuracy_0']:.1%} | {row['accuracy']:.1%} | {row['parameters'] / 1e6:.2f} M "
        f"({row['parameters'] / row['parameters_dense']:.0%}) | {row['macs'] / 1e6:.0f} M "
        f"({row['macs'] / row['macs_dense']:.0%}) | {sum(row['seconds'].values()):.0f} |"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All runs as a Markdown table."""
    steps = sorted({row["steps"] for row in rows})
    rows = sorted(rows, key=lambda row: (row["model"], row["data"], -row["keep"], METHODS.index(row["method"])))
    title = "# One-shot pruning of real models on real images\n\n"
    how = (
        "Made by `python benchmarks/oneshot.py --data DIR --weights DIR`; one seed, a held-out fifth of the images, "
        "at most so many training images of a class as shots says. Dense: the whole model with a closed-form head. "
        "0 steps: the pruned model in closed form (reconstruction, batch norm, ridge head). Seconds are of the whole "
        "pruning, on a shared machine.\n\n"
    )
    last = "/".join(map(str, steps))
    head = f"| model | data | shots | keep | method | dense | 0 steps | {last} steps | parameters | MACs | seconds |\n"
    return title + how + head + "|---" * 11 + "|\n" + "\n".join(line(row) for row in rows) + "\n"


if __name__ == "__main__":
    main()
