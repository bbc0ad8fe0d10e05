"""Transferability: how well each of many source tasks fits a target, from one pass of the backbone over its images.

Each source task is a linear probe on the same features, so that all of them are scored by one matrix product.
"""

from __future__ import annotations

from kinprune.errors import TransferabilityError
from kinprune.transferability.inputs import Sources, Target, sample
from kinprune.transferability.leading import Leaders
from kinprune.transferability.measures import MEASURES, Measure, nearest, register, transferability

__all__ = [
    "MEASURES",
    "Leaders",
    "Measure",
    "Sources",
    "Target",
    "TransferabilityError",
    "nearest",
    "register",
    "sample",
    "transferability",
]
