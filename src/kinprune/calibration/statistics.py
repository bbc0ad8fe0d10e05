"""Batch norm after pruning, matched: each channel gets the mean and spread that it has in the dense model.

A pruned network's activations shrink or drift layer by layer until its features say nothing. Counting batch norm
statistics again undoes that, but puts the pre-training's mean and spread in place of the task's, and cannot be done
where the norms were folded into the convolutions. Matching the dense model's own statistics on the same images does
neither (REPAIR: Jordan et al. 2023, there for interpolated networks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kinprune.calibration.batch_norm import batch_norms
from kinprune.calibration.memory import images_in_memory
from kinprune.errors import TaskError
from kinprune.evaluation import device_of, eval_mode
from kinprune.preprocessing import Preprocessing, normalise

Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def match_batch_norm(
    pruned: nn.Module,
    dense: nn.Module,
    channels: Mapping[str, Sequence[int]],
    images: Tensor,
    preprocessing: Preprocessing,
    *,
    max_images: int = 256,
    memory_mb: int = 1024,
    seed: int = 0,
    noted: dict[str, Moments] | None = None,
) -> int:
    """Give every batch norm of ``pruned`` the output mean and deviation that its channels have in ``dense``.

    ``channels`` names the dense channels that a norm of the pruned model still has, where it has lost some. Norms are
    set one after the other in a single pass, so each sees what those before it now give. At most ``max_images`` of
    ``images`` (uint8 ``[n, 3, h, w]``), drawn with ``seed``, fewer where they would need more than about ``memory_mb``
    MiB. Norms without weights, or given a single value a channel, stay. What the dense model gives goes into ``noted``
    and is read from there next time, for the same ``dense`` and images. Returns how many were set. Raises TaskError
    without images.
    """
    if len(images) == 0:
        raise TaskError("batch norm cannot be matched without images, expected at least one")
    known = {id(norm) for norm in batch_norms(pruned) if norm.affine}
    names = [name for name, module in pruned.named_modules() if id(module) in known]
    if not names:
        return 0
    limit = min(max_images, images_in_memory(dense, images[:1], preprocessing, memory_mb))
    chosen = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]]
    targets = {} if noted is None else noted
    if not targets:
        _pass(dense, names, chosen, preprocessing, lambda name, norm, inputs: _note(targets, name, norm, inputs))
    done: set[str] = set()

    def set_norm(name: str, norm: _BatchNorm, inputs: Tensor) -> None:
        if name in targets and name not in done and inputs.numel() > inputs.shape[1]:
            _match(norm, inputs, targets[name], channels.get(name))
            done.add(name)

    _pass(pruned, names, chosen, preprocessing, set_norm)
    return len(done)


def _pass(
    model: nn.Module,
    names: Sequence[str],
    images: Tensor,
    preprocessing: Preprocessing,
    visit: Callable[[str, _BatchNorm, Tensor], None],
) -> None:
    """One forward in evaluation mode; ``visit`` sees every norm with its input before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: visit(name, module, args[0]) if isinstance(module, _BatchNorm) else None

    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        model(normalise(images.to(device_of(model)), preprocessing))


def moments(inputs: Tensor) -> Moments:
    """Mean and variance of each channel of ``[n, c, ...]``, in double precision.

    Batch norm's own training kernel counts them: ``var_mean`` takes many times as long over channels that lie last.
    """
    mean, variance = inputs.new_zeros((2, inputs.shape[1]))
    torch.batch_norm(inputs, None, None, mean, variance, True, 1.0, 1e-5, False)
    count = inputs.numel() // inputs.shape[1]
    return mean.double(), variance.double() * ((count - 1) / count)


def _note(targets: dict[str, Moments], name: str, norm: _BatchNorm, inputs: Tensor) -> None:
    """The mean and signed deviation of a dense norm's output, before any activation that is part of it."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = moments(inputs)
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    targets[name] = ((mean - norm.running_mean.double()) * scale + norm.bias.double(), variance.sqrt() * scale)


def _match(norm: _BatchNorm, inputs: Tensor, target: Moments, channels: Sequence[int] | None) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = moments(inputs)
    wanted_mean, wanted_deviation = target if channels is None else (part[list(channels)] for part in target)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(wanted_deviation)
    norm.bias.copy_(wanted_mean)
