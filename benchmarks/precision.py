"""What int8 and fp16 cost in accuracy and give in bytes and milliseconds.

    python benchmarks/precision.py --data DIR --weights DIR [--keep 0.5] [--steps 20] [--json]

Each backbone is pruned for each task, exported in the three precisions, calibrated on the task's training images, and
every file is run on the task's test images by ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kinprune as kp
from kinprune.delivery import versions
from kinprune.devices import evaluate_exported, time_models
from kinprune.precision import PRECISIONS

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet18": ("resnet18_tinyimagenet64", 64),
    "mobilenetv2_100": ("mobilenetv2_100", 96),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", 96),
}
TASKS = ("dtd10",)
SHOTS = 60


def main(words: Sequence[str] | None = None) -> None:
    """Prune, export and measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--weights", type=Path, required=True, help="the folder of the backbones' weights")
    parser.add_argument("--models", default=",".join(MODELS), help="timm names with commas between")
    parser.add_argument("--tasks", default=",".join(TASKS), help="folders of --data with commas between")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shots", type=int, default=SHOTS, help="training images a class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "precision.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rows = []
    for name in options.models.split(","):
        for task in options.tasks.split(","):
            rows.append(measure(name, task, options))
            if not options.json:
                print(json.dumps(rows[-1]), flush=True)
    found = {"keep": options.keep, "steps": options.steps, "shots": options.shots, "versions": versions(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    worst = max(row["fp32"]["accuracy"] - row["int8"]["accuracy"] for row in rows)
    print(json.dumps({"worst_int8_loss": round(worst, 4), "seconds": round(time.perf_counter() - started, 1)}))


def measure(name: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """One backbone on one task: accuracy, bytes and milliseconds in each precision."""
    weights, pixels = MODELS[name]
    task = kp.load_task(options.data / folder, shots=options.shots)
    backbone = kp.load_backbone(
        name,
        num_classes=len(task.classes),
        weights=options.weights / f"{weights}.safetensors",
        image_size=pixels,
    )
    images = kp.decode(task, backbone.preprocessing)
    plan = kp.Plan(kp.Budget(keep=options.keep), multiple=16, recipe=kp.Recipe(steps=options.steps))
    pruned = kp.prune(backbone, images, plan)
    row: dict[str, Any] = {"model": name, "task": folder, "images": len(images.test), "pruned": pruned.final.accuracy}
    with tempfile.TemporaryDirectory() as place:
        paths = [Path(place) / f"{precision}.onnx" for precision in PRECISIONS]
        for precision, path in zip(PRECISIONS, paths, strict=True):
            kp.export_onnx(
                pruned.model,
                path,
                classes=task.classes,
                preprocessing=images.preprocessing,
                precision=precision,
                calibration=images.train.images,
            )
        for precision, path, latency in zip(PRECISIONS, paths, time_models(paths), strict=True):
            accuracy = evaluate_exported(path, images.test).accuracy
            row[precision] = {"accuracy": accuracy, "bytes": path.stat().st_size, "ms": round(latency, 4)}
    return row


def page(found: dict[str, Any]) -> str:
    """The table of what was measured."""
    lines = [
        "# Precision",
        "",
        f"Pruned to {found['keep']:g} of the units, {found['steps']} steps, {found['shots']} training images a class;"
        " ONNX Runtime, one thread, one image. Made by `python benchmarks/precision.py --data DIR --weights DIR`.",
        "",
        "| model | task | test images | fp32 | fp16 | int8 | int8, points | kB fp32 / fp16 / int8 |"
        " ms fp32 / fp16 / int8 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        each = [row[precision] for precision in PRECISIONS]
        accuracies = " | ".join(f"{one['accuracy']:.1%}" for one in each)
        points = 100 * (each[2]["accuracy"] - each[0]["accuracy"])
        sizes = " / ".join(f"{one['bytes'] / 1000:.0f}" for one in each)
        latencies = " / ".join(f"{one['ms']:.2f}" for one in each)
        lines.append(
            f"| {row['model']} | {row['task']} | {row['images']} | {accuracies} | {points:+.1f} "
            f"| {sizes} | {latencies} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
