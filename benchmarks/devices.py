"""Whether fewer multiply-accumulates are less time in ONNX Runtime, and whether latency is foretold and kept.

    python benchmarks/devices.py [--models resnet18:224,...] [--masks 50] [--threads 1] [--json]

For each backbone: this machine is profiled as ``kinprune device profile`` does it; then small models at keep .5, .2,
.1 and .05, with widths that the device likes, are timed beside the whole one, and beside torch-pruning's with as many
multiply-accumulates, with and without its ``round_to``. Then as many random masks as asked for are foretold and timed,
and as many searches for random limits in milliseconds are made: as for a device elsewhere, by prediction alone, and as
on this one, where models are timed and cut further. Weights are random: latency does not depend on them. Run it with
nothing else running.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer
import timm
import torch
from numpy.typing import NDArray

import kinprune as kp
from kinprune.delivery import versions
from kinprune.devices.device import Device, this_machine
from kinprune.devices.goal import Goal, goals_of
from kinprune.devices.kit import Samples
from kinprune.devices.noise import NOISE_FILE, write_noise
from kinprune.devices.profile import make_samples, profile_here
from kinprune.devices.settling import settle
from kinprune.devices.timing import Setting, time_loads
from kinprune.devices.widths import round_counts, sample_counts
from kinprune.selection import Selection

RESULTS = Path(__file__).parent / "results"
MODELS = (
    "resnet18:224",
    "mobilenetv2_100:224",
    "vit_tiny_patch16_224:224",
    "resnet18:64",
    "mobilenetv2_100:96",
    "vit_tiny_patch16_224:96",
)
KEEP = (0.5, 0.2, 0.1, 0.05)
ROUND_TO = 16
SEED = 11
Counts = NDArray[np.int64]


def main(words: Sequence[str] | None = None) -> None:
    """Measure every model, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(MODELS), help="timm names with pixels: resnet18:224, with commas between"
    )
    parser.add_argument("--masks", type=int, default=50, help="random masks, and searches, of each model")
    parser.add_argument("--samples", type=int, default=200, help="small models of a profile")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "fp16", "int8"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "devices.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    started = time.perf_counter()
    before = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    measured = {(row["model"], row["pixels"]): row for row in before}
    for one in options.models.split(","):
        name, _, pixels = one.partition(":")
        measured[name, int(pixels)] = row = measure(name, int(pixels), options)
        if not options.json:
            print(json.dumps(row["summary"]), flush=True)
    rows = list(measured.values())
    found = {
        "precision": options.precision,
        "threads": options.threads,
        "masks": options.masks,
        "machine": this_machine(),
        "versions": versions(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    summary = {f"{row['model']}:{row['pixels']}": row["summary"] for row in rows}
    print(json.dumps({"models": summary, "seconds": round(time.perf_counter() - started, 1)}))


def measure(name: str, pixels: int, options: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of a backbone."""
    backbone = kp.load_backbone(name, num_classes=10, random=True, image_size=pixels)
    space = kp.find_units(backbone.model, (pixels, pixels), head=backbone.head)
    samples = make_samples(backbone, space, (options.precision,), samples=options.samples)
    begun = time.perf_counter()
    device = profile_here(Device("here"), samples, Setting(options.threads))
    seconds = time.perf_counter() - begun
    bench = Bench(samples[options.precision], space, options)
    goal = replace(goals_of(device, space, {"keep": 1.0}, precision=options.precision)[0])
    return bench.run(name, pixels, goal, seconds)


class Bench:
    """Small models of one backbone, written down and timed."""

    def __init__(self, samples: Samples, space: kp.UnitSpace, options: argparse.Namespace) -> None:
        self.samples = samples
        self.space = space
        self.options = options

    def times(self, rows: Sequence[Counts], extra: Sequence[Path] = (), *, slowest: bool = False) -> list[float]:
        """Milliseconds of the models that keep ``rows``, and of other files, all in turn."""
        with tempfile.TemporaryDirectory() as folder:
            write_noise(Path(folder) / NOISE_FILE, self.samples.template.segments.values())
            paths = []
            for number, counts in enumerate(rows):
                paths.append(Path(folder) / f"{number}.onnx")
                paths[-1].write_bytes(self.samples.template.at(counts))
            every = [*paths, *extra]
            found = time_loads(every, [Setting(self.options.threads, rounds=6)] * len(every))
            return [float(value) for value in (found.max(axis=0) if slowest else found.min(axis=0))]

    def run(self, name: str, pixels: int, goal: Goal, seconds: float) -> dict[str, Any]:
        """Reductions, predictions and searches."""
        reductions = self.reductions(name, goal)
        errors = self.prediction_errors(goal)
        searches = self.searches(goal)
        ours = [row for row in reductions if row["tool"] == "kinprune"]
        assert goal.costs.latency is not None
        summary = {
            "whole_ms": round(reductions[0]["whole_ms"], 3),
            "multiple": goal.multiple,
            "least_share_shown": round(min(row["shown"] for row in ours), 3),
            "median_error": round(float(np.median(np.abs(errors))), 4),
            "worst_error": round(float(np.max(np.abs(errors))), 4),
            "over_by_5_percent": sum(one["settled"] > 1.05 for one in searches),
            "over_by_5_percent_foretold": sum(one["foretold"] > 1.05 for one in searches),
            "profile_seconds": round(seconds, 1),
        }
        return {
            "model": name,
            "pixels": pixels,
            "summary": summary,
            "reductions": reductions,
            "errors": [round(float(error), 4) for error in errors],
            "searches": searches,
            "fit": {"error": goal.costs.latency.error, "margin": goal.costs.latency.margin},
        }

    def reductions(self, name: str, goal: Goal) -> list[dict[str, Any]]:
        """MACs and milliseconds of small models beside the whole one, ours and torch-pruning's."""
        space = self.space
        whole = int(space.costs.macs(space.sizes[None])[0])
        counts = [round_counts(space, space.sizes * keep, goal.multiple) for keep in KEEP]
        macs = [int(value) for value in space.costs.macs(np.array(counts))]
        with tempfile.TemporaryDirectory() as folder:
            peers = []
            for keep, wanted in zip(KEEP, macs, strict=True):
                for round_to in (None, ROUND_TO):
                    peers.append((keep, round_to, *pruned_by_peer(name, self.samples, wanted, round_to, Path(folder))))
            found = self.times([space.sizes, *counts], [path for _, _, path, _ in peers if path is not None])
        rows = [
            _row("kinprune", keep, value / whole, ms, found[0])
            for keep, value, ms in zip(KEEP, macs, found[1:], strict=False)
        ]
        latencies = iter(found[1 + len(KEEP) :])
        for keep, round_to, path, value in peers:
            tool = "torch-pruning" if round_to is None else f"torch-pruning, round_to={round_to}"
            if path is None:
                rows.append({"tool": tool, "keep": keep, "failed": value})
            else:
                rows.append(_row(tool, keep, value / whole, next(latencies), found[0]))
        return rows

    def prediction_errors(self, goal: Goal) -> NDArray[np.float64]:
        """Foretold over measured, less one, of random masks of any widths."""
        assert goal.costs.latency is not None
        counts = sample_counts(self.space, self.options.masks + 13, seed=SEED)[13:]
        measured = np.array(self.times(list(counts)))
        return np.asarray(goal.costs.latency.predict(counts) / measured - 1)

    def searches(self, goal: Goal) -> list[dict[str, float]]:
        """What models take that were selected for random limits, in parts of the limit."""
        generator = np.random.default_rng(SEED)
        space, latency = self.space, goal.costs.latency
        assert latency is not None
        low = float(
            latency.bound(np.minimum(round_counts(space, space.sizes * 0, goal.multiple), space.sizes)[None])[0]
        )
        high = float(latency.predict(space.sizes[None])[0])
        found = []
        for _ in range(self.options.masks):
            limit = float(np.exp(generator.uniform(np.log(low * 1.02), np.log(high))))
            scores = generator.random(len(space))

            def pick(aim: float, scores: NDArray[np.float64] = scores) -> Selection:
                return kp.select(space, scores, kp.Budget(latency_ms=aim), multiple=goal.multiple, costs=goal.costs)

            def milliseconds(selection: Selection) -> float:
                return self.times([space.counts(selection.mask.kept)], slowest=True)[0]

            first = pick(limit)
            settled = settle(limit, first, pick, milliseconds)
            pair = [space.counts(one.mask.kept) for one in (first, settled)]
            foretold, last = self.times(pair)
            found.append({"limit": limit, "foretold": foretold / limit, "settled": last / limit})
        return found


def _row(tool: str, keep: float, macs: float, ms: float, whole: float) -> dict[str, Any]:
    shown = (1 - ms / whole) / (1 - macs)
    return {
        "tool": tool,
        "keep": keep,
        "macs": macs,
        "ms": ms,
        "whole_ms": whole,
        "latency": ms / whole,
        "shown": shown,
    }


def pruned_by_peer(
    name: str, samples: Samples, macs: int, round_to: int | None, folder: Path
) -> tuple[Path | None, Any]:
    """torch-pruning's model nearest to ``macs``, exported, and its multiply-accumulates; or None and why not."""
    import torch_pruning

    image = torch.zeros(1, 3, *samples.image_size)
    best: tuple[float, Any] | None = None
    low, high = 0.0, 0.98
    for _ in range(7):
        ratio = (low + high) / 2
        try:
            model = _peer_model(name, samples.image_size[0])
            pruner = peer.build_pruner(model, image, torch_pruning.importance.RandomImportance(), ratio=ratio)
            pruner.round_to = round_to
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner.step()
            peer.settle_heads(model, pruner)
            found = _macs(model.eval(), samples.image_size)
        except Exception as error:  # whatever another tool fails with is its row
            return None, f"{type(error).__name__}: {error}"[:200]
        if best is None or abs(np.log(found / macs)) < abs(np.log(best[0] / macs)):
            best = (found, model)
        low, high = (ratio, high) if found > macs else (low, ratio)
    assert best is not None
    path = folder / f"{macs}-{round_to}.onnx"
    preprocessing = kp.Preprocessing(image_size=samples.image_size)
    kp.export_onnx(best[1], path, classes=[str(n) for n in range(10)], preprocessing=preprocessing, check=False)
    return path, best[0]


def _peer_model(name: str, pixels: int) -> Any:
    arguments = {"img_size": pixels} if "vit" in name else {}
    with torch.random.fork_rng(devices=[]), peer.plain_attention():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **arguments)


def _macs(model: Any, size: tuple[int, int]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


def page(found: dict[str, Any]) -> str:
    """The tables of what was measured."""
    lines = [
        "# Devices",
        "",
        f"ONNX Runtime, {found['precision']}, {found['threads']} thread(s), one image, on an"
        f" {found['machine']['processor']}, nothing else on its core. Made by `python benchmarks/devices.py`.",
        "",
        "*shown*: the share of the reduction in multiply-accumulates that is a reduction of latency. torch-pruning's"
        " models have as many multiply-accumulates as Kinprune's, as nearly as its ratio allows; it cuts residual"
        " streams as well.",
        "",
        "| model | pixels | whole | tool | keep | MACs left | latency left | shown |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        for one in row["reductions"]:
            whole = f"{row['summary']['whole_ms']:.3g} ms"
            head = f"| {row['model']} | {row['pixels']} | {whole} | {one['tool']} | {one['keep']:g} |"
            if "failed" in one:
                lines.append(f"{head} failed | | {one['failed']} |")
            else:
                lines.append(f"{head} {one['macs']:.1%} | {one['latency']:.1%} | {one['shown']:.0%} |")
    count = found["masks"]
    lines += [
        "",
        f"Foretold latency of {count} random masks of any widths, and {count} searches for random limits: how many"
        " models were over the limit by more than 5 % as measured, selected by prediction alone (a device elsewhere)"
        " and where they are timed and cut further (this machine).",
        "",
        "| model | pixels | widths | median error | worst error | over, by prediction | over, timed | limit used |"
        " profile |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        one = row["summary"]
        used = float(np.median([search["settled"] for search in row["searches"]]))
        lines.append(
            f"| {row['model']} | {row['pixels']} | {one['multiple']} | {one['median_error']:.1%} "
            f"| {one['worst_error']:.1%} | {one['over_by_5_percent_foretold']} of {count} "
            f"| {one['over_by_5_percent']} of {count} | {used:.0%} | {one['profile_seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
