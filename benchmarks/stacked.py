"""Whether small models train faster stacked: one training step of several at once, beside one after the other.

    python benchmarks/stacked.py [--models 2 4 8] [--device cuda] [--threads 1] [--json]

Source tasks of a bank are cut to the same widths, so their models can be stacked and run as one with ``torch.func``.
A step is forwards and backwards on 64 images at 64 px for ResNet-18 with a tenth of its units, without an optimiser;
the least of some repeats counts, of processor time on a CPU. In bfloat16 vmap has no batch norm; that column is of
one after the other alone, in channels-last, as ``fine_tune`` runs it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap  # type: ignore[attr-defined]
from torch.nn import functional

import kinprune as kp
from kinprune.delivery import versions
from kinprune.evaluation import lay_out
from kinprune.selection import Budget, select
from kinprune.units import extract, find_units

RESULTS = Path(__file__).parent / "results"
SIZE, BATCH, CLASSES, KEEP = 64, 64, 5, 0.1


def main(words: Sequence[str] | None = None) -> None:
    """Time every number of models, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "stacked.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    rows = []
    for number in options.models:
        rows.append(measure(number, options))
        if not options.json:
            print(line(rows[-1]), flush=True)
    found = {"device": options.device, "threads": options.threads, "versions": versions(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    print(json.dumps({str(row["models"]): round(row["stacked"] / row["in_turn"], 2) for row in rows}))


def measure(number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of ``number`` models."""
    models = [small(seed).to(options.device).train() for seed in range(number)]
    images = torch.randn(number, BATCH, 3, SIZE, SIZE, device=options.device)
    labels = torch.randint(0, CLASSES, (number, BATCH), device=options.device)
    stacked = stacked_step(models, images, labels)
    seconds = {"stacked": least(stacked, options)}
    for model in models:
        lay_out(model)
    for name, half in (("in_turn", False), ("in_turn_bfloat16", True)):
        seconds[name] = least(lambda half=half: in_turn(models, images, labels, half), options)  # type: ignore[misc]
    return {"models": number, **seconds}


def small(seed: int) -> nn.Module:
    """ResNet-18 with a tenth of the units inside its blocks, chosen at random."""
    backbone = kp.load_backbone("resnet18", num_classes=CLASSES, random=True, image_size=SIZE)
    space = find_units(backbone.model, (SIZE, SIZE), head=backbone.head)
    scores = np.random.default_rng(seed).random(len(space))
    return extract(backbone.model, space, select(space, scores, Budget(keep=KEEP)).mask)


def in_turn(models: Sequence[nn.Module], images: Tensor, labels: Tensor, half: bool) -> None:
    for model, some, wanted in zip(models, images, labels, strict=True):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            outputs = model(some)
        functional.cross_entropy(outputs.float(), wanted).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()


def stacked_step(models: list[nn.Module], images: Tensor, labels: Tensor) -> Callable[[], Any]:
    """A step of all models at once, each on its own images."""
    parameters, buffers = stack_module_state(models)
    skeleton = small(0).train().to("meta")

    def loss(parameters: Any, buffers: Any, some: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(skeleton, (parameters, buffers), (some,)), wanted)

    return lambda: vmap(grad(loss))(parameters, buffers, images, labels)


def least(step: Callable[[], Any], options: argparse.Namespace) -> float:
    """The least seconds of a step, after one that does not count."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    taken = []
    for _ in range(options.repeats + 1):
        started = clock()
        step()
        if options.device != "cpu":
            torch.cuda.synchronize(options.device)
        taken.append(clock() - started)
    return min(taken[1:])


def line(row: dict[str, Any]) -> str:
    return (
        f"| {row['models']} | {row['stacked']:.2f} | {row['in_turn']:.2f} | {row['in_turn_bfloat16']:.2f} "
        f"| {row['stacked'] / row['in_turn']:.1f} |"
    )


def page(found: dict[str, Any]) -> str:
    """What was found as a page of Markdown."""
    told = (
        "# Small models stacked\n\nMade by `python benchmarks/stacked.py`: seconds of one training step of several "
        "ResNet-18 at 64 px with a tenth of their units, 64 images each, on "
        f"{found['device']}, {found['threads']} thread: all at once with `torch.func.vmap`, one after the other in "
        "float32, and in bfloat16 as they are trained (vmap cannot). Times: stacked in parts of one after the other, "
        "both in float32.\n\n"
    )
    head = "| models | stacked | one after the other | the same, bfloat16 | times |\n" + "|---" * 5 + "|\n"
    return told + head + "".join(f"{line(row)}\n" for row in found["rows"])


if __name__ == "__main__":
    main()
