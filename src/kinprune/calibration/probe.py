"""The linear probe: what a task's classes look like to the whole backbone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kinprune.calibration.head import HeadMethod, fit_head

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Probe:
    """A task's linear classifier on the backbone's features, and the mean features of its classes.

    ``weights`` and ``means`` are float32 ``[c, d]``, ``biases`` float32 ``[c]``; ``counts`` int64 ``[c]`` has the
    images behind each mean. ``softmax(features @ weights.T + biases)`` are the probabilities of the task's classes.
    """

    weights: Floats
    biases: Floats
    means: Floats
    counts: NDArray[np.int64]


def solve_probe(
    model: nn.Module, head: str, features: Tensor, labels: Tensor, num_classes: int, *, method: HeadMethod = "ridge"
) -> Probe:
    """Solve the head of the whole backbone, in place (see ``solve_head``), and keep it with the class means.

    ``features`` are the head's inputs, float64 ``[n, d]``, and ``labels`` int64 ``[n]``; every class has an image.
    """
    fit_head(model, head, features, labels, num_classes, method=method)
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64).index_add_(0, labels.cpu(), features)
    biases = torch.zeros(num_classes) if layer.bias is None else layer.bias.detach().float().cpu()
    return Probe(
        weights=layer.weight.detach().float().cpu().numpy().copy(),
        biases=biases.numpy().copy(),
        means=(sums / counts.clamp_min(1).unsqueeze(1)).float().numpy(),
        counts=counts.numpy(),
    )


def answers_of(probe: Probe, features: Tensor) -> Tensor:
    """What the whole backbone with a probe for a head answers: float32 ``[n, c]`` from features ``[n, d]``."""
    return features.float() @ torch.from_numpy(probe.weights).T + torch.from_numpy(probe.biases)
