"""The tensors of an artifact: collecting them from a model, and giving them to an architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kinprune.artifact.contents import require


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name they have: a tied one comes up several times."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def collect(model: nn.Module, architecture: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What has to be stored of ``model``: its tensors, and the aliases of tied ones.

    Tensors are contiguous, on the CPU and each there once; an alias is a further name of a tied tensor, with the name
    it is stored under. Non-persistent buffers that the architecture makes itself are left out. Raises ArtifactError
    for tensors that do not fit the architecture.
    """
    expected, persistent = dict(named_tensors(architecture)), set(architecture.state_dict())
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in named_tensors(model):
        value = tensor.detach()
        if name in expected and name not in persistent and _equal(value.cpu(), expected[name]):
            continue
        identity = (isinstance(tensor, nn.Parameter), value.device, value.data_ptr(), value.shape, value.stride())
        if value.numel() and identity in first:
            aliases[name] = first[identity]
            continue
        first[identity] = name
        stored[name] = value.cpu().clone(memory_format=torch.contiguous_format)
    check_tensors(stored, aliases, architecture)
    return stored, aliases


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and torch.equal(tensor, other)


def check_tensors(stored: Mapping[str, Tensor], aliases: Mapping[str, str], architecture: nn.Module) -> None:
    """Raise ArtifactError unless names, types, dimensions and values can be those of a part of the architecture."""
    expected, persistent = dict(named_tensors(architecture)), set(architecture.state_dict())
    needed = {name for name, tensor in expected.items() if isinstance(tensor, nn.Parameter) or name in persistent}
    missing, unknown = sorted(needed - set(stored) - set(aliases)), sorted({*stored, *aliases} - set(expected))
    require(not missing, f"{len(missing)} tensors of the architecture are missing ({', '.join(missing[:3])})")
    require(not unknown, f"{len(unknown)} tensors have no place in the architecture ({', '.join(unknown[:3])})")
    for alias, name in aliases.items():
        require(alias not in stored and name in stored, f"{alias!r} is said to be {name!r}, which is not stored")
        same = isinstance(expected[alias], nn.Parameter) == isinstance(expected[name], nn.Parameter)
        require(same, f"{alias!r} is said to be {name!r}, but one is a parameter and one a buffer")
    for name, tensor in stored.items():
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        require(finite, f"{name!r} holds NaN or infinity, expected finite numbers")
    for name in (*stored, *aliases):
        tensor, whole = stored[aliases.get(name, name)], expected[name]
        require(tensor.dtype == whole.dtype, f"{name!r} is {tensor.dtype}, expected {whole.dtype}")
        part = tensor.dim() == whole.dim() and all(
            a == b or 0 < a < b for a, b in zip(tensor.shape, whole.shape, strict=True)
        )
        require(part, f"{name!r} is {list(tensor.shape)}, which is no part of {list(whole.shape)}")


def assign(model: nn.Module, stored: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Make the stored tensors those of ``model``, in their own shapes; tied ones are one tensor again.

    The modules' attributes are set before: each layer's tensors are compared with them. Raises ArtifactError.
    """
    check_tensors(stored, aliases, model)
    expected = dict(named_tensors(model))
    made: dict[str, Tensor] = {}
    for name in (*stored, *aliases):
        source, whole = aliases.get(name, name), expected[name]
        if source not in made:
            # Aligned as PyTorch's own tensors are, so that no operation chooses another way through them.
            copy = stored[source].clone()
            made[source] = nn.Parameter(copy, whole.requires_grad) if isinstance(whole, nn.Parameter) else copy
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, made[source])
    for name, module in model.named_modules():
        _check_layer(name, module)


def _check_layer(name: str, module: nn.Module) -> None:
    """A wrong cut is seen before it runs."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    expected = _shapes(module)
    if weight is None or expected is None:
        return
    for tensor, shape in zip((weight, bias), expected, strict=True):
        fits = tensor is None or tuple(tensor.shape) == shape
        require(fits, f"a tensor of {name!r} is {list(tensor.shape if tensor is not None else ())}, expected {shape}")


def _shapes(module: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of weight and bias, by what a layer of PyTorch's own says of itself."""
    if isinstance(module, nn.Linear):
        return (module.out_features, module.in_features), (module.out_features,)
    if isinstance(module, nn.modules.conv._ConvNd):
        inner, outer = module.in_channels, module.out_channels
        sides = (inner, outer // module.groups) if module.transposed else (outer, inner // module.groups)
        return (*sides, *module.kernel_size), (outer,)
    if isinstance(module, nn.LayerNorm):
        return tuple(module.normalized_shape), tuple(module.normalized_shape)
    if isinstance(module, nn.GroupNorm):
        return (module.num_channels,), (module.num_channels,)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return (module.num_features,), (module.num_features,)
    return None
