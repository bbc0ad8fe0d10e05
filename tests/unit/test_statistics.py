"""Matching batch norm to the dense model, against statistics counted by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from kinprune.calibration import match_batch_norm
from kinprune.calibration.statistics import Moments, moments
from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing, normalise
from kinprune.units import Mask, extract, find_units
from kinprune.units.layout import kept

PREPROCESSING = Preprocessing((32, 32))


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dense() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=4).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.running_mean)
    return model


def outputs(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What a batch norm gives before an activation writes over it, ``[c, everything else]``."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[2].detach().clone()))
    with torch.no_grad():
        model(normalise(images, PREPROCESSING))
    handle.remove()
    return seen[0].movedim(1, 0).flatten(1).double()


def test_a_whole_model_keeps_its_answers(dense: nn.Module, images: Tensor) -> None:
    matched = copy.deepcopy(dense)
    assert match_batch_norm(matched, dense, {}, images, PREPROCESSING) > 10
    batch = normalise(images, PREPROCESSING)
    with torch.no_grad():
        assert torch.allclose(matched(batch), dense(batch), atol=2e-3)


def test_every_kept_channel_has_the_dense_mean_and_spread(dense: nn.Module, images: Tensor) -> None:
    space = find_units(dense, (32, 32))
    random = np.random.default_rng(0)
    mask = space.whole_mask().kept
    for part in space.split(mask):
        part[random.permutation(len(part))[: len(part) // 2]] = False
    chosen = Mask(mask, space.fingerprint)
    pruned = extract(dense, space, chosen)
    units = [np.flatnonzero(part) for part in space.split(mask)]
    name = "layer3.0.bn1"
    channels = kept(space.tensors[f"{name}.weight"][0], units, space.sizes.tolist())
    wanted = outputs(dense, name, images)[channels]
    before = outputs(pruned, name, images)
    assert (
        match_batch_norm(pruned, dense, {name: channels.tolist()} | kept_channels(space, units), images, PREPROCESSING)
        > 10
    )
    found = outputs(pruned, name, images)
    assert not torch.allclose(before.mean(1), wanted.mean(1), atol=0.05)
    assert torch.allclose(found.mean(1), wanted.mean(1), atol=1e-3)
    assert torch.allclose(found.std(1), wanted.std(1), rtol=2e-2)


def kept_channels(space, units) -> dict[str, list[int]]:  # type: ignore[no-untyped-def]
    counts = space.sizes.tolist()
    return {
        name.removesuffix(".weight"): kept(layout[0], units, counts).tolist()
        for name, layout in space.tensors.items()
        if name.endswith(".weight")
    }


def test_without_batch_norm_there_is_nothing_to_match(images: Tensor) -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=32).eval()
    assert match_batch_norm(model, model, {}, images, PREPROCESSING) == 0


def test_without_images_it_is_refused(dense: nn.Module, images: Tensor) -> None:
    with pytest.raises(TaskError, match="without images"):
        match_batch_norm(dense, dense, {}, images[:0], PREPROCESSING)


def test_modes_and_hooks_are_as_before(dense: nn.Module, images: Tensor) -> None:
    pruned = copy.deepcopy(dense).train()
    match_batch_norm(pruned, dense, {}, images, PREPROCESSING)
    assert all(module.training for module in pruned.modules())
    assert not any(module._forward_pre_hooks for model in (pruned, dense) for module in model.modules())


def test_what_the_dense_model_gave_is_not_asked_again(dense: nn.Module, images: Tensor) -> None:
    noted: dict[str, Moments] = {}
    first, second = copy.deepcopy(dense), copy.deepcopy(dense)
    match_batch_norm(first, dense, {}, images, PREPROCESSING, noted=noted)
    passes: list[int] = []
    dense.register_forward_pre_hook(lambda *_: passes.append(1))
    match_batch_norm(second, dense, {}, images, PREPROCESSING, noted=noted)
    assert len(passes) == 1  # the images that memory holds are found with one image
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 7), (4, 5, 9, 9)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_are_those_of_double_precision(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    inputs = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs.contiguous(memory_format=layout) if len(shape) == 4 else inputs
    mean, variance = moments(inputs)
    exact = inputs.double().movedim(1, 0).flatten(1)
    assert torch.allclose(mean, exact.mean(1), rtol=1e-6)
    assert torch.allclose(variance, exact.var(1, correction=0), rtol=1e-5)
