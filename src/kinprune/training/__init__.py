"""The one way models are fine-tuned."""

from kinprune.training.batches import hold_back
from kinprune.training.loop import CurvePoint, OnStep, TrainingResult, fine_tune
from kinprune.training.memory import TrainingMemory
from kinprune.training.planning import least_limit
from kinprune.training.recipe import Recipe

__all__ = [
    "CurvePoint",
    "OnStep",
    "Recipe",
    "TrainingMemory",
    "TrainingResult",
    "fine_tune",
    "hold_back",
    "least_limit",
]
