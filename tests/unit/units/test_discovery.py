from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch_pruning
import torchvision
from timm.models import convmixer
from torch import Tensor, nn
from torch.nn import functional as F

from kinprune.errors import UnitError
from kinprune.units import Mask, UnitSpace, extract, find_units

Build = Callable[..., tuple[nn.Module, tuple[int, int]]]
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


def summary(space: UnitSpace) -> list[tuple[str, str, int, int]]:
    return [(group.name, group.kind, group.size, group.width) for group in space.groups]


def reasons(space: UnitSpace) -> dict[str, str]:
    return {whole.layer: whole.reason for whole in space.whole}


class Classifier(nn.Module):
    """A stem, something in the middle and a head: what the user's own models below differ in is the middle."""

    def __init__(self, middle: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.last = nn.Conv2d(width, 6, 1)
        self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.last(self.middle(self.stem(images)).relu())
        return self.head(features.relu().mean((2, 3)))


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


# --- names, kinds and sizes of known models


def test_resnet18_has_the_inner_filters_of_its_blocks() -> None:
    space = find_units(timm.create_model("resnet18"), (32, 32), head="fc")
    expected = [
        (f"layer{stage}.{block}.conv1", "filter", 32 * 2**stage, 1) for stage in (1, 2, 3, 4) for block in (0, 1)
    ]
    assert summary(space) == expected
    assert len(space) == 2 * (64 + 128 + 256 + 512)
    assert not any(group.normalised for group in space.groups)
    assert space.groups[0].tensors("produces") == [("layer1.0.conv1.weight", 0)]
    assert space.groups[0].tensors("consumes") == [("layer1.0.conv2.weight", 1)]
    carried = {(f"layer1.0.bn1.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(space.groups[0].tensors("carries")) == carried


def test_resnet18_streams_are_named_by_their_first_layer_and_listed_as_whole_otherwise() -> None:
    model = timm.create_model("resnet18")
    streams = [group for group in find_units(model, (32, 32), stream=True).groups if group.kind == "channel"]
    assert [(group.name, group.size) for group in streams] == [
        ("conv1", 64),
        ("layer2.0.conv2", 128),
        ("layer3.0.conv2", 256),
        ("layer4.0.conv2", 512),
    ]
    whole = reasons(find_units(model, (32, 32), head="fc"))
    assert whole.pop("fc") == "the classifier's classes"
    assert set(whole) == {
        "conv1",
        *(f"layer{stage}.{block}.conv2" for stage in (1, 2, 3, 4) for block in (0, 1)),
        *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)),
    }
    assert all("residual stream" in reason and "--stream" in reason for reason in whole.values())


def test_resnet50_bottlenecks_have_two_groups_a_block() -> None:
    space = find_units(timm.create_model("resnet50"), (32, 32))
    assert len(space.groups) == 32
    assert summary(space)[:2] == [("layer1.0.conv1", "filter", 64, 1), ("layer1.0.conv2", "filter", 64, 1)]


def test_vit_tiny_has_heads_and_nodes() -> None:
    space = find_units(timm.create_model("vit_tiny_patch16_224"), (224, 224))
    expected = []
    for block in range(12):
        expected += [(f"blocks.{block}.attn", "head", 3, 64), (f"blocks.{block}.mlp", "node", 768, 1)]
    assert summary(space) == expected
    heads = space.groups[0]
    assert heads.tensors("produces") == [("blocks.0.attn.qkv.weight", 0)]
    assert heads.tensors("consumes") == [("blocks.0.attn.proj.weight", 1)]
    assert heads.tensors("carries") == [("blocks.0.attn.qkv.bias", 0)]
    assert not heads.normalised


def test_the_stream_of_a_vit_is_one_group_that_its_norms_see() -> None:
    space = find_units(timm.create_model("vit_tiny_patch16_224", depth=2), (224, 224), stream=True)
    (stream,) = [group for group in space.groups if group.kind == "channel"]
    assert (stream.name, stream.size, stream.width, stream.normalised) == ("patch_embed.proj", 192, 1, True)
    assert {("cls_token", 2), ("pos_embed", 2), ("norm.weight", 0)} <= set(stream.tensors("carries"))
    assert ("head.weight", 1) in stream.tensors("consumes")


def test_two_heads_are_found_beside_a_stream() -> None:
    """A trial that leaves one head lays tensors out differently in memory, which is no reason to blame anything."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=2)
    kinds = [group.kind for group in find_units(model, (32, 32), stream=True).groups]
    assert sorted(kinds) == ["channel", "head", "head", "node", "node"]


def test_mobilenetv2_expands_and_carries_through_depthwise_layers(build: Build) -> None:
    model, size = build("mobilenetv2")
    space = find_units(model, size, head="classifier")
    assert [group.kind for group in space.groups] == ["filter"] * 16
    # The first block is depthwise-separable: its width is the stem's, which runs from block to block.
    first = space.groups[0]
    assert first.name == "blocks.1.0.conv_pw"
    assert first.tensors("consumes") == [("blocks.1.0.conv_pwl.weight", 1)]
    assert ("blocks.1.0.conv_dw.weight", 0) in first.tensors("carries")
    assert not any(name.startswith("conv_stem") for group in space.groups for name, _ in group.tensors("produces"))


def test_the_squeeze_of_a_gate_stays_but_the_gated_channels_go_with_their_layer(build: Build) -> None:
    model, size = build("seresnet")
    space = find_units(model, size, stream=True)
    whole = reasons(space)
    squeezes = [f"layer{stage}.{block}.se.fc1" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert all(whole[layer] == "the squeeze of a gate" for layer in squeezes)
    stream = next(group for group in space.groups if ("layer1.1.conv2.weight", 0) in group.tensors("produces"))
    assert {("layer1.0.se.fc2.weight", 0), ("layer1.1.se.fc2.weight", 0)} <= set(stream.tensors("produces"))
    assert {("layer1.0.se.fc1.weight", 1), ("layer1.1.se.fc1.weight", 1)} <= set(stream.tensors("consumes"))


def test_grouped_convolutions_lose_whole_groups() -> None:
    space = find_units(timm.create_model("resnext50_32x4d"), (32, 32))
    grouped = [group for group in space.groups if group.name == "layer1.0.conv1"]
    assert [(group.size, group.width) for group in grouped] == [(32, 4)]
    assert grouped[0].tensors("consumes") == [("layer1.0.conv3.weight", 1)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
def test_no_layer_is_skipped_silently(build: Build, family: str, stream: bool) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=stream)
    cut = {part.tensor.rpartition(".")[0] for group in space.groups for part in group.parts if part.dimension == 0}
    whole = reasons(space)
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert layers <= cut | set(whole)
    produced = {name.rpartition(".")[0] for group in space.groups for name, _ in group.tensors("produces")}
    assert not produced & set(whole)
    assert all(whole.values())
    assert len({group.name for group in space.groups}) == len(space.groups)
    for group in space.groups:
        assert group.tensors("produces") and group.tensors("consumes")
        assert group.size > 1
        assert group.width * group.size <= max(
            model.get_parameter(name).shape[dimension] for name, dimension in group.tensors("produces")
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_are_the_only_thing_that_the_option_adds(build: Build, family: str) -> None:
    model, size = build(family)
    inside, all_ = find_units(model, size), find_units(model, size, stream=True)
    assert {(group.name, group.size) for group in inside.groups} <= {(group.name, group.size) for group in all_.groups}
    assert not any(group.kind == "channel" for group in inside.groups)
    whole = reasons(inside)
    freed = set(whole) - set(reasons(all_))
    assert set(reasons(all_)) <= set(whole)
    assert all("--stream" in whole[layer] for layer in freed)
    added = [group for group in all_.groups if group.name not in {other.name for other in inside.groups}]
    cut = {part.tensor.rpartition(".")[0] for group in added for part in group.parts if part.dimension == 0}
    assert freed <= cut
    assert bool(freed) == bool(added)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "densenet121"])
def test_coupled_layers_are_those_that_torch_pruning_finds(name: str) -> None:
    arguments = {"block_config": (2, 2)} if name == "densenet121" else {}
    model = timm.create_model(name, **arguments).eval()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(1, 3, 32, 32))
    names = {module: name for name, module in model.named_modules()}
    theirs = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            found = graph.get_pruning_group(module, torch_pruning.prune_conv_out_channels, [0])
            outputs = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_depthwise_conv_out_channels)
            theirs.add(
                frozenset(
                    names[dependency.target.module]
                    for dependency, _ in found
                    if isinstance(dependency.target.module, nn.Conv2d) and dependency.handler in outputs
                )
            )
    space = find_units(model, (32, 32), stream=True)
    layers = {names[module] for module in model.modules() if isinstance(module, nn.Conv2d)}
    ours = {
        frozenset(
            part.tensor.rpartition(".")[0]
            for part in group.parts
            if part.dimension == 0 and part.tensor.rpartition(".")[0] in layers
        )
        for group in space.groups
    }
    assert ours == theirs


# --- the user's own models


def test_inner_filters_of_a_residual_block_written_as_a_sequence_are_units() -> None:
    model = torchvision.models.mobilenet_v2(width_mult=0.25)
    space = find_units(model, (32, 32))
    assert [group.name for group in space.groups] == [f"features.{block}.conv.0.0" for block in range(2, 18)]


def test_an_operation_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    middle = nn.Sequential(nn.Conv2d(8, 8, 1), Lambda(lambda x: x.sort(dim=1).values), nn.Conv2d(8, 8, 1))
    space = find_units(Classifier(middle), (8, 8))
    whole = reasons(space)
    assert whole["middle.0"] == "the operation sort is not understood"
    assert [group.name for group in space.groups] == ["stem", "middle.2", "last"]


def test_a_complex_transform_over_channels_is_named_too() -> None:
    middle = nn.Sequential(nn.Conv2d(8, 8, 1), Lambda(lambda x: torch.fft.fft(x, dim=1).real), nn.Conv2d(8, 8, 1))
    space = find_units(Classifier(middle), (8, 8))
    assert "fft" in reasons(space)["middle.0"]
    assert {"stem", "middle.2", "last"} == {group.name for group in space.groups}


class Shuffle(nn.Module):
    """Channel shuffle with its sizes written down."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 1)
        self.out = nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, _, h, w = x.shape
        x = x.view(n, 3, 4, h, w).transpose(1, 2).reshape(n, 12, h, w)
        return self.out(x)


def test_sizes_in_the_models_own_code_are_found_by_a_trial_and_the_rest_stays_prunable() -> None:
    model = Classifier(nn.Sequential(Shuffle(), nn.ReLU(), Shuffle())).double()
    space = find_units(model, (8, 8))
    whole = reasons(space)
    for layer in ("middle.0.conv", "middle.2.conv"):
        assert "Shuffle (" in whole[layer] and "fixes this size in its own code" in whole[layer]
    assert [group.name for group in space.groups] == ["stem", "middle.0.out", "middle.2.out", "last"]
    _assert_extracts(model, space)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)
        self.proj = nn.Conv2d(8, 8, 1)
        self.num_heads = 2

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = self.qkv(x).flatten(2).reshape(n, 3, 2, 4, h * w).transpose(-1, -2).unbind(1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, -1, h, w))


@pytest.mark.parametrize("before", [0, 1, 2])
def test_even_a_group_of_two_is_tried(before: int) -> None:
    """Whatever its place among the groups: two heads in the model's code must not pass for free ones."""
    plain = [layer for _ in range(before) for layer in (nn.Conv2d(8, 8, 1), nn.ReLU())]
    model = Classifier(nn.Sequential(*plain, TwoHeads())).double()
    space = find_units(model, (4, 4))
    assert "fixes this size" in reasons(space)[f"middle.{2 * before}.qkv"]
    _assert_extracts(model, space)


class Separate(nn.Module):
    """Attention with a layer each for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 20)
        self.out = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2).transpose(1, 2)
        n, length, _ = y.shape
        q, k, v = (layer(y).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 3).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).reshape(n, length, -1))
        return y.transpose(1, 2).reshape(x.shape)


def test_heads_made_by_three_layers_are_one_group() -> None:
    model = Classifier(Separate()).double()
    space = find_units(model, (4, 4))
    (heads,) = [group for group in space.groups if group.kind == "head"]
    assert (heads.name, heads.size, heads.width) == ("middle", 4, 3)
    assert heads.tensors("produces") == [("middle.q.weight", 0), ("middle.k.weight", 0), ("middle.v.weight", 0)]
    assert heads.tensors("consumes") == [("middle.out.weight", 1)]
    _assert_extracts(model, space)


def test_an_error_of_any_kind_in_the_trial_is_blamed_on_its_module() -> None:
    def look_up(x: Tensor) -> Tensor:
        return x * {12: 2.0}[x.shape[1]]

    middle = nn.Sequential(nn.Conv2d(8, 12, 1), Lambda(look_up), nn.Conv2d(12, 8, 1))
    space = find_units(Classifier(middle), (8, 8))
    assert "fixes this size" in reasons(space)["middle.0"]
    assert "stem" in {group.name for group in space.groups}


def test_a_model_that_reads_values_is_watched_for_real() -> None:
    middle = nn.Sequential(
        nn.Conv2d(8, 12, 1), Lambda(lambda x: x if x.sum().item() < math.inf else x * 2.0), nn.Conv2d(12, 8, 1)
    )
    model = Classifier(middle)
    model.middle.eval()
    before = copy.deepcopy(model.state_dict())
    space = find_units(model, (8, 8))
    assert {group.name for group in space.groups} == {"stem", "middle.0", "middle.2", "last"}
    assert model.training and model.stem.training and not model.middle[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _assert_extracts(model: nn.Module, space: UnitSpace) -> None:
    kept = space.whole_mask().kept
    for part in space.split(kept):
        part[len(part) // 2 :] = False
    small = extract(model, space, Mask(kept, space.fingerprint))
    assert torch.isfinite(small(torch.randn(2, 3, 8, 8, dtype=torch.float64))).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x)).relu()).mean((2, 3)))


def test_tied_weights_are_one_tensor_of_one_group() -> None:
    model = Tied().double()
    space = find_units(model, (8, 8))
    assert summary(space) == [("stem", "filter", 8, 1)]
    names = [part.tensor for part in space.groups[0].parts]
    assert names.count("first.weight") == 1 and "second.weight" not in names
    assert {"first.bias", "second.bias"} <= set(names)
    small = extract(model, space, Mask(np.arange(8) % 2 == 0, space.fingerprint))
    assert isinstance(small, Tied)
    assert small.first.weight is small.second.weight
    assert small.first.groups == small.second.groups == small.second.in_channels == 4
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.head.weight[:, 1::2] = 0
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(small(images), reference(images), atol=1e-12)


# --- what is refused


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)), "the model's output"),
        (nn.Sequential(nn.Flatten()), "it has no layer with weights"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Softmax(dim=1), nn.Flatten(), nn.Linear(512, 4)), "a softmax runs over"),
    ],
)
def test_a_model_without_units_is_refused_with_the_reasons(model: nn.Module, told: str) -> None:
    with pytest.raises(UnitError, match="no prunable unit") as caught:
        find_units(model, (8, 8))
    assert told in str(caught.value)


def test_a_model_of_streams_alone_is_told_of_the_option() -> None:
    model = convmixer.ConvMixer(dim=16, depth=2)
    with pytest.raises(UnitError, match="try stream=True"):
        find_units(model, (32, 32))
    assert {group.kind for group in find_units(model, (32, 32), stream=True).groups} >= {"channel"}


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, AssertionError, ZeroDivisionError])
def test_the_models_own_error_comes_through(kind: type[Exception]) -> None:
    def fail(x: Tensor) -> Tensor:
        raise kind("the cat sat on the keyboard")

    with pytest.raises(UnitError, match=r"8 x 8 pixels .*the cat sat on the keyboard") as caught:
        find_units(Classifier(Lambda(fail)), (8, 8))
    assert kind.__name__ in str(caught.value)
    assert isinstance(caught.value.__cause__, kind)


def test_an_image_size_that_the_model_does_not_take_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24)
    with pytest.raises(UnitError, match=r"64 x 64 pixels.*choose another image size"):
        find_units(model, (64, 64))


def test_a_model_that_gives_no_tensor_is_refused() -> None:
    with pytest.raises(UnitError, match=r"gave a tuple.*wrap it"):
        find_units(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Lambda(lambda x: (x, x))), (8, 8))


# --- what is left alone, and what is told apart


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


def global_hooks() -> list[int]:
    module = nn.modules.module
    return [len(module._global_forward_hooks), len(module._global_forward_pre_hooks)]


@pytest.mark.parametrize("family", ["seresnet", "vit", "levit"])
def test_the_model_is_left_as_it_was(build: Build, family: str) -> None:
    model, size = build(family)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tensors = {name: id(value) for name, value in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    hooked, everywhere = hooks(model), global_hooks()
    state = torch.random.get_rng_state()
    find_units(model, size, stream=True)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert {name: id(value) for name, value in model.named_parameters()} == tensors
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks(model) == hooked
    assert global_hooks() == everywhere
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_stays_behind_when_the_model_fails() -> None:
    everywhere = global_hooks()
    model = Classifier(Lambda(lambda x: x.no_such_thing))
    with pytest.raises(UnitError, match="no_such_thing"):
        find_units(model, (8, 8))
    assert global_hooks() == everywhere
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_frozen_half_and_training_models_have_the_same_units(build: Build, family: str) -> None:
    model, size = build(family)
    expected = find_units(model, size)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for other in (model, copy.deepcopy(model).bfloat16(), copy.deepcopy(model).train()):
        space = find_units(other, size)
        assert space.groups == expected.groups
        assert space.fingerprint == expected.fingerprint
        assert np.array_equal(space.costs.of(space.sizes).macs, expected.costs.of(space.sizes).macs)


def test_the_fingerprint_is_that_of_the_units(build: Build) -> None:
    def of(family: str, head: str, classes: int = 7, seed: int = 0, stream: bool = False) -> str:
        model, size = build(family, classes, seed)
        return find_units(model, size, stream=stream, head=head).fingerprint

    first = of("resnet", "fc")
    assert len(first) == 64
    assert of("resnet", "fc") == first
    assert of("resnet", "fc", seed=1) == first
    assert of("resnet", "fc", classes=100) == first
    others = [
        of("resnet", "fc", stream=True),
        of("seresnet", "fc"),
        of("bottleneck", "fc"),
        of("vit", "head"),
        of("deit3", "head"),
    ]
    assert len({first, *others}) == 6


def test_a_deeper_or_wider_model_has_another_fingerprint() -> None:
    def of(**arguments: Any) -> str:
        return find_units(timm.create_model("vit_tiny_patch16_224", img_size=32, **arguments), (32, 32)).fingerprint

    same = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    changes: list[dict[str, Any]] = [{}, {"depth": 3}, {"num_heads": 6}, {"mlp_ratio": 3}]
    assert len({of(**same | change) for change in changes}) == 4


def test_greyscale_images_are_a_matter_of_channels() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 3))
    space = find_units(model, (8, 8), channels=1)
    assert summary(space) == [("0", "filter", 4, 1), ("2", "filter", 2, 1)]
    with pytest.raises(UnitError, match="3 channels"):
        find_units(model, (8, 8))
