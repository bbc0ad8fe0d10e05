"""Surgery against a masked forward pass in float64, for every supported family, in-block and with the stream."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import byobnet, efficientnet, levit, regnet, vgg
from torch import Tensor, nn
from torch.nn import functional as F

from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units import layout as layouts


def named(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=7, **arguments)


def narrow_vgg() -> nn.Module:
    widths = [8, "M", 12, "M", 16, "M", 16, 16]
    return vgg.VGG(widths, num_classes=7, mlp_ratio=1 / 128, norm_layer=nn.BatchNorm2d)


def narrow_regnet(se_ratio: float) -> nn.Module:
    cfg = regnet.RegNetCfg(w0=8, wa=14.0, wm=2.0, group_size=4, depth=5, se_ratio=se_ratio)
    return regnet.RegNet(cfg, num_classes=7)


def narrow_efficientnet() -> nn.Module:
    return efficientnet._gen_efficientnet(
        "efficientnet_b0", channel_multiplier=0.25, depth_multiplier=0.4, num_classes=7
    )


def narrow_levit() -> nn.Module:
    return levit.Levit(
        img_size=64, num_classes=7, embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 3, 4), depth=(1, 1, 1)
    )


CHANNELS: dict[str, Any] = {"channels": (8, 12, 16, 24)}
VIT: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SWIN: dict[str, Any] = {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6), "embed_dim": 24}
COATNET: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "stem_width": (8, 16),
    "transformer_dim_head": 16,
}

FAMILIES: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet18": (32, named("resnet18", **CHANNELS)),
    "resnet26": (32, named("resnet26", layers=(1, 2, 1, 1), **CHANNELS)),
    "resnet26d": (32, named("resnet26d", layers=(1, 1, 1, 1), stem_width=8, **CHANNELS)),
    "seresnet18": (32, named("seresnet18", **CHANNELS)),
    "vgg11_bn": (32, narrow_vgg),
    "densenet121": (32, named("densenet121", block_config=(2, 2, 2, 2), growth_rate=8)),
    "mobilenetv2": (32, named("mobilenetv2_035")),
    "mobilenetv3": (32, named("mobilenetv3_small_050")),
    "mobilenetv4": (32, named("mobilenetv4_conv_small_035")),
    "efficientnet_b0": (32, narrow_efficientnet),
    "regnetx": (32, partial(narrow_regnet, 0.0)),
    "regnety": (32, partial(narrow_regnet, 0.25)),
    "resnext26ts": (
        32,
        lambda: byobnet.ByobNet(replace(byobnet.model_cfgs["resnext26ts"], width_factor=0.5), num_classes=7),
    ),
    "convnext": (32, named("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 24))),
    "vit": (32, named("vit_tiny_patch16_224", img_size=32, **VIT)),
    "deit3": (32, named("deit3_small_patch16_224", img_size=32, **VIT)),
    "dinov2": (28, named("vit_small_patch14_dinov2", img_size=28, **VIT)),
    "swin": (56, named("swin_tiny_patch4_window7_224", **SWIN)),
    "levit": (64, narrow_levit),
    "coatnet": (64, named("coatnet_nano_rw_224", **COATNET)),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only get in each other's way on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def silence(model: nn.Module, space: UnitSpace, mask: Mask) -> None:
    """Set the weights that take removed units in to zero."""
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for number, (group, kept) in enumerate(zip(space.groups, space.split(mask.kept), strict=True)):
            for name, dimension in group.tensors("consumes"):
                units = layouts.unit_of(space.tensors[name][dimension], number, space.sizes.tolist())
                gone = torch.from_numpy((units >= 0) & ~kept[units])
                tensors[name].movedim(dimension, 0)[gone] = 0


def masked(model: nn.Module, space: UnitSpace, mask: Mask) -> nn.Module:
    """The whole model with the outgoing weights of removed units at zero, written without the code under test."""
    model = copy.deepcopy(model)
    silence(model, space, mask)
    norms: dict[str, np.ndarray] = {}
    for number, (group, kept) in enumerate(zip(space.groups, space.split(mask.kept), strict=True)):
        for name, dimension in group.tensors("carries") if group.normalised else ():
            module = name.rpartition(".")[0]
            if isinstance(model.get_submodule(module), nn.LayerNorm):
                units = layouts.unit_of(space.tensors[name][dimension], number, space.sizes.tolist())
                norms[module] = np.flatnonzero((units < 0) | kept[units])
    for name, indices in norms.items():
        parent, _, child = name.rpartition(".")
        norm = KeptLayerNorm(model.get_submodule(name), torch.from_numpy(indices))
        setattr(model.get_submodule(parent), child, norm)
    return model


@lru_cache(maxsize=4)
def whole_model(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = FAMILIES[name][1]().double().eval()
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


def descent(model: nn.Module, batch: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    """The loss and its gradients with batch norm in training mode and nothing random."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, DropPath)):
            module.eval()
    loss = F.cross_entropy(model(batch), labels)
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    model.eval()
    return loss.item(), list(gradients)


@torch.no_grad()
def step(model: nn.Module, gradients: list[Tensor], rate: float) -> None:
    """One step of plain SGD."""
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter -= rate * gradient


@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_of_the_extracted_model_is_that_of_the_masked_one(name: str, stream: bool) -> None:
    model, space = whole_model(name), space_of(name, stream)
    mask = draw_mask(space, 11)
    small, large = extract(model, space, mask), masked(model, space, mask)
    batch, labels = images(name, 4), torch.tensor([0, 3, 6, 3])
    with torch.no_grad():
        before = small(batch)
    (small_loss, gradients), (large_loss, large_gradients) = (descent(each, batch, labels) for each in (small, large))
    assert small_loss == pytest.approx(large_loss, abs=1e-9, rel=1e-9)
    # Batch norm over four images of one pixel has steep gradients: a step of a set length stays on numerical ground.
    rate = 0.01 / math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    step(small, gradients, rate)
    step(large, large_gradients, rate)
    silence(large, space, mask)  # the masked weights have gradients, the extracted model does not have these weights
    with torch.no_grad():
        found, expected = small(batch), large(batch)
    assert float((found - before).abs().max()) > 1e-6  # the step did something
    scale = expected.abs().max().clamp(min=1)
    assert float((found - expected).abs().max() / scale) < 1e-9
