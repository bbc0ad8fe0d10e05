"""Which timm models can be pruned: Kinprune and torch-pruning on random weights, half of every layer.

    python benchmarks/coverage.py [--models a,b] [--skip-export] [--jobs 2] [--json]

Every model and tool runs in a process of its own. Every finished run is a line of ``--out``; run again, it goes on
where it stopped. A table is written beside it. What is checked, and how, is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import coverage_table
import peer
import timm
import torch
from coverage_models import MODELS, SIZES
from torch import Tensor, nn

from kinprune.backbones.classifier import find_classifier
from kinprune.delivery import versions
from kinprune.devices import export_onnx
from kinprune.errors import BackboneError, ExportError, UnitError
from kinprune.importance import random
from kinprune.preprocessing import Preprocessing
from kinprune.selection import Budget, select
from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units.layout import unit_of

RESULTS = Path(__file__).parent / "results"
CLASSES = 10
KEEP = 0.5
SEED = 0
PRELOADED = ["coverage_table", "kinprune.devices", "torch_pruning"]
Row = dict[str, Any]


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="timm names with commas between (default: all of the list)")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage.jsonl")
    parser.add_argument("--skip-export", action="store_true", help="no ONNX, which takes most of the time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time, one thread each")
    parser.add_argument("--timeout", type=float, default=180, help="seconds after which a run counts as failed")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args()
    started = time.perf_counter()
    names = options.models.split(",") if options.models else list(MODELS)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(row["model"], row["tool"]) for row in rows}
    todo = [run for run in product(names, TOOLS) if run not in done]
    with ThreadPoolExecutor(options.jobs) as threads:
        running = [
            threads.submit(run_alone, name, tool, not options.skip_export, options.timeout) for name, tool in todo
        ]
        for number, finished in enumerate(as_completed(running), start=1):
            row = finished.result()
            rows.append(row)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if not options.json:
                print(f"[{number}/{len(todo)}] {coverage_table.short(row)}", flush=True)
    chosen = [row for row in rows if row["model"] in names]
    options.out.with_suffix(".md").write_text(coverage_table.page(chosen, names))
    summary = coverage_table.summary(chosen)
    if not options.json:
        print("\n".join(f"{value:>9}  {text}" for text, value in summary.items()))
    print(json.dumps({**summary, "seconds": round(time.perf_counter() - started, 1)}))


def run_alone(name: str, tool: str, export: bool, timeout: float) -> Row:
    """One tool on one model in a process of its own; that it crashes or hangs is told in the row."""
    context = _context(export)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, name, tool, export))
    started = time.perf_counter()
    process.start()
    sender.close()
    row: Row = {"model": name, "tool": tool, "runs": False}
    try:
        row.update(receiver.recv() if receiver.poll(timeout) else {"error": f"no answer in {timeout:g} s"})
    except EOFError:
        process.join()
        row["error"] = f"the process ended with exit code {process.exitcode}"
    process.join(timeout=5)
    process.kill()
    return {**row, "seconds": round(time.perf_counter() - started, 1), "versions": versions()}


def _context(export: bool) -> Any:
    """Processes forked from one that has imported everything, where there is such a thing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED + ["onnxruntime", "onnxscript"] * export)
    return context


def _answer(sender: Connection, name: str, tool: str, export: bool) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(TOOLS[tool](name, export))
    except Exception as error:  # any error of any model is a result here
        sender.send({"error": coverage_table.first_line(error)})


def build(name: str) -> tuple[nn.Module, int]:
    """A model with seeded random weights, and the side of its images in pixels."""
    torch.manual_seed(SEED)
    given: dict[str, Any] = {"img_size": SIZES[name]} if name in SIZES else {}
    model: Any = timm.create_model(name, num_classes=CLASSES, **given).eval()
    for module in model.modules():
        # Fresh batch norms do nothing, and scales of nearly zero switch blocks off: both would hide a wrong cut.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
        for parameter in module.parameters(recurse=False):
            if parameter.detach().abs().max() < 1e-2:
                nn.init.normal_(parameter, std=0.1)
    return model, SIZES.get(name) or model.pretrained_cfg["input_size"][-1]


def measure_kinprune(name: str, export: bool) -> Row:
    """Units, costs, a forward pass, equality with the masked model, and ONNX."""
    model, side = build(name)
    row: Row = {"family": type(model).__module__.rpartition(".")[2], "image": side}
    try:
        head = find_classifier(model, (side, side))
    except BackboneError:  # a distilled model has two
        head = None
    stream = False
    started = time.perf_counter()
    try:
        space = find_units(model, (side, side), head=head)
    except UnitError as error:
        row["in_block"] = coverage_table.first_line(error)
        stream, space = True, find_units(model, (side, side), head=head, stream=True)
    small, mask = _half(model, space)
    row["cut_seconds"] = round(time.perf_counter() - started, 3)
    row.update(_describe(space, mask, small), stream=stream)
    answer(small, side)
    row["runs"] = True
    row.update(_compare(model, space, side))
    if not stream:
        row["with_stream"] = _with_stream(model, side, head)
    if export:
        row.update(_export(small, side))
    return row


def _half(model: nn.Module, space: UnitSpace) -> tuple[nn.Module, Mask]:
    mask = select(space, random(space, SEED), Budget(keep=KEEP)).mask
    return extract(model, space, mask), mask


def _describe(space: UnitSpace, mask: Mask, small: nn.Module) -> Row:
    whole, costs = space.cost(space.whole_mask()), space.cost(mask)
    return {
        "units": len(space),
        "groups": coverage_table.count(group.kind for group in space.groups),
        "whole": coverage_table.count(coverage_table.reason(layer.reason) for layer in space.whole),
        "parameters": [whole.parameters, costs.parameters],
        "macs": [whole.macs, costs.macs],
        "costs_exact": costs.parameters == sum(parameter.numel() for parameter in small.parameters()),
    }


@torch.no_grad()
def answer(model: nn.Module, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The logits of one random image; an error if they are none."""
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    logits: Tensor = model(image)
    if logits.shape != (1, CLASSES) or not bool(torch.isfinite(logits).all()):
        raise ValueError(f"the pruned model gives {list(logits.shape)} logits, finite or not, expected [1, {CLASSES}]")
    return logits


def _compare(model: nn.Module, space: UnitSpace, side: int) -> Row:
    """The extracted model against the whole one with the removed units' outgoing weights at zero, in double precision.

    Groups over which statistics run are kept whole for this: there the two differ by definition.
    """
    kept = select(space, random(space, SEED + 1), Budget(keep=KEEP)).mask.kept.copy()
    for group, part in zip(space.groups, space.split(kept), strict=True):
        part |= group.normalised
    compared = sum(not group.normalised for group in space.groups)
    row: Row = {"compared": [compared, len(space.groups)], "difference": None}
    if compared:
        double = model.double()
        mask = Mask(kept, space.fingerprint)
        found = answer(extract(double, space, mask), side, torch.float64)
        with _silenced(double, space, mask):
            expected = answer(double, side, torch.float64)
        row["difference"] = float((found - expected).abs().max() / expected.abs().max())
        model.float()
    return row


class _silenced:
    """Inside, the outgoing weights of the units that a mask removes are zero; written without the code under test."""

    def __init__(self, model: nn.Module, space: UnitSpace, mask: Mask) -> None:
        self.tensors = dict(model.named_parameters())
        self.space, self.mask = space, mask
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def __enter__(self) -> None:
        counts = self.space.sizes.tolist()
        for number, (group, kept) in enumerate(zip(self.space.groups, self.space.split(self.mask.kept), strict=True)):
            for name, dimension in group.tensors("consumes"):
                self.before.setdefault(name, self.tensors[name].clone())
                units = unit_of(self.space.tensors[name][dimension], number, counts)
                self.tensors[name].movedim(dimension, 0)[torch.from_numpy((units >= 0) & ~kept[units])] = 0

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            self.tensors[name].copy_(value)


def _with_stream(model: nn.Module, side: int, head: str | None) -> Row:
    """The same with residual streams cut as well; a failure here is a result of its own."""
    try:
        space = find_units(model, (side, side), head=head, stream=True)
        small, mask = _half(model, space)
        found = _describe(space, mask, small)
        answer(small, side)
    except (UnitError, RuntimeError, ValueError) as error:
        return {"runs": False, "error": coverage_table.first_line(error)}
    return {"runs": True, **found}


def _export(model: nn.Module, side: int) -> Row:
    names = [str(number) for number in range(CLASSES)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = export_onnx(
                model, Path(folder) / "model.onnx", classes=names, preprocessing=Preprocessing((side, side))
            )
        except ExportError as error:
            return {"onnx": False, "onnx_error": coverage_table.first_line(error)}
    return {"onnx": True, "onnx_difference": made.max_difference}


def measure_torch_pruning(name: str, _: bool) -> Row:
    """The pruner of torch-pruning with magnitudes, then a forward pass."""
    import torch_pruning

    with peer.plain_attention():
        model, side = build(name)
    before = sum(parameter.numel() for parameter in model.parameters())
    started = time.perf_counter()
    pruner = peer.build_pruner(
        model, torch.randn(1, 3, side, side), torch_pruning.importance.MagnitudeImportance(p=1), ratio=1 - KEEP
    )
    pruner.step()
    peer.settle_heads(model, pruner)
    row: Row = {"cut_seconds": round(time.perf_counter() - started, 3)}
    row["parameters"] = [before, sum(parameter.numel() for parameter in model.parameters())]
    try:
        answer(model.eval(), side)
    except (RuntimeError, ValueError, AssertionError) as error:
        return {**row, "error": coverage_table.first_line(error)}
    return {**row, "runs": True}


TOOLS = {"kinprune": measure_kinprune, "torch-pruning": measure_torch_pruning}

if __name__ == "__main__":
    main()
