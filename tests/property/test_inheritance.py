"""Inheritance against a mean over whole-size tensors with holes, for random masks, donors and weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kinprune.inheritance import Donor, inherit
from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units.layout import unit_of

FAMILIES: dict[str, tuple[int, str, Callable[[], nn.Module]]] = {
    "resnet": (32, "fc", partial(timm.create_model, "resnet18", num_classes=7, channels=(4, 6, 8, 12))),
    "mobilenet": (32, "classifier", partial(timm.create_model, "mobilenetv2_035", num_classes=7)),
    "densenet": (
        32,
        "classifier",
        partial(timm.create_model, "densenet121", num_classes=7, block_config=(2, 2), growth_rate=8),
    ),
    "vit": (
        32,
        "head",
        partial(
            timm.create_model, "vit_tiny_patch16_224", num_classes=7, img_size=32, depth=2, embed_dim=48, num_heads=3
        ),
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=8)
def built(name: str, stream: bool) -> tuple[nn.Module, UnitSpace]:
    size, head, make = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    return model, find_units(model, (size, size), stream=stream, head=head)


def draw(space: UnitSpace, random: np.random.Generator) -> Mask:
    kept = np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[random.choice(len(part), int(random.integers(1, len(part) + 1)), replace=False)] = True
    return Mask(kept, space.fingerprint)


def donor_of(model: nn.Module, space: UnitSpace, random: np.random.Generator, half: bool) -> Donor:
    mask = draw(space, random)
    state = extract(model, space, mask).state_dict()
    tensors = {
        name: torch.from_numpy(random.normal(size=tensor.shape)).to(torch.float16 if half else torch.float32)
        for name, tensor in state.items()
        if tensor.is_floating_point() and not name.startswith(f"{space.head}.")
    }
    return Donor(mask, tensors, float(random.exponential()) + 0.01)


def indices(space: UnitSpace, name: str, shape: torch.Size, mask: Mask) -> tuple[np.ndarray, ...]:
    """The open mesh of whole-size indices that a mask keeps, without the code under test."""
    found = []
    for dimension, length in enumerate(shape):
        keeps = np.ones(length, dtype=bool)
        for number, part in enumerate(space.split(mask.kept)) if name in space.tensors else ():
            units = unit_of(space.tensors[name][dimension], number, space.sizes.tolist())
            keeps &= (units < 0) | part[units]
        found.append(np.flatnonzero(keeps))
    return np.ix_(*found) if found else ()


def reference(space: UnitSpace, name: str, tensor: Tensor, mask: Mask, donors: list[Donor]) -> np.ndarray:
    own = tensor.detach().double().numpy()
    total, weight = np.zeros(tensor.shape), np.zeros(tensor.shape)
    for donor in donors:
        place = indices(space, name, tensor.shape, donor.mask)
        total[place] += donor.weight * donor.tensors[name].double().numpy()
        weight[place] += donor.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mean = np.where(weight > 0, total / weight, own)
    return mean[indices(space, name, tensor.shape, mask)].astype(np.float32)


@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), number=st.integers(1, 5), half=st.booleans())
def test_entries_are_means_over_the_donors_that_have_them_in_any_order(
    name: str, stream: bool, seed: int, number: int, half: bool
) -> None:
    model, space = built(name, stream)
    random = np.random.default_rng(seed)
    donors = [donor_of(model, space, random, half) for _ in range(number)]
    mask = draw(space, random)
    small = inherit(model, space, mask, donors)
    alone, whole = extract(model, space, mask).state_dict(), model.state_dict()
    for key, tensor in small.state_dict().items():
        if key in donors[0].tensors:
            expected = reference(space, key, whole[key], mask, donors)
            assert np.allclose(tensor.numpy(), expected, rtol=3e-7, atol=1e-12), key
        else:
            assert torch.equal(tensor, alone[key]), key
    again = inherit(model, space, mask, [donors[place] for place in random.permutation(number)])
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))
    size = FAMILIES[name][0]
    with torch.no_grad():
        assert small(torch.zeros(2, 3, size, size)).shape == (2, 7)
