"""Narrow members of model families, and masks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import byobnet, levit, mlp_mixer
from torch import nn

from kinprune.units import Mask, UnitSpace

Built = tuple[nn.Module, tuple[int, int]]

_VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
_NARROW: dict[str, Any] = {"channels": (8, 12, 16, 24)}
_FAMILIES: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "resnet": (32, partial(timm.create_model, "resnet18", **_NARROW)),
    "bottleneck": (32, partial(timm.create_model, "resnet26d", layers=(1, 1, 1, 1), stem_width=8, **_NARROW)),
    "seresnet": (32, partial(timm.create_model, "seresnet18", **_NARROW)),
    "densenet": (32, partial(timm.create_model, "densenet121", block_config=(2, 2), growth_rate=8)),
    "mobilenetv2": (32, partial(timm.create_model, "mobilenetv2_035")),
    "mobilenetv3": (32, partial(timm.create_model, "mobilenetv3_small_050")),
    "convnext": (32, partial(timm.create_model, "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 24))),
    "vit": (32, partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, **_VIT)),
    "deit3": (32, partial(timm.create_model, "deit3_small_patch16_224", img_size=32, **_VIT)),
    "swin": (
        56,
        partial(
            timm.create_model,
            "swin_tiny_patch4_window7_224",
            img_size=56,
            depths=(2, 2),
            num_heads=(3, 6),
            embed_dim=24,
        ),
    ),
    "levit": (
        64,
        partial(levit.Levit, img_size=64, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)),
    ),
    "coatnet": (
        64,
        partial(
            timm.create_model,
            "coatnet_nano_rw_224",
            img_size=64,
            embed_dim=(16, 32, 48, 64),
            depths=(1, 1, 1, 1),
            stem_width=(8, 16),
            transformer_dim_head=16,
        ),
    ),
    "resnext": (32, partial(byobnet.ByobNet, replace(byobnet.model_cfgs["resnext26ts"], width_factor=0.5))),
    "mixer": (64, partial(mlp_mixer.MlpMixer, img_size=64, embed_dim=32, num_blocks=2)),
}


@pytest.fixture(scope="session")
def build() -> Callable[..., Built]:
    """``build(family, classes=7, seed=0)``: a fresh float32 model in eval mode, and its image size."""

    def make(family: str, classes: int = 7, seed: int = 0) -> Built:
        size, constructor = _FAMILIES[family]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return constructor(num_classes=classes).eval(), (size, size)

    return make


@pytest.fixture(scope="session")
def draw() -> Callable[..., Mask]:
    """``draw(space, seed)``: a mask with its own random share kept in every group, at least one unit each."""

    def make(space: UnitSpace, seed: int) -> Mask:
        random = np.random.default_rng(seed)
        kept = np.zeros(len(space), dtype=bool)
        for part in space.split(kept):
            count = int(random.integers(1, len(part) + 1))
            part[random.choice(len(part), count, replace=False)] = True
        return Mask(kept, space.fingerprint)

    return make


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
