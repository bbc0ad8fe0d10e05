"""Calibration: the real images that eight bits are fitted to, and whether a model still answers as before on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kinprune.devices.runtime import check_images
from kinprune.errors import ExportError
from kinprune.preprocessing import Preprocessing

MOST = 256
"""Images used; ranges hardly move beyond."""
LEAST = 0.5
"""The least part of what chance leaves open that must be answered alike."""


@dataclass(frozen=True)
class Agreement:
    """How alike two models answer the same images.

    ``share`` is the share answered with the same class, ``by_chance`` what that would be if the answers had nothing
    to do with each other, ``mean_difference`` that of a logit, in parts of the logits' standard deviation.
    """

    images: int
    share: float
    by_chance: float
    mean_difference: float


def calibration_images(given: Tensor | None, expected: Preprocessing) -> NDArray[np.uint8]:
    """Up to ``MOST`` of the images given, evenly spaced and shuffled: they mostly come class by class.

    Raises ExportError where there are none, or they are of another type or size than the model takes.
    """
    if given is None:
        raise ExportError(
            "int8 needs images to calibrate on, and none are given: give some of the training images, of all classes"
        )
    images = given.detach().cpu().numpy()
    check_images(images, expected, 1)
    chosen = np.linspace(0, len(images) - 1, min(MOST, len(images))).round().astype(int)
    return np.ascontiguousarray(images[np.random.default_rng(0).permutation(chosen)])


def agreement(found: NDArray[np.float32], expected: NDArray[np.float32]) -> Agreement:
    """Compare two models' logits ``[n, k]``."""
    ours, theirs = found.argmax(axis=1), expected.argmax(axis=1)
    width = expected.shape[1]
    chances = [np.bincount(answers, minlength=width) / len(answers) for answers in (ours, theirs)]
    spread = max(float(expected.std()), float(np.finfo(np.float32).tiny))
    return Agreement(
        images=len(found),
        share=float(np.mean(ours == theirs)),
        by_chance=float(chances[0] @ chances[1]),
        mean_difference=float(np.abs(found - expected).mean()) / spread,
    )


def check_agreement(found: Agreement) -> None:
    """Raise ExportError where answers are no numbers, or agree little more than chance would have them."""
    if not np.isfinite(found.mean_difference):
        raise ExportError("in int8 the model answers with NaN or infinity: export it in fp16 or fp32")
    if found.share - found.by_chance < LEAST * (1 - found.by_chance):
        raise ExportError(
            f"in int8 only {found.share:.0%} of {found.images} calibration images are answered as before "
            f"({found.by_chance:.0%} by chance), so it is of no use: calibrate on more images of all classes, or "
            "export the model in fp16 or fp32"
        )
