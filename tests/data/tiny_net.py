"""The network of the stored bank, small enough that a bank of it can be kept beside the tests, and records of it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import nn

from kinprune.backbones import Backbone
from kinprune.bank import Accuracy, Record, record_key
from kinprune.calibration import Probe
from kinprune.units import Mask, UnitSpace, extract


def tiny() -> nn.Module:
    """Two convolutions in front of a classifier, 8 and 12 filters."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(3, 8, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(8),
            act1=nn.ReLU(),
            second=nn.Conv2d(8, 12, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(12),
            act2=nn.ReLU(),
            third=nn.Conv2d(12, 10, 3, stride=2, padding=1, bias=False),
            norm3=nn.BatchNorm2d(10),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            classifier=nn.Linear(10, 4),
        )
    )


def random_record(backbone: Backbone, space: UnitSpace, seed: int, **changed: Any) -> Record:
    """A record of random numbers that fits the network, the same for the same seed; ``changed`` fields are taken."""
    generator = np.random.default_rng(seed)
    classes = tuple(f"class {number}" for number in range(3))
    ranking = np.concatenate([generator.permutation(group.size) for group in space.groups]).astype(np.int64)
    kept = ranking < np.maximum(space.sizes // 2, 1)[space.group_of]
    width = backbone.model.get_parameter(f"{backbone.head}.weight").shape[1]
    small = extract(backbone.model, space, Mask(kept, space.fingerprint))
    state = {
        name: torch.from_numpy(generator.normal(size=tuple(tensor.shape))).float()
        if tensor.is_floating_point()
        else tensor
        for name, tensor in small.state_dict().items()
    }
    values: dict[str, Any] = {
        "key": record_key(f"task {seed}", {"keep": 0.5}),
        "name": f"fruit {seed}",
        "classes": classes,
        "ranking": ranking,
        "scores": generator.random(len(space)).astype(np.float16),
        "mask": Mask(kept, space.fingerprint),
        "probe": Probe(
            generator.normal(size=(3, width)).astype(np.float32),
            generator.normal(size=3).astype(np.float32),
            generator.normal(size=(3, width)).astype(np.float32),
            generator.integers(1, 90, 3),
        ),
        "accuracy": Accuracy(1 / 3, 0.25, 0.9),
        "tensors": state,
        "details": {"data": "somewhere", "seconds": {"prune": 0.1}, "seed": seed},
    }
    return Record(**{**values, **changed})
