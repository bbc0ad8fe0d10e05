"""Running operations by shape alone.

On the meta device PyTorch works out the commonest operations in Python, at half a millisecond to two milliseconds
each; where the answer is plain from the inputs' shapes it is given here, at a hundredth of that. Everything else, and
everything that is not plainly well-formed, goes to PyTorch itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

POINTWISE = frozenset(
    {"add", "sub", "mul", "div", "gelu", "silu", "relu", "hardswish", "sigmoid", "hardsigmoid", "hardtanh", "tanh"}
)


def run(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What ``func(*args, **kwargs)`` gives; ``name`` is its ATen name."""
    first = args[1] if name == "addmm" else args[0] if args else None
    if isinstance(first, Tensor) and first.is_meta and first.is_floating_point():
        plain = name.removesuffix("_")
        if plain in POINTWISE and _alike(first, args[1:]):
            return first if name.endswith("_") else torch.empty_like(first)
        if name in ("_softmax", "_safe_softmax") and first.is_contiguous() and len(args) < 4 and not kwargs:
            return torch.empty_like(first)
        if name == "addmm" and not kwargs and _product(*args):
            return first.new_empty((first.shape[0], args[2].shape[1]))
        if name == "native_layer_norm" and first.is_contiguous() and _normalises(first, *args[1:4]):
            statistics = (*first.shape[: -len(args[1])], *(1 for _ in args[1]))
            return torch.empty_like(first), first.new_empty(statistics), first.new_empty(statistics)
        if name == "native_batch_norm" and _scales(first, *args[1:6]):
            return torch.empty_like(first), torch.empty_like(args[3]), torch.empty_like(args[4])
    if name == "cat" and not kwargs and _joins(*args):
        tensors, dim = args[0], args[1] if len(args) > 1 else 0
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        return tensors[0].new_empty(shape)
    return func(*args, **kwargs)


def _alike(first: Tensor, others: Any) -> bool:
    """Whether the other arguments are real scalars, options, or tensors laid out like the first."""
    return all(
        (item.is_meta and item.dtype == first.dtype and item.shape == first.shape and item.stride() == first.stride())
        if isinstance(item, Tensor)
        else not isinstance(item, complex)
        for item in others
    )


def _product(bias: Tensor, left: Tensor, right: Tensor) -> bool:
    return (
        bias.dtype == left.dtype == right.dtype
        and left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and bias.shape == right.shape[1:]
    )


def _normalises(values: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None) -> bool:
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    return list(values.shape[-len(shape) :]) == list(shape) and all(
        list(tensor.shape) == list(shape) and tensor.dtype == values.dtype for tensor in given
    )


def _scales(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool
) -> bool:
    """Whether a batch norm uses its running statistics, all in the values' type."""
    given = [tensor for tensor in (weight, bias) if tensor is not None]
    return not training and all(
        tensor is not None and tensor.is_meta and tensor.shape == values.shape[1:2] and tensor.dtype == values.dtype
        for tensor in (*given, mean, var)
    )


def _joins(tensors: Any, dim: int = 0) -> bool:
    """Whether tensors of one type, contiguous, can lie side by side along a dimension."""
    first, *others = tensors
    place = dim % first.dim() if first.dim() else 0
    return first.dim() > 1 and all(
        tensor.is_meta
        and tensor.is_contiguous()
        and tensor.dtype == first.dtype
        and tensor.shape[:place] == first.shape[:place]
        and tensor.shape[place + 1 :] == first.shape[place + 1 :]
        for tensor in (first, *others)
    )
