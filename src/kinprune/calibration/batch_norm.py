"""Batch norm after pruning: its statistics belong to the dense model and must be counted again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kinprune.errors import TaskError
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import Preprocessing, normalise


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Every batch norm with running statistics, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


def is_folded(norm: _BatchNorm) -> bool:
    """Whether the statistics were folded into the layer before: mean 0, variance 1 (within 1 %) and a learned bias.

    Such a norm only adds its bias. Counting its statistics would rescale channels whose scale is now in the
    convolution's weights, so it must stay as it is, in calibration and in training.
    """
    mean, variance, bias = norm.running_mean, norm.running_var, norm.bias
    if mean is None or variance is None or bias is None:
        return False
    return bool((mean == 0).all() and ((variance - 1).abs() < 0.01).all() and (bias != 0).any())


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    max_images: int = 640,
    seed: int = 0,
) -> int:
    """Replace the running statistics of every batch norm by their average over ``images`` (uint8 ``[n, 3, h, w]``).

    At most ``max_images`` images, drawn with ``seed``, in nearly equal batches of at most ``batch_size``. All other
    modules run in evaluation mode; modes and momenta are restored. Folded norms (see ``is_folded``) stay as they are,
    and so do the statistics of a norm that sees a single value a channel, which has no variance.
    Returns the number of norms that were counted again: 0 without batch norm. Raises TaskError without images.
    """
    norms = [norm for norm in batch_norms(model) if not is_folded(norm)]
    if not norms:
        return 0
    if len(images) == 0 or batch_size < 1 or max_images < 1:
        raise TaskError(
            f"batch norm cannot be counted on {len(images)} images in batches of {batch_size}, at most {max_images}; "
            "expected at least one image and sizes of at least 1"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:max_images]
    # Equal batches, because a cumulative average gives a small last batch the weight of a full one.
    batches = order.tensor_split(-(-len(order) // batch_size))
    device = device_of(model)
    with eval_mode(model), _counting(norms):
        for indices in batches:
            model(normalise(images[indices].to(device), preprocessing))
    return len(norms)


@contextmanager
def _counting(norms: list[_BatchNorm]) -> Iterator[None]:
    """Norms that average their statistics cumulatively over the forwards inside, each from nothing."""
    momenta = [norm.momentum for norm in norms]
    counts = [None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone() for norm in norms]
    handles = [norm.register_forward_pre_hook(_train_where_variance_exists) for norm in norms]
    for norm in norms:
        norm.momentum = None
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.zero_()
    try:
        yield
    finally:
        for norm, momentum, count, handle in zip(norms, momenta, counts, handles, strict=True):
            handle.remove()
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)


def _train_where_variance_exists(norm: nn.Module, args: tuple[Any, ...]) -> None:
    inputs: Tensor = args[0]
    norm.training = inputs.numel() > inputs.shape[1]


@contextmanager
def frozen_batch_norm(model: nn.Module, which: Callable[[_BatchNorm], bool] = is_folded) -> Iterator[None]:
    """Batch norms for which ``which`` holds stay in evaluation mode inside, whatever the model's mode is set to."""
    chosen = [norm for norm in batch_norms(model) if which(norm)]
    handles = [norm.register_forward_pre_hook(_stay_in_eval) for norm in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stay_in_eval(norm: nn.Module, args: tuple[Any, ...]) -> None:
    norm.training = False
