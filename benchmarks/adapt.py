"""Where the seconds of one adaptation go, with a bank of many source tasks.

    python benchmarks/adapt.py [--bank starter/bank.db] [--data starter/photos] [--tasks 1000] [--json]

The bank is copied and filled up to ``--tasks`` records: copies of its own under other keys, their probes and scores
disturbed, so that every record is different and nothing but the number of different files of weights is smaller than
in a real bank. Then one task is adapted to, and the stages are timed: everything but the passes over images (features,
closed form, evaluation) and the training is what a larger bank costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kinprune as kp
from kinprune.bank import Bank, Record, create_bank, open_bank
from kinprune.bank.backbone import bank_space, load_bank_backbone
from kinprune.delivery import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
OF_THE_BANK = ("kin", "vote", "inherit")


def main(words: Sequence[str] | None = None) -> None:
    """Fill the bank, adapt, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", default=str(ROOT / "starter" / "bank.db"))
    parser.add_argument("--data", default=str(ROOT / "starter" / "photos"))
    parser.add_argument("--tasks", type=int, default=1000, help="records of the bank")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2, 0.1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapt.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bank = fill(open_bank(options.bank), Path(folder) / "bank.db", options.tasks)
        runs = [adapt_once(bank, options) for _ in range(options.repeats)]
    stages = {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
    found = {
        "tasks": options.tasks,
        "keep": options.keep,
        "steps": options.steps,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "model": bank.header.spec.name,
        "stages": stages,
        "of_the_bank": sum(stages[name] for name in OF_THE_BANK),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    if not options.json:
        print(page(found))
    print(json.dumps({"of_the_bank": round(found["of_the_bank"], 3), "seconds": found["seconds"]}))


def fill(source: Bank, address: Path, tasks: int) -> Bank:
    """A bank of ``tasks`` records made of another's."""
    backbone = load_bank_backbone(source, 2)
    bank = create_bank(address, backbone, bank_space(source, backbone), stream=source.header.stream)
    records = [source.record(entry) for entry in source.entries()]
    generator = np.random.default_rng(0)
    for number in range(tasks):
        bank.add(disturbed(records[number % len(records)], number, generator))
    return bank


def disturbed(record: Record, number: int, generator: np.random.Generator) -> Record:
    """A record like another, with a probe and scores of its own."""
    spread = 0.3 * record.probe.weights.std()
    noise = generator.normal(0, spread, record.probe.weights.shape).astype(np.float32)
    scores = record.scores + generator.normal(0, 0.1, record.scores.shape).astype(np.float16)
    return replace(
        record,
        key=f"{number}-{record.key}"[:64],
        scores=scores,
        probe=replace(record.probe, weights=record.probe.weights + noise),
    )


def adapt_once(bank: Bank, options: argparse.Namespace) -> dict[str, float]:
    """The seconds of each stage of one adaptation, from images in memory."""
    task = kp.load_task(options.data)
    backbone = load_bank_backbone(bank, len(task.classes))
    decoded = kp.decode(task, backbone.preprocessing)
    plan = kp.AdaptPlan(recipe=kp.Recipe(steps=options.steps))
    return kp.adapt(decoded, bank, [kp.Budget(keep=keep) for keep in options.keep], plan, backbone=backbone).seconds


def page(found: dict[str, Any]) -> str:
    """The stages as a page of Markdown."""
    whole = sum(found["stages"].values())
    lines = [
        "# Where the seconds of one adaptation go",
        "",
        f"Made by `python benchmarks/adapt.py`: {found['model']}, a bank of {found['tasks']:,} source tasks, "
        f"keep {', '.join(f'{keep:g}' for keep in found['keep'])}, {found['steps']} steps each, "
        f"{found['threads']} threads; the median of {found['repeats']} runs.",
        "",
        "| stage | seconds | share |",
        "|---|---:|---:|",
        *(f"| {name} | {seconds:.2f} | {seconds / whole:.0%} |" for name, seconds in found["stages"].items()),
        "",
        f"The bank's part ({', '.join(OF_THE_BANK)}): {found['of_the_bank']:.2f} s.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
