"""Timing: how long ONNX Runtime takes for models that run in turn, so that a busy moment meets all of them.

A model's figure is the lower quartile of its single runs, which lie rounds apart, in the best of a few loads: what the
device takes when nothing else is in the way. This module needs ONNX Runtime and NumPy alone: it is part of the kit that
runs on devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 3
PASSES = 3
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
    """Seconds of single runs, one after the other; before them one that brings the weights into the caches again."""
    session.run(None, {"images": image})
    runs: list[float] = []
    begun = last = perf_counter()
    while len(runs) < LEAST_RUNS or last - begun < SLICE:
        session.run(None, {"images": image})
        now = perf_counter()
        runs.append(now - last)
        last = now
    return runs


def time_models(paths: Sequence[Path], settings: Sequence[Setting]) -> list[float]:
    """Milliseconds of a run for each of a few files, in turn: the best of ``PASSES`` loads of each.

    What else a device does only ever makes a run longer, so that the best is nearest to what the model takes.
    """
    return [float(value) for value in time_loads(paths, settings).min(axis=0)]


def time_loads(paths: Sequence[Path], settings: Sequence[Setting]) -> NDArray[np.float64]:
    """Milliseconds of each of ``PASSES`` loads of each file, ``[passes, n]``.

    Where a load's weights happen to lie in memory makes some slower by a tenth, for as long as they are loaded.
    """
    found = []
    for _ in range(PASSES):
        sessions = [open_timed(path, setting.threads) for path, setting in zip(paths, settings, strict=True)]
        images = [_image(session, setting.batch) for session, setting in zip(sessions, settings, strict=True)]
        found.append(time_sessions(sessions, images, max(setting.rounds for setting in settings)))
    return np.array(found)


def _image(session: Any, batch: int) -> NDArray[np.float32]:
    shape = session.get_inputs()[0].shape[1:]
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


def time_many(paths: Sequence[Path], setting: Setting, on_timed: OnTimed | None = None) -> list[float]:
    """Milliseconds of a run for each of many files, as ``time_models``; a few are in memory at a time.

    The passes are minutes apart, so that a busy minute does not meet all timings of a model.
    """
    best = [np.inf] * len(paths)
    for number in range(PASSES):
        for start in range(0, len(paths), TOGETHER):
            sessions = [open_timed(path, setting.threads) for path in paths[start : start + TOGETHER]]
            images = [_image(session, setting.batch) for session in sessions]
            for place, found in enumerate(time_sessions(sessions, images, setting.rounds), start):
                best[place] = min(best[place], found)
            if on_timed is not None:
                on_timed(number * len(paths) + start + len(sessions), PASSES * len(paths))
    return best
