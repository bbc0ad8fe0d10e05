"""Timing: how long ONNX Runtime takes for models that run in turn, so that a busy moment meets all of them.

A model's figure is the lower quartile of its single runs, which lie rounds apart: what the device takes when nothing
else is in the way. This module needs ONNX Runtime and NumPy alone: it is part of the kit that runs on devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4
PASSES = 2
LEAST_RUNS = 2
SLICE = 0.012
"""Seconds that a model runs at least in a round."""
QUANTILE = 0.25
TOGETHER = 32
"""Models that are held in memory at one time."""

OnTimed = Callable[[int, int], None]


@dataclass(frozen=True)
class Setting:
    """How models run: CPU threads and images at a time, and how often they are timed."""

    threads: int = 1
    batch: int = 1
    rounds: int = ROUNDS


def open_timed(path: Path, threads: int) -> Any:
    """ONNX Runtime's session for a file, as it is timed: on the CPU, its messages switched off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def time_sessions(sessions: Sequence[Any], images: Sequence[NDArray[np.float32]], rounds: int) -> list[float]:
    """Milliseconds of a run for each session, on its images; the first round only warms up."""
    seen: list[list[float]] = [[] for _ in sessions]
    for number in range(rounds + 1):
        for session, image, runs in zip(sessions, images, seen, strict=True):
            found = _slice(session, image)
            runs.extend(found if number else [])
    return [1000 * float(np.quantile(runs, QUANTILE)) for runs in seen]


def _slice(session: Any, image: NDArray[np.float32]) -> list[float]:
    runs: list[float] = []
    begun = last = perf_counter()
    while len(runs) < LEAST_RUNS or last - begun < SLICE:
        session.run(None, {"images": image})
        now = perf_counter()
        runs.append(now - last)
        last = now
    return runs


def time_files(
    paths: Sequence[Path], image_size: tuple[int, int], setting: Setting, on_timed: OnTimed | None = None
) -> list[float]:
    """Milliseconds of a run for each of many files: the better of ``PASSES`` timings, minutes apart.

    A few files are in memory at a time. What else a device does only ever makes a run longer, so that the better one
    is nearer to the truth.
    """
    image = np.random.default_rng(0).standard_normal((setting.batch, 3, *image_size), dtype=np.float32)
    best = [np.inf] * len(paths)
    for number in range(PASSES):
        for start in range(0, len(paths), TOGETHER):
            sessions = [open_timed(path, setting.threads) for path in paths[start : start + TOGETHER]]
            for place, found in enumerate(time_sessions(sessions, [image] * len(sessions), setting.rounds), start):
                best[place] = min(best[place], found)
            if on_timed is not None:
                on_timed(number * len(paths) + start + len(sessions), PASSES * len(paths))
    return best
