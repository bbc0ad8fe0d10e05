from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kinprune.errors import UnitError
from kinprune.units import Mask, UnitSpace, attributes_of, extract, find_units, set_attributes

Build = Callable[..., tuple[nn.Module, tuple[int, int]]]
Draw = Callable[[UnitSpace, int], Mask]
FAMILIES = ["resnet", "densenet", "mobilenetv3", "convnext", "vit", "swin", "levit"]


def half_of(space: UnitSpace, first: int = 0) -> Mask:
    """Every other unit of every group, at least two where there are two."""
    kept = np.zeros(len(space), dtype=bool)
    for part in space.split(kept):
        part[first % len(part) :: 2] = True
        if part.sum() < 2:
            part[:2] = True
    return Mask(kept, space.fingerprint)


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(batch)
    return answer


# --- the result is an ordinary module


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_of_the_same_class_with_no_hook_and_no_wrapper(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    small = extract(model, space, half_of(space))
    assert [(name, type(module)) for name, module in small.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    assert list(small.state_dict()) == list(model.state_dict())
    for module in small.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_it_can_be_copied_and_exported(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    small = extract(model, space, half_of(space))
    batch = images(size)
    expected = run(small, batch)
    assert torch.equal(run(copy.deepcopy(small), batch), expected)
    exported = torch.export.export(small, (batch,), strict=False)
    assert torch.allclose(run(exported.module(), batch), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_it_can_be_compiled(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size)
    small = extract(model, space, half_of(space))
    batch = images(size)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled, batch), run(small, batch), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_types_are_kept(build: Build, family: str, dtype: torch.dtype) -> None:
    model, size = build(family)
    model.to(dtype)
    space = find_units(model, size)
    small = extract(model, space, half_of(space))
    assert {value.dtype for value in small.parameters()} == {dtype}
    answer = run(small, images(size).to(dtype))
    assert answer.dtype == dtype
    assert torch.isfinite(answer).all()
    assert torch.equal(answer, run(extract(model, space, half_of(space)), images(size).to(dtype)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_it_learns(build: Build, family: str) -> None:
    model, size = build(family)
    for parameter in model.parameters():
        if parameter.detach().abs().max() < 1e-3:  # zero-initialised scales and gates let no gradient pass
            nn.init.normal_(parameter)
    space = find_units(model, size)
    small = extract(model, space, half_of(space)).train()
    optimiser = torch.optim.SGD(small.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    whole = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(small(images(size, 4)), torch.tensor([0, 1, 2, 3])).backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    optimiser.step()
    # Biases behind which a batch norm takes the mean away have no gradient; every weight has.
    still = [
        name
        for name, value in small.named_parameters()
        if torch.equal(value, before[name]) and name.endswith(".weight") and value.dim() > 1
    ]
    assert still == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def test_flags_and_modes_go_with_the_weights(build: Build) -> None:
    model, size = build("resnet")
    space = find_units(model, size)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    model.layer1.train()
    small = extract(model, space, half_of(space))
    assert [value.requires_grad for value in small.parameters()] == [
        value.requires_grad for value in model.parameters()
    ]
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    assert all(isinstance(value, nn.Parameter) and value.is_leaf for value in small.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_its_state_loads_strictly_into_another_of_the_same_mask(build: Build, draw: Draw, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    mask = draw(space, 3)
    small = extract(model, space, mask)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    fresh = extract(build(family, seed=9)[0], space, mask)
    assert not torch.equal(run(fresh, images(size)), run(small, images(size)))
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(run(fresh, images(size)), run(small, images(size)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_rebuilt_from_its_attributes_alone(build: Build, draw: Draw, family: str) -> None:
    """What an artifact on disk relies on: no tracing, only integers and the cut tensors."""
    model, size = build(family)
    space = find_units(model, size, stream=True)
    mask = draw(space, 4)
    small = extract(model, space, mask)
    rebuilt = build(family, seed=5)[0]
    cut = dict(small.state_dict())
    for module_name, module in rebuilt.named_modules():
        for name, value in [*module._parameters.items()]:
            if value is not None:
                setattr(module, name, nn.Parameter(cut[f"{module_name}.{name}".removeprefix(".")].clone()))
        for name, value in [*module._buffers.items()]:
            if value is not None and (full := f"{module_name}.{name}".removeprefix(".")) in cut:
                setattr(module, name, cut[full].clone())
    set_attributes(rebuilt, attributes_of(space, space.counts(mask.kept).tolist()))
    assert torch.equal(run(rebuilt, images(size)), run(small, images(size)))


def test_the_whole_mask_gives_the_model_again_and_no_attributes(build: Build) -> None:
    for family in ("resnet", "vit", "levit"):
        model, size = build(family)
        space = find_units(model, size)
        small = extract(model, space, space.whole_mask())
        assert torch.equal(run(small, images(size)), run(model, images(size)))
        assert attributes_of(space, space.sizes.tolist()) == {}


def test_attributes_tell_the_new_widths(build: Build) -> None:
    model, size = build("vit")
    space = find_units(model, size)
    counts = [2 if group.kind == "head" else 100 for group in space.groups]
    attributes = attributes_of(space, counts)
    attention = attributes["blocks.0.attn"]
    assert attention["num_heads"] == 2
    assert attributes["blocks.0.attn.qkv"] == {"out_features": 3 * 2 * 16}
    assert attributes["blocks.0.attn.proj"] == {"in_features": 2 * 16}
    assert attributes["blocks.0.mlp.fc1"] == {"out_features": 100}
    assert attributes["blocks.0.mlp.fc2"] == {"in_features": 100}
    kept = np.concatenate([np.arange(group.size) < count for group, count in zip(space.groups, counts, strict=True)])
    small = extract(model, space, Mask(kept, space.fingerprint))
    for name, values in attributes.items():
        for attribute, value in values.items():
            assert getattr(small.get_submodule(name), attribute) == value
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)


@pytest.mark.parametrize("family", ["resnet", "mobilenetv3", "densenet"])
def test_convolutions_and_norms_tell_their_true_sizes(build: Build, draw: Draw, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    small = extract(model, space, draw(space, 5))
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(module.weight) == len(module.running_mean) == module.num_features


# --- the original


@pytest.mark.parametrize("family", FAMILIES)
def test_the_original_is_untouched_and_shares_no_memory(build: Build, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size)
    before, expected = copy.deepcopy(model.state_dict()), run(model, images(size))
    attributes = {name: getattr(model.get_submodule(name), attribute) for name, attribute in space.attributes}
    small = extract(model, space, half_of(space))
    places = {value.untyped_storage().data_ptr() for value in [*model.parameters(), *model.buffers()] if value.numel()}
    assert not any(value.untyped_storage().data_ptr() in places for value in [*small.parameters(), *small.buffers()])
    with torch.no_grad():
        for value in [*small.parameters(), *small.buffers()]:
            value.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, images(size)), expected)
    assert {name: getattr(model.get_submodule(name), attribute) for name, attribute in space.attributes} == attributes


def test_what_a_model_remembers_of_its_weights_in_eval_mode_is_not_passed_on(build: Build) -> None:
    """LeViT keeps its attention biases from one forward pass to the next."""
    model, size = build("levit")
    for name, parameter in model.named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
    space = find_units(model, size)
    expected = run(extract(model, space, half_of(space)), images(size))
    run(model, images(size))
    assert model.stages[0].blocks[0].attn.attention_bias_cache
    assert torch.equal(run(extract(model, space, half_of(space)), images(size)), expected)
    small = extract(model, space, half_of(space))
    run(small, images(size))
    again = find_units(small, size)
    smaller = extract(small, again, half_of(again))
    assert run(smaller, images(size)).shape == (2, 7)


# --- two rounds, and what is refused


@pytest.mark.parametrize("stream", [False, True], ids=["in-block", "stream"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shrunk_space_is_that_of_the_extracted_model(build: Build, family: str, stream: bool) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=stream)
    mask = half_of(space)
    shrunk, found = space.shrink(mask), find_units(extract(model, space, mask), size, stream=stream)
    assert shrunk.sizes.tolist() == space.counts(mask.kept).tolist()
    assert shrunk.groups == found.groups
    assert shrunk.fingerprint == found.fingerprint
    assert shrunk.fingerprint != space.fingerprint
    assert shrunk.cost(shrunk.whole_mask()) == space.cost(mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_rounds_are_one(build: Build, draw: Draw, family: str) -> None:
    model, size = build(family)
    space = find_units(model, size, stream=True)
    first = draw(space, 6)
    shrunk = space.shrink(first)
    second = draw(shrunk, 7)
    twice = extract(extract(model, space, first), shrunk, second)
    kept = first.kept.copy()
    kept[first.kept] = second.kept
    once = extract(model, space, Mask(kept, space.fingerprint))
    assert list(once.state_dict()) == list(twice.state_dict())
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in once.state_dict().items())
    assert torch.equal(run(once, images(size)), run(twice, images(size)))
    assert shrunk.cost(second) == space.cost(Mask(kept, space.fingerprint))


def test_a_mask_of_another_space_is_refused(build: Build) -> None:
    model, size = build("resnet")
    space = find_units(model, size)
    stream = find_units(model, size, stream=True)
    for mask in (stream.whole_mask(), Mask(np.ones(len(space) - 1, dtype=bool), space.fingerprint)):
        with pytest.raises(UnitError, match="belongs to another unit space"):
            extract(model, space, mask)
        with pytest.raises(UnitError, match="belongs to another unit space"):
            space.cost(mask)


def test_an_empty_group_is_refused_by_name(build: Build) -> None:
    model, size = build("vit")
    space = find_units(model, size)
    kept = np.ones(len(space), dtype=bool)
    space.split(kept)[2][:] = False
    with pytest.raises(UnitError, match=r"keeps no unit of blocks\.1\.attn"):
        extract(model, space, Mask(kept, space.fingerprint))


def test_masks_are_equal_by_value() -> None:
    a, b = Mask(np.array([True, False]), "x"), Mask(np.array([True, False]), "x")
    assert a == b and hash(a) == hash(b)
    assert a != Mask(np.array([True, True]), "x") and a != Mask(np.array([True, False]), "y") and a != "x"
