"""Training and eval mode, and what modules remember between forward passes in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, so that batch norm statistics stay and dropout is off.

    Afterwards every module is in the mode it was in and remembers nothing of what ran inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.eval()
    try:
        yield
    finally:
        model.train()
        _restore(modes)


def forget(model: nn.Module) -> None:
    """Drop what modules computed from their weights and kept for eval mode (attention biases in LeViT and its kin).

    Such modules drop it themselves when they are set to training mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    _restore(modes)


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
