"""Which shortcut loses none of the truly nearest ten: class means, few images, or sketches, on real and made-up probes.

    python benchmarks/scale_recall.py --data DIR --weights DIR --folder DIR [--tasks 20000] [--targets 40] [--json]

Real probes: tasks of five classes of CIFAR-100, 100 training images each, a ridge head on the whole ResNet-18's
features; targets are other fives of its test images. Features and probes are kept in --folder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kin import CLASSES, COUNT, PROBED, World
from numpy.typing import NDArray
from torch import Tensor

import kinprune as kp
from kinprune.bank import ProbeChunk, sketches
from kinprune.bank.coding import encode_probe
from kinprune.calibration import Probe, head_inputs
from kinprune.calibration.head import best_inverse_temperature, ridge_head
from kinprune.delivery import versions
from kinprune.transferability import Sources, Target, sample, transferability

RESULTS = Path(__file__).parent / "results"
SHARES = (0.005, 0.01, 0.02, 0.05)
SHOTS = 200
"""Training images a class that tasks draw theirs from."""

Scored = Callable[[Target], NDArray[np.float64]]


def main(words: Sequence[str] | None = None) -> None:
    """Rank every target's sources by each shortcut, and write how far down the truly nearest ten are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="holds cifar100")
    parser.add_argument("--weights", type=Path, required=True, help="holds resnet18_tinyimagenet64.safetensors")
    parser.add_argument("--folder", type=Path, required=True, help="where features and probes are kept")
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--targets", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale_recall.json")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    options = parser.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    world = World(512)
    made_up = [world.target(CLASSES * PROBED, seed) for seed in range(options.targets)]
    rows = [
        *measure("real", real_sources(options), real_targets(options)),
        *measure("made up", world.sources(options.tasks, seed=1), made_up),
    ]
    found = {"tasks": options.tasks, "targets": options.targets, "versions": versions(), "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(found))
    if not options.json:
        print(page(found))
    print(json.dumps({f"{row['probes']}, {row['shortcut']}": row["recall"]["0.02"] for row in rows}))


def measure(name: str, sources: Sources, targets: Sequence[Target]) -> list[dict[str, Any]]:
    """A row for each shortcut."""
    ranks: dict[str, list[NDArray[np.int64]]] = {}
    shortcuts = shortcuts_of(sources)
    for target in targets:
        true = np.argsort(-transferability("leep", target, sources), kind="stable")[:COUNT]
        for shortcut, scored in shortcuts.items():
            order = np.argsort(-scored(target), kind="stable")
            places = np.empty(len(order), dtype=np.int64)
            places[order] = np.arange(len(order))
            ranks.setdefault(shortcut, []).append(places[true])
    return [
        {
            "probes": name,
            "shortcut": shortcut,
            "recall": {str(share): float(np.mean(np.stack(those) < share * len(sources))) for share in SHARES},
            "worst": int(np.max(those)) + 1,
        }
        for shortcut, those in ranks.items()
    ]


def shortcuts_of(sources: Sources) -> dict[str, Scored]:
    """Cheaper scores of all sources."""
    found: dict[str, Scored] = {
        "class means": lambda target: transferability("class-mean", target, sources),
        "96 images": lambda target: transferability("leep", sample(target, 96, 0), sources),
    }
    chunk = chunk_of(sources)
    for rank in (32, 64):
        sketches.RANK = rank
        draft = sketches.Draft.of(0, chunk)
        draft.add(chunk)
        found[f"sketch of {rank}, 96 images"] = _on_a_sample(draft.sketch())
    return found


def _on_a_sample(sketch: sketches.Sketch) -> Scored:
    return lambda target: sketch.scores(sample(target, 96, 0))


def chunk_of(sources: Sources) -> ProbeChunk:
    """The same probes as a bank has them."""
    probes = zip(sources.weights, sources.biases, sources.means, sources.counts, strict=True)
    contents = tuple(encode_probe(Probe(*arrays, np.full(count, PROBED))) for *arrays, count in probes)
    numbers = np.arange(1, len(sources) + 1)
    return ProbeChunk(numbers, tuple(map(str, numbers)), sources.counts, contents, sources.weights.shape[2])


def features_of(options: argparse.Namespace, part: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features and labels of the training or test images, computed once."""
    path = options.folder / f"{part}.npz"
    if not path.exists():
        weights = options.weights / "resnet18_tinyimagenet64.safetensors"
        backbone = kp.load_backbone("resnet18", num_classes=100, weights=str(weights), image_size=64)
        task = kp.load_task(options.data / "cifar100", shots=SHOTS, label_column="fine_label")
        decoded = kp.decode(task, backbone.preprocessing)
        for name, split in (("train", decoded.train), ("test", decoded.test)):
            features = head_inputs(backbone.model, backbone.head, split.images, backbone.preprocessing)
            np.savez(options.folder / f"{name}.npz", f=features.float().numpy(), y=split.labels.numpy())
    with np.load(path) as found:
        return found["f"], found["y"]


def real_targets(options: argparse.Namespace) -> list[Target]:
    """Fives of classes, all their test images."""
    features, labels = features_of(options, "test")
    random, targets = np.random.default_rng(9), []
    for _ in range(options.targets):
        classes = random.choice(100, CLASSES, replace=False)
        rows = [np.flatnonzero(labels == kind) for kind in classes]
        own = np.repeat(np.arange(CLASSES), [len(those) for those in rows])
        targets.append(Target(features[np.concatenate(rows)], own, CLASSES))
    return targets


def real_sources(options: argparse.Namespace) -> Sources:
    """Probes of fives of classes, solved once."""
    path = options.folder / "real.npz"
    if not path.exists():
        features, labels = features_of(options, "train")
        random = np.random.default_rng(0)
        rows = [np.flatnonzero(labels == kind) for kind in range(100)]
        wide, shape = torch.from_numpy(features).double(), (options.tasks, CLASSES, features.shape[1])
        weights, means = np.empty(shape, np.float16), np.empty(shape, np.float16)
        biases = np.empty(shape[:2], np.float16)
        ridge = float(np.median([ridge_head(*drawn(wide, rows, random), CLASSES)[2].ridge or 0 for _ in range(30)]))
        for number in range(options.tasks):
            some, own = drawn(wide, rows, random)
            weight, bias = solved(some, own, ridge)
            weights[number], biases[number] = weight.numpy(), bias.numpy()
            means[number] = some.reshape(CLASSES, PROBED, -1).mean(dim=1).numpy()
        np.savez(path, W=weights, M=means, B=biases)
    with np.load(path) as found:
        return Sources(found["W"], found["B"], found["M"], np.full(len(found["W"]), CLASSES))


def drawn(features: Tensor, rows: Sequence[NDArray[np.int64]], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features and labels of a task's images, class after class."""
    classes = random.choice(len(rows), CLASSES, replace=False)
    chosen = np.concatenate([random.choice(rows[kind], PROBED, replace=False) for kind in classes])
    return features[chosen], torch.arange(CLASSES).repeat_interleave(PROBED)


def solved(features: Tensor, labels: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """``ridge_head`` for balanced classes and a penalty that is known: a Cholesky factor in place of eigenvectors."""
    images, share = len(features), 1 / CLASSES
    targets = torch.nn.functional.one_hot(labels, CLASSES).double()
    mean = features.mean(0)
    gram = (features - mean) @ (features - mean).T
    vector = torch.ones(images, 1, dtype=torch.float64)
    for _ in range(12):  # the largest eigenvalue, which the penalty is a part of
        vector = gram @ vector
        vector /= vector.norm()
    penalty = ridge * float(vector.T @ gram @ vector)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + penalty * torch.eye(images, dtype=torch.float64)))
    dual = inverse @ (targets - share)
    hat = 1 - penalty * inverse.diagonal().unsqueeze(1) + 1 / images
    left_out = targets - penalty * dual / (1 - hat)
    scale, _ = best_inverse_temperature(left_out, labels, torch.ones(images, dtype=torch.float64))
    weight = (features - mean).T @ dual
    return scale * weight.T, scale * (share - mean @ weight)


def page(found: dict[str, Any]) -> str:
    """The table."""
    shares = " | ".join(f"in the first {share:.1%}" for share in SHARES)
    lines = [
        f"| {row['probes']} | {row['shortcut']} | "
        + " | ".join(f"{row['recall'][str(share)]:.4f}" for share in SHARES)
        + f" | {row['worst']:,} |"
        for row in found["rows"]
    ]
    return "\n".join(
        [
            "# What finds the nearest without reading all",
            "",
            "Made by `python benchmarks/scale_recall.py --data DIR --weights DIR --folder DIR`:",
            f"{found['tasks']:,} source tasks of five classes, {found['targets']} targets of 500 images. The share of",
            "the truly nearest ten by LEEP on all images that a shortcut puts among the first, and where it puts the",
            "worst of them. Real: CIFAR-100 on ResNet-18's features. Sketches are those of `bank/sketches.py`.",
            "",
            f"| probes | shortcut | {shares} | worst place |",
            "|---|---|" + "---:|" * (len(SHARES) + 1),
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
