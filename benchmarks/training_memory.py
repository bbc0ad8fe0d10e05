"""Fine-tuning under a limit of memory: whether it holds, what it costs in time, and what is left of the accuracy.

    python benchmarks/training_memory.py --data DIR --weights DIR [--steps 10] [--json]

``DIR`` of data holds ``trashnet``, ``DIR`` of weights ``resnet18_tinyimagenet64.safetensors``,
``mobilenetv2_100.safetensors`` and ``vit_tiny_patch16_224.safetensors``. Each model is pruned once for each keep ratio
and brought to its closed form; then every limit is a process of its own, which reads the model, runs it forwards and
backwards once, as scoring does, and fine-tunes it with the whole model as teacher. Linux only. Every finished run is a
line of ``--out`` with the ending ``.jsonl``; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import kinprune as kp
from kinprune.delivery import versions
from kinprune.errors import TrainingError
from kinprune.evaluation import lay_out
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.tasks import Split
from kinprune.training import Recipe, fine_tune
from kinprune.training.resident import Watch

RESULTS = Path(__file__).parent / "results"
MODELS = {
    "resnet18": ("resnet18_tinyimagenet64", 64),
    "mobilenetv2_100": ("mobilenetv2_100", 96),
    "vit_tiny_patch16_224": ("vit_tiny_patch16_224", 96),
}
DATA = "trashnet"
LIMITS = (None, 200, 100, 50, 30)
MEGABYTE = 10**6
TENSORS = "tensors.safetensors"


def main(words: Sequence[str] | None = None) -> None:
    """Prune, run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shots", type=int, default=60, help="at most so many training images of each class")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_memory.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--fresh", nargs=4, metavar=("DIR", "LIMIT", "STEPS", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.fresh:
        print(json.dumps(train(*options.fresh)))
        return
    started = time.perf_counter()
    lines = options.out.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(text) for text in lines.read_text().splitlines()] if lines.exists() else []
    done = {(row["model"], row["keep"], row["threads"], row["limit"]) for row in rows}
    for model, keep in product(options.models, options.keep):
        todo = [run for run in product(options.threads, LIMITS) if (model, keep, *run) not in done]
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = prune(model, keep, Path(folder), options)
            for threads, limit in todo:
                row = {"model": model, "keep": keep, "threads": threads, "limit": limit, **start}
                rows.append({**row, **in_fresh_process(folder, limit, options.steps, threads)})
                with lines.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
                if not options.json:
                    print(line(rows[-1], rows), flush=True)
    found = {"steps": options.steps, "shots": options.shots, "data": DATA, "rows": rows, "versions": versions()}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    limited = [row for row in rows if row["limit"] is not None and "peak" in row]
    held = sum(row["peak"] <= row["limit"] * MEGABYTE for row in limited)
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"held": f"{held} of {len(limited)}", "refused": refused(rows), "seconds": seconds}))


def refused(rows: Sequence[dict[str, Any]]) -> int:
    return sum("refused" in row for row in rows)


def prune(model: str, keep: float, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Prune a model to its closed form and write down what a fine-tuning needs; what it is before any step."""
    weights, size = MODELS[model]
    task = kp.load_task(options.data / DATA, shots=options.shots)
    path = options.weights / f"{weights}.safetensors"
    backbone = kp.load_backbone(model, num_classes=len(task.classes), weights=path, image_size=size)
    return write_down(folder, backbone, kp.decode(task, backbone.preprocessing), keep)


def write_down(folder: Path, backbone: kp.Backbone, task: kp.DecodedTask, keep: float) -> dict[str, Any]:
    """The pruned model, the whole one that teaches it, and the images, as files in ``folder``."""
    pruned = kp.prune(backbone, task, kp.Plan(kp.Budget(keep=keep), recipe=Recipe(steps=0)))
    teacher = kp.prune(backbone, task, kp.Plan(kp.Budget(keep=1), reconstruct=False, recipe=Recipe(steps=0)))
    for name, one in (("small", pruned), ("whole", teacher)):
        kp.save(kp.artifact_of(one, backbone, task), folder / name)
    tensors = {f"begin.{name}": tensor for name, tensor in (pruned.closed_form.trainable or {}).items()}
    for name, split in (("train", task.train), ("test", task.test)):
        tensors |= {f"{name}.images": split.images, f"{name}.labels": split.labels}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    return {"start": pruned.start.accuracy, "weight_bytes": pruned.selection.costs.weight_bytes}


def in_fresh_process(folder: str, limit: int | None, steps: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--fresh", folder, str(limit or 0), str(steps), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(folder: str, limit: str, steps: str, threads: str) -> dict[str, Any]:
    """Fine-tune what was written down, and tell what it took."""
    torch.set_num_threads(int(threads))
    small, tensors = kp.load(Path(folder) / "small"), load_file(Path(folder) / TENSORS)
    model, teacher, preprocessing = small.model, kp.load(Path(folder) / "whole").model, small.preprocessing
    train, test = (Split(tensors[f"{name}.images"], tensors[f"{name}.labels"]) for name in ("train", "test"))
    begin = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("begin.")} or None
    run_once(teacher, train, preprocessing)
    allowed = int(limit) * MEGABYTE or None
    recipe = Recipe(steps=int(steps))
    watch = Watch(torch.device("cpu")) if allowed is None else None
    cpu = time.process_time()
    try:
        result = fine_tune(model, train, preprocessing, recipe, teacher=teacher, begin=begin, memory_limit=allowed)
    except TrainingError as error:
        return {"refused": str(error)}
    cpu = time.process_time() - cpu
    memory = result.memory
    return {
        "peak": watch.stop() if watch is not None else None if memory is None else memory.peak,
        "predicted": None if memory is None else memory.predicted,
        "micro_batch": 64 if memory is None else memory.micro_batch,
        "recomputed": 0 if memory is None else memory.recomputed,
        "frozen": 0 if memory is None else len(memory.frozen),
        "norms_frozen": memory is not None and memory.norms_frozen,
        "seconds": result.seconds,
        "cpu_seconds": cpu,
        "accuracy": kp.evaluate(model, test, preprocessing).accuracy,
        "last_loss": result.losses[-1],
        "best_step": result.best_step,
    }


def run_once(model: torch.nn.Module, split: Split, preprocessing: Preprocessing) -> None:
    """A pass forwards and backwards, as of scoring: what libraries load on first use is there afterwards."""
    lay_out(model)
    inputs = normalise(split.images[:8], preprocessing)
    torch.nn.functional.cross_entropy(model(inputs), split.labels[:8]).backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.grad = None


def line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """One run, for people."""
    limit = "none" if row["limit"] is None else f"{row['limit']} MB"
    head = f"| {row['model']} | {row['keep']:g} | {row['threads']} | {limit} "
    if "refused" in row:
        return f"{head}| refused | | | | | {row['start']:.1%} | |"
    free = next(
        (other for other in rows if other["limit"] is None and same_run(other, row) and "cpu_seconds" in other), None
    )
    # Threads that wait for each other use the processor too, the more the busier the machine is.
    alone = free is not None and row["threads"] == 1
    times = f"{row['cpu_seconds'] / free['cpu_seconds']:.1f}" if free is not None and alone else ""
    predicted = "" if row["predicted"] is None else f"{row['predicted'] / MEGABYTE:.0f} MB"
    return (
        f"{head}| {predicted} | {row['peak'] / MEGABYTE:.0f} MB | {row['micro_batch']} | {how(row)} | {times} "
        f"| {row['start']:.1%} | {row['accuracy']:.1%} |"
    )


def same_run(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first[name] == second[name] for name in ("model", "keep", "threads"))


def how(row: dict[str, Any]) -> str:
    """What was done to stay below the limit, besides parts of mini-batches."""
    done = [
        *([f"{row['recomputed']} recomputed"] if row["recomputed"] else []),
        *([f"{row['frozen']} fixed"] if row["frozen"] else []),
        *(["batch norm frozen"] if row["norms_frozen"] else []),
    ]
    return ", ".join(done)


def page(found: dict[str, Any]) -> str:
    """All runs as a page of Markdown."""
    rows = sorted(
        found["rows"],
        key=lambda row: (row["model"], -row["keep"], row["threads"], -(row["limit"] or 10**6)),
    )
    title = "# Fine-tuning under a limit of memory\n\n"
    told = (
        "Made by `python benchmarks/training_memory.py --data DIR --weights DIR`: "
        f"{found['steps']} steps of 64 images, the whole model as teacher, {found['data']} with at most "
        f"{found['shots']} training images a class. Predicted: the peak that the plan foretells; peak: the most "
        "resident memory while it ran, above what was resident just before, each run in a process of its own. Images: "
        "those that went through the model at once. Recomputed: blocks run again in the backward pass; fixed: the "
        "earliest layers and blocks, not trained. Time, on one thread: processor time in parts of that without a "
        "limit, planning (2 to 5 s, as long as some ten steps) included. Start: the accuracy in closed form, before "
        "any step.\n\n"
    )
    head = "| model | keep | threads | limit | predicted | peak | images | besides | time | start | accuracy |\n"
    return title + told + head + "|---" * 11 + "|\n" + "\n".join(line(row, rows) for row in rows) + "\n"


if __name__ == "__main__":
    main()
