"""Attention in single operations: on a CPU in bfloat16 it trains several times as fast as PyTorch's fused kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kinprune.training.recipe import Recipe, resolve_precision


def attends_slowly(recipe: Recipe, device: torch.device) -> bool:
    """Whether PyTorch's fused attention is the slower one in training on a device in a recipe's precision.

    It goes through every head of every image in blocks with matrix products of their own, and for so small ones in
    bfloat16 setting them up takes the time: forwards and backwards, 37 tokens take seven times as long as in single
    operations, 197 tokens three times (batches of 64, heads of 64, one thread).
    """
    return device.type == "cpu" and resolve_precision(recipe, device) == "bfloat16"


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """The attention of timm's models inside is computed in single operations, the same but for rounding."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True
