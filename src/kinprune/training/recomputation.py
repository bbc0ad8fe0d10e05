"""Recomputation: blocks of a model whose activations are not kept for the backward pass but made again in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kinprune.calibration import batch_norms


def blocks(model: nn.Module) -> list[str]:
    """Names of the modules to recompute: members of a sequence or list, of several layers each, the innermost such.

    Empty for a model that is not built of blocks.
    """
    return [name for name, _ in _inside("", model, member=False)]


def _inside(name: str, module: nn.Module, *, member: bool) -> list[tuple[str, nn.Module]]:
    listing = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    inner = [
        found
        for child_name, child in module.named_children()
        for found in _inside(f"{name}.{child_name}" if name else child_name, child, member=listing)
    ]
    if not member or listing or _layers(module) < 2:
        return inner
    # A block whose own parts are such blocks, as a stage is, is recomputed part by part.
    covered = sum(parameter.numel() for _, part in inner for parameter in part.parameters())
    return inner if 2 * covered >= sum(parameter.numel() for parameter in module.parameters()) else [(name, module)]


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())


@contextmanager
def recomputed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The modules of these names keep their inputs alone for the backward pass inside, and run again in it.

    Random numbers are drawn again as they were, and batch norms count each image once.
    """
    chosen = [model.get_submodule(name) for name in names]
    for module in chosen:
        # An attribute of the instance hides the method of its class until it is deleted.
        setattr(module, "forward", _recomputing(module, module.forward))  # noqa: B010
    try:
        yield
    finally:
        for module in chosen:
            delattr(module, "forward")


def _recomputing(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _uncounted(module)), **kwargs
        )

    return run


@contextmanager
def _uncounted(module: nn.Module) -> Iterator[None]:
    """Batch norms that normalise by the batch's statistics, as before, and add nothing to the running ones."""
    norms = [norm for norm in batch_norms(module) if norm.training and norm.track_running_stats]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
