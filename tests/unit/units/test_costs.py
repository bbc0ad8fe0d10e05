from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kinprune.precision import PRECISIONS
from kinprune.units import Mask, UnitSpace, extract, find_units
from kinprune.units.runtime import NO_RUNTIME

Build = Callable[..., tuple[nn.Module, tuple[int, int]]]
Draw = Callable[[UnitSpace, int], Mask]
FAMILIES = [
    "resnet",
    "bottleneck",
    "seresnet",
    "densenet",
    "mobilenetv2",
    "mobilenetv3",
    "convnext",
    "vit",
    "deit3",
    "swin",
    "levit",
    "coatnet",
    "resnext",
    "mixer",
]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of tensor data in a safetensors file of the model."""
    blob = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    header = int.from_bytes(blob[:8], "little")
    offsets = [entry["data_offsets"][1] for name, entry in json.loads(blob[8 : 8 + header]).items()]
    assert max(offsets) == len(blob) - 8 - header
    return max(offsets)


def counted_macs(model: nn.Module, size: tuple[int, int]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, 3, *size))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
def test_costs_are_those_of_the_extracted_model(build: Build, draw: Draw, family: str, stream: bool) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=stream)
    for mask in (space.whole_mask(), draw(space, 1), draw(space, 2)):
        costs, small = space.cost(mask), extract(model, space, mask)
        assert costs.units == mask.kept.sum()
        assert costs.parameters == sum(parameter.numel() for parameter in small.parameters())
        assert costs.weight_bytes == stored_bytes(small)
        assert costs.macs == counted_macs(small, size)
        # What the pruned model says of itself is what was foreseen of it (but a single unit left is no unit any more).
        again = find_units(small, size, stream=stream)
        assert replace(again.cost(again.whole_mask()), units=costs.units) == costs


def test_half_precision_halves_bytes_but_nothing_else(build: Build) -> None:
    model, size = build("vit")
    full = find_units(model, size)
    half = find_units(model.bfloat16(), size)
    a, b = full.cost(full.whole_mask()), half.cost(half.whole_mask())
    assert (a.parameters, a.macs) == (b.parameters, b.macs)
    assert a.weight_bytes == 2 * b.weight_bytes
    whole = full.sizes[None]
    assert full.costs.live_bytes(whole) == 2 * half.costs.live_bytes(whole)
    # Stored as half, they are what the half model has; a model of half numbers stays as it is.
    for space in (full, half):
        assert space.costs.weight_bytes(whole, "fp16") == half.costs.weight_bytes(whole)


def cost_of(space: UnitSpace, counts: list[int], name: str) -> int:
    return int(getattr(space.costs.of(counts), name))


class Chain(nn.Module):
    """Three layers: 3 -> 4 -> 6 channels on a 4 x 4 grid, then a classifier of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 1, bias=False)
        self.head = nn.Linear(6 * 16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).flatten(1))


@pytest.mark.parametrize(("first", "second"), [(4, 6), (2, 3), (1, 6), (4, 1)])
def test_a_chain_by_hand(first: int, second: int) -> None:
    space = find_units(Chain(), (4, 4))
    assert [(group.name, group.size) for group in space.groups] == [("first", 4), ("second", 6)]
    costs = space.costs.of([first, second])
    parameters = 27 * first + first + first * second + 2 * 16 * second + 2
    assert costs.parameters == parameters
    assert costs.weight_bytes == 4 * parameters
    assert costs.macs == 16 * 27 * first + 16 * first * second + 2 * 16 * second
    image, one, two, logits = 4 * 16 * 3, 4 * 16 * first, 4 * 16 * second, 8
    # The image is read by the first layer only; ReLU writes over its input, flattening moves nothing.
    counts = np.array([[first, second]])
    assert space.costs.live_bytes(counts) == max(image + one, one + two, two + logits)
    assert space.costs.weight_bytes(counts, "fp16") == 2 * parameters
    # A byte an element and 13 an output channel, biases as they were, and the classifier as it was.
    layers = 27 * first + 13 * first + 4 * first + first * second + 13 * second
    assert space.costs.weight_bytes(counts, "int8") == layers + 4 * (2 * 16 * second + 2)
    for precision in PRECISIONS:
        costs = space.costs.of([first, second], precision)
        assert costs.weight_bytes == space.costs.weight_bytes(counts, precision)
        assert costs.peak_memory_bytes == space.costs.peak_memory_bytes(counts, precision)


def test_peak_memory_is_what_a_runtime_makes_of_the_model() -> None:
    space = find_units(Chain(), (4, 4))
    counts = np.array([[4, 6], [1, 2]])
    bare = replace(space.costs, runtime=NO_RUNTIME)
    assert (bare.peak_memory_bytes(counts) == bare.weight_bytes(counts) + bare.live_bytes(counts)).all()
    for precision, own in space.costs.runtime.overheads.items():
        weights, live = space.costs.weight_bytes(counts, precision), space.costs.live_bytes(counts)
        matrices = np.array([[27 * 4, 4 * 6, 2 * 16 * 6], [27, 2, 2 * 16 * 2]])
        # The image, both convolutions, ReLU, flattening, and the classifier's product.
        expected = space.costs.runtime.peak_bytes(precision, weights, live, matrices, 6, 3)
        assert space.costs.peak_memory_bytes(counts, precision).tolist() == expected.tolist()
        assert (expected > weights + live + own.fixed).all()


def test_batch_norm_takes_no_memory_of_its_own() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    space = find_units(model, (4, 4))
    image, one, two = 4 * 16 * 3, 4 * 16 * 5, 4 * 16 * 2
    assert space.costs.live_bytes(np.array([[5]])) == max(image + one, one + two)


class Residual(nn.Module):
    """A stem of 8 channels and a block that adds to it; 4 x 4 grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.up = nn.Conv2d(8, 16, 1, bias=False)
        self.down = nn.Conv2d(16, 8, 1, bias=False)
        self.head = nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("channels", "inner"), [(8, 16), (8, 2), (3, 16), (3, 1)])
def test_a_residual_block_by_hand(channels: int, inner: int) -> None:
    space = find_units(Residual(), (4, 4), stream=True)
    by_name = {"stem": channels, "up": inner}
    counts = [by_name[group.name] for group in space.groups]
    costs = space.costs.of(counts)
    weights = 4 * (3 * channels + 2 * channels * inner + 2 * channels)
    assert costs.weight_bytes == weights
    assert costs.macs == 16 * (3 * channels + 2 * channels * inner) + 2 * channels
    image, stream, wide, pooled, logits = 192, 64 * channels, 64 * inner, 4 * channels, 8
    live = [
        image + stream,
        stream + wide,  # the stream waits for the sum
        stream + wide + stream,  # while the second layer writes its output
        stream + stream,  # the sum goes over one of its inputs
        stream + pooled,
        pooled + logits,
    ]
    assert space.costs.live_bytes(np.array([counts])) == max(live)


def test_normalisation_layers_save_their_statistics() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten()
    ).eval()
    space = find_units(model, (2, 2))
    costs = space.costs.of([3])
    assert costs.parameters == 9 + 6 + 6
    assert costs.weight_bytes == 4 * costs.parameters + 4 * 6 + 8  # mean and variance, and the count of batches


def test_what_is_not_saved_costs_nothing_and_what_is_tied_costs_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.again = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
            self.again.weight = self.up.weight
            self.down = nn.Linear(8, 12, bias=False)
            self.register_buffer("scale", torch.ones(100), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(self.up(x.flatten(1)).relu())
            return self.down(self.again(x).relu())

    space = find_units(Tied(), (2, 2))
    costs = space.costs.of([5])
    assert costs.parameters == 2 * 12 * 5
    assert costs.weight_bytes == 4 * 2 * 12 * 5
    assert costs.macs == 4 * 12 * 5


@pytest.mark.parametrize("family", ["resnet", "densenet", "mobilenetv3", "vit", "swin"])
def test_costs_grow_with_every_unit(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    random = np.random.default_rng(0)
    counts = np.array([[random.integers(1, group.size) for group in space.groups] for _ in range(20)])
    for group in range(len(space.groups)):
        more = counts.copy()
        more[:, group] += 1
        for name in ("parameters", "macs"):
            assert (getattr(space.costs, name)(more) > getattr(space.costs, name)(counts)).all()
        for precision in PRECISIONS:
            for name in ("weight_bytes", "peak_memory_bytes"):
                cost = getattr(space.costs, name)
                assert (cost(more, precision) > cost(counts, precision)).all()


@pytest.mark.parametrize("family", ["resnet", "densenet", "mobilenetv3", "convnext", "vit"])
def test_fewer_bits_are_fewer_bytes(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size)
    random = np.random.default_rng(2)
    counts = np.array([[random.integers(1, group.size + 1) for group in space.groups] for _ in range(20)])
    whole, half, bytes_ = (space.costs.weight_bytes(counts, precision) for precision in ("fp32", "fp16", "int8"))
    assert (half < whole).all() and (bytes_ < whole).all()
    large = space.sizes[None]
    assert space.costs.weight_bytes(large, "int8") < space.costs.weight_bytes(large, "fp16")
    assert space.costs.peak_memory_bytes(large, "fp32") < space.costs.peak_memory_bytes(large, "fp16")


def test_many_masks_at_once_are_each_one_alone(build: Build) -> None:
    model, size = build("levit")
    space = find_units(model, size)
    random = np.random.default_rng(1)
    counts = np.array([[random.integers(1, group.size + 1) for group in space.groups] for _ in range(5)])
    for name in ("parameters", "weight_bytes", "macs", "peak_memory_bytes"):
        together = getattr(space.costs, name)(counts)
        assert together.tolist() == [getattr(space.costs.of(row), name) for row in counts]
    for precision in PRECISIONS:
        for name in ("weight_bytes", "peak_memory_bytes"):
            together = getattr(space.costs, name)(counts, precision)
            assert together.tolist() == [getattr(space.costs.of(row, precision), name) for row in counts]
