"""Whether budgets of peak memory hold: random budgets, the models chosen under them, and what a device's process takes.

    python benchmarks/memory.py --weights DIR [--searches 50] [--models NAME ...] [--json]

``DIR`` holds ``resnet18_tinyimagenet64.safetensors``, ``mobilenetv2_100.safetensors`` and
``vit_tiny_patch16_224.safetensors``. Each search draws a budget between the smallest and the whole model's memory and
scores at random, selects, exports, and measures the file in a process of its own; every other one is in eight bits.
Every search is a line of ``--out``; run again, it goes on where it stopped. Accuracy is not looked at, so the
classifier is random, and eight bits are set by noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import kinprune as kp
from kinprune.delivery import versions
from kinprune.devices.goal import DeviceCosts
from kinprune.devices.memory import measure_memory
from kinprune.devices.onnx import export_onnx
from kinprune.precision import Precision
from kinprune.units import UnitSpace

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet18": ("resnet18_tinyimagenet64", 64),
    "mobilenetv2_100": ("mobilenetv2_100", 96),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", 96),
}
IN_TURN: tuple[Precision, ...] = ("fp32", "int8")
CLASSES = 10
CALIBRATION = 4


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--searches", type=int, default=50, help="of each model")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=IN_TURN, default=IN_TURN)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    started = time.perf_counter()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"searches": [], "versions": versions()}
    done = {(row["model"], row["number"]) for row in found["searches"]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        todo = [
            (number, precision)
            for number in range(options.searches)
            if (precision := IN_TURN[number % len(IN_TURN)]) in options.precisions and (name, number) not in done
        ]
        if todo:
            backbone, space = prepare(name, options.weights)
        for number, precision in todo:
            row = {"model": name, "number": number, **search(backbone, space, number, precision)}
            found["searches"].append(row)
            options.out.write_text(json.dumps(found, indent=1) + "\n")
            if not options.json:
                print(line(row), flush=True)
    options.out.with_suffix(".md").write_text(page(found))
    held = [row["measured"] <= row["asked"] for row in found["searches"]]
    told = {"searches": len(held), "held": sum(held), "seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(told))


def prepare(name: str, weights: Path) -> tuple[kp.Backbone, UnitSpace]:
    """A model with its weights and a random classifier, and its units, those of the residual stream included."""
    file, size = MODELS[name]
    backbone = kp.load_backbone(name, num_classes=CLASSES, weights=weights / f"{file}.safetensors", image_size=size)
    return backbone, kp.find_units(backbone.model, (size, size), stream=True, head=backbone.spec.head)


def search(backbone: kp.Backbone, space: UnitSpace, number: int, precision: Precision) -> dict[str, Any]:
    """Ask for a random budget, and tell what was foreseen and what was measured."""
    random = np.random.default_rng(number)
    costs = DeviceCosts(space.costs, precision)
    least, whole = (
        int(costs.peak_memory_bytes(counts[None])[0]) for counts in (np.ones_like(space.sizes), space.sizes)
    )
    asked = int(random.integers(least, whole + 1))
    chosen = kp.select(space, random.random(len(space)), kp.Budget(peak_memory_bytes=asked), costs=costs)
    pixels = random.integers(0, 256, (CALIBRATION, 3, *backbone.preprocessing.image_size), dtype=np.uint8)
    given = {} if precision == "fp32" else {"precision": precision, "calibration": torch.from_numpy(pixels)}
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(
            kp.extract(backbone.model, space, chosen.mask),
            Path(folder) / "model.onnx",
            classes=[str(label) for label in range(CLASSES)],
            preprocessing=backbone.preprocessing,
            check=False,
            **given,
        )
        used = measure_memory(done.path)
    return {
        "precision": precision,
        "asked": asked,
        "foreseen": chosen.costs.peak_memory_bytes,
        "measured": used.peak_bytes,
        "file": done.bytes,
        "units": chosen.costs.units / len(space),
        "use": asdict(used),
    }


def line(row: dict[str, Any]) -> str:
    """One search, for people who watch."""
    return (
        f"{row['model']} {row['precision']}: asked {row['asked'] / 1e6:.2f} MB, foreseen {row['foreseen'] / 1e6:.2f}, "
        f"measured {row['measured'] / 1e6:.2f} ({row['measured'] / row['asked']:.2f})"
    )


def page(found: dict[str, Any]) -> str:
    """The searches of each model and precision as a page of Markdown."""
    searches = sorted(found["searches"], key=lambda row: (list(MODELS).index(row["model"]), row["number"]))
    lines = [
        "# Do budgets of memory hold?",
        "",
        f"Made by `python benchmarks/memory.py --weights DIR`: {len(searches)} searches by random scores for random "
        "budgets of peak memory between the smallest and the whole model's, each exported, loaded and run in a process "
        f"that runs nothing else (ONNX Runtime {searches[0]['use']['runtime']}). *Measured* is its peak over its own "
        "baseline.",
        "",
        "| model | precision | searches | within the budget | budgets, MB | measured / asked: median | least | most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, precision in dict.fromkeys((row["model"], row["precision"]) for row in searches):
        rows = [row for row in searches if (row["model"], row["precision"]) == (name, precision)]
        ratios = [row["measured"] / row["asked"] for row in rows]
        asked = [row["asked"] / 1e6 for row in rows]
        lines.append(
            f"| {name} | {precision} | {len(rows)} | {sum(ratio <= 1 for ratio in ratios)} "
            f"| {min(asked):.1f} to {max(asked):.1f} | {median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
