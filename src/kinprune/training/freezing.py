"""Freezing the earliest layers: what they are, in the order in which images pass them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kinprune.evaluation import eval_mode


@dataclass(frozen=True, eq=False)
class Piece:
    """What is frozen as one: a block, a layer outside of blocks, or parameters of the model's own; by their names."""

    name: str
    parameters: tuple[str, ...]


@torch.no_grad()
def pieces(model: nn.Module, inputs: Tensor, blocks: Sequence[str]) -> list[Piece]:
    """The model's trainable pieces in the order of their first use on ``inputs`` ``[n, 3, h, w]``.

    A module that the forward pass does not call is in none of them, and is never frozen.
    """
    names = {module: name for name, module in model.named_modules()}
    order: list[str] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = names[module]
        order.append(next((block for block in blocks if name == block or name.startswith(f"{block}.")), name))

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(note) for module in owners]
    try:
        with eval_mode(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name in dict.fromkeys(order):
        own = model.get_submodule(name).named_parameters(prefix=name, recurse=name in blocks)
        trained = tuple(key for key, value in own if value.requires_grad)
        if trained:
            found.append(Piece(name or "+".join(trained), trained))
    return found


@contextmanager
def frozen(model: nn.Module, parts: Sequence[Piece]) -> Iterator[None]:
    """These pieces of the model take no gradient inside."""
    chosen = [model.get_parameter(name) for piece in parts for name in piece.parameters]
    for parameter in chosen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in chosen:
            parameter.requires_grad_(True)
