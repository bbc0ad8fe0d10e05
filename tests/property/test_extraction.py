"""Surgery against a masked forward pass in float64, for every supported family, in-block and with the stream."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units import layout as layouts

FAMILIES = {
    "resnet18": (32, {}),
    "resnet26": (32, {}),
    "seresnet18": (32, {}),
    "vgg11_bn": (32, {}),
    "densenet121": (32, {"block_config": (2, 2, 2, 2)}),
    "mobilenetv2_050": (32, {}),
    "mobilenetv3_small_050": (32, {}),
    "mobilenetv4_conv_small_050": (32, {}),
    "efficientnet_b0": (32, {}),
    "regnetx_002": (32, {}),
    "regnety_002": (32, {}),
    "resnext26ts": (32, {}),
    "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "deit3_small_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "vit_small_patch14_dinov2": (28, {"img_size": 28, "depth": 2}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 48}),
    "levit_128s": (224, {}),
    "coatnet_nano_rw_224": (64, {"img_size": 64}),
}


class KeptLayerNorm(nn.Module):
    """A layer norm whose statistics run over some channels only: what the cut model computes, in the whole one."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept
        self.first = type(norm).__name__.endswith("2d")

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1) if self.first else x
        inner = x[..., self.kept]
        mean, variance = inner.mean(-1, keepdim=True), inner.var(-1, unbiased=False, keepdim=True)
        x = (x - mean) / (variance + self.norm.eps).sqrt() * self.norm.weight + self.norm.bias
        return x.movedim(-1, 1) if self.first else x


def masked(model: nn.Module, space: UnitSpace, mask: Mask) -> nn.Module:
    """The whole model with the outgoing weights of removed units at zero, written without the code under test."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    counts = space.sizes.tolist()
    norms: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for number, (group, kept) in enumerate(zip(space.groups, space.split(mask.kept), strict=True)):
            for name, dimension in group.tensors("consumes"):
                units = layouts.unit_of(space.tensors[name][dimension], number, counts)
                gone = torch.from_numpy((units >= 0) & ~kept[units])
                tensors[name].movedim(dimension, 0)[gone] = 0
            for name, dimension in group.tensors("carries") if group.normalised else ():
                module = name.rpartition(".")[0]
                if isinstance(model.get_submodule(module), nn.LayerNorm):
                    units = layouts.unit_of(space.tensors[name][dimension], number, counts)
                    norms[module] = np.flatnonzero((units < 0) | kept[units])
    for name, indices in norms.items():
        parent, _, child = name.rpartition(".")
        norm = KeptLayerNorm(model.get_submodule(name), torch.from_numpy(indices))
        setattr(model.get_submodule(parent), child, norm)
    return model


@lru_cache(maxsize=4)
def whole_model(name: str) -> nn.Module:
    size, arguments = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model(name, num_classes=7, **arguments).double().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        for module in model.modules():  # zero-initialised gates and scales would hide a wrong cut
            for parameter in module.parameters(recurse=False):
                if parameter.detach().abs().max() < 1e-2:
                    nn.init.normal_(parameter, std=0.5)
    return model


@lru_cache(maxsize=8)
def space_of(name: str, stream: bool) -> UnitSpace:
    size, _ = FAMILIES[name]
    return find_units(whole_model(name), (size, size), stream=stream)


def draw_mask(space: UnitSpace, seed: int) -> Mask:
    """A random mask with its own share kept in every group, at least one unit each."""
    random = np.random.default_rng(seed)
    kept = np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        count = int(random.integers(1, len(part) + 1))
        part[random.choice(len(part), count, replace=False)] = True
    return Mask(kept, space.fingerprint)


def images(name: str, count: int = 2) -> Tensor:
    size, _ = FAMILIES[name]
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def exact(space: UnitSpace, model: nn.Module, stream: bool) -> bool:
    """Whether the reference above knows the statistics that run over this space's units."""
    return not any(group.normalised for group in space.groups) or stream


@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31))
def test_the_extracted_model_equals_the_masked_one(name: str, stream: bool, seed: int) -> None:
    model, space = whole_model(name), space_of(name, stream)
    mask = draw_mask(space, seed)
    small = extract(model, space, mask)
    with torch.no_grad():
        expected = masked(model, space, mask)(images(name))
        found = small(images(name))
    assert torch.isfinite(expected).all()
    scale = expected.abs().max().clamp(min=1)
    assert float((found - expected).abs().max() / scale) < 1e-9
    assert sum(p.numel() for p in small.parameters()) == space.cost(mask).parameters
    assert space.shrink(mask).cost(space.shrink(mask).whole_mask()) == space.cost(mask)
