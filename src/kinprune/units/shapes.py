"""Running operations by shape alone.

On the meta device PyTorch works out the commonest operations of a transformer in Python, at about half a millisecond
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
