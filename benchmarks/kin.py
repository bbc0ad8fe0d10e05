"""Seconds and memory to find a target's nearest source tasks: all at once beside a Python loop over tasks.

    python benchmarks/kin.py [--tasks 1000 10000 100000] [--json]

The bank is made up, in the shape of a real one: linear probes in float16 over 512 features, 5 classes each, and 500
images of the target. How it is made, and what is compared, is in ``World`` and ``loop``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kinprune.delivery import versions
from kinprune.transferability import MEASURES, Sources, Target, nearest, transferability

RESULTS = Path(__file__).parent / "results"
CLASSES = 5
COUNT = 10
PROBED = 100
"""Images a class of the target, and of a source task's mean."""


def main(words: Sequence[str] | None = None) -> None:
    """Time every size, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1000, 10_000, 100_000], help="sizes of the bank")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--images", type=int, default=500, help="images of the target")
    parser.add_argument("--targets", type=int, default=20, help="targets that recall is counted over")
    parser.add_argument("--repeats", type=int, default=5, help="runs, of which the median counts")
    parser.add_argument("--loop", type=int, default=500, help="tasks that the loop does; its seconds are scaled up")
    parser.add_argument("--measured", type=int, default=10_000, help="most tasks for the table of measures")
    parser.add_argument("--out", type=Path, default=RESULTS / "kin.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--time-loop", type=Path, metavar="FILE", help="the loop only: used by the above")
    options = parser.parse_args(words)
    if options.time_loop:
        print(time_loop(options.time_loop))
        return
    world = World(options.features)
    most = max(options.tasks)
    bank = world.sources(most, seed=1)
    targets = [world.target(options.images, seed) for seed in range(options.targets)]
    # The first call starts threads and counts for nobody.
    transferability("leep", targets[0], first(bank, 500))
    rows = []
    for tasks in options.tasks:
        rows.append(measure(targets, first(bank, tasks), options))
        if not options.json:
            print(line(rows[-1]), flush=True)
    some = first(bank, min(most, options.measured))
    kinds = [measure_kind(name, targets[0], some, options.repeats) for name in MEASURES]
    found = {
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "features": options.features,
        "images": options.images,
        "targets": options.targets,
        "repeats": options.repeats,
        "looped": options.loop,
        "measured": len(some),
        "versions": versions(),
        "rows": rows,
        "measures": kinds,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    largest = max(rows, key=lambda row: row["tasks"])
    print(json.dumps({"seconds": largest["nearest"], "rows": rows}))


class World:
    """Classes whose features look like a backbone's, so that some source tasks are near a target and most are not.

    1000 classes in 25 families. A class's mean is a part that all share, its family's place and its own, both in a
    common subspace; an image adds noise, most of it in a subspace too; a rectifier ends it. A source task is five
    classes, of one or two families or of any; its probe is the discriminant of means that are estimated from 100 images
    each, made less sure by a factor of its own. A target's classes come from the same pool.
    """

    POOL, FAMILIES, RANK, NOISE_RANK = 1000, 25, 48, 96

    def __init__(self, features: int, seed: int = 0) -> None:
        self._random = random = np.random.default_rng(seed)
        shape = (self.RANK, features)
        basis = random.standard_normal(shape) / np.sqrt(self.RANK)
        self.family_of = random.integers(self.FAMILIES, size=self.POOL)
        families = random.standard_normal((self.FAMILIES, self.RANK)) @ basis
        own = random.standard_normal((self.POOL, self.RANK)) @ basis
        self._means = 0.3 + 0.5 * families[self.family_of] + 0.4 * own
        self._means += 0.1 * random.standard_normal(self._means.shape)
        self._noise = random.standard_normal((self.NOISE_RANK, features)) / np.sqrt(self.NOISE_RANK)
        labels = np.repeat(np.arange(self.POOL), 30)
        images = self.images(labels, random)
        self._rectified = np.stack([images[labels == label].mean(axis=0) for label in range(self.POOL)])
        within = images - self._rectified[labels]
        covariance = within.T @ within / len(within)
        covariance += 0.05 * np.trace(covariance) / features * np.eye(features)
        self._precision = np.linalg.inv(covariance).astype(np.float32)
        self._spread = np.sqrt(np.diag(covariance) / PROBED).astype(np.float32)

    def images(self, labels: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.float32]:
        """Features ``[n, d]`` of images with these labels."""
        noise = 2.7 * random.standard_normal((len(labels), self.NOISE_RANK)) @ self._noise
        noise += 1.25 * random.standard_normal(noise.shape)
        return np.maximum(self._means[labels] + noise, 0).astype(np.float32)

    def classes(self, tasks: int, random: np.random.Generator) -> NDArray[np.int64]:
        """Five different classes a task ``[tasks, 5]``: a third each of one family, of two, of any."""
        families = random.integers(self.FAMILIES, size=(tasks, 2))
        kind = random.integers(3, size=tasks)[:, None]
        chosen = np.empty((tasks, CLASSES), dtype=np.int64)
        for start in range(0, tasks, 5000):
            those = slice(start, start + 5000)
            keys = random.random((len(kind[those]), self.POOL), dtype=np.float32)
            near = self.family_of == families[those, :1]
            second = self.family_of == families[those, 1:]
            keys += np.where(kind[those] == 0, ~near, np.where(kind[those] == 1, ~(near | second), False))
            chosen[those] = np.argpartition(keys, CLASSES, axis=1)[:, :CLASSES]
        return chosen

    def sources(self, tasks: int, seed: int) -> Sources:
        """A bank of so many tasks."""
        random = np.random.default_rng([2, seed])
        chosen = self.classes(tasks, random)
        shape = (tasks, CLASSES, len(self._precision))
        weights, means = np.empty(shape, dtype=np.float16), np.empty(shape, dtype=np.float16)
        biases = np.empty(shape[:2], dtype=np.float16)
        for start in range(0, tasks, 2000):
            those = slice(start, start + 2000)
            own = self._rectified[chosen[those]].astype(np.float32)
            own += self._spread * random.standard_normal(own.shape, dtype=np.float32)
            centre = own.mean(axis=1, keepdims=True)
            sure = random.uniform(0.3, 1, (len(own), 1, 1)).astype(np.float32)
            probe = ((own - centre).reshape(-1, shape[2]) @ self._precision).reshape(own.shape) * sure
            weights[those], means[those] = probe, own
            biases[those] = -(probe * (own + centre)).sum(axis=2) / 2
        return Sources(weights, biases, means, np.full(tasks, CLASSES, dtype=np.int64))

    def target(self, images: int, seed: int) -> Target:
        """A new task of five classes, as many images each."""
        random = np.random.default_rng([3, seed])
        labels = np.arange(images, dtype=np.int64) % CLASSES
        return Target(self.images(self.classes(1, random)[0][labels], random), labels, CLASSES)


def first(bank: Sources, tasks: int) -> Sources:
    """The first so many tasks of a bank."""
    return Sources(bank.weights[:tasks], bank.biases[:tasks], bank.means[:tasks], bank.counts[:tasks])


def loop(target: Target, sources: Sources) -> NDArray[np.float64]:
    """LEEP a task at a time, each with the array operations that its published code uses."""
    scores = np.empty(len(sources))
    told = np.eye(target.classes, dtype=np.float32)[target.labels]
    for place in range(len(sources)):
        logits = target.features @ sources.weights[place].astype(np.float32).T + sources.biases[place]
        theta = np.exp(logits - logits.max(axis=1, keepdims=True))
        theta /= theta.sum(axis=1, keepdims=True)
        joint = told.T @ theta / len(theta)
        given = joint / joint.sum(axis=0)
        scores[place] = np.log((given[target.labels] * theta).sum(axis=1)).mean()
    return scores


def loop_alone(target: Target, sources: Sources) -> float:
    """Seconds of the loop, best of three, in a process with one thread: more only slow down products this small."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loop.npz"
        arrays = {name: getattr(sources, name) for name in ("weights", "biases", "means", "counts")}
        np.savez(path, features=target.features, labels=target.labels, **arrays)
        command = [sys.executable, __file__, "--time-loop", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


def time_loop(path: Path) -> float:
    """What ``loop_alone`` starts."""
    with np.load(path) as found:
        target = Target(found["features"], found["labels"], CLASSES)
        sources = Sources(found["weights"], found["biases"], found["means"], found["counts"])
    return min(timed(lambda: loop(target, sources), 3))


def measure(targets: Sequence[Target], sources: Sources, options: argparse.Namespace) -> dict[str, Any]:
    """One size of the bank: medians of seconds, memory of the first run, and what the nearest miss."""
    target = targets[0]
    some = first(sources, options.loop)
    memory = peak(lambda: nearest("leep", target, sources, COUNT))
    runs = timed(lambda: nearest("leep", target, sources, COUNT), options.repeats)
    row: dict[str, Any] = {
        "tasks": len(sources),
        "nearest": median(runs),
        "nearest_runs": runs,
        "full": median(timed(lambda: transferability("leep", target, sources), options.repeats)),
        "loop": loop_alone(target, some) * len(sources) / len(some),
        "memory_bytes": memory,
        "probes_bytes": sources.weights.nbytes,
    }
    row["times_faster"] = row["loop"] / row["nearest"]
    row["times_faster_full"] = row["loop"] / row["full"]
    row["differs"] = float(np.abs(loop(target, some) - transferability("leep", target, some)).max())
    return row | recall(targets, sources)


def recall(targets: Sequence[Target], sources: Sources) -> dict[str, float]:
    """The share of the truly nearest that ``nearest`` finds, over all targets and of the worst."""
    shares = []
    for target in targets:
        true = np.argsort(-transferability("leep", target, sources), kind="stable")[:COUNT]
        shares.append(len(np.intersect1d(true, nearest("leep", target, sources, COUNT)[0])) / len(true))
    return {"recall": float(np.mean(shares)), "recall_worst": min(shares)}


def measure_kind(name: str, target: Target, sources: Sources, repeats: int) -> dict[str, Any]:
    """One measure: seconds for all tasks in full, and for the nearest."""
    true = np.argsort(-transferability(name, target, sources), kind="stable")[:COUNT]
    return {
        "measure": name,
        "full": median(timed(lambda: transferability(name, target, sources), min(repeats, 3))),
        "nearest": median(timed(lambda: nearest(name, target, sources, COUNT), min(repeats, 3))),
        "recall": len(np.intersect1d(true, nearest(name, target, sources, COUNT)[0])) / len(true),
    }


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of so many runs."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def peak(run: Callable[[], object]) -> int:
    """How many bytes of arrays there are at most at one time, beside those there were."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def line(row: dict[str, Any]) -> str:
    """One size as a row of the table."""
    cells = (
        f"{row['tasks']:,}",
        f"**{row['nearest']:.3f}**",
        f"{row['full']:.3f}",
        f"{row['loop']:.1f}",
        f"{row['times_faster']:.0f}",
        f"{row['times_faster_full']:.1f}",
        f"{row['memory_bytes'] / 1e6:.0f}",
        f"{row['probes_bytes'] / 1e6:.0f}",
        f"{row['recall']:.3f}",
        f"{row['recall_worst']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def page(found: dict[str, Any]) -> str:
    """All rows as a page of Markdown."""
    columns = (
        "source tasks",
        "nearest 10, s",
        "all scored in full, s",
        "Python loop, s",
        "times faster",
        "in full",
        "extra MB",
        "MB of probes",
        "recall of the true 10",
        "worst target",
    )
    return "\n".join(
        [
            "# From features to the nearest source tasks",
            "",
            f"Made by `python benchmarks/kin.py` with {found['threads']} threads at a load of {found['load']:.1f}:",
            f"LEEP of a made-up bank's probes (5 classes, {found['features']} features, float16) on {found['images']}",
            f"images; medians of {found['repeats']} runs, conversion to float32 included. The loop goes over",
            f"{found['looped']} tasks in one thread, best of three, scaled up.",
            f"Recall is over {found['targets']} targets.",
            "Extra MB is the most that new arrays take at one time; OpenBLAS's own buffers are not in it.",
            "",
            f"| {' | '.join(columns)} |",
            "|---:" * len(columns) + "|",
            *(line(row) for row in found["rows"]),
            "",
            f"Every measure, {found['measured']:,} source tasks, one target:",
            "",
            "| measure | all scored in full, s | nearest 10, s | recall of the true 10 |",
            "|---|---:|---:|---:|",
            *(
                f"| {row['measure']} | {row['full']:.2f} | {row['nearest']:.2f} | {row['recall']:.1f} |"
                for row in found["measures"]
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main()
