"""Seconds and memory from a whole model to a pruned one, without scoring: Kinprune beside torch-pruning.

    python benchmarks/engine.py [--models a,b] [--repeats 5] [--threads N] [--json]

Half of every layer goes, chosen by random scores. One process times the tools in turn and takes medians; memory is
measured in a fresh process for each. What is compared, and how, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peer
import timm
import torch
from torch import nn

from kinprune.backbones.classifier import find_classifier
from kinprune.delivery import versions
from kinprune.importance import random
from kinprune.selection import Budget, select
from kinprune.units import extract, find_units

RESULTS = Path(__file__).parent / "results"
MODELS = ("resnet50", "mobilenetv2_100", "vit_base_patch16_224", "vit_large_patch16_224", "densenet201")
KEEP = 0.5
Seconds = dict[str, float]


def main(words: Sequence[str] | None = None) -> None:
    """Time every model, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="timm names with commas between")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each tool, of which the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-memory", action="store_true", help="seconds only")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--fresh", nargs=2, metavar=("MODEL", "TOOL"), help="once, for memory: used by the above")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.fresh:
        print(json.dumps(run_fresh(*options.fresh)))
        return
    started = time.perf_counter()
    rows = []
    for name in options.models.split(","):
        rows.append(measure(name, options))
        if not options.json:
            print(line(rows[-1]), flush=True)
    found = {"threads": options.threads, "repeats": options.repeats, "versions": versions(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    ratios = {row["model"]: round(row["times_faster"], 1) for row in rows}
    print(json.dumps({"times_faster": ratios, "seconds": round(time.perf_counter() - started, 1)}))


def build(name: str, tool: str) -> nn.Module:
    """A model with random weights, as the tool needs it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if tool != "torch_pruning":
            return timm.create_model(name).eval()
        with peer.plain_attention():
            return timm.create_model(name).eval()


def _size(model: Any) -> tuple[int, int]:
    """Height and width of the model's images."""
    _, height, width = model.pretrained_cfg["input_size"]
    return height, width


def kinprune_in_blocks(model: nn.Module) -> Seconds:
    """Units inside blocks: filters, heads and nodes."""
    return _kinprune(model, stream=False)


def kinprune_with_streams(model: nn.Module) -> Seconds:
    """Every dimension, residual streams too: what torch-pruning takes."""
    return _kinprune(model, stream=True)


def _kinprune(model: nn.Module, *, stream: bool) -> Seconds:
    size = _size(model)
    head = find_classifier(model, size)
    clock = _Clock()
    space = find_units(model, size, stream=stream, head=head)
    clock.lap("find_units")
    mask = select(space, random(space, 0), Budget(keep=KEEP)).mask
    clock.lap("select")
    small = extract(model, space, mask)
    clock.lap("extract")
    return clock.laps(small)


def torch_pruning(model: nn.Module) -> Seconds:
    """torch-pruning's graph, then its pruning, of whole heads of transformers as Kinprune does."""
    import torch_pruning

    image = torch.randn(1, 3, *_size(model))
    clock = _Clock()
    importance = torch_pruning.importance.RandomImportance()
    pruner = peer.build_pruner(model, image, importance, ratio=1 - KEEP, whole_heads=True)
    clock.lap("init")
    pruner.step()
    clock.lap("step")
    return clock.laps(model)


TOOLS: dict[str, Callable[[nn.Module], Seconds]] = {
    "kinprune_in_blocks": kinprune_in_blocks,
    "kinprune_with_streams": kinprune_with_streams,
    "torch_pruning": torch_pruning,
}


class _Clock:
    """Seconds between laps, and what came of them."""

    def __init__(self) -> None:
        self._laps: Seconds = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def laps(self, pruned: nn.Module) -> Seconds:
        parameters = sum(parameter.numel() for parameter in pruned.parameters())
        return {**self._laps, "total": sum(self._laps.values()), "parameters": parameters}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over repeats of every tool in turn, after one of each that does not count, and memory."""
    runs: dict[str, list[Seconds]] = {tool: [] for tool in TOOLS}
    for number in range(options.repeats + 1):
        for tool, run in TOOLS.items():
            laps = run(build(name, tool))
            if number:
                runs[tool].append(laps)
    row: dict[str, Any] = {"model": name}
    for tool, listed in runs.items():
        row[tool] = {part: median(laps[part] for laps in listed) for part in listed[0]}
        row[tool]["runs"] = [laps["total"] for laps in listed]
        row[tool] |= {} if options.skip_memory else _measure_fresh(name, tool, options.threads)
    total = row["torch_pruning"]["total"]
    row["times_faster"] = total / row["kinprune_with_streams"]["total"]
    row["times_faster_in_blocks"] = total / row["kinprune_in_blocks"]["total"]
    return row


def _measure_fresh(name: str, tool: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--fresh", name, tool, "--threads", str(threads)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def run_fresh(name: str, tool: str) -> dict[str, float]:
    """The first run in a process: its seconds, and by how many bytes resident memory grew at most (Linux)."""
    if tool == "torch_pruning":
        import torch_pruning  # noqa: F401  # what importing takes is no part of the run
    model = build(name, tool)
    _forget_peak()
    before = _memory("VmRSS")
    laps = TOOLS[tool](model)
    return {"first_total": laps["total"], "memory_bytes": _memory("VmHWM") - before}


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(field: str) -> int:
    """A field of the process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{field}:"))


def line(row: dict[str, Any]) -> str:
    """One model as a row of the table."""
    blocks, streams, other = (row[tool] for tool in TOOLS)
    cells = [row["model"]]
    for own in (blocks, streams):
        cells += [
            f"{own['find_units']:.2f} + {own['select']:.3f} + {own['extract']:.2f} = **{own['total']:.2f}**",
            _megabytes(own),
        ]
    cells.append(f"{other['init']:.2f} + {other['step']:.2f} = **{other['total']:.2f}**")
    cells.append(_megabytes(other))
    cells += [f"{row['times_faster']:.1f}", f"{row['times_faster_in_blocks']:.1f}"]
    return f"| {' | '.join(cells)} |"


def _megabytes(measured: Seconds) -> str:
    return f"{measured['memory_bytes'] / 1e6:.0f}" if "memory_bytes" in measured else ""


def page(found: dict[str, Any]) -> str:
    """All rows as a page of Markdown."""
    columns = (
        "model",
        "in blocks: find + select + extract, s",
        "MB",
        "with streams, s",
        "MB",
        "torch-pruning 1.6.1: init + step, s",
        "MB",
        "times faster, with streams",
        "in blocks",
    )
    return "\n".join(
        [
            "# From a whole model to a pruned one",
            "",
            f"Made by `python benchmarks/engine.py --threads {found['threads']}`: medians of {found['repeats']} runs,",
            "the tools in turn; half of every layer, random scores. MB is how far resident memory grows at most over",
            "the model itself. How it is measured: [benchmarks/README.md](../README.md#engine).",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            *(line(row) for row in found["rows"]),
            "",
        ]
    )


if __name__ == "__main__":
    main()
