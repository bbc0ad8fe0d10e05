"""Latency: how long ONNX Runtime takes for one image, of several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from kinprune.devices.onnx import open_session, read_metadata

ROUNDS = 7
SLICE = 0.05
"""Seconds that each model runs in a round."""


def measure_latencies(paths: Sequence[str | Path], *, threads: int = 1, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds that each exported model takes for one image, on ``threads`` CPU threads.

    The models run in turn, a slice of time each, so that a busy moment of the machine meets all of them; a model's
    figure is the median of its rounds, the first of which only warms up. Raises ExportError for files that are none.
    """
    sessions = [open_session(path, threads=threads) for path in paths]
    sides = [read_metadata(path).preprocessing.image_size for path in paths]
    images = [np.random.default_rng(0).standard_normal((1, 3, *size), dtype=np.float32) for size in sides]
    found: list[list[float]] = [[] for _ in paths]
    for _ in range(rounds + 1):
        for session, image, seen in zip(sessions, images, found, strict=True):
            started, runs = perf_counter(), 0
            while (passed := perf_counter() - started) < SLICE or not runs:
                session.run(["logits"], {"images": image})
                runs += 1
            seen.append(1000 * passed / runs)
    return [median(seen[1:]) for seen in found]
